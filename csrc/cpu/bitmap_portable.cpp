// The bitmap layout in plain C++: one value after the other, at the columns of the bits that are set.
#include "cpu/bitmap_rows.h"
#include "cpu/bits.h"
#include "cpu/float16.h"

namespace macko {
namespace {

void expand_bits(uint32_t mask, const uint16_t*& values, uint16_t* columns) {
  for (int column = 0; column < kBlock; ++column) columns[column] = 0;
  for (; mask; mask &= mask - 1) columns[first_bit(mask)] = *values++;
}

template <typename Value>
struct Portable {
  static constexpr int kTokens = 4, kSums = 1;
  using Input = float;
  struct Weights {
    uint32_t mask;
    const uint16_t* values;
  };
  struct Sum {
    float low = 0.f, high = 0.f;  // of the lower and the upper 16 columns, so that neither waits for the other
  };

  static void prefetch(const uint16_t*) {}

  static Weights expand(uint32_t mask, const uint16_t*& values) {
    const Weights weights{mask, values};
    values += count_bits(mask);
    return weights;
  }

  static void add(Sum& sum, const Weights& weights, const float* x) {
    uint32_t low = weights.mask & 0xffffu, high = weights.mask >> 16;
    const uint16_t* low_values = weights.values;
    const uint16_t* high_values = weights.values + count_bits(low);
    for (; low && high; low &= low - 1, high &= high - 1) {
      sum.low += Value::load(*low_values++) * x[first_bit(low)];
      sum.high += Value::load(*high_values++) * x[first_bit(high) + 16];
    }
    for (; low; low &= low - 1) sum.low += Value::load(*low_values++) * x[first_bit(low)];
    for (; high; high &= high - 1) sum.high += Value::load(*high_values++) * x[first_bit(high) + 16];
  }

  static void join(Sum& sum, const Sum& other) {
    sum.low += other.low;
    sum.high += other.high;
  }

  static float total(const Sum& sum) { return sum.low + sum.high; }
};

void widen(const uint16_t* halves, int64_t count, float* floats) {
  for (int64_t i = 0; i < count; ++i) floats[i] = Float16::load(halves[i]);
}

void unpack(const BitmapProduct& product, int64_t cols, int64_t first_row, int64_t last_row, uint16_t* weight) {
  unpack_rows(product, cols, first_row, last_row, weight, expand_bits);
}

}  // namespace

BitmapKernels portable_kernels() {
  return {multiply_rows<Portable<Float16>>, multiply_rows<Portable<BFloat16>>, nullptr, widen, unpack};
}

}  // namespace macko
