// For each byte of bits, the shuffle that expands values to the columns of its set bits. Only a table, no function: see
// bitmap_rows.h.
#pragma once

#include <cstdint>

namespace macko {
namespace {

struct Shuffles {
  // Where each byte of 8 columns of 16 bits comes from; x86 and ARM make zero of what has its highest bit set.
  alignas(16) uint8_t bytes[256][16];

  constexpr Shuffles() : bytes() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t source = 0;
      for (int column = 0; column < 8; ++column) {
        const bool is_set = bits >> column & 1;
        for (int byte = 0; byte < 2; ++byte) {
          bytes[bits][2 * column + byte] = is_set ? static_cast<uint8_t>(source + byte) : uint8_t{0x80};
        }
        if (is_set) source = static_cast<uint8_t>(source + 2);
      }
    }
  }
};
constexpr Shuffles kShuffles;

}  // namespace
}  // namespace macko
