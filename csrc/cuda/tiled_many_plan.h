// How a product of many tokens from the tiled layout is shared out among blocks (csrc/cuda/tiled_many.cuh).
#pragma once

#include <algorithm>
#include <utility>

#include "cuda/tiled.cuh"

namespace macko {

constexpr int kMaxSlots = 8;                              // of a ring
constexpr int kMaxRanks = 8;                              // blocks of a cluster
constexpr int kGroupTiles = 8;                            // of a warpgroup's 64 rows
constexpr int kOutTokens = 32, kOutStride = 64 * 2 + 16;  // of a warpgroup's results on their way out: tokens, bytes
constexpr int kOutBytes = kOutTokens * kOutStride;

// What a block has sums for.
struct ManyShape {
  int groups, tokens;  // 64 rows each, and the tokens

  __host__ __device__ constexpr int tiles() const { return groups * kGroupTiles; }
  __host__ __device__ constexpr int panel_bytes() const { return tokens * kTileColumns * 2; }
  __host__ __device__ constexpr int sum_bytes() const { return groups * 64 * tokens * 4; }
};

// The blocks of rows of a group, none with rows of two members.
struct RowBlocks {
  int first[MACKO_TILED_MEMBERS];  // of a member; INT_MAX for those that are not
  int count;

  RowBlocks(const TiledGroup& group, int tiles) : count(0) {
    for (int i = 0; i < MACKO_TILED_MEMBERS; i++) {
      const int rows = group.members[i].rows;
      first[i] = rows > 0 ? count : INT_MAX;
      count += (tiles_of(rows) + tiles - 1) / tiles;
    }
  }
};

// Who multiplies which panels of which products. Those are numbered by rows, then tokens. Of `whole` of them each block
// has all panels, the panels of the others are cut into ranges, as long as each other or one longer: by ranks, of a
// product each, or of all.
struct Shares {
  int blocks, ranks, token_blocks, panels, whole, each, longer;

  // ranks: 1, or the blocks of a cluster, with products * ranks blocks.
  Shares(int blocks, int ranks, int row_blocks, int token_blocks, int panels)
      : blocks(blocks), ranks(ranks), token_blocks(token_blocks), panels(panels), whole(0) {
    const int products = row_blocks * token_blocks;
    if (ranks > 1) {
      each = panels / ranks;
      longer = panels % ranks;
      return;
    }
    whole = products < 2 * blocks ? 0 : products / blocks - 1;
    const int shared = (products - whole * blocks) * panels;
    each = shared / blocks;
    longer = shared % blocks;
  }

#ifdef __CUDACC__
  // Where the range of a block begins, among the shared panels.
  __device__ __forceinline__ int begin_of(int block) const {
    const int product = ranks == 1 ? 0 : block / ranks, in_product = block - product * ranks;
    const int in_all = ranks == 1 ? block : in_product;
    return product * panels + in_all * each + min(in_all, longer);
  }
  // The block whose range has this panel, where ranges are of all.
  __device__ __forceinline__ int block_of(int panel) const {
    const int high = longer * (each + 1);
    return panel < high ? panel / (each + 1) : longer + (panel - high) / each;
  }
#endif
};

// How long things take on an H200 at 50 %, us (docs/design.md): a panel by shape, and what else a kernel takes that has
// whole products, shares them in clusters, or in ranges.
constexpr float kPanelTime256 = 0.76f, kPanelTime192 = 0.66f, kPanelTime128 = 0.84f, kPanelTime64 = 0.62f,
                kPanelTime32 = 0.55f;
constexpr float kProductTime = 8.0f, kClusterTime = 10.0f, kRangeTime = 15.0f;

// How long the kernel for fewer tokens (csrc/cuda/tiled_wgmma.cuh), which takes up to kGroupTokens at a time, is
// expected to need instead, us, as measured there: for each tile of the strips that blocks have room for, and besides.
constexpr int kGroupTokens = 64;
inline float groups_time(const TiledGroup& group, int multiprocessors, int tokens) {
  constexpr float kTileTime32 = 0.026f, kTileTime64 = 0.033f, kBesides = 3.0f;
  int of_each = (group.strips + multiprocessors - 1) / multiprocessors;
  const int most = group.most_tiles(), room = most <= 4 ? 4 : of_each == 1 && most <= 6 ? 6 : 8;
  if (of_each > 2 || (of_each == 2 && room > 4)) of_each = (of_each + 2) / 3 * 3;
  return of_each * room * panels_of(group.cols) * (tokens > 32 ? kTileTime64 : kTileTime32) + kBesides;
}

// Of a block, on sm_90, besides its barriers.
constexpr int kBlockSharedBytes = 227 * 1024 - 4 * kMaxSlots * 8;

// How a kernel is launched.
struct ManyPlan {
  ManyShape shape;
  float time;  // that it is expected to take, us
  int blocks, ranks, panel_slots, record_slots, record_slot_bytes;
  int64_t shared_bytes;                 // of a block
  int64_t panels_bytes, partial_bytes;  // of the workspace: x, then the sums of blocks for others; flags are behind
  int64_t workspace_bytes;

  // The rest, of this shape and so many blocks and ranks. False if records are too long for a block's shared memory.
  bool fill(const TiledGroup& group, int tokens, int row_blocks) {
    int strips = 1;  // of a product at most
    for (const TiledGroup::Member& member : group.members) {
      if (member.rows == 0) continue;
      const int each = member.cuts.each, all = (tiles_of(member.rows) - member.cuts.longer) / each;
      strips = std::max(strips, std::min((shape.tiles() + each - 2) / each + 1, all));
    }
    record_slot_bytes = strips * group.record_bytes;
    // The fourth slot of records is worth 5 to 10 %, others nothing (docs/design.md).
    for (const auto& [of_panels, of_records] : {std::pair(3, 4), std::pair(3, 3), std::pair(2, 3), std::pair(2, 2)}) {
      panel_slots = of_panels;
      record_slots = of_records;
      const int64_t rings =
          int64_t{panel_slots} * shape.panel_bytes() + int64_t{record_slots} * record_slot_bytes + kBehindRecords;
      shared_bytes = shape.groups * kOutBytes + std::max<int64_t>(rings, ranks > 1 ? shape.sum_bytes() : 0);
      if (shared_bytes <= kBlockSharedBytes) break;
    }
    const int token_blocks = (tokens + shape.tokens - 1) / shape.tokens, panels = panels_of(group.cols);
    const bool whole = ranks > 1 || row_blocks * token_blocks % blocks == 0;
    panels_bytes = int64_t{token_blocks} * panels * shape.panel_bytes();
    partial_bytes = whole ? 0 : int64_t{blocks} * shape.sum_bytes();
    workspace_bytes = panels_bytes + partial_bytes + (whole ? 0 : int64_t{blocks} * shape.groups * 4);
    return shared_bytes <= kBlockSharedBytes;
  }
};

}  // namespace macko
