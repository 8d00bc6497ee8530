// The float types in kernels: conversions under one name, so that a kernel is written once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace macko {

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(float value) { return value; }

// A value from its bits.
template <typename T>
__device__ float bits_to_float(uint16_t bits);
template <>
__device__ inline float bits_to_float<__half>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
template <>
__device__ inline float bits_to_float<__nv_bfloat16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest even.
template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

__device__ inline uint16_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ inline uint16_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

// Two 16-bit values that were read as one word, the first in the low half.
template <typename T>
__device__ float2 pair_to_float(uint32_t word);
template <>
__device__ inline float2 pair_to_float<__half>(uint32_t word) {
  return make_float2(to_float(__ushort_as_half(word & 0xffffu)), to_float(__ushort_as_half(word >> 16)));
}
template <>
__device__ inline float2 pair_to_float<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// Back again, rounded.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  return bits_of(from_float<T>(first)) | static_cast<uint32_t>(bits_of(from_float<T>(second))) << 16;
}

// Nonzero if a value of this word, one float or two 16-bit ones, is NaN or infinite: its exponent's bits are all ones.
template <typename T>
__device__ uint32_t not_finite(uint32_t word);
template <>
__device__ inline uint32_t not_finite<__half>(uint32_t word) {
  return ((word & 0x7c007c00u) + 0x04000400u) & 0x80008000u;
}
template <>
__device__ inline uint32_t not_finite<__nv_bfloat16>(uint32_t word) {
  return ((word & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
}
template <>
__device__ inline uint32_t not_finite<float>(uint32_t word) {
  return ((word & 0x7f800000u) + 0x00800000u) & 0x80000000u;
}

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }

}  // namespace macko
