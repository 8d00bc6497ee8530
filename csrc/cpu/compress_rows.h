// The loops over the columns of a dense row, which all instruction sets share. Like bitmap_rows.h, this is compiled for
// one of them, hence the anonymous namespace.
//
// Set: what an instruction set does with 32 columns, a block.
//   nonzeros(columns)      a bit for each column that is not zero, of either sign
//   count(bits)            how many are set
//   put_values(columns, nonzeros, entries, values)   the values of the entries, +0 where one is no nonzero
//   put_columns(entries, places)                     the columns of the entries, modulo 16
#pragma once

#include "cpu/bitmap.h"
#include "cpu/compress.h"

namespace macko {
namespace {

// A block with all its 32 columns: where the row ends within it, a copy that goes on with zeros.
class Block {
 public:
  Block(const uint16_t* row, int64_t cols, int64_t block) : columns_(row + block * kBlock) {
    const int64_t there = cols - block * kBlock;
    if (there >= kBlock) return;
    for (int64_t column = 0; column < kBlock; ++column) {
      padded_[column] = column < there ? columns_[column] : uint16_t{0};
    }
    columns_ = padded_;
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const uint16_t* columns() const { return columns_; }

 private:
  const uint16_t* columns_;
  uint16_t padded_[kBlock];
};

// The bits up to the highest one that is set.
inline uint32_t up_to_highest(uint32_t bits) {
  for (int shift = 1; shift < kBlock; shift *= 2) bits |= bits >> shift;
  return bits;
}

// The entries of a block, among them the bridges: an entry stands wherever the 15 columns before have none, though only
// within `bounds`. previous: the entries of the block before.
inline uint32_t with_bridges(uint32_t nonzeros, uint32_t previous, uint32_t bounds) {
  uint64_t entries = uint64_t{nonzeros} << 16 | previous >> 16;
  uint64_t reached = entries;  // the columns of entries, and the 15 behind each
  for (int shift = 1; shift < 16; shift *= 2) reached |= reached << shift;
  // A branch for each bridge: where it is guessed right, no block waits for the bridges of the one before.
  for (uint64_t free; (free = ~reached & uint64_t{bounds} << 16) != 0;) {
    const uint64_t bridge = free & (~free + 1);
    entries |= bridge;
    reached |= (bridge << 16) - bridge;
  }
  return static_cast<uint32_t>(entries >> 16);
}

// Calls visit(columns, nonzeros, entries) for the blocks of a row, up to that of its last nonzero.
template <typename Set, typename Visit>
inline void for_blocks(const uint16_t* row, int64_t cols, const Visit& visit) {
  int64_t blocks = (cols + kBlock - 1) / kBlock;
  while (blocks > 0 && Set::nonzeros(Block(row, cols, blocks - 1).columns()) == 0) --blocks;
  uint32_t previous = 1u << 31;  // gaps are counted from the column before the first
  for (int64_t block = 0; block < blocks; ++block) {
    const Block there(row, cols, block);
    const uint32_t nonzeros = Set::nonzeros(there.columns());
    previous = with_bridges(nonzeros, previous, block + 1 < blocks ? ~0u : up_to_highest(nonzeros));
    visit(there.columns(), nonzeros, previous);
  }
}

template <typename Set>
int64_t count_entries(const uint16_t* row, int64_t cols) {
  int64_t count = 0;
  for_blocks<Set>(row, cols, [&](const uint16_t*, uint32_t, uint32_t entries) { count += Set::count(entries); });
  return count;
}

template <typename Set>
int64_t put_entries(const uint16_t* row, int64_t cols, uint16_t* values, uint8_t* places) {
  int64_t count = 0;
  for_blocks<Set>(row, cols, [&](const uint16_t* columns, uint32_t nonzeros, uint32_t entries) {
    Set::put_values(columns, nonzeros, entries, values + count);
    Set::put_columns(entries, places + count);
    count += Set::count(entries);
  });
  return count;
}

template <typename Set>
int64_t put_nonzeros(const uint16_t* row, int64_t cols, uint32_t* masks, uint16_t* values) {
  int64_t count = 0;
  for (int64_t block = 0; block * kBlock < cols; ++block) {
    const Block there(row, cols, block);
    const uint32_t nonzeros = Set::nonzeros(there.columns());
    masks[block] = nonzeros;
    Set::put_values(there.columns(), nonzeros, nonzeros, values + count);
    count += Set::count(nonzeros);
  }
  return count;
}

template <typename Set>
CompressKernels compress_kernels() {
  return {count_entries<Set>, put_entries<Set>, put_nonzeros<Set>};
}

}  // namespace
}  // namespace macko
