// y = x W^T + bias + residual for 1, 2 or 4 tokens from the sliced layout. A block takes a slice: x goes to shared
// memory, each warp multiplies its share of the slice's units, a lane a row, and the warps' sums are added up.
#pragma once

#include <algorithm>

#include "cuda/dependent_launch.cuh"
#include "cuda/input.cuh"
#include "cuda/scalar.cuh"
#include "cuda/sliced.cuh"
#include "cuda/spmv_call.h"
#include "cuda/warp.cuh"

namespace macko {

// Shape of a block, fixed when it is compiled.
template <int DeltaBits_, int Warps_, int Tokens_>
struct SpmvConfig {
  static constexpr int DeltaBits = DeltaBits_;
  static constexpr int Warps = Warps_;    // of a block
  static constexpr int Tokens = Tokens_;  // 1, 2 or 4
  static constexpr int Threads = Warps * kWarpSize;
  static constexpr int UnitsInFlight = DeltaBits == 2 ? 1 : 2;  // a thread's units fetched ahead; more cost registers
  // Blocks that an SM holds at a time. The launch planner counts on it (macko_llm/layouts/sliced_plan.py): with room
  // for fewer, SMs would wait; with room for more, the next kernel's blocks would crowd on some SMs and leave others
  // idle.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
  static constexpr int Blocks = is_lone_block(Warps) ? 1 : 32 / Warps;
#else
  static constexpr int Blocks = is_lone_block(Warps) ? 1 : 48 / Warps;
#endif
  static_assert(Tokens == 1 || Tokens == 2 || Tokens == 4, "x is read in 2, 4 or 8 bytes");
};

// Bytes of shared memory that x takes.
template <typename X>
constexpr int64_t spmv_shared_bytes(int64_t cols, int tokens) {
  return (cols + kPaddingColumns) * tokens * sizeof(X);
}

// x [tokens, cols] -> [cols + kPaddingColumns][Tokens] in shared memory; what is not there becomes zero. One token's x
// is transformed on the way. Asynchronous copies and loops that are not unrolled, because weights wait in registers.
// Returns a bit for each token in which this thread saw a value that is not finite, as far as it saw any.
template <typename X, typename Config>
__device__ __forceinline__ uint32_t fill_x(X* __restrict__ shared, const X* __restrict__ x, const macko_input& input,
                                           int cols, int tokens, float* scratch) {
  constexpr int kVector = 16 / sizeof(X);
  const bool vectors = cols % kVector == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  int begin = 0;  // from here on, element by element
  uint32_t bad = 0;
  if (Config::Tokens == 1 && vectors) {
    begin = cols;
    if constexpr (sizeof(X) == 2) {
      fill_input<X>(shared, shared + cols + kPaddingColumns, x, input, cols, scratch, Config::Threads);
    } else {
      for_own_vectors<kVector>(cols, Config::Threads, [&](int i) { copy_to_shared(shared + i, x + i); });
      wait_for_copies();
    }
  } else if constexpr (Config::Tokens > 1)
    if (vectors) {
      begin = cols;
#pragma unroll 1
      for (int i = threadIdx.x; i < cols / 2; i += Config::Threads) {
        uint32_t pairs[Config::Tokens];
#pragma unroll
        for (int t = 0; t < Config::Tokens; t++) {
          pairs[t] = t < tokens ? reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(t) * cols)[i] : 0;
          bad |= static_cast<uint32_t>(not_finite<X>(pairs[t]) != 0) << t;
        }
        uint32_t* const to = reinterpret_cast<uint32_t*>(shared) + i * Config::Tokens;
#pragma unroll
        for (int t = 0; t + 1 < Config::Tokens; t += 2) {
          to[t / 2] = __byte_perm(pairs[t], pairs[t + 1], 0x5410);
          to[(Config::Tokens + t) / 2] = __byte_perm(pairs[t], pairs[t + 1], 0x7632);
        }
      }
    }
#pragma unroll 1
  for (int i = begin * Config::Tokens + threadIdx.x; i < (cols + kPaddingColumns) * Config::Tokens;
       i += Config::Threads) {
    const int column = i / Config::Tokens, t = i % Config::Tokens;
    const X value = column < cols && t < tokens ? x[static_cast<int64_t>(t) * cols + column] : from_float<X>(0.0f);
    bad |= static_cast<uint32_t>(not_finite<X>(bits_of(value)) != 0) << t;
    shared[i] = value;
  }
  return bad;
}

// Whether there is a value that is not finite in what this thread copied of one token's x.
template <typename X, typename Config>
__device__ __forceinline__ bool copied_not_finite(const X* shared, int cols) {
  uint32_t bad = 0;
  for_own_vectors<16 / sizeof(X)>(cols, Config::Threads, [&](int i) {
    const uint4 v = *reinterpret_cast<const uint4*>(shared + i);
    bad |= not_finite<X>(v.x) | not_finite<X>(v.y) | not_finite<X>(v.z) | not_finite<X>(v.w);
  });
  return bad != 0;
}

// sums[t] += weight * x[t] for the tokens of one column; `address` is the column's in shared memory.
template <typename X, int Tokens>
__device__ __forceinline__ void multiply_column(float (&sums)[Tokens], float weight, uint32_t address) {
  if constexpr (sizeof(X) == 4) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
    sums[0] = fmaf(weight, x, sums[0]);
  } else if constexpr (Tokens == 1) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
    sums[0] = fmaf(weight, bits_to_float<X>(x), sums[0]);
  } else {
    uint32_t pairs[Tokens / 2];
    if constexpr (Tokens == 2) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pairs[0]) : "r"(address));
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(address));
    }
#pragma unroll
    for (int t = 0; t < Tokens; t += 2) {
      const float2 x = pair_to_float<X>(pairs[t / 2]);
      sums[t] = fmaf(weight, x.x, sums[t]);
      sums[t + 1] = fmaf(weight, x.y, sums[t + 1]);
    }
  }
}

// A unit of one row times x. `address` is where x of the unit's first column lies; it moves on to the next unit's.
template <typename T, typename X, typename Config>
__device__ __forceinline__ void multiply_unit(float (&sums)[Config::Tokens],
                                              const uint4 (&values)[Unit<Config::DeltaBits>::kVectors], uint32_t deltas,
                                              uint32_t& address) {
  constexpr int kColumnBytes = sizeof(X) * Config::Tokens;
  const UnitOffsets<Config::DeltaBits> offsets(deltas);
#pragma unroll
  for (int v = 0; v < Unit<Config::DeltaBits>::kVectors; v++) {
    const uint32_t words[4] = {values[v].x, values[v].y, values[v].z, values[v].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 weights = pair_to_float<T>(words[i]);
      const int entry = 8 * v + 2 * i;
      multiply_column<X>(sums, weights.x, address + (offsets.of(entry) + entry) * kColumnBytes);
      multiply_column<X>(sums, weights.y, address + (offsets.of(entry + 1) + entry + 1) * kColumnBytes);
    }
  }
  address += offsets.span() * kColumnBytes;
}

// Lanes that add up one row's sums over the warps of a block: the largest power of 2 that divides the warps.
template <typename Config>
constexpr int kLanesPerRow = Config::Warps & -Config::Warps;

// Position in the slice of the row that this thread finishes, or -1 if it finishes none.
template <typename Config>
__device__ __forceinline__ int finished_row() {
  constexpr int kLanes = kLanesPerRow<Config>, kRows = kWarpSize / kLanes;  // rows that a warp finishes
  static_assert(Config::Warps * kRows >= kWarpSize, "every row must find a warp");
  const int place = warp_index() * kRows + lane_index() / kLanes;
  return lane_index() % kLanes == 0 && place < kWarpSize ? place : -1;
}

// One token's sums over the warps of a block: in the thread that finishes a row, that row's.
template <typename Config>
__device__ __forceinline__ float add_up(float (&partial)[Config::Warps][kWarpSize + 1], float sum) {
  constexpr int kLanes = kLanesPerRow<Config>, kRows = kWarpSize / kLanes;
  partial[warp_index()][lane_index()] = sum;
  __syncthreads();
  const int place = min(warp_index() * kRows + lane_index() / kLanes, kWarpSize - 1);
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Config::Warps; warp += kLanes) total += partial[warp + lane_index() % kLanes][place];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
  return total;
}

template <typename T, typename X, typename Config>
__global__ void __launch_bounds__(Config::Threads, Config::Blocks)
    spmv_slice(const macko_sliced matrix,  // its values are T and its warps Config::Warps
               const macko_input input,    // plain unless X is T and Config::Tokens 1
               const X* x,                 // [tokens, cols], or what the transform reads
               const X* bias,              // [rows], or null
               const X* residual,          // [tokens, rows], or null; null unless X is T
               X* y,                       // out: [tokens, rows]; may be the residual
               int tokens) {               // at most Config::Tokens
  static_assert(sizeof(X) == 2 || Config::Tokens == 1, "floats are multiplied one token at a time");
  using U = Unit<Config::DeltaBits>;
  constexpr int kAhead = Config::UnitsInFlight;
  // At 128 bytes: with x half a line off, copies into it cost 1 us of 16.
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ float partial[Config::Tokens][Config::Warps][kWarpSize + 1];
  __shared__ int rows[kWarpSize];  // of the slice, -1 where there is none
  static_assert(sizeof(partial) + sizeof(rows) + 128 <= kSpmvOtherShared, "shared_bytes_for_x counts on it");
  X* const shared_x = reinterpret_cast<X*>(shared_bytes);
  const int slice = blockIdx.x, height = matrix.height;
  const int lane = min(lane_index(), height - 1);  // lanes without a row repeat the last one's work
  const Share share(matrix.unit_offsets[slice], matrix.unit_offsets[slice + 1], Config::Warps, warp_index());
  int left = share.count;
  const int vectors_apart = U::kVectors * height;  // of a lane's units
  const uint4* values =
      static_cast<const uint4*>(matrix.values) + static_cast<int64_t>(share.begin) * vectors_apart + lane;
  const uint32_t* deltas = matrix.deltas + static_cast<int64_t>(share.begin) * height + lane;

  uint4 next_values[kAhead][U::kVectors];
  uint32_t next_deltas[kAhead];
  const auto fetch = [&](int i) {
#pragma unroll
    for (int v = 0; v < U::kVectors; v++) next_values[i][v] = load_once(values + v * height);
    next_deltas[i] = load_once(deltas);
    values += vectors_apart;
    deltas += height;
  };
#pragma unroll
  for (int i = 0; i < kAhead; i++) {
    if (i < left) fetch(i);
  }
  const int start = matrix.starts[(slice * Config::Warps + warp_index()) * height + lane];
  int row = -1;
  if (warp_index() == 0 && lane_index() < height) row = matrix.row_order[slice * height + lane_index()];

  if constexpr (Config::Tokens == 1 && sizeof(X) == 2) {
    prepare_input<X>(shared_x + matrix.cols + kPaddingColumns, input, matrix.cols, Config::Threads);
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  uint32_t bad = fill_x<X, Config>(shared_x, x, input, matrix.cols, tokens, &partial[0][0][0]);
  if (row >= 0) row -= matrix.first_row;  // not sooner: whoever subtracts waits for the load
  if (warp_index() == 0) rows[lane_index()] = row;
  __syncthreads();
  // What is added to the row that this thread finishes, fetched while there is time, in one register.
  const int place = finished_row<Config>();
  uint32_t added = 0;
  if (place >= 0 && rows[place] >= 0) {
    if (bias) added = bits_of(bias[rows[place]]);
    if constexpr (Config::Tokens == 1 && sizeof(X) == 2) {
      if (residual) added |= static_cast<uint32_t>(bits_of(residual[rows[place]])) << 16;
    }
  }

  // A token that is not finite spoils its product as 0 x infinity would in a dense one, whatever the columns hold: each
  // warp has a part of all rows, and the warp that sees such a value begins with NaN.
  if (Config::Tokens == 1 && matrix.cols % (16 / static_cast<int>(sizeof(X))) == 0) {
    bad |= copied_not_finite<X, Config>(shared_x, matrix.cols);
  }
  float sums[Config::Tokens];
#pragma unroll
  for (int t = 0; t < Config::Tokens; t++) sums[t] = __any_sync(kAllLanes, bad >> t & 1) ? NAN : 0.0f;
  uint32_t address =
      static_cast<uint32_t>(__cvta_generic_to_shared(shared_x)) + start * static_cast<int>(sizeof(X)) * Config::Tokens;
  for (; left > 0; left -= kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (i < left) {
        uint4 unit_values[U::kVectors];
#pragma unroll
        for (int v = 0; v < U::kVectors; v++) unit_values[v] = next_values[i][v];
        const uint32_t unit_deltas = next_deltas[i];
        if (i + kAhead < left) fetch(i);
        multiply_unit<T, X, Config>(sums, unit_values, unit_deltas, address);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Config::Tokens; t++) {
    float total = add_up<Config>(partial[t], sums[t]);
    const int finished = finished_row<Config>();
    if (t >= tokens || finished < 0 || rows[finished] < 0) continue;
    const int64_t at = static_cast<int64_t>(t) * matrix.rows + rows[finished];
    if constexpr (sizeof(X) == 4) {
      total += __uint_as_float(added);
    } else {
      const float2 bias_and_residual = pair_to_float<X>(added);
      total += bias_and_residual.x;
      if (residual) total = rounded<X>(total) + (Config::Tokens == 1 ? bias_and_residual.y : to_float(residual[at]));
    }
    y[at] = from_float<X>(total);
  }
}

// What is asked of CUDA once a kernel and GPU.
struct LaunchFacts {
  bool known;
  int most_shared_bytes;
  int least_shared_bytes;  // so that no more blocks than Config::Blocks fit an SM
};

// A product to launch, typed; see SpmvCall.
template <typename T, typename X>
struct Spmv {
  macko_sliced matrix;
  macko_input input;
  const X* x;
  const X* bias;
  const X* residual;
  X* y;
  int device;
  cudaStream_t stream;

  explicit Spmv(const SpmvCall& call)
      : matrix(*call.matrix),
        input(call.input),
        x(static_cast<const X*>(call.x)),
        bias(static_cast<const X*>(call.bias)),
        residual(static_cast<const X*>(call.residual)),
        y(static_cast<X*>(call.y)),
        device(call.device),
        stream(call.stream) {}
};

template <typename T, typename X, typename Config>
cudaError_t launch_spmv_config(const Spmv<T, X>& p, int tokens) {
  static LaunchFacts facts[kMaxGpus];  // written with the same values by every thread that finds nothing
  constexpr auto kernel = spmv_slice<T, X, Config>;
  LaunchFacts fact = p.device < kMaxGpus ? facts[p.device] : LaunchFacts{};
  if (!fact.known) {
    const int most = static_cast<int>(shared_bytes_for_x(p.device));
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    int of_sm = 0;
    error = cudaDeviceGetAttribute(&of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, p.device);
    if (error != cudaSuccess) return error;
    fact = {true, most, is_lone_block(Config::Warps) ? std::min(most, of_sm / 2) : 0};
    if (p.device < kMaxGpus) facts[p.device] = fact;
  }
  const int64_t bytes =
      spmv_shared_bytes<X>(p.matrix.cols, Config::Tokens) + other_elements(p.input, p.matrix.cols) * sizeof(X);
  if (bytes > fact.most_shared_bytes) return cudaErrorInvalidValue;
  return launch_overlapping<kernel>(p.matrix.slices, Config::Threads, std::max<int64_t>(bytes, fact.least_shared_bytes),
                                    p.device, p.stream, p.matrix, p.input, p.x, p.bias, p.residual, p.y, tokens);
}

template <int DeltaBits, int Tokens, typename T, typename X>
cudaError_t launch_spmv_tokens(const Spmv<T, X>& p, int tokens) {
  const int warps = p.matrix.warps;
  const auto launch = warps == 32   ? launch_spmv_config<T, X, SpmvConfig<DeltaBits, 32, Tokens>>
                      : warps == 20 ? launch_spmv_config<T, X, SpmvConfig<DeltaBits, 20, Tokens>>
                      : warps == 24 ? launch_spmv_config<T, X, SpmvConfig<DeltaBits, 24, Tokens>>
                      : warps == 16 ? launch_spmv_config<T, X, SpmvConfig<DeltaBits, 16, Tokens>>
                      : warps == 12 ? launch_spmv_config<T, X, SpmvConfig<DeltaBits, 12, Tokens>>
                                    : launch_spmv_config<T, X, SpmvConfig<DeltaBits, 8, Tokens>>;
  return launch(p, tokens);
}
template <int Tokens, typename T, typename X>
cudaError_t launch_spmv_some(const Spmv<T, X>& p, int tokens) {
  return p.matrix.delta_bits == 2 ? launch_spmv_tokens<2, Tokens>(p, tokens) : launch_spmv_tokens<4, Tokens>(p, tokens);
}

// All tokens, as many at a time as fit.
template <typename T, typename X>
cudaError_t launch_spmv(Spmv<T, X> p, int64_t tokens) {
  const int64_t fit = shared_bytes_for_x(p.device) / spmv_shared_bytes<X>(p.matrix.cols, 1);  // tokens whose x fits
  while (tokens > 0) {
    int now = 1;
    if constexpr (sizeof(X) == 2) now = tokens >= 3 && fit >= 4 ? 4 : tokens >= 2 && fit >= 2 ? 2 : 1;
    const int used = static_cast<int>(tokens < now ? tokens : now);
    cudaError_t error = cudaSuccess;
    if constexpr (sizeof(X) == 2) {
      error = now == 4   ? launch_spmv_some<4>(p, used)
              : now == 2 ? launch_spmv_some<2>(p, used)
                         : launch_spmv_some<1>(p, used);
    } else {
      error = launch_spmv_some<1>(p, used);
    }
    if (error != cudaSuccess) return error;
    p.x += static_cast<int64_t>(used) * p.matrix.cols;
    p.y += static_cast<int64_t>(used) * p.matrix.rows;
    if (p.residual) p.residual += static_cast<int64_t>(used) * p.matrix.rows;
    tokens -= used;
  }
  return cudaSuccess;
}

}  // namespace macko
