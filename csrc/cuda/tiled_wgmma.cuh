// y = x W^T + bias + residual for 17 to 64 tokens from the tiled layout, on Hopper's warpgroups (sm_90a).
//
// mma.sync reads x from registers, which costs every warp as many loads as it has tokens; wgmma reads it from shared
// memory by itself, for the 64 rows of four warps at once. So each warp expands its tiles into registers as for a few
// tokens, and the tokens cost tensor cores alone. The warps of a part of the columns write x to shared memory in
// the order in which tiles have their columns.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "cuda/dependent_launch.cuh"
#include "cuda/scalar.cuh"
#include "cuda/spmm_call.h"
#include "cuda/tiled_ring.cuh"
#include "cuda/wgmma.cuh"

namespace macko {

// Shape of a block, fixed when it is compiled.
template <int Strips_, int WarpsOfStrip_, int Parts_, int Tiles_, int Tokens_, int Ranks_>
struct GroupConfig {
  static constexpr int Strips = Strips_;              // of a block
  static constexpr int WarpsOfStrip = WarpsOfStrip_;  // in a part: 1, 2 or 4, each with some of its tiles
  static constexpr int Parts = Parts_;                // of the block's columns
  static constexpr int Tiles = Tiles_;                // of a strip, at most
  static constexpr int Tokens = Tokens_;
  static constexpr int Slots = 2;       // of a ring of records
  static constexpr int Ranks = Ranks_;  // blocks of a cluster, each with a part of the columns of the same strips
  static constexpr int Groups = (Strips * WarpsOfStrip + kGroupWarps - 1) / kGroupWarps;  // of a part
  static constexpr int PartWarps = Groups * kGroupWarps;
  static constexpr int Threads = Parts * PartWarps * kWarpSize;
  static constexpr int Pairs = ((Tiles + 1) / 2 + WarpsOfStrip - 1) / WarpsOfStrip;  // of tiles, of a warp
  static constexpr int Rows = Tiles * kTileRows;                                     // of a strip

  // A panel of x: of 8 columns each [Tokens][8], first those of a half, then those of the other in other banks.
  static constexpr int EightBytes = Tokens * 16, HalfBytes = 4 * EightBytes + 64;
  static constexpr int PanelBytes = 2 * HalfBytes;
  static constexpr int PanelTokens = PartWarps * 4;  // tokens of a panel that the warps of a part load at once
  static constexpr int Loads = (Tokens + PanelTokens - 1) / PanelTokens;

  static constexpr int PanelSlots = 2;
  static constexpr int Buffers = Pairs > 1 ? 2 : 1;  // of expanded tiles

  // Records and panels, then the sums in their place.
  static constexpr int64_t shared_bytes(int64_t record_bytes) {
    const int64_t rings = int64_t{Parts} * (Strips * Slots * record_bytes + PanelSlots * PanelBytes);
    const int64_t sums = int64_t{Parts} * Strips * Rows * Tokens * 4;
    return rings > sums ? rings : sums;
  }
};

// x of a part's panels, on its way through registers, a panel ahead, to shared memory. A warp loads 64 columns of 4
// tokens, behind the last token that one again, for products that nobody asks for.
template <typename T, typename Config>
struct GroupColumns {
  static constexpr int kApart = Config::PanelTokens, kLoads = Config::Loads;

  const T* x;
  uint32_t at[kLoads];  // of the next columns, from x on, in bytes: 64 tokens of the most columns are 16 MiB
  int left;             // columns from there on to the end
  int warp_token;       // the first of the warp's first load
  uint32_t target;
  uint4 next[kLoads];

  __device__ __forceinline__ GroupColumns(const T* x, int cols, int first_panel, int tokens, int warp, uint32_t shared)
      : x(x), warp_token(warp * 4) {
    const int width = (cols + 7) / 8 * 8, token = warp_token + lane_index() / 8, eight = lane_index() % 8;
    const int column = first_panel * kTileColumns + eight * 8;
    left = width - column;
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      at[i] = static_cast<uint32_t>(min(token + i * kApart, tokens - 1) * width + column) * sizeof(T);
      at[i] = __shfl_sync(kAllLanes, at[i], lane_index());  // or compilers work it out anew for each panel
    }
    target = shared + eight / 4 * Config::HalfBytes + token * 16 + eight % 4 * 4;
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      next[i] = make_uint4(0, 0, 0, 0);
      if (left > 0) next[i] = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(x) + at[i]);
      at[i] += kTileColumns * sizeof(T);
    }
    left -= kTileColumns;
  }

  // The words of 8 columns go to where tiles have them: of a step's first 8 columns those that lanes have first.
  __device__ __forceinline__ void store(int slot) const {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (Config::Tokens % kApart != 0 && warp_token + i * kApart >= Config::Tokens) break;
      const uint32_t at = target + slot * Config::PanelBytes + i * kApart * 16;
      const uint32_t words[4] = {next[i].x, next[i].y, next[i].z, next[i].w};
#pragma unroll
      for (int word = 0; word < 4; word++) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + word * Config::EightBytes), "r"(words[word]) : "memory");
      }
    }
  }
};

// A lane's units of a pair of tiles, or of one, as wgmma reads them in each step.
template <int Tiles>
__device__ __forceinline__ void expand_pair(uint32_t head_at, uint32_t values, const LaneOfWord& own,
                                            uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const HalfHead<Tiles> head(head_at, half, own);
#pragma unroll
    for (int step = 0; step < 2; step++) {
#pragma unroll
      for (int tile = 0; tile < Tiles; tile++) {
        head.expand(tile, step, values, own, a[2 * half + step][tile], a[2 * half + step][2 + tile]);
      }
    }
  }
}

template <typename T, typename Config>
__global__ void __cluster_dims__(Config::Ranks) __launch_bounds__(Config::Threads, 1)
    spmm_groups(const __grid_constant__ TiledGroup group,  // its strips have at most Config::Tiles tiles
                const T* x,                                // [tokens, cols rounded up to 8] at a multiple of 16
                const T* bias,                             // [rows], or null
                const T* residual,                         // [tokens, rows], or null
                T* y,                                      // out: [tokens, rows]; may be the residual
                int tokens) {                              // at most Config::Tokens
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ __align__(8) uint64_t barriers[Config::Parts * Config::Strips * Config::Slots];
  __shared__ StripRows rows_of_strips[Config::Strips];
  constexpr int kRing = Config::Slots;
  const int warp = __shfl_sync(kAllLanes, warp_index(), 0), lane = lane_index();
  const int part = warp / Config::PartWarps, in_part = warp % Config::PartWarps;
  const int which = in_part / Config::WarpsOfStrip, sub = in_part % Config::WarpsOfStrip;
  const int rank = blockIdx.x % Config::Ranks, first_strip = blockIdx.x / Config::Ranks * Config::Strips;
  const bool has_strip = which < Config::Strips && first_strip + which < group.strips;
  const TiledGroup::Member member = group.member_of(first_strip + which);
  const int of_member = first_strip + which - member.first_strip;
  Strip strip = {0, 0};
  if (has_strip) strip = member.cuts.strip(of_member);
  if (which < Config::Strips && part == 0 && sub == 0 && lane == 0) rows_of_strips[which] = member.rows_of(strip);
  constexpr int kParts = Config::Parts * Config::Ranks;
  const int panels = panels_of(group.cols), of_all = rank * Config::Parts + part;
  const int begin = panels * of_all / kParts, count = panels * (of_all + 1) / kParts - begin;
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes));
  const int ring_index = part * Config::Strips + which;
  const bool fetches = has_strip && sub == 0;
  RecordRing<kRing> ring(member.records, member.starts + static_cast<int64_t>(of_member) * panels + begin,
                         fetches ? count : 0, shared + ring_index * kRing * group.record_bytes, group.record_bytes,
                         static_cast<uint32_t>(__cvta_generic_to_shared(barriers + ring_index * kRing)), fetches);
  if (Config::WarpsOfStrip > 1) __syncthreads();
#pragma unroll
  for (int slot = 0; slot < kRing; slot++) ring.fetch(slot);
  const uint32_t columns_at = shared + Config::Parts * Config::Strips * kRing * group.record_bytes +
                              part * Config::PanelSlots * Config::PanelBytes;
  GroupColumns<T, Config> columns(x, group.cols, begin, tokens, in_part, columns_at);
  const LaneOfWord own;
  float sums[Config::Pairs][Config::Tokens / 2] = {};
  constexpr uint64_t kDescription = (uint64_t{Config::EightBytes / 16} << 16) |
                                    (uint64_t{128 / 16} << 32);  // from 8 columns, and 8 tokens, to the next

  let_next_kernel_start();
  wait_for_previous_kernel();
  columns.load();
  columns.store(0);
  columns.load();
  uint32_t a[Config::Buffers][kSteps][4];
  int panel_slot = 0, slot = 0;
  uint32_t round = 0;
#pragma unroll 1
  for (int done = 0; done < count; done++) {
    // wgmma shall see what was stored before the barrier; so late, stores are no longer waited for.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, %1;" ::"r"(part + 1), "n"(Config::PartWarps * kWarpSize) : "memory");
    if (done > 0) ring.fetch(slot == 0 ? kRing - 1 : slot - 1);
    const uint64_t panel = kDescription | ((columns_at + panel_slot * Config::PanelBytes) & 0x3ffffu) >> 4;
    panel_slot = panel_slot + 1 == Config::PanelSlots ? 0 : panel_slot + 1;
    columns.store(panel_slot);
    columns.load();
    uint32_t record = 0;
    if (strip.count > 0) record = ring.wait(slot, round);
    uint32_t values = record + strip.count * kHeadBytes;
    asm volatile("" : "+r"(values));  // or it is worked out anew for each pair
#pragma unroll
    for (int k = 0; k < Config::Pairs; k++) {
      const int pair = k * Config::WarpsOfStrip + sub, buffer = k % Config::Buffers;
      const int tiles = strip.count - 2 * pair;
      const uint32_t head = record + pair * 2 * kHeadBytes;
      if (tiles > 1) {
        expand_pair<2>(head, values, own, a[buffer]);
      } else {
#pragma unroll
        for (int i = 0; i < kSteps * 4; i++) a[buffer][i / 4][i % 4] = 0;
        if (tiles > 0) expand_pair<1>(head, values, own, a[buffer]);
      }
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        constexpr int kStepBytes = 2 * Config::EightBytes;
        multiply_group<T, Config::Tokens>(sums[k], a[buffer][step],
                                          panel + (step / 2 * Config::HalfBytes + step % 2 * kStepBytes) / 16);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Config::Buffers - 1) : "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (++slot == kRing) {
      slot = 0;
      round++;
    }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

  // [parts][strips][tokens][rows], where the records were.
  __syncthreads();
  float* const partial = reinterpret_cast<float*>(shared_bytes);
  constexpr int kPartial = Config::Tokens * Config::Rows;
  if (has_strip) {
    float* const own_partial = partial + ring_index * kPartial + lane % 4 * 2 * Config::Rows + lane / 4;
#pragma unroll
    for (int e = 0; e < Config::Tokens / 8; e++) {
      if (e * 8 >= tokens) break;
#pragma unroll
      for (int k = 0; k < Config::Pairs; k++) {
        const int tile = 2 * (k * Config::WarpsOfStrip + sub);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (tile + i / 2 < Config::Tiles) {
            own_partial[(e * 8 + i % 2) * Config::Rows + (tile + i / 2) * kTileRows] = sums[k][e * 4 + i];
          }
        }
      }
    }
  }
  namespace cg = cooperative_groups;
  if constexpr (Config::Ranks > 1) {
    cg::this_cluster().sync();
  } else {
    __syncthreads();
  }
#pragma unroll 1
  for (int i = rank * Config::Threads + threadIdx.x; i < Config::Strips * Config::Rows * tokens;
       i += Config::Ranks * Config::Threads) {
    const int place = i % Config::Rows, its_which = i / Config::Rows % Config::Strips;
    const int token = i / (Config::Rows * Config::Strips);
    const StripRows rows = rows_of_strips[its_which];
    if (place >= rows.count) continue;
    const int row = rows.first + place;
    const int64_t at = static_cast<int64_t>(token) * group.rows + row;
    const float added = residual ? to_float(residual[at]) : 0.0f;
    float* const sums_of_parts = partial + its_which * kPartial + token * Config::Rows + place;
    float total = bias ? to_float(bias[row]) : 0.0f;
#pragma unroll
    for (int r = 0; r < Config::Ranks; r++) {
      const float* theirs = sums_of_parts;
      if constexpr (Config::Ranks > 1) theirs = cg::this_cluster().map_shared_rank(sums_of_parts, r);
#pragma unroll
      for (int p = 0; p < Config::Parts; p++) total += theirs[p * Config::Strips * kPartial];
    }
    if (residual) total = rounded<T>(total) + added;
    y[at] = from_float<T>(total);
  }
  if constexpr (Config::Ranks > 1) cg::this_cluster().sync();  // what others still read must not go
}

template <typename T, typename Config>
cudaError_t launch_groups_config(const SpmmCall& call, int shared_bytes, int tokens) {
  static AllowedBytes allowed;
  const TiledGroup& group = *call.group;
  const int64_t bytes = Config::shared_bytes(group.record_bytes);
  constexpr auto kernel = spmm_groups<T, Config>;
  const cudaError_t error = allowed.at_least(kernel, bytes, 1, shared_bytes, call.device);
  if (error != cudaSuccess) return error;
  const int clusters = (group.strips + Config::Strips - 1) / Config::Strips;
  return launch_overlapping<kernel>(clusters * Config::Ranks, Config::Threads, bytes, call.device, call.stream, group,
                                    static_cast<const T*>(call.x), static_cast<const T*>(call.bias),
                                    static_cast<const T*>(call.residual), static_cast<T*>(call.y), tokens);
}

// At most this many tokens, in the fastest block of those measured (docs/design.md). All of them fit a GPU of sm_90.
template <typename T, int Tokens>
cudaError_t launch_groups_some(const SpmmCall& call, int multiprocessors, int shared_bytes, int tokens) {
  const TiledGroup& group = *call.group;
  const int tiles = group.most_tiles();
  const int of_each = (group.strips + multiprocessors - 1) / multiprocessors;  // strips of a multiprocessor
  if (of_each == 1) {
    if (tiles <= 4) return launch_groups_config<T, GroupConfig<2, 2, 4, 4, Tokens, 2>>(call, shared_bytes, tokens);
    constexpr int kParts = Tokens <= 32 ? 4 : 3;  // registers for as many warps
    if (tiles <= 6) return launch_groups_config<T, GroupConfig<2, 2, kParts, 6, Tokens, 2>>(call, shared_bytes, tokens);
  }
  if (of_each == 2 && tiles <= 4) {
    return launch_groups_config<T, GroupConfig<4, 2, 2, 4, Tokens, 2>>(call, shared_bytes, tokens);
  }
  if (tiles <= 4) {
    return launch_groups_config<T, GroupConfig<6, 2, 2, 4, Tokens, 2>>(call, shared_bytes, tokens);
  }
  return launch_groups_config<T, GroupConfig<3, 4, 2, 8, Tokens, 1>>(call, shared_bytes, tokens);
}

// All tokens, as many at a time as a block takes.
template <typename T>
cudaError_t launch_groups(const SpmmCall& all, int multiprocessors, int shared_bytes, int64_t tokens) {
  return for_some_tokens(all, tokens, kGroupTokens, [&](const SpmmCall& call, int now) {
    return now > 32 ? launch_groups_some<T, 64>(call, multiprocessors, shared_bytes, now)
                    : launch_groups_some<T, 32>(call, multiprocessors, shared_bytes, now);
  });
}

}  // namespace macko
