// The bitmap layout with NEON, which every 64-bit ARM has: eight columns at a time, by shuffles from a table.
#include <arm_neon.h>

#include "cpu/bitmap_rows.h"
#include "cpu/float16.h"
#include "cpu/shuffles.h"

namespace macko {
namespace {

// How many bits are set in the bytes of a word up to each one, in that byte: where the next part's values begin.
uint32_t counts_to_byte(uint32_t mask) {
  const uint8x8_t counts = vcnt_u8(vreinterpret_u8_u32(vdup_n_u32(mask)));
  return vget_lane_u32(vreinterpret_u32_u8(counts), 0) * 0x01010101u;
}

// The four parts of a block: visit(part, its 8 columns), and `values` moves on.
template <typename Visit>
inline void expand_parts(uint32_t mask, const uint16_t*& values, const Visit& visit) {
  const uint32_t counts = counts_to_byte(mask);
  for (int part = 0; part < 4; ++part) {
    // Not one part after the other: loads need not wait for each other.
    const uint16_t* from = values + (part == 0 ? 0 : counts >> 8 * (part - 1) & 0xffu);
    const uint8x16_t shuffle = vld1q_u8(kShuffles.bytes[mask >> 8 * part & 0xffu]);
    visit(part, vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(from)), shuffle)));
  }
  values += counts >> 24;
}

struct Halves {
  static float32x4_t low(uint16x8_t columns) { return vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u16(columns))); }
  static float32x4_t high(uint16x8_t columns) { return vcvt_high_f32_f16(vreinterpretq_f16_u16(columns)); }
};

struct Brains {
  static float32x4_t low(uint16x8_t columns) { return vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(columns), 16)); }
  static float32x4_t high(uint16x8_t columns) { return vreinterpretq_f32_u32(vshll_high_n_u16(columns, 16)); }
};

template <typename Value>
struct Neon {
  static constexpr int kTokens = 2, kSums = 2;
  using Input = float;
  struct Weights {
    float32x4_t columns[8];
  };
  struct Sum {
    float32x4_t lanes[4] = {vdupq_n_f32(0.f), vdupq_n_f32(0.f), vdupq_n_f32(0.f), vdupq_n_f32(0.f)};
  };

  static void prefetch(const uint16_t* values) { __builtin_prefetch(values); }

  static Weights expand(uint32_t mask, const uint16_t*& values) {
    Weights weights;
    expand_parts(mask, values, [&](int part, uint16x8_t columns) {
      weights.columns[2 * part] = Value::low(columns);
      weights.columns[2 * part + 1] = Value::high(columns);
    });
    return weights;
  }

  static void add(Sum& sum, const Weights& weights, const float* x) {
    for (int i = 0; i < 8; ++i) {
      sum.lanes[i % 4] = vfmaq_f32(sum.lanes[i % 4], weights.columns[i], vld1q_f32(x + 4 * i));
    }
  }

  static void join(Sum& sum, const Sum& other) {
    for (int i = 0; i < 4; ++i) sum.lanes[i] = vaddq_f32(sum.lanes[i], other.lanes[i]);
  }

  static float total(const Sum& sum) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(sum.lanes[0], sum.lanes[1]), vaddq_f32(sum.lanes[2], sum.lanes[3])));
  }
};

void widen(const uint16_t* halves, int64_t count, float* floats) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(floats + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
  for (; i < count; ++i) floats[i] = Float16::load(halves[i]);
}

void unpack(const BitmapProduct& product, int64_t cols, int64_t first_row, int64_t last_row, uint16_t* weight) {
  unpack_rows(product, cols, first_row, last_row, weight, [](uint32_t mask, const uint16_t*& values, uint16_t* out) {
    expand_parts(mask, values, [&](int part, uint16x8_t columns) { vst1q_u16(out + 8 * part, columns); });
  });
}

}  // namespace

BitmapKernels neon_kernels() {
  return {multiply_rows<Neon<Halves>>, multiply_rows<Neon<Brains>>, nullptr, widen, unpack};
}

}  // namespace macko
