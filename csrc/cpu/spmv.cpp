// y = x W^T + bias for a few tokens on the CPU: portable C++, one row after the other.
#include <vector>

#include "cpu/float16.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

// Dot product of one packed row with x [cols], in float32.
template <typename Value>
float row_dot(const uint16_t* values, const uint8_t* deltas, int64_t begin, int64_t end, const float* x) {
  float even = 0.f, odd = 0.f;  // two sums, so that one addition need not wait for the other
  int64_t column = -1;
  int64_t entry = begin;
  if (entry < end && (entry & 1)) {  // deltas come in pairs from an even entry on
    column += delta_at(deltas, entry) + 1;
    odd += Value::load(values[entry]) * x[column];
    ++entry;
  }
  for (; entry + 1 < end; entry += 2) {
    const uint8_t pair = deltas[entry >> 1];
    const int64_t first = column + (pair & kMaxDelta) + 1;
    column = first + (pair >> kDeltaBits) + 1;
    even += Value::load(values[entry]) * x[first];
    odd += Value::load(values[entry + 1]) * x[column];
  }
  if (entry < end) {
    column += delta_at(deltas, entry) + 1;
    even += Value::load(values[entry]) * x[column];
  }
  return even + odd;
}

struct Packed {
  const uint16_t* values;
  const uint8_t* deltas;
  const int32_t* row_offsets;
  int64_t rows, cols;
};

template <typename Value, typename Activation>
macko_status spmv(const Packed& matrix, const void* x_any, const void* bias_any, void* y_any, int64_t tokens,
                  int32_t threads) {
  using Storage = typename Activation::Storage;
  const Storage* x = static_cast<const Storage*>(x_any);
  const Storage* bias = static_cast<const Storage*>(bias_any);
  Storage* y = static_cast<Storage*>(y_any);
  std::vector<float> wide(static_cast<size_t>(tokens * matrix.cols));
  std::vector<float> spoilt(static_cast<size_t>(tokens), 0.f);  // NaN for a token that is not finite: 0 x infinity
  for (int64_t token = 0; token < tokens; ++token) {
    float sum = 0.f;
    for (int64_t i = token * matrix.cols; i < (token + 1) * matrix.cols; ++i) {
      wide[i] = Activation::load(x[i]);
      sum += 0.f * wide[i];
    }
    spoilt[token] = sum;
  }
  const auto cost_before = [&](int64_t row) { return (matrix.row_offsets[row] + row) * tokens; };
  return for_row_ranges(matrix.rows, threads, cost_before, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float start = bias ? Activation::load(bias[row]) : 0.f;
      for (int64_t token = 0; token < tokens; ++token) {
        const float dot = row_dot<Value>(matrix.values, matrix.deltas, matrix.row_offsets[row],
                                         matrix.row_offsets[row + 1], wide.data() + token * matrix.cols);
        y[token * matrix.rows + row] = Activation::store(dot + start + spoilt[token]);
      }
    }
  });
}

}  // namespace
}  // namespace macko

extern "C" macko_status macko_cpu_spmv(const uint16_t* values, int32_t value_dtype, const uint8_t* deltas,
                                       const int32_t* row_offsets, int64_t rows, int64_t cols, const void* x,
                                       const void* bias, void* y, int32_t x_dtype, int64_t tokens, int32_t threads) {
  using namespace macko;
  if (rows < 0 || cols < 1 || tokens < 0 || !row_offsets || !is_value_dtype(value_dtype)) return MACKO_BAD_ARGUMENT;
  if (rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y || (row_offsets[rows] > 0 && (!values || !deltas))) return MACKO_BAD_ARGUMENT;
  const Packed matrix{values, deltas, row_offsets, rows, cols};
  return with_activation(x_dtype, [&](auto activation) {
    using Activation = decltype(activation);
    return value_dtype == MACKO_FLOAT16 ? spmv<Float16, Activation>(matrix, x, bias, y, tokens, threads)
                                        : spmv<BFloat16, Activation>(matrix, x, bias, y, tokens, threads);
  });
}
