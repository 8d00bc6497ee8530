// Bits in plain C++. Included where code runs on any CPU, and nowhere else: see bitmap_rows.h.
#pragma once

#include <cstdint>

#include "cpu/bitmap.h"

namespace macko {
namespace {

// Words of a row's bits.
inline int64_t blocks_of(int64_t cols) { return (cols + kBlock - 1) / kBlock; }

// By pairs, fours and bytes of bits; compilers know this for one instruction.
inline int count_bits(uint32_t mask) {
  mask -= mask >> 1 & 0x55555555u;
  mask = (mask & 0x33333333u) + (mask >> 2 & 0x33333333u);
  return static_cast<int>(((mask + (mask >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

// The place of the lowest bit: the top five bits of a product with a de Bruijn sequence differ for each of the 32.
inline int first_bit(uint32_t mask) {
  static constexpr uint8_t kPlaces[32] = {0,  1,  28, 2,  29, 14, 24, 3, 30, 22, 20, 15, 25, 17, 4,  8,
                                          31, 27, 13, 23, 21, 19, 16, 7, 26, 12, 18, 6,  11, 5,  10, 9};
  return kPlaces[(mask & (0u - mask)) * 0x077cb531u >> 27];
}

}  // namespace
}  // namespace macko
