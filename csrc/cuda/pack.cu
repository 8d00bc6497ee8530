// Packing on the GPU, in two passes over the matrix with a warp for each row: count the entries, then write them.
#include <cstdio>

#include "cuda/gap_walk.cuh"
#include "cuda/launch.h"
#include "cuda/warp.cuh"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

constexpr int kBlocksInFlight = 4;  // blocks of 32 columns that a warp loads at once

// What a lane finds in its column.
struct Element {
  uint16_t bits;  // the number there
  int gap;        // if it is not zero: columns skipped since the nonzero before it
  int entries;    // entries that store it: the bridges over the gap and itself; 0 for a zero
};

// Walks a warp over a row, 32 columns at a time, and calls visit(element) in all lanes together.
template <typename Visit>
__device__ void for_elements(const uint16_t* __restrict__ row, int cols, const Visit& visit) {
  const int lane = lane_index();
  int previous = -1;  // last nonzero column of the blocks before
  for (int start = 0; start < cols; start += kBlocksInFlight * kWarpSize) {
    uint16_t bits[kBlocksInFlight];
#pragma unroll
    for (int block = 0; block < kBlocksInFlight; ++block) {
      const int column = start + block * kWarpSize + lane;
      bits[block] = column < cols ? __ldg(row + column) : uint16_t{0};
    }
#pragma unroll
    for (int block = 0; block < kBlocksInFlight; ++block) {
      const Gap gap(bits[block], start + block * kWarpSize + lane, previous);
      visit(Element{bits[block], gap.columns, gap.entries(kBridge)});
    }
  }
}

// Adds one delta to zeroed words. Lanes, and the rows at either end, share a word: it is combined, never overwritten.
__device__ void put_delta(uint32_t* deltas, uint32_t entry, int delta) {
  if (delta) {
    atomicOr(&deltas[entry / kWordEntries], static_cast<uint32_t>(delta) << entry % kWordEntries * kDeltaBits);
  }
}

__global__ void __launch_bounds__(kBlockThreads)        // a warp for each row
    count_entries(const uint16_t* __restrict__ weight,  // [rows, cols]
                  int rows,                             // of the matrix
                  int cols,                             // of the matrix
                  int32_t* __restrict__ counts) {       // out: [rows]
  const int row = blockIdx.x * kBlockWarps + warp_index();
  if (row >= rows) return;
  int entries = 0;
  for_elements(weight + int64_t{row} * cols, cols, [&](const Element& element) { entries += element.entries; });
  entries = warp_sum(entries);
  if (lane_index() == 0) counts[row] = entries;
}

__global__ void __launch_bounds__(kBlockThreads)            // a warp for each row
    write_entries(const uint16_t* __restrict__ weight,      // [rows, cols]
                  int rows,                                 // of the matrix
                  int cols,                                 // of the matrix
                  const int32_t* __restrict__ row_offsets,  // [rows + 1]
                  uint16_t* __restrict__ values,            // out: [padded], zero before
                  uint32_t* __restrict__ deltas) {          // out: [padded / 8] words, zero before
  const int row = blockIdx.x * kBlockWarps + warp_index();
  if (row >= rows) return;
  const int lane = lane_index();
  uint32_t next = row_offsets[row];  // first entry of the block of columns
  for_elements(weight + int64_t{row} * cols, cols, [&](const Element& element) {
    const uint32_t end = warp_sum_up_to(static_cast<uint32_t>(element.entries));
    const uint32_t entry = next + end - 1;  // where the nonzero goes, after its bridges
    if (element.entries > 0) {
      values[entry] = element.bits;
      put_delta(deltas, entry, element.gap % kBridge);
    }
    // Bridges may be many, so the whole warp writes those of one lane after those of the other. Their values stay zero.
    for (unsigned bridged = __ballot_sync(kAllLanes, element.entries > 1); bridged; bridged &= bridged - 1) {
      const int owner = __ffs(bridged) - 1;
      const uint32_t bridges = __shfl_sync(kAllLanes, element.entries, owner) - 1;
      const uint32_t first = __shfl_sync(kAllLanes, entry, owner) - bridges;
      for (uint32_t bridge = lane; bridge < bridges; bridge += kWarpSize) put_delta(deltas, first + bridge, kMaxDelta);
    }
    next += of_last_lane(end);
  });
}

}  // namespace

const char* text_of(cudaError_t error) {
  static thread_local char text[96];
  int driver = 0, library = 0;  // 1000 times the major and 10 times the minor number
  if (error != cudaErrorInsufficientDriver || cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0 ||
      cudaRuntimeGetVersion(&library) != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  std::snprintf(text, sizeof text, "its driver knows CUDA up to %d.%d, and macko was built with CUDA %d.%d",
                driver / 1000, driver % 1000 / 10, library / 1000, library % 1000 / 10);
  return text;
}

}  // namespace macko

extern "C" const char* macko_cuda_error(void) { return macko::last_cuda_error; }

extern "C" macko_status macko_cuda_row_entries(const uint16_t* weight, int64_t rows, int64_t cols, int32_t* counts,
                                               int32_t device, void* stream) {
  using namespace macko;
  if (!fits_gpu(rows, cols) || (rows > 0 && (!weight || !counts))) return MACKO_BAD_ARGUMENT;
  if (rows == 0) return MACKO_OK;
  return launch_on(device, [=] {
    count_entries<<<blocks_for(rows), kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        weight, static_cast<int>(rows), static_cast<int>(cols), counts);
  });
}

extern "C" macko_status macko_cuda_pack(const uint16_t* weight, int64_t rows, int64_t cols, const int32_t* row_offsets,
                                        uint16_t* values, uint8_t* deltas, int32_t device, void* stream) {
  using namespace macko;
  if (!fits_gpu(rows, cols) || !row_offsets || (rows > 0 && !weight)) return MACKO_BAD_ARGUMENT;
  if (!is_aligned(deltas, sizeof(uint32_t))) return MACKO_BAD_ARGUMENT;
  if (rows == 0 || !values || !deltas) return MACKO_OK;  // no array: a matrix without entries
  return launch_on(device, [=] {
    write_entries<<<blocks_for(rows), kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        weight, static_cast<int>(rows), static_cast<int>(cols), row_offsets, values,
        reinterpret_cast<uint32_t*>(deltas));
  });
}
