// Which panels of which products a block multiplies (csrc/cuda/tiled_many.cuh), and where their tiles are.
#pragma once

#include "cuda/tiled_many_plan.h"

namespace macko {

// The same value, which compilers then know to be that of all lanes, and may keep where wgmma takes it from.
__device__ __forceinline__ int of_warp(int value) { return __reduce_max_sync(kAllLanes, value); }

// A block's part of a product: these panels of it.
struct Piece {
  int row_block, token_block, begin, end;
};

// A block's pieces, one after the other. Of its range it takes the end first: so others do not wait long for its sums.
// A block waits for those before it alone, which wait for none before their sums are there; GPUs start blocks in order,
// so all waits end, whatever else runs.
struct Pieces {
  int begin, end, last, count;  // of the range, and the last product that it has panels of

  __device__ __forceinline__ explicit Pieces(const Shares& shares)
      : begin(of_warp(shares.begin_of(blockIdx.x))), end(of_warp(shares.begin_of(blockIdx.x + 1))) {
    last = of_warp((end - 1) / shares.panels);
    count = shares.whole + (begin < end ? last - of_warp(begin / shares.panels) + 1 : 0);
  }

  __device__ __forceinline__ Piece operator()(const Shares& shares, int index) const {
    int product = index * shares.blocks + blockIdx.x, from = 0, to = shares.panels;
    if (index >= shares.whole) {
      const int of_shared = last - (index - shares.whole), first = of_shared * shares.panels;
      product = shares.whole * shares.blocks + of_shared;
      from = max(begin - first, 0);
      to = min(end - first, shares.panels);
    }
    const int row_block = of_warp(product / shares.token_blocks);
    return {row_block, product - row_block * shares.token_blocks, from, to};
  }
  // The first panel of a piece's product, among the shared ones.
  __device__ __forceinline__ int first_panel(const Shares& shares, int index) const {
    return (last - (index - shares.whole)) * shares.panels;
  }
};

// Where a tile of a matrix is.
struct TilePlace {
  int strip, tile, count;  // its strip, its place there, and the tiles of the strip
};
__device__ __forceinline__ TilePlace place_of(const StripCuts& cuts, int tile) {
  const int high = cuts.longer * (cuts.each + 1);
  if (tile < high) return {tile / (cuts.each + 1), tile % (cuts.each + 1), cuts.each + 1};
  return {cuts.longer + (tile - high) / cuts.each, (tile - high) % cuts.each, cuts.each};
}

// The rows of a product, all of one matrix of the group.
struct RowBlock {
  TiledGroup::Member member;
  int first_tile, last_tile, first_strip, strips;  // of the matrix

  __device__ __forceinline__ RowBlock(const TiledGroup& group, const RowBlocks& blocks, int index, int tiles)
      : member(group.members[0]) {
    int first = 0;
#pragma unroll
    for (int i = 1; i < MACKO_TILED_MEMBERS; i++) {
      if (index >= blocks.first[i]) {
        member = group.members[i];
        first = blocks.first[i];
      }
    }
    first_tile = (index - first) * tiles;
    last_tile = min(first_tile + tiles, tiles_of(member.rows)) - 1;
    first_strip = place_of(member.cuts, first_tile).strip;
    strips = place_of(member.cuts, last_tile).strip - first_strip + 1;
  }
};

}  // namespace macko
