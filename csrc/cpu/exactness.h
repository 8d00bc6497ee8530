// What decides whether a product is finite, and whether instructions that take subnormal numbers for zeros may do it.
// Included where code runs on any CPU, and nowhere else: see bitmap_rows.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/bitmap.h"
#include "cpu/float16.h"

namespace macko {
namespace {

// What an input holds, by the bits of its magnitudes, which rise with them.
struct Range {
  int32_t smallest = INT32_MAX;  // but for zeros
  int32_t largest = 0;

  bool is_finite() const { return largest < 0x7f800000; }
};

inline Range range_of(const float* x, int64_t count) {
  Range range;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of_float(x[i]) & 0x7fffffffu);
    range.largest = std::max(range.largest, magnitude);
    range.smallest = std::min(range.smallest, magnitude == 0 ? INT32_MAX : magnitude);
  }
  return range;
}

// The smallest magnitude of values other than zero, by its bits.
inline int32_t smallest_of(const uint16_t* values, int64_t count) {
  int16_t smallest = kNoSmallest;
  for (int64_t i = 0; i < count; ++i) smallest = std::min(smallest, static_cast<int16_t>(values[i] & 0x7fff));
  return smallest;
}

// Whether `vdpbf16ps`, which takes subnormal numbers for zeros, meets none. All products are whole multiples of the
// last places of the smallest two factors, 2^-7 of their powers of two, and so are all sums of them: if that is 2^-126
// or more, the smallest normal float32, no sum is subnormal.
inline bool pairs_are_exact(int32_t smallest_value, int32_t smallest_x) {
  const int32_t value = smallest_value >> 7, input = smallest_x >> 23;  // exponents, 127 above the powers of two
  return value > 0 && input > 0 && value - 127 - 7 + input - 127 - 7 >= -126;
}

}  // namespace
}  // namespace macko
