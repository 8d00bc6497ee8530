// What all products on a CPU share: the dtype of x and y, and how sums become y. Included where code runs on any CPU,
// and nowhere else: see bitmap_rows.h.
#pragma once

#include <cstdint>
#include <exception>
#include <limits>

#include "cpu/float16.h"
#include "macko.h"

namespace macko {
namespace {

// Added to all sums of a token that is not finite: to those that meet zeros alone, which are left out, too.
constexpr float kSpoilt = std::numeric_limits<float>::quiet_NaN();

inline bool is_value_dtype(int32_t dtype) { return dtype == MACKO_FLOAT16 || dtype == MACKO_BFLOAT16; }

// Calls product(Activation{}), which may throw for want of memory.
template <typename Product>
macko_status with_activation(int32_t x_dtype, const Product& product) {
  try {
    switch (x_dtype) {
      case MACKO_FLOAT16: return product(Float16{});
      case MACKO_BFLOAT16: return product(BFloat16{});
      case MACKO_FLOAT32: return product(Float32{});
      default: return MACKO_BAD_ARGUMENT;
    }
  } catch (const std::exception&) {
    return MACKO_OUT_OF_MEMORY;
  }
}

// Rows [first_row, last_row) of a token's y [rows], of their sums. bias: [rows], or null.
template <typename Activation, typename Storage = typename Activation::Storage>
void put_rows(const float* sums, const Storage* bias, float spoilt, int64_t first_row, int64_t last_row, Storage* y) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const float start = bias ? Activation::load(bias[row]) : 0.f;
    y[row] = Activation::store(*sums++ + start + spoilt);
  }
}

}  // namespace
}  // namespace macko
