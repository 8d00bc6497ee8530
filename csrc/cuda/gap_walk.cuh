// How a warp walks over the gaps between a row's nonzeros, 32 columns at a time.
#pragma once

#include "cuda/warp.cuh"

namespace macko {

// What a lane finds in its column.
struct Gap {
  bool nonzero;  // the column; negative zero is a zero
  int columns;   // if so: skipped since the nonzero before it

  // All lanes together, for 32 columns in order. `previous` is the row's last nonzero column before them, -1 if there
  // is none; it is moved on.
  __device__ Gap(uint16_t bits, int column, int& previous) : nonzero((bits & 0x7fffu) != 0) {
    const unsigned nonzeros = __ballot_sync(kAllLanes, nonzero);
    const unsigned before = nonzeros & ((1u << lane_index()) - 1);
    const int first = column - lane_index();
    columns = column - 1 - (before ? first + 31 - __clz(before) : previous);
    if (nonzeros) previous = first + 31 - __clz(nonzeros);
  }

  // Entries that store it, where one bridges this many columns: the bridges over the gap and itself; 0 for a zero.
  __device__ int entries(int bridge) const { return nonzero ? columns / bridge + 1 : 0; }
};

}  // namespace macko
