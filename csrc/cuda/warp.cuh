// What the 32 lanes of a warp do together, on numbers and on the deltas of a row.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "format.h"

namespace macko {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWordEntries = 8;  // entries whose deltas make up a 32-bit word

__device__ inline int lane_index() { return threadIdx.x % kWarpSize; }
__device__ inline int warp_index() { return threadIdx.x / kWarpSize; }

// Sum over the lanes; every lane gets it.
template <typename T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Sum over this lane and those before it.
template <typename T>
__device__ T warp_sum_up_to(T value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane_index() >= distance) value += before;
  }
  return value;
}

template <typename T>
__device__ T of_last_lane(T value) {
  return __shfl_sync(kAllLanes, value, kWarpSize - 1);
}

// Which of the eight entries of a word belong to a range: those from `low` on, before `high`.
struct WordRange {
  int low, high;

  // `first` is the word's first entry. Entries are unsigned, so that a step beyond the last one does not overflow.
  __device__ WordRange(uint32_t first, uint32_t begin, uint32_t end)
      : low(clamped(static_cast<int>(begin - first))), high(clamped(static_cast<int>(end - first))) {}

  __device__ bool holds(int entry) const { return entry >= low && entry < high; }

  // Columns that the entries in the range reach over.
  __device__ int span(uint32_t deltas) const {
    const uint64_t bit = 1;
    deltas &= static_cast<uint32_t>((bit << high * kDeltaBits) - (bit << low * kDeltaBits));
    const uint32_t of_two = (deltas & 0x0f0f0f0fu) + (deltas >> kDeltaBits & 0x0f0f0f0fu);
    return static_cast<int>(of_two * 0x01010101u >> 24) + high - low;  // the product's top byte sums the four bytes
  }

 private:
  __device__ static int clamped(int entry) { return min(max(entry, 0), kWordEntries); }
};

// Columns that the entries [begin, end) reach over; every lane gets the sum.
__device__ inline int64_t warp_span(const uint32_t* __restrict__ deltas, uint32_t begin, uint32_t end) {
  int64_t span = 0;
  const uint32_t start = begin / kWordEntries * kWordEntries;
  for (uint32_t first = start + lane_index() * kWordEntries; first < end; first += kWarpSize * kWordEntries) {
    span += WordRange(first, begin, end).span(__ldg(deltas + first / kWordEntries));
  }
  return warp_sum(span);
}

}  // namespace macko
