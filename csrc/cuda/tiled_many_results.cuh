// How the sums of a product (csrc/cuda/tiled_many.cuh) become rows of y.
#pragma once

#include "cuda/scalar.cuh"
#include "cuda/tiled_many_pieces.cuh"
#include "cuda/wgmma.cuh"

namespace macko {

// Waits for so many threads at a barrier other than the block's.
template <int Threads>
__device__ __forceinline__ void sync_threads_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}

// What becomes of sums: a matrix's rows of y, and of what is added.
template <typename T>
struct Results {
  const T* bias;      // of the first row, or null
  const T* residual;  // of the first row and token, or null
  T* y;
  int rows, tokens;  // from the first on
  int all_rows;      // from a token to the next
  bool vectors;      // whether 8 rows are 16 bytes at a multiple of 16

  __device__ __forceinline__ Results(const T* all_bias, const T* all_residual, T* all_y, const TiledGroup& group,
                                     const RowBlock& block, int group_tile, int first_token, int all_tokens)
      : rows(block.member.rows - group_tile * kTileRows), tokens(all_tokens - first_token), all_rows(group.rows) {
    const int first_row = block.member.first_row + group_tile * kTileRows;
    const int64_t at = static_cast<int64_t>(first_token) * all_rows + first_row;
    bias = all_bias ? all_bias + first_row : nullptr;
    residual = all_residual ? all_residual + at : nullptr;
    y = all_y + at;
    vectors = all_rows % 8 == 0 && (reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(residual)) % 16 == 0;
  }

  // 8 rows of a token, where `vectors` holds.
  __device__ __forceinline__ void write_eight(int row, int token, uint4 eight) const {
    const int64_t at = static_cast<int64_t>(token) * all_rows + row;
    if (residual) {
      const uint4 others = *reinterpret_cast<const uint4*>(residual + at);
      eight = {add(eight.x, others.x), add(eight.y, others.y), add(eight.z, others.z), add(eight.w, others.w)};
    }
    *reinterpret_cast<uint4*>(y + at) = eight;
  }
  __device__ __forceinline__ void write_one(int row, int token, uint32_t bits) const {
    const int64_t at = static_cast<int64_t>(token) * all_rows + row;
    const float value = pair_to_float<T>(bits).x;
    y[at] = from_float<T>(residual ? value + to_float(residual[at]) : value);
  }

 private:
  static __device__ __forceinline__ uint32_t add(uint32_t words, uint32_t others) {
    const float2 two = pair_to_float<T>(words), other = pair_to_float<T>(others);
    return pack_pair<T>(two.x + other.x, two.y + other.y);
  }
};

// Writes a warpgroup's results, [tokens, 64 rows], through shared memory, so that rows are written together: those of
// each `ranks`th kOutTokens tokens.
template <typename T, int Tokens>
__device__ __forceinline__ void write_results(const Results<T>& results, const float (&sums)[Tokens / 2],
                                              uint32_t out_at, int barrier, int rank, int ranks) {
  const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarpSize, lane = lane_index();
  const int own_row = warp * 16 + lane / 4;
  float biases[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (results.bias && own_row + i * 8 < results.rows) biases[i] = to_float(results.bias[own_row + i * 8]);
  }
#pragma unroll
  for (int first = 0; first < Tokens; first += kOutTokens) {
    if (first >= results.tokens) break;
    if (ranks > 1 && first / kOutTokens % ranks != rank) continue;
    sync_threads_at<kGroupThreads>(barrier);  // the results before have left
#pragma unroll
    for (int eight = 0; eight < kOutTokens / 8; eight += 2) {
      uint32_t matrices[4];  // rows 0 to 7 and 8 to 15 of eight tokens, and of the next eight
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int of_token = first / 8 + eight + i / 2;
        const float* const two = &sums[of_token * 4 + i % 2 * 2];
        matrices[i] = pack_pair<T>(two[0] + biases[i % 2], two[1] + biases[i % 2]);
      }
      const uint32_t at = out_at + (eight * 8 + lane / 16 * 8 + lane % 8) * kOutStride + warp * 32 + lane / 8 % 2 * 16;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(matrices[0]),
                   "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                   : "memory");
    }
    sync_threads_at<kGroupThreads>(barrier);
    const int there = min(results.tokens - first, kOutTokens);
    if (results.vectors && results.rows >= 64) {
#pragma unroll 1
      for (int i = thread; i < there * 8; i += kGroupThreads) {
        uint4 eight;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(eight.x), "=r"(eight.y), "=r"(eight.z), "=r"(eight.w)
                     : "r"(out_at + i / 8 * kOutStride + i % 8 * 16)
                     : "memory");
        results.write_eight(i % 8 * 8, first + i / 8, eight);
      }
    } else {
#pragma unroll 1
      for (int i = thread; i < there * 64; i += kGroupThreads) {
        if (i % 64 >= results.rows) continue;
        uint32_t bits;
        asm volatile("{\n .reg .b16 h;\n ld.shared.b16 h, [%1];\n cvt.u32.u16 %0, h;\n}"
                     : "=r"(bits)
                     : "r"(out_at + i / 64 * kOutStride + i % 64 * 2)
                     : "memory");
        results.write_one(i % 64, first + i / 64, bits);
      }
    }
  }
}

}  // namespace macko
