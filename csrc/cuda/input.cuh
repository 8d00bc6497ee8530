// What becomes of x on its way into the shared memory of a product: nothing, RMSNorm, or silu(gate) * up. Every block
// does it for itself, which costs less than a kernel of its own before the product.
//
// Roundings are those of transformers' eager Llama: the normalised x is rounded before it is scaled by the norm's
// weight, silu before it is multiplied.
#pragma once

#include "cuda/scalar.cuh"
#include "cuda/warp.cuh"
#include "macko.h"

namespace macko {

__device__ __forceinline__ float silu(float value) { return value / (1.0f + __expf(-value)); }

// silu(gate) * up of two elements.
template <typename T>
__device__ __forceinline__ uint32_t gated_pair(uint32_t gates, uint32_t ups) {
  const float2 gate = pair_to_float<T>(gates), up = pair_to_float<T>(ups);
  return pack_pair<T>(rounded<T>(silu(gate.x)) * up.x, rounded<T>(silu(gate.y)) * up.y);
}

// Sum over the threads of a block whose warps fill a power of 2 or not; every thread gets it. `scratch` holds a float a
// warp and may be written again after the next __syncthreads().
__device__ __forceinline__ float block_sum(float value, float* scratch, int warps) {
  value = warp_sum(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  return warp_sum(lane_index() < warps ? scratch[lane_index()] : 0.0f);
}

__device__ __forceinline__ void copy_to_shared(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Calls body(i) for each 16-byte vector of elements of a row that is this thread's: what a thread copies it also
// transforms, so that it need not wait for others. Not unrolled, because weights wait in registers meanwhile.
template <int Elements = 8, typename Body>
__device__ __forceinline__ void for_own_vectors(int cols, int threads, const Body& body) {
#pragma unroll 1
  for (int i = threadIdx.x * Elements; i < cols; i += threads * Elements) body(i);
}
// The same for each pair of elements, as 32-bit words.
template <typename Body>
__device__ __forceinline__ void for_own_pairs(int cols, int threads, const Body& body) {
  for_own_vectors(cols, threads, [&](int i) {
#pragma unroll 2
    for (int k = i / 2; k < i / 2 + 4; k++) body(k);
  });
}

// The part that needs no other kernel's result: the norm's weight goes to shared memory. `other` [cols] is where the
// transform's second operand waits.
template <typename T>
__device__ __forceinline__ void prepare_input(T* other, const macko_input& input, int cols, int threads) {
  if (input.transform != MACKO_RMS_NORM) return;
  const T* const weight = static_cast<const T*>(input.norm_weight);
  for_own_vectors(cols, threads, [&](int i) { copy_to_shared(other + i, weight + i); });
}

// x -> shared [cols]; the caller calls __syncthreads() before it reads. cols is a multiple of 8, x is aligned to 16
// bytes.
template <typename T>
__device__ __forceinline__ void fill_input(T* shared, T* other, const T* x, const macko_input& input, int cols,
                                           float* scratch, int threads) {
  for_own_vectors(cols, threads, [&](int i) { copy_to_shared(shared + i, x + i); });
  if (input.transform == MACKO_SILU_GATE) {
    for_own_vectors(cols, threads, [&](int i) { copy_to_shared(other + i, x + cols + i); });
  }
  wait_for_copies();
  if (input.transform == MACKO_PLAIN) return;
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(shared);
  const uint32_t* const others = reinterpret_cast<const uint32_t*>(other);
  if (input.transform == MACKO_SILU_GATE) {
    for_own_pairs(cols, threads, [&](int k) { pairs[k] = gated_pair<T>(pairs[k], others[k]); });
    return;
  }
  float squares = 0.0f;
  for_own_pairs(cols, threads, [&](int k) {
    const float2 v = pair_to_float<T>(pairs[k]);
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, squares));
  });
  const float scale = rsqrtf(block_sum(squares, scratch, threads / kWarpSize) / cols + input.norm_epsilon);
  for_own_pairs(cols, threads, [&](int k) {
    const float2 v = pair_to_float<T>(pairs[k]), weight = pair_to_float<T>(others[k]);
    pairs[k] = pack_pair<T>(weight.x * rounded<T>(v.x * scale), weight.y * rounded<T>(v.y * scale));
  });
}

// Elements of shared memory that a transform needs besides x.
__host__ __device__ constexpr int64_t other_elements(const macko_input& input, int64_t cols) {
  return input.transform == MACKO_PLAIN ? 0 : cols;
}

// Checks what fill_input relies on, for all but plain input of a product.
inline bool is_valid(const macko_input& input, const void* x, int64_t cols) {
  if (input.transform == MACKO_PLAIN) return true;
  if (cols % 8 != 0 || !is_aligned(x, 16)) return false;
  return input.transform == MACKO_SILU_GATE ||
         (input.transform == MACKO_RMS_NORM && input.norm_weight && is_aligned(input.norm_weight, 16));
}

}  // namespace macko
