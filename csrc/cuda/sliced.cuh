// The sliced layout: how a packed matrix lies in GPU memory while it is being multiplied.
//
// Rows are sorted by length and cut into slices of `height` rows, one lane of a warp a row. The entries of a slice's
// rows are interleaved a unit at a time, so that a warp reads them with full 16-byte loads, and each warp of a block
// takes an equal share of a slice's units. A unit is as many entries of a row as a 32-bit word has deltas: 16 of 2 bits
// or 8 of 4. Narrower deltas than the format's 4 bits save bytes while gaps are short; longer gaps are bridged by zeros
// as in the format. Rows shorter than their slice go on with zeros of delta 0. In a group of matrices each one's rows
// are sorted and cut by themselves, so that a slice has rows of one matrix only.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "macko.h"

namespace macko {

// Columns behind the last one that the zeros at the end of a short row may touch; macko_llm/layouts/sliced_plan.py
// keeps to it.
constexpr int kPaddingColumns = MACKO_SLICED_PADDING;

template <int DeltaBits>
struct Unit {
  static_assert(DeltaBits == 2 || DeltaBits == 4, "a unit's decoding is written for 2 and 4 bits");
  static constexpr int kMaxDelta = (1 << DeltaBits) - 1;
  static constexpr int kEntries = 32 / DeltaBits;
  static constexpr int kVectors = kEntries / 8;  // 16-byte vectors of values
  static constexpr int kWords = kEntries / 4;    // words of four byte-sized offsets
};

// Columns skipped in a unit up to and with each entry, a byte an entry, four to a word. Entry e lies in byte
// e / kWords of word e % kWords, and at column first + offset + e.
template <int DeltaBits>
struct UnitOffsets {
  using U = Unit<DeltaBits>;
  uint32_t words[U::kWords];

  __device__ __forceinline__ explicit UnitOffsets(uint32_t deltas) {
    if constexpr (DeltaBits == 4) {
      const uint32_t even = deltas & 0x0f0f0f0fu, odd = deltas >> 4 & 0x0f0f0f0fu;
      words[1] = (even + odd) * 0x01010101u;  // the product's bytes are running sums
      words[0] = words[1] - odd;
    } else {
      const uint32_t even = deltas & 0x33333333u, odd = deltas >> 2 & 0x33333333u, pairs = even + odd;
      const uint32_t second_pair = pairs >> 4 & 0x0f0f0f0fu;
      words[3] = ((pairs & 0x0f0f0f0fu) + second_pair) * 0x01010101u;
      words[1] = words[3] - second_pair;
      words[2] = words[3] - (odd >> 4 & 0x0f0f0f0fu);
      words[0] = words[1] - (odd & 0x0f0f0f0fu);
    }
  }
  __device__ __forceinline__ uint32_t of(int entry) const {
    return words[entry % U::kWords] >> 8 * (entry / U::kWords) & 0xffu;
  }
  // Columns from the unit's first to the next unit's first.
  __device__ __forceinline__ uint32_t span() const { return (words[U::kWords - 1] >> 24) + U::kEntries; }
};

// The units that one warp of a block takes of its slice: an equal share, the first warps one more if they do not
// divide.
struct Share {
  int begin, count;

  // The slice has the units [first, end).
  __device__ __forceinline__ Share(int first, int end, int warps, int warp) {
    const int each = (end - first) / warps, rest = (end - first) % warps;
    begin = first + warp * each + min(warp, rest);
    count = each + (warp < rest ? 1 : 0);
  }
};

// Weights are read once: they pass the L1 cache by, and L2 fetches them in its longest sectors.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
#if __CUDA_ARCH__ >= 800
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
#else
  return __ldcs(address);
#endif
}
__device__ __forceinline__ uint32_t load_once(const uint32_t* address) {
#if __CUDA_ARCH__ >= 800
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
#else
  return __ldcs(address);
#endif
}

// Shared memory that SpMV takes besides x: the sums of 32 warps for 4 tokens, rows and biases, alignment.
constexpr int kSpmvOtherShared = 4 * 32 * (kWarpSize + 1) * 4 + kWarpSize * 8 + 128;

// Shared memory that a block of this GPU has for x.
inline int64_t shared_bytes_for_x(int device) {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes - kSpmvOtherShared;
}

// Warps of the blocks that SpMV is compiled for.
constexpr bool is_block_warps(int warps) {
  return warps == 8 || warps == 12 || warps == 16 || warps == 20 || warps == 24 || warps == 32;
}
// Of those, the ones of which an SM holds one block at a time; of the others it holds as many as make up 48 warps.
constexpr bool is_lone_block(int warps) { return warps == 20 || warps == 32; }

// Checks what launchers rely on. Every slice has a row, and rows may fill slices partly where a group's member ends.
inline bool is_valid(const macko_sliced* m) {
  return m && m->rows >= 0 && m->cols >= 1 && m->cols <= UINT16_MAX && (m->delta_bits == 2 || m->delta_bits == 4) &&
         (m->value_dtype == MACKO_FLOAT16 || m->value_dtype == MACKO_BFLOAT16) && m->height >= 1 &&
         m->height <= kWarpSize && is_block_warps(m->warps) && m->first_row >= 0 && m->slices <= m->rows &&
         m->slices >= (m->rows + m->height - 1) / m->height &&
         (m->rows == 0 || (m->values && m->deltas && m->starts && m->unit_offsets && m->row_order &&
                           is_aligned(m->values, 16) && is_aligned(m->deltas, 4)));
}

// The row at a place of a slice, -1 if there is none.
__device__ __forceinline__ int row_at(const macko_sliced& matrix, int slice, int place) {
  const int row = matrix.row_order[slice * matrix.height + place];
  return row < 0 ? row : row - matrix.first_row;
}

}  // namespace macko
