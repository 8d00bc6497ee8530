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

}  // namespace
}  // namespace macko
