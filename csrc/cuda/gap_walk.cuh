// Packing's walk over a row: a warp finds the nonzeros, the gaps between them, and the entries that each one needs.
#pragma once

#include <cstdint>

#include "cuda/warp.cuh"

namespace macko {

constexpr int kBlocksInFlight = 4;  // blocks of 32 columns that a warp loads at once

// What a lane finds in its column.
struct Element {
  uint16_t bits;  // the number there
  int column;
  int entries;  // those that store it: the zeros that bridge the gap before it, then itself; 0 for a zero
  int delta;    // of the last of them; the bridges before have the largest that there is
};

// Walks a warp over a row, 32 columns at a time, and calls visit(element) in all lanes together. Gives the row's last
// nonzero column, -1 if it has none.
template <int DeltaBits, typename Visit>
__device__ int for_elements(const uint16_t* __restrict__ row, int cols, const Visit& visit) {
  constexpr int kReach = 1 << DeltaBits;  // columns that a bridge moves on
  const int lane = lane_index();
  const unsigned lanes_before = (1u << lane) - 1;
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
      const int first = start + block * kWarpSize;
      const bool nonzero = (bits[block] & 0x7fffu) != 0;  // negative zero is a zero
      const unsigned nonzeros = __ballot_sync(kAllLanes, nonzero);
      const unsigned before = nonzeros & lanes_before;
      const int gap = first + lane - 1 - (before ? first + 31 - __clz(before) : previous);
      visit(Element{bits[block], first + lane, nonzero ? gap / kReach + 1 : 0, gap % kReach});
      if (nonzeros) previous = first + 31 - __clz(nonzeros);
    }
  }
  return previous;
}

// Entries that store a row; every lane gets the number.
template <int DeltaBits>
__device__ int row_entries(const uint16_t* __restrict__ row, int cols) {
  int entries = 0;
  for_elements<DeltaBits>(row, cols, [&](const Element& element) { entries += element.entries; });
  return warp_sum(entries);
}

}  // namespace macko
