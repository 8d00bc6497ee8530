// The layout in which a CPU multiplies (macko_bitmap in macko.h), and what each instruction set does with it.
//
// A row is a bit for each column, 32 to a word, and the values of the columns whose bits are set, in their order. So a
// word says where the next values go: they are expanded into 32 columns, zeros between them, and multiplied with 32
// columns of x as they lie in memory. Nothing is gathered.
#pragma once

#include <cstdint>

#include "macko.h"

namespace macko {

constexpr int kBlock = 32;           // columns of a word
constexpr int kBitmapPadding = 32;   // values behind the last one, which vectors may read and nothing uses
constexpr int kNoSmallest = 0x7f80;  // macko_bitmap.smallest of a matrix without values

// The product of some rows with all tokens.
struct BitmapProduct {
  const uint16_t* values;
  const uint32_t* masks;
  const int32_t* row_starts;
  int64_t rows, blocks;
  const void*
      x;  // [tokens][blocks * kBlock], zeros behind the last column: float32, or bfloat16 for `pairs_of_bfloat16`
  int64_t tokens;
  float* sums;  // out: [tokens][rows]
};

using MultiplyRows = void (*)(const BitmapProduct&, int64_t first_row, int64_t last_row);

struct BitmapKernels {
  MultiplyRows float16, bfloat16;  // values of these, exact products, float32 sums
  MultiplyRows pairs_of_bfloat16;  // both of bfloat16, subnormal numbers taken for zeros; null where the CPU cannot
  void (*widen)(const uint16_t* halves, int64_t count, float* floats);  // float16 to float32
  // Dense rows of `cols` columns, one behind the other, of which `weight` is the first.
  void (*unpack)(const BitmapProduct&, int64_t cols, int64_t first_row, int64_t last_row, uint16_t* weight);
};

BitmapKernels portable_kernels();

// Of csrc/x86, where the library is built for such CPUs (MACKO_X86).
int32_t x86_instructions();                       // the most that this CPU can do, a macko_instructions
BitmapKernels x86_kernels(int32_t instructions);  // MACKO_AVX2 or MACKO_AVX512
BitmapKernels avx2_kernels();
BitmapKernels avx512_kernels(bool has_bf16);

// Of csrc/arm, where the library is built for 64-bit ARM (MACKO_ARM), all of which has NEON.
BitmapKernels neon_kernels();

}  // namespace macko
