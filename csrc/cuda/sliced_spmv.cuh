// y = x W^T + bias for 1, 2 or 4 tokens from the sliced layout. A block takes a slice: x goes to shared memory, each
// warp multiplies its share of the slice's units, a lane a row, and the warps' sums are added up.
#pragma once

#include <algorithm>

#include "cuda/scalar.cuh"
#include "cuda/sliced.cuh"
#include "cuda/warp.cuh"

namespace macko {

// Blocks of a launch may start while the one before still runs, and fetch weights until it is done (programmatic
// dependent launch). Nothing that another kernel writes may be read before wait_for_previous_kernel().
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Shape of a block, fixed when it is compiled.
template <int DeltaBits_, int Warps_, int Tokens_>
struct SpmvConfig {
  static constexpr int DeltaBits = DeltaBits_;
  static constexpr int Warps = Warps_;    // of a block
  static constexpr int Tokens = Tokens_;  // 1, 2 or 4
  static constexpr int Threads = Warps * kWarpSize;
  static constexpr int UnitsInFlight = DeltaBits == 2 ? 1 : 2;  // a thread's units fetched ahead; more cost registers
  // Blocks that an SM holds at a time. The launch planner counts on it (macko_llm/sliced.py): with room for fewer, SMs
  // would wait; with room for more, the next kernel's blocks would crowd on some SMs and leave others idle.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
  static constexpr int Blocks = is_lone_block(Warps) ? 1 : 32 / Warps;
#else
  static constexpr int Blocks = is_lone_block(Warps) ? 1 : 48 / Warps;
#endif
  static_assert(Tokens == 1 || Tokens == 2 || Tokens == 4, "x is read in 2, 4 or 8 bytes");
};

// Bytes of shared memory that x takes.
constexpr int64_t spmv_shared_bytes(int64_t cols, int tokens) { return (cols + kPaddingColumns) * tokens * 2; }

// x [tokens, cols] -> [cols + kPaddingColumns][Tokens] in shared memory; what is not there becomes zero.
template <typename T, typename Config>
__device__ __forceinline__ void fill_x(T* __restrict__ shared, const T* __restrict__ x, int cols, int tokens) {
  const bool vectors = cols % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  int begin = 0;  // from here on, element by element
  if (Config::Tokens == 1 && vectors) {
    begin = cols;
#if __CUDA_ARCH__ >= 800
    // Asynchronous copies, because they need no registers while weights wait in them.
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#pragma unroll 1
    for (int i = threadIdx.x * 8; i < cols; i += Config::Threads * 8) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * 2), "l"(x + i) : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
#pragma unroll 1
    for (int i = threadIdx.x * 8; i < cols; i += Config::Threads * 8) {
      *reinterpret_cast<uint4*>(shared + i) = *reinterpret_cast<const uint4*>(x + i);
    }
#endif
  } else if (Config::Tokens > 1 && vectors) {
    begin = cols;
#pragma unroll 1
    for (int i = threadIdx.x; i < cols / 2; i += Config::Threads) {
      uint32_t pairs[Config::Tokens];
#pragma unroll
      for (int t = 0; t < Config::Tokens; t++) {
        pairs[t] = t < tokens ? reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(t) * cols)[i] : 0;
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
    shared[i] = column < cols && t < tokens ? x[static_cast<int64_t>(t) * cols + column] : from_float<T>(0.0f);
  }
}

// sums[t] += weight * x[t] for the tokens of one column; `address` is the column's in shared memory.
template <typename T, int Tokens>
__device__ __forceinline__ void multiply_column(float (&sums)[Tokens], float weight, uint32_t address) {
  if constexpr (Tokens == 1) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
    sums[0] = fmaf(weight, bits_to_float<T>(x), sums[0]);
  } else {
    uint32_t pairs[Tokens / 2];
    if constexpr (Tokens == 2) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pairs[0]) : "r"(address));
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(address));
    }
#pragma unroll
    for (int t = 0; t < Tokens; t += 2) {
      const float2 x = pair_to_float<T>(pairs[t / 2]);
      sums[t] = fmaf(weight, x.x, sums[t]);
      sums[t + 1] = fmaf(weight, x.y, sums[t + 1]);
    }
  }
}

// A unit of one row times x. `address` is where x of the unit's first column lies; it moves on to the next unit's.
template <typename T, typename Config>
__device__ __forceinline__ void multiply_unit(float (&sums)[Config::Tokens],
                                              const uint4 (&values)[Unit<Config::DeltaBits>::kVectors], uint32_t deltas,
                                              uint32_t& address) {
  constexpr int kColumnBytes = 2 * Config::Tokens;
  const UnitOffsets<Config::DeltaBits> offsets(deltas);
#pragma unroll
  for (int v = 0; v < Unit<Config::DeltaBits>::kVectors; v++) {
    const uint32_t words[4] = {values[v].x, values[v].y, values[v].z, values[v].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 weights = pair_to_float<T>(words[i]);
      const int entry = 8 * v + 2 * i;
      multiply_column<T>(sums, weights.x, address + (offsets.of(entry) + entry) * kColumnBytes);
      multiply_column<T>(sums, weights.y, address + (offsets.of(entry + 1) + entry + 1) * kColumnBytes);
    }
  }
  address += offsets.span() * kColumnBytes;
}

// The rows of a slice and their biases, which the first warp fetches while there is time.
struct SliceRows {
  int row[kWarpSize];  // -1 where there is none
  float bias[kWarpSize];
};

// One token's sums over the warps of a block, written to y. Every warp adds up some rows, by shuffles.
template <typename T, typename Config>
__device__ __forceinline__ void write_sums(float (&partial)[Config::Warps][kWarpSize + 1], float sum,
                                           const SliceRows& rows, T* y) {
  constexpr int kLanes = Config::Warps & -Config::Warps;  // that add up one row: the largest power of 2 that divides
  constexpr int kRows = kWarpSize / kLanes;               // that a warp adds up
  static_assert(Config::Warps * kRows >= kWarpSize, "every row must find a warp");
  partial[warp_index()][lane_index()] = sum;
  __syncthreads();
  const int place = warp_index() * kRows + lane_index() / kLanes;
  if (warp_index() * kRows >= kWarpSize) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Config::Warps; warp += kLanes) total += partial[warp + lane_index() % kLanes][place];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
  if (lane_index() % kLanes == 0 && rows.row[place] >= 0) y[rows.row[place]] = from_float<T>(total + rows.bias[place]);
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::Threads, Config::Blocks)
    spmv_slice(const macko_sliced matrix,  // its warps are Config::Warps
               const T* x,                 // [tokens, cols]
               const T* bias,              // [rows], or null
               T* y,                       // out: [tokens, rows]
               int tokens) {               // at most Config::Tokens
  using U = Unit<Config::DeltaBits>;
  constexpr int kAhead = Config::UnitsInFlight;
  // At 128 bytes: with x half a line off, copies into it cost 1 us of 16.
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ float partial[Config::Tokens][Config::Warps][kWarpSize + 1];
  __shared__ SliceRows rows;
  static_assert(sizeof(partial) + sizeof(rows) + 128 <= kSpmvOtherShared, "shared_bytes_for_x counts on it");
  T* const shared_x = reinterpret_cast<T*>(shared_bytes);
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

  let_next_kernel_start();
  wait_for_previous_kernel();
  fill_x<T, Config>(shared_x, x, matrix.cols, tokens);
  if (row >= 0) row -= matrix.first_row;  // not sooner: whoever subtracts waits for the load
  if (warp_index() == 0) rows.row[lane_index()] = row;
  __syncthreads();
  const float row_bias = bias && row >= 0 ? to_float(bias[row]) : 0.0f;

  float sums[Config::Tokens] = {};
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_x)) + start * 2 * Config::Tokens;
  for (; left > 0; left -= kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (i < left) {
        uint4 unit_values[U::kVectors];
#pragma unroll
        for (int v = 0; v < U::kVectors; v++) unit_values[v] = next_values[i][v];
        const uint32_t unit_deltas = next_deltas[i];
        if (i + kAhead < left) fetch(i);
        multiply_unit<T, Config>(sums, unit_values, unit_deltas, address);
      }
    }
  }
  if (warp_index() == 0) rows.bias[lane_index()] = row_bias;
#pragma unroll
  for (int t = 0; t < Config::Tokens; t++) {
    if (t < tokens) write_sums<T, Config>(partial[t], sums[t], rows, y + static_cast<int64_t>(t) * matrix.rows);
  }
}

// What is asked of CUDA once a kernel and GPU.
struct LaunchFacts {
  bool known;
  bool overlaps;           // programmatic dependent launch
  int least_shared_bytes;  // so that no more blocks than Config::Blocks fit an SM
};
constexpr int kMaxGpus = 64;

template <typename T, typename Config>
cudaError_t launch_spmv_config(const macko_sliced& matrix, const T* x, const T* bias, T* y, int tokens, int device,
                               cudaStream_t stream) {
  static LaunchFacts facts[kMaxGpus];  // written with the same values by every thread that finds nothing
  const auto kernel = spmv_slice<T, Config>;
  LaunchFacts fact = device < kMaxGpus ? facts[device] : LaunchFacts{};
  if (!fact.known) {
    int major = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    const int most = static_cast<int>(shared_bytes_for_x(device));
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    int of_sm = 0;
    error = cudaDeviceGetAttribute(&of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error != cudaSuccess) return error;
    fact = {true, major >= 9, is_lone_block(Config::Warps) ? std::min(most, of_sm / 2) : 0};
    if (device < kMaxGpus) facts[device] = fact;
  }
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = matrix.slices;
  config.blockDim = Config::Threads;
  config.dynamicSmemBytes = std::max<int64_t>(spmv_shared_bytes(matrix.cols, Config::Tokens), fact.least_shared_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = fact.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, matrix, x, bias, y, tokens);
}

template <typename T, int DeltaBits, int Tokens>
cudaError_t launch_spmv_tokens(const macko_sliced& m, const T* x, const T* bias, T* y, int tokens, int device,
                               cudaStream_t stream) {
  const auto launch = m.warps == 32   ? launch_spmv_config<T, SpmvConfig<DeltaBits, 32, Tokens>>
                      : m.warps == 20 ? launch_spmv_config<T, SpmvConfig<DeltaBits, 20, Tokens>>
                      : m.warps == 24 ? launch_spmv_config<T, SpmvConfig<DeltaBits, 24, Tokens>>
                      : m.warps == 16 ? launch_spmv_config<T, SpmvConfig<DeltaBits, 16, Tokens>>
                      : m.warps == 12 ? launch_spmv_config<T, SpmvConfig<DeltaBits, 12, Tokens>>
                                      : launch_spmv_config<T, SpmvConfig<DeltaBits, 8, Tokens>>;
  return launch(m, x, bias, y, tokens, device, stream);
}

// All tokens, as many at a time as fit.
template <typename T>
cudaError_t launch_spmv(const macko_sliced& m, const T* x, const T* bias, T* y, int64_t tokens, int device,
                        cudaStream_t stream) {
  const int64_t fit = shared_bytes_for_x(device) / spmv_shared_bytes(m.cols, 1);  // tokens whose x fits
  while (tokens > 0) {
    const int now = tokens >= 3 && fit >= 4 ? 4 : tokens >= 2 && fit >= 2 ? 2 : 1;
    const int used = static_cast<int>(tokens < now ? tokens : now);
    const bool narrow = m.delta_bits == 2;
    const auto launch = now == 4   ? (narrow ? launch_spmv_tokens<T, 2, 4> : launch_spmv_tokens<T, 4, 4>)
                        : now == 2 ? (narrow ? launch_spmv_tokens<T, 2, 2> : launch_spmv_tokens<T, 4, 2>)
                                   : (narrow ? launch_spmv_tokens<T, 2, 1> : launch_spmv_tokens<T, 4, 1>);
    const cudaError_t error = launch(m, x, bias, y, used, device, stream);
    if (error != cudaSuccess) return error;
    x += static_cast<int64_t>(used) * m.cols;
    y += static_cast<int64_t>(used) * m.rows;
    tokens -= used;
  }
  return cudaSuccess;
}

}  // namespace macko
