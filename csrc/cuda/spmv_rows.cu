// y = x W^T + bias for a few tokens, straight from the canonical arrays: a warp for each row, any shape.
//
// A warp takes 64 neighbouring entries at a time, two for each lane, so that it gathers from few cache lines of x.
#include "cuda/launch.h"
#include "cuda/scalar.cuh"
#include "cuda/warp.cuh"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

constexpr int kStepPairs = 4;                         // pairs of entries that a lane takes in a step
constexpr uint32_t kPairStride = kWarpSize * 2;       // entries from one of a lane's pairs to the next
constexpr uint32_t kStep = kStepPairs * kPairStride;  // entries that a warp takes in a step
constexpr uint32_t kSector = 16;                      // entries whose values fill 32 bytes, the unit that memory moves
constexpr uint32_t kLongRow = 16384;                  // rows with more entries are split over the warps of their block
constexpr uint32_t kHalfBits = 16, kHalfMask = 0xffffu;
static_assert(kStepPairs % 2 == 0, "columns are summed for two pairs at once");
static_assert(kPairStride * kBridge <= kHalfMask, "the columns under 32 pairs are summed in 16 bits");

// A packed matrix as the kernel reads it.
struct Packed {
  const uint32_t* values;      // [padded / 2] pairs of 16-bit values
  const uint8_t* deltas;       // [padded / 2] pairs of deltas
  const int32_t* row_offsets;  // [rows + 1]
  int rows, cols;              // of the dense matrix
};

// A part of a row: entries [begin, end).
struct Range {
  uint32_t begin, end;

  __device__ uint32_t length() const { return end - begin; }
  __device__ bool holds(uint32_t entry) const { return entry - begin < length(); }  // wraps before the beginning
};

__device__ Range row_range(const Packed& matrix, int row) {
  return {static_cast<uint32_t>(matrix.row_offsets[row]), static_cast<uint32_t>(matrix.row_offsets[row + 1])};
}

// The pairs of entries that a lane takes in a step, not yet decoded.
struct Pairs {
  uint32_t values[kStepPairs];
  uint32_t deltas[kStepPairs];
};

// Loads the pairs of a lane whose first entry is `first`; none that begin at or after `end`.
__device__ Pairs load_pairs(const Packed& matrix, uint32_t first, uint32_t end) {
  const uint32_t* values = matrix.values + first / 2;
  const uint8_t* deltas = matrix.deltas + first / 2;
  Pairs pairs;
  if (first - lane_index() * 2 + kStep <= end) {  // the same in all lanes, and without a test for each pair
#pragma unroll
    for (uint32_t i = 0; i < kStepPairs; ++i) {
      pairs.values[i] = __ldg(values + i * (kPairStride / 2));
      pairs.deltas[i] = __ldg(deltas + i * (kPairStride / 2));
    }
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kStepPairs; ++i) {
      const bool exists = first + i * kPairStride < end;
      pairs.values[i] = exists ? __ldg(values + i * (kPairStride / 2)) : 0;
      pairs.deltas[i] = exists ? __ldg(deltas + i * (kPairStride / 2)) : 0;
    }
  }
  return pairs;
}

// Adds the products of a step with `Tokens` rows of x and returns the step's last column. `column` is the last one
// before it. In a whole step every entry belongs to the range.
template <bool Whole, typename Value, int Tokens, typename Activation>
__device__ int add_step(const Pairs& pairs, uint32_t first, const Range& range, int column,
                        const Activation* __restrict__ x, int cols, float (&sums)[Tokens]) {
#pragma unroll
  for (int half = 0; half < kStepPairs; half += 2) {
    bool has_even[2], has_odd[2];  // whether the entries of a pair belong to the range
    int even_span[2], odd_span[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t even = first + (half + i) * kPairStride;
      has_even[i] = Whole || range.holds(even);
      has_odd[i] = Whole || range.holds(even + 1);
      even_span[i] = has_even[i] ? static_cast<int>(pairs.deltas[half + i] & kMaxDelta) + 1 : 0;
      odd_span[i] = has_odd[i] ? static_cast<int>(pairs.deltas[half + i] >> kDeltaBits) + 1 : 0;
    }
    // One scan sums both pairs, each in half a register.
    const uint32_t spans = (even_span[0] + odd_span[0]) | (even_span[1] + odd_span[1]) << kHalfBits;
    const uint32_t reached = warp_sum_up_to(spans);
    const uint32_t total = of_last_lane(reached), before = reached - spans;
    const int start[2] = {static_cast<int>(column + (before & kHalfMask)),
                          static_cast<int>(column + (total & kHalfMask) + (before >> kHalfBits))};
    column += (total & kHalfMask) + (total >> kHalfBits);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 values = pair_to_float<Value>(pairs.values[half + i]);
      const int even = start[i] + even_span[i], odd = even + odd_span[i];
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        const Activation* x_token = x + int64_t{token} * cols;
        if (has_even[i]) sums[token] = fmaf(values.x, to_float(__ldg(x_token + even)), sums[token]);
        if (has_odd[i]) sums[token] = fmaf(values.y, to_float(__ldg(x_token + odd)), sums[token]);
      }
    }
  }
  return column;
}

// Adds this lane's share of the products of a range with `Tokens` rows of x. `column` is the last one before the range.
template <typename Value, int Tokens, typename Activation>
__device__ void add_products(const Packed& matrix, const Range& range, int column, const Activation* __restrict__ x,
                             float (&sums)[Tokens]) {
  uint32_t step = range.begin / kSector * kSector;
  Pairs next = load_pairs(matrix, step + lane_index() * 2, range.end);
  for (; step < range.end; step += kStep) {
    const Pairs pairs = next;
    const uint32_t first = step + lane_index() * 2;  // this lane's first entry
    next = load_pairs(matrix, first + kStep, range.end);
    const bool whole = step >= range.begin && step + kStep <= range.end;
    column = whole ? add_step<true, Value>(pairs, first, range, column, x, matrix.cols, sums)
                   : add_step<false, Value>(pairs, first, range, column, x, matrix.cols, sums);
  }
}

template <typename Activation>
__device__ void store(float sum, const Activation* __restrict__ bias, int row, Activation* __restrict__ y) {
  *y = from_float<Activation>(bias ? sum + to_float(bias[row]) : sum);
}

// One row by all warps of a block. Each warp takes an equal share of the entries and must first learn, from the deltas
// of the shares before its own, at which column it begins.
template <typename Value, int Tokens, typename Activation>
__device__ void multiply_long_row(const Packed& matrix, int row, const Activation* __restrict__ x,
                                  const Activation* __restrict__ bias, Activation* __restrict__ y) {
  __shared__ int spans[kBlockWarps];
  __shared__ float parts[kBlockWarps][Tokens];
  const Range range = row_range(matrix, row);
  const uint32_t share = (range.length() + kBlockWarps - 1) / kBlockWarps;
  const uint32_t begin = min(range.begin + warp_index() * share, range.end);
  const Range part{begin, min(begin + share, range.end)};
  const int64_t span = warp_span(reinterpret_cast<const uint32_t*>(matrix.deltas), part.begin, part.end);
  if (lane_index() == 0) spans[warp_index()] = static_cast<int>(span);
  __syncthreads();
  int column = -1;
  for (int warp = 0; warp < warp_index(); ++warp) column += spans[warp];
  float sums[Tokens] = {};
  add_products<Value>(matrix, part, column, x, sums);
#pragma unroll
  for (int token = 0; token < Tokens; ++token) {
    const float sum = warp_sum(sums[token]);
    if (lane_index() == 0) parts[warp_index()][token] = sum;
  }
  __syncthreads();
  if (threadIdx.x < Tokens) {
    float sum = 0.f;
    for (int warp = 0; warp < kBlockWarps; ++warp) sum += parts[warp][threadIdx.x];
    store(sum, bias, row, y + int64_t{threadIdx.x} * matrix.rows + row);
  }
  __syncthreads();  // the next long row uses the same shared memory
}

template <typename Value, int Tokens, typename Activation>
__global__ void __launch_bounds__(kBlockThreads)        // a warp for each row
    multiply_rows(Packed matrix,                        // W
                  const Activation* __restrict__ x,     // [Tokens, cols]
                  const Activation* __restrict__ bias,  // [rows] or null
                  Activation* __restrict__ y) {         // out: [Tokens, rows]
  const int first_row = blockIdx.x * kBlockWarps;
  const int row = first_row + warp_index();
  bool is_long = false;
  if (row < matrix.rows) {
    const Range range = row_range(matrix, row);
    is_long = range.length() > kLongRow;
    if (!is_long) {
      float sums[Tokens] = {};
      add_products<Value>(matrix, range, -1, x, sums);
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        const float sum = warp_sum(sums[token]);
        if (lane_index() == 0) store(sum, bias, row, y + int64_t{token} * matrix.rows + row);
      }
    }
  }
  if (!__syncthreads_or(is_long)) return;
  for (int other = first_row; other < min(first_row + kBlockWarps, matrix.rows); ++other) {
    if (row_range(matrix, other).length() > kLongRow) multiply_long_row<Value, Tokens>(matrix, other, x, bias, y);
  }
}

template <typename Value, typename Activation>
macko_status multiply(const Packed& matrix, const void* x_any, const void* bias_any, void* y_any, int64_t tokens,
                      int32_t device, void* stream) {
  const Activation* x = static_cast<const Activation*>(x_any);
  const Activation* bias = static_cast<const Activation*>(bias_any);
  Activation* y = static_cast<Activation*>(y_any);
  return launch_on(device, [=] {
    const unsigned blocks = blocks_for(matrix.rows);
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    for (int64_t token = 0; token < tokens;) {
      const Activation* from = x + token * matrix.cols;
      Activation* to = y + token * matrix.rows;
      const int taken = tokens - token >= 4 ? 4 : tokens - token >= 2 ? 2 : 1;
      switch (taken) {
        case 4: multiply_rows<Value, 4><<<blocks, kBlockThreads, 0, on>>>(matrix, from, bias, to); break;
        case 2: multiply_rows<Value, 2><<<blocks, kBlockThreads, 0, on>>>(matrix, from, bias, to); break;
        default: multiply_rows<Value, 1><<<blocks, kBlockThreads, 0, on>>>(matrix, from, bias, to); break;
      }
      token += taken;
    }
  });
}

template <typename Value>
macko_status dispatch_activation(int32_t value_dtype, int32_t x_dtype, const Packed& matrix, const void* x,
                                 const void* bias, void* y, int64_t tokens, int32_t device, void* stream) {
  if (x_dtype == value_dtype) return multiply<Value, Value>(matrix, x, bias, y, tokens, device, stream);
  if (x_dtype == MACKO_FLOAT32) return multiply<Value, float>(matrix, x, bias, y, tokens, device, stream);
  return MACKO_BAD_ARGUMENT;
}

}  // namespace
}  // namespace macko

extern "C" macko_status macko_cuda_spmv_rows(const uint16_t* values, int32_t value_dtype, const uint8_t* deltas,
                                             const int32_t* row_offsets, int64_t rows, int64_t cols, const void* x,
                                             const void* bias, void* y, int32_t x_dtype, int64_t tokens, int32_t device,
                                             void* stream) {
  using namespace macko;
  if (!fits_gpu(rows, cols) || tokens < 0 || !row_offsets) return MACKO_BAD_ARGUMENT;
  if (!is_aligned(values, sizeof(uint32_t)) || !is_aligned(deltas, sizeof(uint32_t))) return MACKO_BAD_ARGUMENT;
  if (rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y) return MACKO_BAD_ARGUMENT;
  const Packed matrix{reinterpret_cast<const uint32_t*>(values), deltas, row_offsets, static_cast<int>(rows),
                      static_cast<int>(cols)};
  switch (value_dtype) {
    case MACKO_FLOAT16:
      return dispatch_activation<__half>(value_dtype, x_dtype, matrix, x, bias, y, tokens, device, stream);
    case MACKO_BFLOAT16:
      return dispatch_activation<__nv_bfloat16>(value_dtype, x_dtype, matrix, x, bias, y, tokens, device, stream);
    default: return MACKO_BAD_ARGUMENT;
  }
}
