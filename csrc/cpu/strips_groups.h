// Which entry of which row lies where in a group. Bfloat16: a row's two side by side, as `vdpbf16ps` multiplies them;
// float16: the first of all rows and then the second, as `vcvtph2ps` widens them. Included where code runs on any CPU,
// and nowhere else: see bitmap_rows.h.
#pragma once

#include <cstring>

#include "cpu/strips.h"

namespace macko {
namespace {

inline int slot_of(bool is_bfloat16, int row, int64_t entry) {
  const int second = static_cast<int>(entry & 1);
  return is_bfloat16 ? 2 * row + second : row + kTile * second;
}

inline int row_of(bool is_bfloat16, int slot) { return is_bfloat16 ? slot / 2 : slot % kTile; }

inline uint16_t value_at(const uint8_t* group, int slot) {
  uint16_t value;
  std::memcpy(&value, group + kSlots + 2 * slot, sizeof value);
  return value;
}

}  // namespace
}  // namespace macko
