// What a decoded token needs besides products and attention: its embedding, the transforms of several tokens, and the
// most probable next one.
#include <algorithm>
#include <type_traits>

#include "cuda/dependent_launch.cuh"
#include "cuda/input.cuh"
#include "cuda/sliced.cuh"

namespace macko {
namespace {

constexpr int kThreads = 256;
constexpr int kTransformThreads = 512;
constexpr int kArgmaxBlocks = 64;  // of a text

// Neither starts early nor lets others start early: an ordinary kernel, between two tokens. Later kernels may read the
// slot before they wait, hence the fence.
__global__ void begin_token(const int64_t* tokens, const uint16_t* embeddings, uint16_t* x, int32_t* slot,
                            int64_t hidden, int64_t vocabulary) {
  const int64_t text = blockIdx.x, token = tokens[text];
  const uint16_t* const row = embeddings + (token >= 0 && token < vocabulary ? token : 0) * hidden;
  for (int64_t i = threadIdx.x; i < hidden; i += kThreads) x[text * hidden + i] = row[i];
  if (text == 0 && threadIdx.x == 0) *slot += 1;
  __threadfence();
}

template <typename T>
__global__ void __launch_bounds__(kTransformThreads)
    transform_row(const macko_input input, const T* x, T* y, int cols) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ float scratch[kWarpSize];
  T* const shared = reinterpret_cast<T*>(shared_bytes);
  prepare_input(shared + cols, input, cols, kTransformThreads);
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * cols;
  fill_input(shared, shared + cols, x + row, input, cols, scratch, kTransformThreads);
  T* const to = y + row;
  for_own_vectors(cols, kTransformThreads,
                  [&](int i) { *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(shared + i); });
}

// silu(gate) * up of a token's [2, cols]. Each thread takes a vector, since a block a token would take 5 us more.
template <typename T>
__global__ void __launch_bounds__(kThreads) gate_rows(const T* x, T* y, int cols) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * 8;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (column >= cols) return;
  const T* const row = x + static_cast<int64_t>(blockIdx.y) * 2 * cols + column;
  const uint4 gate = *reinterpret_cast<const uint4*>(row), up = *reinterpret_cast<const uint4*>(row + cols);
  *reinterpret_cast<uint4*>(y + static_cast<int64_t>(blockIdx.y) * cols + column) =
      make_uint4(gated_pair<T>(gate.x, up.x), gated_pair<T>(gate.y, up.y), gated_pair<T>(gate.z, up.z),
                 gated_pair<T>(gate.w, up.w));
}

template <typename T>
cudaError_t launch_gate(const void* x, void* y, int64_t tokens, int cols, int device, cudaStream_t stream) {
  constexpr int kColumns = kThreads * 8, kMostTokens = 65535;
  for (int64_t first = 0; first < tokens; first += kMostTokens) {
    const dim3 grid((cols + kColumns - 1) / kColumns,
                    static_cast<unsigned>(std::min<int64_t>(tokens - first, kMostTokens)));
    const cudaError_t error =
        launch_overlapping<gate_rows<T>>(grid, kThreads, 0, device, stream, static_cast<const T*>(x) + first * 2 * cols,
                                         static_cast<T*>(y) + first * cols, cols);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_transform(const macko_input& input, const void* x, void* y, int64_t tokens, int cols, int device,
                             cudaStream_t stream) {
  if (input.transform == MACKO_SILU_GATE) return launch_gate<T>(x, y, tokens, cols, device, stream);
  constexpr auto kernel = transform_row<T>;
  const int64_t bytes = (cols + other_elements(input, cols)) * static_cast<int64_t>(sizeof(T));
  if (bytes > shared_bytes_for_x(device)) return cudaErrorInvalidValue;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  return launch_overlapping<kernel>(static_cast<unsigned>(tokens), kTransformThreads, bytes, device, stream, input,
                                    static_cast<const T*>(x), static_cast<T*>(y), cols);
}

// A logit and its token as a number that is larger for larger logits, NaN above all, and for smaller tokens of equal
// ones.
__device__ __forceinline__ unsigned long long rank_of(float logit, int token) {
  uint32_t bits = isnan(logit) ? 0x7fffffffu : __float_as_uint(logit + 0.0f);  // + 0: no negative zero
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}

// scratch[text] is the best rank so far, scratch[texts + text] the number of blocks that are done; both end as zero.
template <typename T>
__global__ void argmax(const T* logits, int64_t* tokens, unsigned long long* scratch, int texts, int vocabulary) {
  __shared__ unsigned long long bests[kThreads / kWarpSize];
  const int text = blockIdx.y;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const T* const row = logits + static_cast<int64_t>(text) * vocabulary;
  unsigned long long best = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < vocabulary; i += gridDim.x * kThreads) {
    best = max(best, rank_of(to_float(row[i]), i));
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    best = max(best, __shfl_xor_sync(kAllLanes, best, distance));
  }
  if (lane_index() == 0) bests[warp_index()] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarpSize; warp++) best = max(best, bests[warp]);
  atomicMax(scratch + text, best);
  __threadfence();
  if (atomicAdd(scratch + texts + text, 1ull) != gridDim.x - 1) return;
  __threadfence();
  best = atomicExch(scratch + text, 0ull);
  scratch[texts + text] = 0;
  uint32_t bits = static_cast<uint32_t>(best >> 32);
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  tokens[text] = isfinite(__uint_as_float(bits)) ? static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(best)) : -1;
}

bool is_16_bit(int32_t dtype) { return dtype == MACKO_FLOAT16 || dtype == MACKO_BFLOAT16; }

}  // namespace
}  // namespace macko

using namespace macko;

macko_status macko_cuda_begin_token(const int64_t* tokens, const void* embeddings, void* x, int32_t* slot,
                                    int64_t texts, int64_t hidden, int64_t vocabulary, int32_t device, void* stream) {
  if (texts < 1 || texts > UINT16_MAX || hidden < 1 || vocabulary < 1 || !tokens || !embeddings || !x || !slot) {
    return MACKO_BAD_ARGUMENT;
  }
  return launch_on(device, [&] {
    begin_token<<<static_cast<unsigned>(texts), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        tokens, static_cast<const uint16_t*>(embeddings), static_cast<uint16_t*>(x), slot, hidden, vocabulary);
  });
}

macko_status macko_cuda_transform(const macko_input* input, const void* x, void* y, int64_t tokens, int64_t cols,
                                  int32_t dtype, int32_t device, void* stream) {
  if (!input || !x || !y || tokens < 0 || tokens > INT32_MAX || cols < 8 || cols % 8 != 0 ||
      cols > MACKO_DENSE_MAX_COLS || !is_16_bit(dtype) || !is_aligned(x, 16) || !is_aligned(y, 16) ||
      !is_valid(*input, x, cols)) {
    return MACKO_BAD_ARGUMENT;
  }
  if (tokens == 0) return MACKO_OK;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const auto launch = dtype == MACKO_FLOAT16 ? launch_transform<__half> : launch_transform<__nv_bfloat16>;
  return status_of(launch(*input, x, y, tokens, static_cast<int>(cols), device, static_cast<cudaStream_t>(stream)));
}

macko_status macko_cuda_argmax(const void* logits, int64_t* tokens, uint64_t* scratch, int64_t texts,
                               int64_t vocabulary, int32_t dtype, int32_t device, void* stream) {
  if (!logits || !tokens || !scratch || texts < 1 || texts > UINT16_MAX || vocabulary < 1 || vocabulary > INT32_MAX ||
      !is_16_bit(dtype)) {
    return MACKO_BAD_ARGUMENT;
  }
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const int blocks = static_cast<int>(std::min<int64_t>(kArgmaxBlocks, (vocabulary + kThreads - 1) / kThreads));
  const dim3 grid(blocks, static_cast<unsigned>(texts));
  const auto launch = [&](auto typed) {
    return launch_overlapping<argmax<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>>>(
        grid, kThreads, 0, device, static_cast<cudaStream_t>(stream), typed, tokens,
        reinterpret_cast<unsigned long long*>(scratch), static_cast<int>(texts), static_cast<int>(vocabulary));
  };
  return status_of(dtype == MACKO_FLOAT16 ? launch(static_cast<const __half*>(logits))
                                          : launch(static_cast<const __nv_bfloat16*>(logits)));
}
