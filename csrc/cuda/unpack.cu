// Unpacking on the GPU, and the spans that validation needs: a warp for each row.
#include "cuda/launch.h"
#include "cuda/warp.cuh"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

constexpr int kWindow = 1024;  // columns of a row that a warp assembles in shared memory before it writes them
constexpr int kVector = 8;     // 16-bit elements of a 16-byte store
constexpr int kStepEntries = kWarpSize * kWordEntries;

// The eight entries that a lane takes in a step.
struct Entries {
  uint4 values;
  uint32_t deltas;
};

__device__ Entries load_entries(const uint4* __restrict__ values, const uint32_t* __restrict__ deltas, uint32_t first,
                                uint32_t end) {
  if (first >= end) return {};
  return {__ldg(values + first / kWordEntries), __ldg(deltas + first / kWordEntries)};
}

// Element `i` of eight that make up a vector.
__device__ uint16_t element(const uint4& vector, int i) {
  const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
  return static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
}

// Puts those entries that fall into the window [start, start + kWindow) where they belong. `column` is the last one
// before them.
__device__ void place(const Entries& entries, WordRange range, int column, int start, uint16_t* window) {
#pragma unroll
  for (int i = 0; i < kWordEntries; ++i) {
    if (!range.holds(i)) continue;
    column += static_cast<int>(entries.deltas >> i * kDeltaBits & kMaxDelta) + 1;
    const unsigned offset = column - start;
    if (offset < kWindow) window[offset] = element(entries.values, i);
  }
}

// Writes the part of the window that lies in [begin, end) to the row and clears it. Each lane clears what it has read.
__device__ void flush(uint16_t* window, int start, int begin, int end, uint16_t* __restrict__ row) {
  for (int offset = lane_index() * kVector; offset < kWindow && start + offset < end; offset += kWarpSize * kVector) {
    const int column = start + offset;
    uint4* staged = reinterpret_cast<uint4*>(window + offset);
    const uint4 vector = *staged;
    *staged = make_uint4(0, 0, 0, 0);
    if (column >= begin && column + kVector <= end) {
      *reinterpret_cast<uint4*>(row + column) = vector;
      continue;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i >= begin && column + i < end) row[column + i] = element(vector, i);
    }
  }
}

__global__ void __launch_bounds__(kBlockThreads)          // a warp for each row
    unpack_rows(const uint4* __restrict__ values,         // [padded / 8] vectors
                const uint32_t* __restrict__ deltas,      // [padded / 8] words
                const int32_t* __restrict__ row_offsets,  // [rows + 1]
                int rows,                                 // of the matrix
                int cols,                                 // of the matrix
                uint16_t* __restrict__ weight) {          // out: [rows, cols]
  __shared__ __align__(16) uint16_t windows[kBlockWarps][kWindow];
  const int row = blockIdx.x * kBlockWarps + warp_index();
  if (row >= rows) return;
  uint16_t* window = windows[warp_index()];
  for (int offset = lane_index() * kVector; offset < kWindow; offset += kWarpSize * kVector) {
    *reinterpret_cast<uint4*>(window + offset) = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();

  // Columns are counted from the 16-byte boundary at or before the row, so that stores are vectors for any width.
  uint16_t* target = weight + int64_t{row} * cols;
  const int first_column = static_cast<int>(reinterpret_cast<uintptr_t>(target) / sizeof(uint16_t) % kVector);
  const int end_column = first_column + cols;
  target -= first_column;

  const uint32_t begin = row_offsets[row], end = row_offsets[row + 1];
  int start = 0;                                                                       // first column of the window
  int column = first_column - 1;                                                       // last column before the step
  uint32_t first = begin / kWordEntries * kWordEntries + lane_index() * kWordEntries;  // this lane's first entry
  Entries next = load_entries(values, deltas, first, end);
  for (uint32_t step = begin / kWordEntries * kWordEntries; step < end; step += kStepEntries, first += kStepEntries) {
    const Entries entries = next;
    next = load_entries(values, deltas, first + kStepEntries, end);
    const WordRange range(first, begin, end);
    const int span = range.span(entries.deltas);
    const int reached = warp_sum_up_to(span);
    const int last = column + of_last_lane(reached);
    for (;;) {
      place(entries, range, column + reached - span, start, window);
      if (last < start + kWindow) break;
      __syncwarp();
      flush(window, start, first_column, end_column, target);
      __syncwarp();
      start += kWindow;
    }
    column = last;
  }
  __syncwarp();
  for (; start < end_column; start += kWindow) flush(window, start, first_column, end_column, target);
}

__global__ void __launch_bounds__(kBlockThreads)        // a warp for each row
    span_rows(const uint32_t* __restrict__ deltas,      // [padded / 8] words
              const int32_t* __restrict__ row_offsets,  // [rows + 1]
              int rows,                                 // of the matrix
              int64_t* __restrict__ spans) {            // out: [rows] last entry's column + 1
  const int row = blockIdx.x * kBlockWarps + warp_index();
  if (row >= rows) return;
  const int64_t span = warp_span(deltas, row_offsets[row], row_offsets[row + 1]);
  if (lane_index() == 0) spans[row] = span;
}

}  // namespace
}  // namespace macko

extern "C" macko_status macko_cuda_unpack(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                          int64_t rows, int64_t cols, uint16_t* weight, int32_t device, void* stream) {
  using namespace macko;
  if (!fits_gpu(rows, cols) || !row_offsets || (rows > 0 && !weight)) return MACKO_BAD_ARGUMENT;
  if (!is_aligned(values, sizeof(uint4)) || !is_aligned(deltas, sizeof(uint32_t))) return MACKO_BAD_ARGUMENT;
  if (rows == 0) return MACKO_OK;
  return launch_on(device, [=] {
    unpack_rows<<<blocks_for(rows), kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const uint4*>(values), reinterpret_cast<const uint32_t*>(deltas), row_offsets,
        static_cast<int>(rows), static_cast<int>(cols), weight);
  });
}

extern "C" macko_status macko_cuda_row_spans(const uint8_t* deltas, const int32_t* row_offsets, int64_t rows,
                                             int64_t* spans, int32_t device, void* stream) {
  using namespace macko;
  if (!fits_gpu(rows, 1) || !row_offsets || (rows > 0 && !spans)) return MACKO_BAD_ARGUMENT;
  if (!is_aligned(deltas, sizeof(uint32_t))) return MACKO_BAD_ARGUMENT;
  if (rows == 0) return MACKO_OK;
  return launch_on(device, [=] {
    span_rows<<<blocks_for(rows), kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const uint32_t*>(deltas), row_offsets, static_cast<int>(rows), spans);
  });
}
