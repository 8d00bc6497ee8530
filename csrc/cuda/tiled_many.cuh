// y = x W^T + bias + residual for more tokens than a warp's registers have sums for, or fewer tokens of many rows, from
// the tiled layout, on Hopper's warpgroups (sm_90a). A block expands its tiles once for all of its tokens, up to 256;
// what bounds it then is shared memory and the GPU's power (docs/design.md).
//
// One warp of a block brings records to shared memory, and one x, some panels ahead; the warpgroups multiply 64 rows
// each: they load a panel's values into registers while tensor cores are at the panel before. Rows are taken as they
// come, whatever strips they are of. wgmma reads x from shared memory in the order in which tiles have their columns,
// which no copy engine can bring about; so a kernel before this one writes x in that order.
//
// A product is what a block has sums for: these rows, these tokens. Either the blocks of a cluster share the panels of
// one, and add up through each other's shared memory. Or every multiprocessor has one block, and every block as many
// panels (Stream-K, Osama et al. 2023, section 4): first whole products, then a range of what is left, where the block
// with a product's last panel adds the sums of the others to its own, through global memory. Always in the same order.
#pragma once

#include <cooperative_groups.h>

#include "cuda/dependent_launch.cuh"
#include "cuda/scalar.cuh"
#include "cuda/tiled_many_pieces.cuh"
#include "cuda/tiled_many_plan.h"
#include "cuda/tiled_many_results.cuh"
#include "cuda/tiled_ring.cuh"
#include "cuda/wgmma.cuh"

namespace macko {

template <int Groups_, int Tokens_>
struct ManyConfig {
  static constexpr int Groups = Groups_;  // warpgroups that multiply
  static constexpr int Tokens = Tokens_;  // of a product
  static constexpr ManyShape kShape = {Groups, Tokens};
  static constexpr int Threads = (Groups + 1) * kGroupThreads;
  static constexpr int Tiles = kShape.tiles();
  static constexpr int PanelBytes = kShape.panel_bytes(), HalfBytes = PanelBytes / 2, EightBytes = HalfBytes / 4;
  // Of a thread of the warpgroup that copies, and of those that multiply: what launch bounds give, shared out anew.
  static constexpr int CopyRegisters = 56, MultiplyRegisters = Groups == 2 ? 224 : 152;
  static constexpr int GroupFours = kShape.sum_bytes() / 16 / Groups;  // of a warpgroup's sums
};

__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred p;\n"
      "WAIT:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @p bra DONE;\n bra WAIT;\nDONE:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

// Slots of shared memory that a warp fills in turn, and the warpgroups empty.
struct Ring {
  uint32_t slots_at, slot_bytes, full, empty;  // where the first of each is
  int slots, slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t at() const { return slots_at + slot * slot_bytes; }
  __device__ __forceinline__ uint32_t full_barrier() const { return full + slot * 8; }
  __device__ __forceinline__ uint32_t empty_barrier() const { return empty + slot * 8; }
  __device__ __forceinline__ void wait_until_full() const { wait_barrier(full_barrier(), parity); }
  __device__ __forceinline__ void wait_until_empty() const { wait_barrier(empty_barrier(), parity ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void initialize(int readers) const {
    for (int i = 0; i < slots; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + i * 8) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + i * 8), "r"(readers) : "memory");
    }
  }
};

// Brings the records of the block's pieces, by one warp, whose lanes take a strip each.
template <typename Config>
__device__ __forceinline__ void copy_records(const TiledGroup& group, const RowBlocks& row_blocks, const Shares& shares,
                                             Ring ring) {
  const int lane = lane_index();
  const Pieces pieces(shares);
#pragma unroll 1
  for (int index = 0; index < pieces.count; index++) {
    const Piece piece = pieces(shares, index);
    const RowBlock rows(group, row_blocks, piece.row_block, Config::Tiles);
    const bool has_record = lane < rows.strips;
    const int count = piece.end - piece.begin;
    const uint32_t* const starts =
        rows.member.starts + static_cast<int64_t>(rows.first_strip + lane) * shares.panels + piece.begin;
    uint32_t from = 0, to = 0, next = 0;  // read ahead of need
    if (has_record) {
      from = starts[0];
      to = starts[1];
      next = starts[min(2, count)];
    }
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      const uint32_t bytes = (to - from) * kRecordAlignment, all = __reduce_add_sync(kAllLanes, bytes);
      uint32_t later = 0;
      if (has_record) later = starts[min(i + 3, count)];
      ring.wait_until_empty();
      if (lane == 0) expect_bytes(ring.full_barrier(), all);
      __syncwarp();
      if (has_record) {
        copy_bulk(ring.at() + lane * group.record_bytes,
                  rows.member.records + static_cast<int64_t>(from) * kRecordAlignment, bytes, ring.full_barrier());
      }
      from = to;
      to = next;
      next = later;
      ring.advance();
    }
  }
}

// Brings the panels of x, by one warp.
template <typename Config>
__device__ __forceinline__ void copy_panels(const uint8_t* x, const Shares& shares, Ring ring) {
  const Pieces pieces(shares);
#pragma unroll 1
  for (int index = 0; index < pieces.count; index++) {
    const Piece piece = pieces(shares, index);
    const uint8_t* from =
        x + (static_cast<int64_t>(piece.token_block) * shares.panels + piece.begin) * Config::PanelBytes;
#pragma unroll 1
    for (int i = piece.begin; i < piece.end; i++) {
      ring.wait_until_empty();
      if (is_elected()) {
        expect_bytes(ring.full_barrier(), Config::PanelBytes);
        copy_bulk(ring.at(), from, Config::PanelBytes, ring.full_barrier());
      }
      from += Config::PanelBytes;
      ring.advance();
    }
  }
}

// Where a lane finds what it needs of one of its warp's tiles, in bytes behind a panel's records.
struct TileAddress {
  uint32_t masks, offsets, values;
  int width;  // tiles of the head

  __device__ __forceinline__ TileAddress(const RowBlock& rows, int tile, uint32_t record_bytes, int word) {
    const TilePlace place = place_of(rows.member.cuts, tile);
    const uint32_t record = (place.strip - rows.first_strip) * record_bytes;
    const HeadPlace first(place.count, place.tile, 0, word);
    masks = record + first.mask;
    offsets = record + first.offset;
    width = (HeadPlace(place.count, place.tile, 2, word).mask - first.mask) / (kWordsOfStep * 8);
    values = record + place.count * kHeadBytes;
  }
};

// The masks and offsets of a lane's words in its warp's two tiles, [tiles][halves of the columns][steps].
struct PanelHeads {
  uint32_t masks[2][2][2], offsets[2][2];

  __device__ __forceinline__ void load(uint32_t records, const TileAddress (&tiles)[2]) {
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const TileAddress& at = tiles[tile];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(masks[tile][half][0]), "=r"(masks[tile][half][1])
                     : "r"(records + at.masks + half * at.width * (kWordsOfStep * 8)));
        asm volatile("ld.shared.b32 %0, [%1];"
                     : "=r"(offsets[tile][half])
                     : "r"(records + at.offsets + half * at.width * (kWordsOfStep * 4)));
      }
    }
  }

  __device__ __forceinline__ uint32_t offset(int tile, int half, int step) const {
    return step ? offsets[tile][half] >> 16 : offsets[tile][half] & 0xffffu;
  }
};

// Sums of others, which are there when a flag says so.
__device__ __forceinline__ void raise_flag(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ void wait_for_flag(const uint32_t* flag) {
  asm volatile(
      "{\n .reg .pred p;\n .reg .b32 v;\n"
      "WAIT:\n ld.acquire.gpu.global.u32 v, [%0];\n setp.eq.u32 p, v, 0;\n @p bra WAIT;\n}" ::"l"(flag)
      : "memory");
}

// A thread's sums, four at a time, with those of the warpgroup's other threads between them.
template <int Count>
__device__ __forceinline__ void write_sums(float4* out, const float (&sums)[Count]) {
#pragma unroll
  for (int i = 0; i < Count / 4; i++) {
    out[i * kGroupThreads] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  }
}
__device__ __forceinline__ void add_four(float* sums, const float4& other) {
  sums[0] += other.x;
  sums[1] += other.y;
  sums[2] += other.z;
  sums[3] += other.w;
}

// Adds the sums of the cluster's other blocks, where each has them in its shared memory, of the tokens that a block
// writes.
template <typename Config>
__device__ __forceinline__ void add_parts_of_cluster(float4* exchanged, int rank, int ranks,
                                                     float (&sums)[Config::Tokens / 2]) {
  namespace cg = cooperative_groups;
#pragma unroll
  for (int part = 0; part < Config::Tokens / kOutTokens; part++) {
    if (part % ranks != rank) continue;
#pragma unroll 1
    for (int other = 1; other < ranks; other++) {
      const int from = rank + other < ranks ? rank + other : rank + other - ranks;
      const float4* const theirs = cg::this_cluster().map_shared_rank(exchanged, from);
#pragma unroll
      for (int i = part * kOutTokens / 8; i < (part + 1) * kOutTokens / 8; i++) {
        add_four(&sums[4 * i], theirs[i * kGroupThreads]);
      }
    }
  }
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::Threads, 1)
    spmm_many(const __grid_constant__ TiledGroup group, const __grid_constant__ RowBlocks row_blocks,
              const __grid_constant__ Shares shares,
              const uint8_t* x,   // panels of Config::Tokens tokens, as write_panels makes them
              const T* bias,      // [rows], or null
              const T* residual,  // [tokens, rows], or null
              T* y,               // out: [tokens, rows]; may be the residual
              float4* partial,    // [blocks][sums of a product], where ranges end within products
              uint32_t* flags,    // [blocks][Config::Groups], zero: whether those are there
              int tokens, int panel_slots, int record_slots, int record_slot_bytes) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ __align__(8) uint64_t barriers[4 * kMaxSlots];
  const int warp = __shfl_sync(kAllLanes, warp_index(), 0), lane = lane_index();
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes));
  const uint32_t barriers_at = static_cast<uint32_t>(__cvta_generic_to_shared(barriers));
  constexpr int kOutsBytes = Config::Groups * kOutBytes;
  const uint32_t rings_at = shared + kOutsBytes;
  Ring panels = {rings_at, Config::PanelBytes, barriers_at, barriers_at + kMaxSlots * 8, panel_slots};
  Ring records = {rings_at + panel_slots * Config::PanelBytes, static_cast<uint32_t>(record_slot_bytes),
                  barriers_at + 2 * kMaxSlots * 8, barriers_at + 3 * kMaxSlots * 8, record_slots};
  if (threadIdx.x == 0) {
    panels.initialize(Config::Groups * kGroupWarps);
    records.initialize(Config::Groups * kGroupWarps);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  let_next_kernel_start();

  namespace cg = cooperative_groups;
  const int index_of_group = warp / kGroupWarps;
  if (index_of_group == Config::Groups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Config::CopyRegisters));
    if (warp % kGroupWarps == 0) {
      copy_records<Config>(group, row_blocks, shares, records);
    } else if (warp % kGroupWarps == 1) {
      wait_for_previous_kernel();
      copy_panels<Config>(x, shares, panels);
    }
    if (shares.ranks > 1) {
      cg::this_cluster().sync();
      cg::this_cluster().sync();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Config::MultiplyRegisters));
    const LaneOfWord own;
    constexpr uint64_t kDescription = (uint64_t{Config::EightBytes / 16} << 16) |
                                      (uint64_t{128 / 16} << 32);  // from 8 columns, and 8 tokens, to the next
    const Pieces pieces(shares);
#pragma unroll 1
    for (int index = 0; index < pieces.count; index++) {
      const Piece piece = pieces(shares, index);
      const RowBlock rows(group, row_blocks, piece.row_block, Config::Tiles);
      // Behind the last tile a warp multiplies that one again, for nobody.
      const int first = rows.first_tile + warp * 2;
      const TileAddress tiles[2] = {
          {rows, min(first, rows.last_tile), static_cast<uint32_t>(group.record_bytes), own.word},
          {rows, min(first + 1, rows.last_tile), static_cast<uint32_t>(group.record_bytes), own.word}};
      float sums[Config::Tokens / 2] = {};
      uint32_t a[kSteps][4];  // expanded tiles
      uint32_t before = 0;    // barrier of the panel of x before
      uint32_t read = 0;      // that of the records whose values are on their way
      PanelHeads heads;
      TileUnit units[2][2][2];
      const int count = piece.end - piece.begin;
      records.wait_until_full();
      heads.load(records.at(), tiles);
      // All values of a panel at once, so that loads wait for each other once, then the heads of the next. While they
      // come, tensor cores are at the panel before.
      const auto load = [&](bool more) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int half = i / 4, step = i / 2 % 2, tile = i % 2;
          units[tile][half][step].load(heads.masks[tile][half][step],
                                       records.at() + tiles[tile].values + heads.offset(tile, half, step), own);
        }
        read = records.empty_barrier();
        records.advance();
        if (more) {
          records.wait_until_full();
          heads.load(records.at(), tiles);
        }
      };
      load(count > 1);
      const auto multiply = [&] {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (before && lane == 0) arrive_at(before);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int half = i / 4, step = i / 2 % 2, tile = i % 2;
          units[tile][half][step].expand(a[2 * half + step][tile], a[2 * half + step][2 + tile]);
        }
        const uint64_t panel = kDescription | (panels.at() & 0x3ffffu) >> 4;
        panels.wait_until_full();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          constexpr int kStepBytes = 2 * Config::EightBytes;
          multiply_group<T, Config::Tokens>(sums, a[step],
                                            panel + (step / 2 * Config::HalfBytes + step % 2 * kStepBytes) / 16);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // Not before: only now have the loads of all lanes come, not just been asked for.
        if (lane == 0) arrive_at(read);
        before = panels.empty_barrier();
        panels.advance();
      };
#pragma unroll 1
      for (int done = 0; done + 1 < count; done++) {
        multiply();
        load(done + 2 < count);
      }
      multiply();
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane == 0) arrive_at(before);

      const int of_group = index_of_group * Config::GroupFours + threadIdx.x % kGroupThreads;
      if (shares.ranks == 1 && piece.end < shares.panels) {
        write_sums(partial + int64_t{blockIdx.x} * Config::Groups * Config::GroupFours + of_group, sums);
        sync_threads_at<kGroupThreads>(index_of_group + 1);
        if (threadIdx.x % kGroupThreads == 0) raise_flag(flags + blockIdx.x * Config::Groups + index_of_group);
      } else {
        int rank = 0;
        if (shares.ranks > 1) {
          // Where the rings were.
          rank = blockIdx.x % shares.ranks;
          float4* const exchanged = reinterpret_cast<float4*>(shared_bytes + kOutsBytes) + of_group;
          sync_threads_at<Config::Groups * kGroupThreads>(Config::Groups + 1);
          write_sums(exchanged, sums);
          cg::this_cluster().sync();
          add_parts_of_cluster<Config>(exchanged, rank, shares.ranks, sums);
          cg::this_cluster().sync();  // what others still read must not go
        } else if (piece.begin > 0) {
#pragma unroll 1
          for (int block = of_warp(shares.block_of(pieces.first_panel(shares, index))); block < blockIdx.x; block++) {
            const float4* const theirs = partial + int64_t{block} * Config::Groups * Config::GroupFours + of_group;
            wait_for_flag(flags + block * Config::Groups + index_of_group);
#pragma unroll
            for (int i = 0; i < Config::Tokens / 8; i++) add_four(&sums[4 * i], __ldcg(theirs + i * kGroupThreads));
          }
        }
        const Results<T> results(bias, residual, y, group, rows, rows.first_tile + index_of_group * kGroupTiles,
                                 piece.token_block * Config::Tokens, tokens);
        write_results<T, Config::Tokens>(results, sums, shared + index_of_group * kOutBytes, index_of_group + 1, rank,
                                         shares.ranks);
      }
    }
  }
}

// x in the order in which wgmma reads it: for each `Tokens` tokens, and each panel of their columns, [8 columns of a
// tile's order][tokens][8], zeros behind x. A warp takes 8 tokens of a panel. Lowers the flags as well.
template <int Tokens>
__global__ void __launch_bounds__(kBlockThreads)
    write_panels(const uint16_t* x,  // [tokens, width] bits of 16-bit floats
                 int width, int tokens, int panels, uint8_t* out, uint32_t* flags, int flag_count) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < flag_count; i += kBlockThreads) flags[i] = 0;
  }
  const int panel = blockIdx.x * kBlockWarps + warp_index(), first_token = blockIdx.y * 8;
  if (panel >= panels) return;
  // A lane reads the words of a half that become 16 bytes, two times.
  const int token = first_token + lane_index() % 8, word = lane_index() / 8;
  uint8_t* const target = out + (int64_t{first_token / Tokens} * panels + panel) * (Tokens * kTileColumns * 2) +
                          (first_token % Tokens + lane_index() % 8) * 16;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int eight = 0; eight < 4; eight++) {
      const int column = panel * kTileColumns + half * 32 + eight * 8 + word * 2;
      if (token < tokens && column < width) {
        words[eight] = *reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(token) * width + column);
      }
    }
    *reinterpret_cast<uint4*>(target + (half * 4 + word) * Tokens * 16) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace macko
