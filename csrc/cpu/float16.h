// Conversions between the 16-bit float types and float32, exact one way and round-to-nearest-even the other.
#pragma once

#include <cstdint>
#include <cstring>

namespace macko {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Float16 {
  using Storage = uint16_t;

  static float load(uint16_t half) {
    const uint32_t magnitude = half & 0x7fffu;
    uint32_t wide = (magnitude << 13) + 0x38000000u;  // moves the exponent bias from 15 to 127
    if (magnitude >= 0x7c00u) wide += 0x38000000u;    // infinity and NaN keep the largest exponent
    // A subnormal half is its bits times 2^-24, the last place of 0.5. Scaling would need no special case, but it
    // passes through a subnormal float32, which a thread may have been told to flush to zero
    // (torch.set_flush_denormal).
    // Computed for every half, so that loops over many need no branch.
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude | 0x3f000000u) - 0.5f);
    wide = magnitude < 0x0400u ? subnormal : wide;
    return float_of_bits(wide | static_cast<uint32_t>(half & 0x8000u) << 16);
  }

  static uint16_t store(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {                        // below 2^-14 the result is subnormal
      // Adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
      return sign | static_cast<uint16_t>(bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u);
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
  }
};

struct BFloat16 {
  using Storage = uint16_t;

  static float load(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

  static uint16_t store(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

struct Float32 {
  using Storage = float;

  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

}  // namespace macko
