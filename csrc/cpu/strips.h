// The layout in which a CPU with AVX-512 multiplies at high sparsity (macko_strips in macko.h), and what each
// instruction set does with it.
//
// A chunk of rows is cut into strips of 128 columns, so few that they stay in registers. In each strip the chunk's rows
// are sorted, those with most values first, and 16 rows that follow each other are a tile. It is a row of groups: two
// entries of each of its rows, 32 columns of a byte and then 32 values. Rows that have fewer entries than the longest
// of their tile end with zeros; since they are sorted, few do. Nothing is expanded, and zeros cost nothing.
#pragma once

#include <cstdint>

#include "macko.h"

namespace macko {

constexpr int kStrip = 128;  // columns
constexpr int kTile = 16;    // rows
constexpr int kChunk = 256;  // rows, which a byte can tell apart
constexpr int kTiles = kChunk / kTile;
constexpr int kSlots = 2 * kTile;   // entries of a group
constexpr int kGroup = 3 * kSlots;  // bytes of a group

// The product of a chunk with all tokens. x is padded with zeros to whole strips.
struct StripsProduct {
  const uint8_t *groups, *lengths, *row_ids;
  const int64_t* chunk_starts;
  int64_t strips;
  const uint16_t* x;      // [tokens][strips * kStrip] of the values' dtype, or the upper halves of float32
  const uint16_t* x_low;  // [tokens][strips * kStrip] the lower halves of float32, else null
  int64_t tokens;
};

// sums: [tokens][kChunk], zeros before.
using MultiplyChunk = void (*)(const StripsProduct&, int64_t chunk, float* sums);

struct StripsKernels {
  MultiplyChunk float16, bfloat16;            // x of the values' dtype, exact products, float32 sums
  MultiplyChunk float16_wide, bfloat16_wide;  // x of float32
  MultiplyChunk pairs_of_bfloat16;  // like bfloat16, subnormal numbers taken for zeros; null where the CPU cannot
};

StripsKernels portable_strips_kernels();

// Of csrc/x86.
bool x86_has_bf16();
StripsKernels avx512_strips_kernels(bool has_bf16);

}  // namespace macko
