// The loops over rows, blocks and tokens, which all instruction sets share. Whoever includes this is compiled for one
// of them: hence the anonymous namespace, and no header with inline functions, of which the linker might keep this
// file's copy for code that runs on any CPU.
//
// Set: what an instruction set does with one block.
//   Weights   32 weights, in registers
//   Sum       what is added up of a row and a token; its default is zero
//   Input     float or uint16_t, the elements of x
//   kTokens   tokens at a time, where there are as many
//   kSums     sums of a row and a token at a time, of every kSums-th block each, so that none waits for the one before
//   expand(mask, values)   the weights of a block, and `values` moves on
//   prefetch(values), add(sum, weights, x), join(sum, other), total(sum)
#pragma once

#include "cpu/bitmap.h"

namespace macko {
namespace {

// Values ahead of those that are multiplied: 8 KiB. Rows lie one behind the other, so this leads into the next ones.
constexpr int kPrefetch = 4096;

// A row's sums with some tokens are what they are with any number of tokens: the same additions in the same order.
template <typename Set, int kTokens>
inline void multiply_row(const BitmapProduct& product, int64_t row, int64_t token) {
  const int64_t blocks = product.blocks, width = blocks * kBlock;
  const typename Set::Input* x = static_cast<const typename Set::Input*>(product.x) + token * width;
  const uint16_t* values = product.values + product.row_starts[row];
  const uint32_t* masks = product.masks + row * blocks;
  typename Set::Sum sums[Set::kSums][kTokens];
  const auto add_block = [&](int64_t block, int sum) {
    Set::prefetch(values + kPrefetch);
    const typename Set::Weights weights = Set::expand(masks[block], values);
    for (int t = 0; t < kTokens; ++t) Set::add(sums[sum][t], weights, x + t * width + block * kBlock);
  };
  int64_t block = 0;
  for (; block + Set::kSums <= blocks; block += Set::kSums) {
    for (int sum = 0; sum < Set::kSums; ++sum) add_block(block + sum, sum);
  }
  for (int sum = 0; sum < Set::kSums; ++sum) {
    if (block + sum < blocks) add_block(block + sum, sum);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int sum = 1; sum < Set::kSums; ++sum) Set::join(sums[0][t], sums[sum][t]);
    product.sums[(token + t) * product.rows + row] = Set::total(sums[0][t]);
  }
}

template <typename Set>
void multiply_rows(const BitmapProduct& product, int64_t row, int64_t last_row) {
  for (; row < last_row; ++row) {
    int64_t token = 0;
    for (; token + Set::kTokens <= product.tokens; token += Set::kTokens)
      multiply_row<Set, Set::kTokens>(product, row, token);
    for (; token < product.tokens; ++token) multiply_row<Set, 1>(product, row, token);
  }
}

// store(mask, values, out): writes 32 columns, and moves `values` on.
template <typename Store>
inline void unpack_rows(const BitmapProduct& product, int64_t cols, int64_t row, int64_t last_row, uint16_t* weight,
                        const Store& store) {
  const int64_t whole = cols / kBlock;
  for (; row < last_row; ++row) {
    const uint16_t* values = product.values + product.row_starts[row];
    const uint32_t* masks = product.masks + row * product.blocks;
    for (int64_t block = 0; block < whole; ++block, weight += kBlock) store(masks[block], values, weight);
    if (whole < product.blocks) {
      uint16_t last[kBlock];
      store(masks[whole], values, last);
      for (int64_t column = whole * kBlock; column < cols; ++column) *weight++ = last[column - whole * kBlock];
    }
  }
}

}  // namespace
}  // namespace macko
