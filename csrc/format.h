// Constants and helpers of the MACKO format (docs/format.md), shared by the backends.
#pragma once

#include <cstdint>

namespace macko {

constexpr int kDeltaBits = 4;
constexpr int kMaxDelta = (1 << kDeltaBits) - 1;              // most columns that one entry can skip
constexpr int kBridge = kMaxDelta + 1;                        // columns that an explicit zero with delta 15 moves on
constexpr int64_t kEntryAlignment = 8;                        // arrays are padded to a multiple of this many entries
constexpr int64_t kMaxEntries = INT32_MAX - kEntryAlignment;  // row offsets are int32

// True for +0 and -0 of both 16-bit float types.
constexpr bool is_zero(uint16_t bits) { return (bits & 0x7fffu) == 0; }

constexpr int delta_at(const uint8_t* deltas, int64_t entry) {
  return (deltas[entry >> 1] >> ((entry & 1) * kDeltaBits)) & kMaxDelta;
}

}  // namespace macko
