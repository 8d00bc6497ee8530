// y = x W^T + bias + residual for 1 to 32 tokens from the tiled layout, on tensor cores. A block takes a strip, and
// each of its warps a share of the strip's records, which come into shared memory through a ring of the warp's own; at
// the end the warps' sums are added up.
#pragma once

#include <type_traits>

#include "cuda/dependent_launch.cuh"
#include "cuda/scalar.cuh"
#include "cuda/tiled_ring.cuh"

namespace macko {

// A lane's columns of x for mma: 8 of a token, in each half of a panel, for each eight tokens. They come into registers
// a panel ahead of their use, if there are few.
template <typename Config>
struct OwnColumns {
  static constexpr bool kAhead = Config::Eights <= 2;

  const uint4* from;    // the lane's columns in the panel to fetch, of the first eight tokens
  int64_t eight_apart;  // from an eight of tokens to the next
  int left;             // columns from there on to the end
  int tokens;           // of the lane: those from lane / 4 on
  uint4 next[Config::Eights][2];

  template <typename T>
  __device__ __forceinline__ OwnColumns(const T* x, int cols, int first_panel, int, int tokens, uint32_t)
      : tokens(tokens - lane_index() / 4) {
    const int width = (cols + 7) / 8 * 8, column = first_panel * kTileColumns + column_of(0, lane_index());
    from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(lane_index() / 4) * width + column);
    eight_apart = width;  // 8 rows of width / 8 vectors
    left = width - column;
#pragma unroll
    for (int e = 0; e < Config::Eights; e++) next[e][0] = next[e][1] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void start() {
    if (kAhead) fetch();
  }

  // Behind the last column a token keeps older values of its own, which are multiplied with zeros.
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int e = 0; e < Config::Eights; e++) {
      if (e * 8 >= tokens) continue;
      if (left > 0) next[e][0] = from[e * eight_apart];
      if (left > 32) next[e][1] = from[e * eight_apart + 4];
    }
    from += kTileColumns / 8;
    left -= kTileColumns;
  }

  // The next panel's, after which `half` gives them.
  uint4 current[Config::Eights][2];
  __device__ __forceinline__ void advance(int, bool more) {
    if (!kAhead) fetch();
#pragma unroll
    for (int e = 0; e < Config::Eights; e++) {
      current[e][0] = next[e][0];
      current[e][1] = next[e][1];
    }
    if (kAhead && more) fetch();
  }
  __device__ __forceinline__ uint4 half(int, int eight, int half) const { return current[eight][half]; }
};

// The same through shared memory, where the strips of a block share them.
template <typename Config>
struct SharedColumns {
  static constexpr int kPieceBytes = kWarpSize * 16, kPanelBytes = Config::Eights * 2 * kPieceBytes;

  const uint4* from;
  int64_t eight_apart;
  int left, tokens, to_fetch, strip, part;
  uint32_t slots;

  template <typename T>
  __device__ __forceinline__ SharedColumns(const T* x, int cols, int first_panel, int panels, int tokens,
                                           uint32_t shared)
      : tokens(tokens - lane_index() / 4),
        to_fetch(panels),
        strip(warp_index() / Config::Parts),
        part(warp_index() % Config::Parts),
        slots(shared + part * Config::Slots * kPanelBytes + lane_index() * 16) {
    const int width = (cols + 7) / 8 * 8, column = first_panel * kTileColumns + column_of(0, lane_index());
    from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(lane_index() / 4) * width + column);
    eight_apart = width;
    left = width - column;
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i + 1 < Config::Slots; i++) fetch(i);
#if __CUDA_ARCH__ < 900
    asm volatile("cp.async.wait_all;" ::: "memory");  // records were first; from now on they come in turns
#endif
  }

  __device__ __forceinline__ void fetch(int slot) {
    if (to_fetch-- > 0) {
#pragma unroll
      for (int piece = 0; piece < Config::Eights * 2; piece++) {
        if (piece % Config::Strips != strip) continue;
        const int e = piece / 2, half = piece % 2, bytes = e * 8 < tokens && half * 32 < left ? 16 : 0;
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(slots + slot * kPanelBytes + piece * kPieceBytes),
            "l"(from + e * eight_apart + half * 4), "r"(bytes)
            : "memory");
      }
      from += kTileColumns / 8;
      left -= kTileColumns;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Waits for this slot's panel, and starts to fetch one into the slot before, which no warp reads any more.
  __device__ __forceinline__ void advance(int slot, bool) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.wait_group %0;" ::"n"(Config::Slots - 2) : "memory");
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(2 * Config::Slots - 3) : "memory");
#endif
    if constexpr (Config::Strips == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(part + 1), "n"(Config::Strips * kWarpSize) : "memory");
    }
    fetch((slot + Config::Slots - 1) % Config::Slots);
  }

  __device__ __forceinline__ uint4 half(int slot, int eight, int half) const {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(slots + slot * kPanelBytes + (eight * 2 + half) * kPieceBytes));
    return v;
  }
};

// sums += W x^T of 16 rows, 8 tokens and 16 columns: a lane's units of two tiles, and its columns of x.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[4], const uint32_t (&low)[2], const uint32_t (&high)[2],
                                              uint32_t x_low, uint32_t x_high) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low[0]), "r"(low[1]), "r"(high[0]), "r"(high[1]), "r"(x_low), "r"(x_high));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low[0]), "r"(low[1]), "r"(high[0]), "r"(high[1]), "r"(x_low), "r"(x_high));
  }
#endif
}

// Shape of a block, fixed when it is compiled.
template <int Strips_, int Parts_, int Tiles_, int Eights_, int Slots_, int Blocks_, bool Shared_>
struct SpmmConfig {
  static constexpr int Strips = Strips_;   // of a block: their warps read the same x at about the same time
  static constexpr int Parts = Parts_;     // warps of a strip, each with a part of its columns
  static constexpr int Tiles = Tiles_;     // of a strip, at most
  static constexpr int Eights = Eights_;   // of tokens: 1, 2 or 4
  static constexpr int Slots = Slots_;     // of a warp's ring
  static constexpr int Blocks = Blocks_;   // of an SM, as far as registers matter
  static constexpr bool Shared = Shared_;  // whether x goes through shared memory
  static constexpr int Warps = Strips * Parts;
  static constexpr int Threads = Warps * kWarpSize;
  static constexpr int Pairs = (Tiles + 1) / 2;  // of tiles
  static constexpr int Tokens = Eights * 8;
  static constexpr int Rows = Tiles * kTileRows;  // of a strip

  // Rings, then the sums in their place.
  static constexpr int64_t shared_bytes(int64_t record_bytes) {
    const int64_t columns = Shared ? int64_t{Parts} * Slots * Eights * 2 * kWarpSize * 16 : 0;
    const int64_t rings = Warps * Slots * record_bytes + (Shared ? columns : kBehindRecords),
                  sums = int64_t{Warps} * Rows * Tokens * 4;
    return rings > sums ? rings : sums;
  }
};

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::Threads, Config::Blocks)
    spmm_strips(const __grid_constant__ TiledGroup group,  // its strips have at most Config::Tiles tiles
                const T* x,                                // [tokens, cols rounded up to 8] at a multiple of 16
                const T* bias,                             // [rows], or null
                const T* residual,                         // [tokens, rows], or null
                T* y,                                      // out: [tokens, rows]; may be the residual
                int tokens) {                              // at most Config::Tokens
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ __align__(8) uint64_t barriers[Config::Warps * Config::Slots];
  __shared__ StripRows rows_of_strips[Config::Strips];
  const int warp = __shfl_sync(kAllLanes, warp_index(), 0), lane = lane_index();
  const int part = warp % Config::Parts, panels = panels_of(group.cols);
  const int strip_index = blockIdx.x * Config::Strips + warp / Config::Parts;
  const bool has_strip = Config::Strips == 1 || strip_index < group.strips;
  const TiledGroup::Member member = group.member_of(strip_index);
  const int of_member = strip_index - member.first_strip;
  Strip strip = {0, 0};
  if (has_strip) strip = member.cuts.strip(of_member);
  if (part == 0 && lane == 0) rows_of_strips[warp / Config::Parts] = member.rows_of(strip);
  const int begin = panels * part / Config::Parts;
  const int count = panels * (part + 1) / Config::Parts - begin;
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes));
  RecordRing<Config::Slots, Config::Shared> ring(
      member.records, member.starts + static_cast<int64_t>(of_member) * panels + begin, has_strip ? count : 0,
      shared + warp * Config::Slots * group.record_bytes, group.record_bytes,
      static_cast<uint32_t>(__cvta_generic_to_shared(barriers + warp * Config::Slots)));
#pragma unroll
  for (int slot = 0; slot < Config::Slots; slot++) ring.fetch(slot);
  using Columns = std::conditional_t<Config::Shared, SharedColumns<Config>, OwnColumns<Config>>;
  Columns columns(x, group.cols, begin, count, tokens, shared + Config::Warps * Config::Slots * group.record_bytes);
  const LaneOfWord own;
  float sums[Config::Eights][Config::Pairs][4] = {};

  let_next_kernel_start();
  wait_for_previous_kernel();
  columns.start();
  uint32_t round = 0;
#pragma unroll 1
  for (int done = 0; done < count; round++) {
#pragma unroll
    for (int slot = 0; slot < Config::Slots; slot++, done++) {
      if (slot > 0 && done >= count) break;
      columns.advance(slot, done + 1 < count);
      if (Config::Strips > 1 && !has_strip) {
        ring.fetch(slot);  // nothing; but waiting for x counts groups of copies, of which this is one
        continue;
      }
      const uint32_t record = ring.wait(slot, round), values = record + strip.count * kHeadBytes;
      const auto multiply_half = [&](const uint4(&eights)[Config::Eights], int pair, int half, auto tiles) {
        constexpr int kTiles = decltype(tiles)::value;
        const HalfHead<kTiles> head(record + pair * 2 * kHeadBytes, half, own);
#pragma unroll
        for (int step = 0; step < 2; step++) {
          uint32_t low[2] = {0, 0}, high[2] = {0, 0};
#pragma unroll
          for (int tile = 0; tile < kTiles; tile++) head.expand(tile, step, values, own, low[tile], high[tile]);
#pragma unroll
          for (int e = 0; e < Config::Eights; e++) {
            multiply_step<T>(sums[e][pair], low, high, step ? eights[e].z : eights[e].x,
                             step ? eights[e].w : eights[e].y);
          }
        }
      };
      // Both halves of a pair at once, where x is in registers and those suffice.
      constexpr int kHalves = Config::Shared || Config::Tiles > 4 ? 1 : 2;
#pragma unroll
      for (int first = 0; first < 2; first += kHalves) {
        uint4 eights[kHalves][Config::Eights];
#pragma unroll
        for (int h = 0; h < kHalves; h++) {
#pragma unroll
          for (int e = 0; e < Config::Eights; e++) eights[h][e] = columns.half(slot, e, first + h);
        }
#pragma unroll
        for (int pair = 0; pair < Config::Pairs; pair++) {
          const auto multiply_tiles = [&](auto tiles) {
#pragma unroll
            for (int h = 0; h < kHalves; h++) multiply_half(eights[h], pair, first + h, tiles);
          };
          if (2 * pair + 1 < strip.count) {
            multiply_tiles(std::integral_constant<int, 2>());
          } else if (2 * pair < strip.count) {
            multiply_tiles(std::integral_constant<int, 1>());
          }
        }
      }
      __syncwarp();
      ring.fetch(slot);
    }
  }

  // [strips][parts][tokens][rows], where the records were.
  __syncthreads();
  float* const partial = reinterpret_cast<float*>(shared_bytes);
  constexpr int kPartial = Config::Tokens * Config::Rows;
  // The warp's number is asked for again: kept, it would cost a register in the loop.
  float* const own_partial = partial + warp_index() * kPartial + lane % 4 * 2 * Config::Rows + lane / 4;
#pragma unroll
  for (int e = 0; e < Config::Eights; e++) {
    if (e * 8 >= tokens) break;
#pragma unroll
    for (int pair = 0; pair < Config::Pairs; pair++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (2 * pair + i / 2 < Config::Tiles) {
          own_partial[(e * 8 + i % 2) * Config::Rows + (2 * pair + i / 2) * kTileRows] = sums[e][pair][i];
        }
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::Strips * Config::Rows * tokens; i += Config::Threads) {
    const int place = i % Config::Rows, which = i / Config::Rows % Config::Strips;
    const int token = i / (Config::Rows * Config::Strips);
    const StripRows rows = rows_of_strips[which];
    if (place >= rows.count) continue;
    const int row = rows.first + place;
    const int64_t at = static_cast<int64_t>(token) * group.rows + row;
    const float added = residual ? to_float(residual[at]) : 0.0f;
    const float* const sums_of_parts = partial + which * Config::Parts * kPartial + token * Config::Rows + place;
    float total = bias ? to_float(bias[row]) : 0.0f;
#pragma unroll
    for (int p = 0; p < Config::Parts; p++) total += sums_of_parts[p * kPartial];
    if (residual) total = rounded<T>(total) + added;
    y[at] = from_float<T>(total);
  }
#endif
}

}  // namespace macko
