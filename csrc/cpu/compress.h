// What a dense row becomes: the entries of the format, or the bits and values of a bitmap.
#pragma once

#include <cstdint>

#include "macko.h"

namespace macko {

constexpr int kSpill = 32;  // elements behind the last one of a result, which may be written and mean nothing

struct CompressKernels {
  // How many entries a row has.
  int64_t (*count)(const uint16_t* row, int64_t cols);
  // Its entries, and how many: their values, and their columns modulo 16. Room for cols + kSpill of each.
  int64_t (*entries)(const uint16_t* row, int64_t cols, uint16_t* values, uint8_t* columns);
  // Its values other than zero, and how many: a bit a column, 32 to a word, and the values. Room for cols + kSpill.
  int64_t (*nonzeros)(const uint16_t* row, int64_t cols, uint32_t* masks, uint16_t* values);
};

CompressKernels portable_compress_kernels();
// Of csrc/x86.
CompressKernels avx2_compress_kernels();
CompressKernels avx512_compress_kernels();

}  // namespace macko
