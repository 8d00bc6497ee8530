// The tiled layout: how a packed matrix lies in GPU memory while tensor cores multiply it with several tokens.
//
// A tile is 8 rows x 64 columns. Tiles one below the other make a strip; strips have the same number of tiles, or the
// first of them one more. The tiles of a strip that share their columns make a record, bytes that lie together: a head
// for each two tiles (half of one, if the last has no other), then the values other than zero, tile after tile. A head
// is mask words, [halves of the columns][words of a step][tiles][steps of a half], and offsets in the same order.
//
// Two tiles are multiplied in four steps of 16 columns (mma.m16n8k16: their rows are its 16 rows, 8 tokens its
// columns). In a step a lane holds a unit of each: 4 positions of row lane / 4, columns column_of(step, lane) and the
// three behind it, so that a lane's columns of two steps are 16 bytes of x. The units of eight lanes share a mask word,
// a byte for each position with a bit for each lane, and their values lie one behind the other, lane after lane, where
// that word's offset says. So the lanes of a warp read from a few neighbouring words of shared memory, and each finds
// its place by counting the bits of the lanes before it. It may read up to 4 bytes behind the last value.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/warp.cuh"
#include "macko.h"

namespace macko {

constexpr int kTileRows = 8, kTileColumns = 64;
constexpr int kSteps = 4;        // of a tile
constexpr int kUnit = 4;         // positions of a lane in a step
constexpr int kUnitsOfWord = 8;  // lanes that share a mask word
constexpr int kWordsOfStep = kWarpSize / kUnitsOfWord;
constexpr uint32_t kEveryPosition = 0x01010101u;       // of the first lane of a word: its bits there, a byte a position
constexpr int kMaskBytes = kSteps * kWordsOfStep * 4;  // of a tile's mask words
constexpr int kOffsetBytes = kSteps * kWordsOfStep * 2;  // of its offsets: uint16, in bytes behind the first value
constexpr int kHeadBytes = kMaskBytes + kOffsetBytes;
constexpr int kRecordAlignment = 16;
constexpr int kBehindRecords = 16;  // bytes of shared memory behind records that lanes may read, for nothing
constexpr int kMaxTiles = 8;        // of a strip

// The first of the 4 columns, within a tile, of a lane's unit in a step.
__device__ __forceinline__ int column_of(int step, int lane) { return step / 2 * 32 + lane % 4 * 8 + step % 2 * kUnit; }

__host__ __device__ constexpr int panels_of(int cols) { return (cols + kTileColumns - 1) / kTileColumns; }
__host__ __device__ constexpr int tiles_of(int rows) { return (rows + kTileRows - 1) / kTileRows; }

// The tiles of a strip.
struct Strip {
  int first, count;
};

// How the tiles of a matrix are spread over its strips.
struct StripCuts {
  int each, longer;  // tiles of a strip, and how many strips have one more

  StripCuts() = default;
  __host__ __device__ StripCuts(int rows, int strips)
      : each(tiles_of(rows) / strips), longer(tiles_of(rows) % strips) {}

  __device__ __forceinline__ Strip strip(int index) const {
    return {index * each + min(index, longer), each + (index < longer ? 1 : 0)};
  }
};
__host__ __device__ constexpr int most_tiles(int rows, int strips) { return (tiles_of(rows) + strips - 1) / strips; }

// The rows of a strip of a group, counted in the group.
struct StripRows {
  int first, count;
};

// Matrices with the same columns that multiply the same x in one kernel, as one matrix: their strips follow each other,
// and so do their rows.
struct TiledGroup {
  struct Member {
    const uint8_t* records;  // see macko_tiled
    const uint32_t* starts;
    int first_strip, first_row;  // in the group
    int rows;
    StripCuts cuts;

    __device__ __forceinline__ StripRows rows_of(const Strip& strip) const {
      return {first_row + strip.first * kTileRows, min(strip.count * kTileRows, rows - strip.first * kTileRows)};
    }
  };

  Member members[MACKO_TILED_MEMBERS];
  int cols, record_bytes;  // bytes of the longest record of all
  int strips, rows;        // of all

  // Members without rows are left out.
  TiledGroup(const macko_tiled* matrices, int count) : cols(matrices->cols), record_bytes(0), strips(0), rows(0) {
    int used = 0;
    for (int i = 0; i < count; i++) {
      const macko_tiled& matrix = matrices[i];
      if (matrix.rows == 0) continue;
      members[used++] = {static_cast<const uint8_t*>(matrix.records), matrix.starts, strips, rows, matrix.rows,
                         StripCuts(matrix.rows, matrix.strips)};
      record_bytes = std::max(record_bytes, matrix.record_bytes);
      strips += matrix.strips;
      rows += matrix.rows;
    }
    for (; used < MACKO_TILED_MEMBERS; used++) members[used] = {nullptr, nullptr, INT_MAX, rows, 0, StripCuts()};
  }

  // Of the highest strip.
  int most_tiles() const {
    int most = 0;
    for (const Member& member : members) most = std::max(most, member.cuts.each + (member.cuts.longer > 0 ? 1 : 0));
    return most;
  }

  // Whose strip this is. Chosen, not indexed: compilers then keep what comes of an index in other registers than loops
  // need it in.
  __device__ __forceinline__ Member member_of(int strip) const {
    Member member = members[0];
#pragma unroll
    for (int i = 1; i < MACKO_TILED_MEMBERS; i++) {
      if (strip >= members[i].first_strip) member = members[i];
    }
    return member;
  }
};

// What a lane needs to find its units in their words: where its bits begin, and those of the lanes before it.
struct LaneOfWord {
  int word;
  uint32_t shift, below;

  __device__ __forceinline__ LaneOfWord()
      : word(lane_index() / kUnitsOfWord),
        shift(lane_index() % kUnitsOfWord),
        below(((1u << shift) - 1u) * kEveryPosition) {
    // Through shuffles, or compilers work them out anew where they are used.
    word = __shfl_sync(kAllLanes, word, lane_index());
    shift = __shfl_sync(kAllLanes, shift, lane_index());
    below = __shfl_sync(kAllLanes, below, lane_index());
  }
};

// A lane's unit on its way from shared memory to the two registers that mma reads. Two values are loaded for each two
// positions, those that their bits choose from: so nothing depends on a branch, and no load on another.
struct TileUnit {
  uint32_t bits;  // a byte a position
  // Two that follow each other from the first position's on, and two from the third's; their upper halves are zero.
  uint32_t values[4];

  // `address`: of the values of the word with this mask.
  __device__ __forceinline__ void load(uint32_t mask, uint32_t address, const LaneOfWord& own) {
    bits = mask >> own.shift & kEveryPosition;
    const uint32_t first = address + 2 * __popc(mask & own.below);
    const uint32_t third = __dp4a(bits, 0x0202u, first);  // 2 bytes on for each bit of the first two
    asm volatile(
        "ld.shared.u16 %0, [%4];\n ld.shared.u16 %1, [%4 + 2];\n"
        "ld.shared.u16 %2, [%5];\n ld.shared.u16 %3, [%5 + 2];"
        : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
        : "r"(first), "r"(third));
  }

  __device__ __forceinline__ void expand(uint32_t& low, uint32_t& high) const {
    low = choose(values[0], values[1], bits);
    high = choose(values[2], values[3], bits >> 16);
  }

 private:
  // Two positions: of neither bit's 0x3232 takes bytes that are zero; the first's alone makes 0x7610 of it, the
  // second's alone 0x1032, and both 0x5410, where the second position has the second value. Not __byte_perm, which
  // compilers move behind wgmma.fence.
  static __device__ __forceinline__ uint32_t choose(uint32_t first, uint32_t second, uint32_t bits) {
    uint32_t both;
    asm volatile("prmt.b32 %0, %1, %2, %3;" : "=r"(both) : "r"(first), "r"(second), "r"(bits * 0x43deu + 0x3232u));
    return both;
  }
};

// Where a word's mask and offset lie, in bytes behind the record's begin.
struct HeadPlace {
  int mask, offset;

  __device__ __forceinline__ HeadPlace(int tiles, int tile, int step, int word) {
    const int width = tile + 1 == tiles && tile % 2 == 0 ? 1 : 2;  // tiles of this head
    const int at = ((step / 2 * kWordsOfStep + word) * width + tile % 2) * 2 + step % 2;
    mask = tile / 2 * 2 * kHeadBytes + at * 4;
    offset = tile / 2 * 2 * kHeadBytes + width * kMaskBytes + at * 2;
  }
};

// The masks and offsets of the lane's words in a half of the columns: of two tiles, or of one, from a head in shared
// memory.
template <int Tiles>
struct HalfHead {
  uint32_t masks[Tiles][2], offsets[Tiles];

  __device__ __forceinline__ HalfHead(uint32_t head, int half, const LaneOfWord& lane) {
    const uint32_t words = head + (half * kWordsOfStep + lane.word) * Tiles * 8;
    const uint32_t pairs = head + Tiles * kMaskBytes + (half * kWordsOfStep + lane.word) * Tiles * 4;
    if constexpr (Tiles == 2) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(masks[0][0]), "=r"(masks[0][1]), "=r"(masks[1][0]), "=r"(masks[1][1])
                   : "r"(words));
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(offsets[0]), "=r"(offsets[1]) : "r"(pairs));
    } else {
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(masks[0][0]), "=r"(masks[0][1]) : "r"(words));
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(offsets[0]) : "r"(pairs));
    }
  }

  // The lane's unit of a tile in the half's first or second step; `values` is where the record's values begin.
  __device__ __forceinline__ void expand(int tile, int step, uint32_t values, const LaneOfWord& lane, uint32_t& low,
                                         uint32_t& high) const {
    TileUnit unit;
    unit.load(masks[tile][step], values + (step ? offsets[tile] >> 16 : offsets[tile] & 0xffffu), lane);
    unit.expand(low, high);
  }
};

// Checks what launchers rely on.
inline bool is_valid(const macko_tiled* m) {
  return m && m->rows >= 0 && m->cols >= 1 && m->cols <= MACKO_TILED_MAX_COLS && m->strips >= 0 &&
         (m->value_dtype == MACKO_FLOAT16 || m->value_dtype == MACKO_BFLOAT16) &&
         (m->rows == 0 ||
          (m->strips >= 1 && m->strips <= tiles_of(m->rows) && most_tiles(m->rows, m->strips) <= kMaxTiles &&
           m->records && m->starts && m->record_bytes >= kHeadBytes && is_aligned(m->records, kRecordAlignment)));
}

}  // namespace macko
