// Dense rows compressed in plain C++: every column is written, and overwritten by the next one unless it counts. So
// there is no branch, which at half zeros would be a wrong guess every other time.
#include "cpu/bits.h"
#include "cpu/compress_rows.h"

namespace macko {
namespace {

struct Portable {
  static uint32_t nonzeros(const uint16_t* columns) {
    uint32_t bits = 0;
    for (int column = 0; column < kBlock; ++column) bits |= uint32_t{(columns[column] & 0x7fffu) != 0} << column;
    return bits;
  }

  static int count(uint32_t bits) { return count_bits(bits); }

  static void put_values(const uint16_t* columns, uint32_t nonzeros, uint32_t entries, uint16_t* values) {
    for (int column = 0; column < kBlock; column += 8, columns += 8, nonzeros >>= 8, entries >>= 8) {
      for (int i = 0; i < 8; ++i) {
        *values = static_cast<uint16_t>(columns[i] & (0u - (nonzeros >> i & 1)));
        values += entries >> i & 1;
      }
    }
  }

  static void put_columns(uint32_t entries, uint8_t* places) {
    for (int column = 0; column < kBlock; column += 8, entries >>= 8) {
      for (int i = 0; i < 8; ++i) {
        *places = static_cast<uint8_t>(column % 16 + i);
        places += entries >> i & 1;
      }
    }
  }
};

}  // namespace

CompressKernels portable_compress_kernels() { return compress_kernels<Portable>(); }

}  // namespace macko
