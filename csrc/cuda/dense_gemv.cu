// y = W x + bias + residual for one token and dense matrices, at the speed of memory and in step with the sparse
// products: the input's transform inside, weights fetched before the kernel ahead is done.
//
// All threads of a block share a row: each keeps its columns of x in registers and walks down the block's rows. The
// warps' sums wait in shared memory until the end.
#include <algorithm>

#include "cuda/dependent_launch.cuh"
#include "cuda/input.cuh"
#include "cuda/sliced.cuh"

namespace macko {
namespace {

constexpr int kVectorsInFlight = 8;   // of 16 bytes, a thread's
constexpr int kThreadsOfSm = 1024;    // at most: as many bytes in flight as memory needs
constexpr int kMaxRowsOfBlock = 512;  // so that the sums fit shared memory

constexpr int kMaxThreads = 512;

// A row, counted through all parts: its weights, and its bias or null.
struct Row {
  const void* weights;
  const void* bias;

  // Constant indices only: the parameter would else be copied to local memory.
  __device__ __forceinline__ Row(const macko_dense& m, int index) {
    weights = m.weights[0];
    bias = m.biases[0];
    int row = index, before = m.rows[0];
#pragma unroll
    for (int part = 1; part < MACKO_DENSE_PARTS; part++) {
      if (index >= before) {
        weights = m.weights[part];
        bias = m.biases[part];
        row = index - before;
      }
      before += m.rows[part];
    }
    weights = static_cast<const uint16_t*>(weights) + static_cast<int64_t>(row) * m.cols;
    if (bias) bias = static_cast<const uint16_t*>(bias) + row;
  }
};

template <typename T>
__device__ __forceinline__ float dot(float sum, uint4 a, uint4 b) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 p = pair_to_float<T>(as[i]), q = pair_to_float<T>(bs[i]);
    sum = fmaf(p.x, q.x, sum);
    sum = fmaf(p.y, q.y, sum);
  }
  return sum;
}

// Vectors: of a row, a thread's.
template <typename T, int Vectors>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gemv_rows(const macko_dense matrix, const macko_input input, const T* x, const T* residual, T* y, int rows) {
  constexpr int kRows = kVectorsInFlight / Vectors;  // at a time
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ float scratch[kWarpSize];
  const int cols = matrix.cols, vectors = cols / 8, threads = blockDim.x, warps = threads / kWarpSize;
  T* const shared_x = reinterpret_cast<T*>(shared_bytes);
  T* const other = shared_x + cols;
  float* const sums = reinterpret_cast<float*>(other + other_elements(input, cols));  // [rows of the block][warps]
  const int begin = static_cast<int64_t>(rows) * blockIdx.x / gridDim.x;
  const int end = static_cast<int64_t>(rows) * (blockIdx.x + 1) / gridDim.x;

  uint4 weights[kRows][Vectors];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (first + r >= end) break;
      const uint4* const row = static_cast<const uint4*>(Row(matrix, first + r).weights);
#pragma unroll
      for (int v = 0; v < Vectors; v++) {
        const int i = threadIdx.x + v * threads;
        if (i < vectors) weights[r][v] = load_once(row + i);
      }
    }
  };
  fetch(begin);
  prepare_input(other, input, cols, threads);
  let_next_kernel_start();
  wait_for_previous_kernel();
  fill_input(shared_x, other, x, input, cols, scratch, threads);
  __syncthreads();
  for (int first = begin; first < end; first += kRows) {
    float products[kRows] = {};
#pragma unroll
    for (int v = 0; v < Vectors; v++) {
      const int i = threadIdx.x + v * threads;
      if (i >= vectors) break;
      const uint4 x_vector = reinterpret_cast<const uint4*>(shared_x)[i];
#pragma unroll
      for (int r = 0; r < kRows; r++) products[r] = dot<T>(products[r], weights[r][v], x_vector);
    }
    fetch(first + kRows);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float sum = warp_sum(products[r]);
      if (lane_index() == 0 && first + r < end) sums[(first + r - begin) * warps + warp_index()] = sum;
    }
  }
  __syncthreads();
  for (int i = begin + threadIdx.x; i < end; i += threads) {
    float total = 0.0f;
    for (int warp = 0; warp < warps; warp++) total += sums[(i - begin) * warps + warp];
    const T* const bias = static_cast<const T*>(Row(matrix, i).bias);
    if (bias) total += to_float(*bias);
    if (residual) total = rounded<T>(total) + to_float(residual[i]);
    y[i] = from_float<T>(total);
  }
}

template <typename T, int Vectors>
cudaError_t launch_vectors(const macko_dense& m, const macko_input& input, const void* x, const void* residual, void* y,
                           int rows, int device, cudaStream_t stream) {
  static int multiprocessors[kMaxGpus];  // 0 is not known yet
  constexpr auto kernel = gemv_rows<T, Vectors>;
  const int most = static_cast<int>(shared_bytes_for_x(device));
  int count = device < kMaxGpus ? multiprocessors[device] : 0;
  if (count == 0) {
    cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    if (device < kMaxGpus) multiprocessors[device] = count;
  }
  const int vectors = m.cols / 8;
  const int threads = ((vectors + Vectors - 1) / Vectors + kWarpSize - 1) / kWarpSize * kWarpSize;
  int resident = 0;  // blocks of an SM; more would wait for them
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, m.cols * 4);
  if (error != cudaSuccess) return error;
  resident = std::max(1, std::min(resident, kThreadsOfSm / threads));
  int blocks = std::min(rows, count * resident);
  blocks = std::max(blocks, (rows + kMaxRowsOfBlock - 1) / kMaxRowsOfBlock);
  const int rows_of_block = (rows + blocks - 1) / blocks;
  const int64_t bytes = (m.cols + other_elements(input, m.cols)) * sizeof(T) +
                        static_cast<int64_t>(rows_of_block) * (threads / kWarpSize) * sizeof(float);
  if (bytes > most) return cudaErrorInvalidValue;
  return launch_overlapping<kernel>(blocks, threads, bytes, device, stream, m, input, static_cast<const T*>(x),
                                    static_cast<const T*>(residual), static_cast<T*>(y), rows);
}

template <typename T>
cudaError_t launch(const macko_dense& m, const macko_input& input, const void* x, const void* residual, void* y,
                   int rows, int device, cudaStream_t stream) {
  const int vectors = m.cols / 8;
  const auto launch_one = vectors <= kMaxThreads / 4   ? launch_vectors<T, 1>
                          : vectors <= kMaxThreads * 2 ? launch_vectors<T, 2>
                          : vectors <= kMaxThreads * 4 ? launch_vectors<T, 4>
                                                       : launch_vectors<T, 8>;
  return launch_one(m, input, x, residual, y, rows, device, stream);
}

}  // namespace
}  // namespace macko

using namespace macko;

macko_status macko_cuda_dense_gemv(const macko_dense* matrix, const macko_input* input, const void* x,
                                   const void* residual, void* y, int32_t device, void* stream) {
  if (!matrix || !input || !x || !y || matrix->cols < 8 || matrix->cols > MACKO_DENSE_MAX_COLS ||
      matrix->cols % 8 != 0 || !is_aligned(x, 16) || !is_valid(*input, x, matrix->cols) ||
      (matrix->value_dtype != MACKO_FLOAT16 && matrix->value_dtype != MACKO_BFLOAT16)) {
    return MACKO_BAD_ARGUMENT;
  }
  int64_t rows = 0;
  for (int part = 0; part < MACKO_DENSE_PARTS; part++) {
    const int32_t part_rows = matrix->rows[part];
    if (part_rows < 0 || (part_rows > 0 && (!matrix->weights[part] || !is_aligned(matrix->weights[part], 16)))) {
      return MACKO_BAD_ARGUMENT;
    }
    rows += part_rows;
  }
  if (rows == 0) return MACKO_OK;
  if (!fits_gpu(rows, matrix->cols)) return MACKO_BAD_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const auto launch_dtype = matrix->value_dtype == MACKO_FLOAT16 ? launch<__half> : launch<__nv_bfloat16>;
  return status_of(
      launch_dtype(*matrix, *input, x, residual, y, static_cast<int>(rows), device, static_cast<cudaStream_t>(stream)));
}
