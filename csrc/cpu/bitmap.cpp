// The bitmap layout: how it is made of the canonical arrays, and its products, by what this CPU can do.
#include "cpu/bitmap.h"

#include <algorithm>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cpu/bits.h"
#include "cpu/exactness.h"
#include "cpu/float16.h"
#include "cpu/instructions.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/unpack.h"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

bool is_sound(const macko_bitmap* matrix) {
  if (!matrix || matrix->rows < 0 || matrix->cols < 1 || !is_value_dtype(matrix->value_dtype)) return false;
  return matrix->values && matrix->masks && matrix->row_starts;
}

// What a row costs: its values, and its words, each about as much as a value.
auto row_costs(const macko_bitmap& matrix, int64_t tokens) {
  return [starts = matrix.row_starts, blocks = blocks_of(matrix.cols), tokens](int64_t row) {
    return (starts[row] + row * blocks) * tokens;
  };
}

BitmapProduct without_tokens(const macko_bitmap& matrix) {
  return {matrix.values, matrix.masks, matrix.row_starts, matrix.rows, blocks_of(matrix.cols), nullptr, 0, nullptr};
}

template <typename Activation>
void widen(const typename Activation::Storage* x, int64_t count, float* floats, const BitmapKernels&) {
  for (int64_t i = 0; i < count; ++i) floats[i] = Activation::load(x[i]);
}

template <>
void widen<Float16>(const uint16_t* x, int64_t count, float* floats, const BitmapKernels& kernels) {
  kernels.widen(x, count, floats);
}

template <typename Activation>
macko_status spmv(const macko_bitmap& matrix, const void* x_any, const void* bias_any, void* y_any, int64_t tokens,
                  const BitmapKernels& kernels, int32_t threads) {
  using Storage = typename Activation::Storage;
  const Storage* x = static_cast<const Storage*>(x_any);
  const Storage* bias = static_cast<const Storage*>(bias_any);
  Storage* y = static_cast<Storage*>(y_any);
  BitmapProduct product = without_tokens(matrix);
  const int64_t rows = matrix.rows, cols = matrix.cols, width = product.blocks * kBlock;
  std::vector<float> wide(static_cast<size_t>(tokens * width), 0.f), sums(static_cast<size_t>(tokens * rows));
  std::vector<float> spoilt(static_cast<size_t>(tokens), 0.f);
  int32_t smallest = INT32_MAX;
  for (int64_t token = 0; token < tokens; ++token) {
    float* floats = wide.data() + token * width;
    widen<Activation>(x + token * cols, cols, floats, kernels);
    const Range range = range_of(floats, cols);
    if (!range.is_finite()) spoilt[token] = kSpoilt;
    smallest = std::min(smallest, range.smallest);
  }
  product.x = wide.data();
  product.tokens = tokens;
  product.sums = sums.data();
  MultiplyRows multiply = matrix.value_dtype == MACKO_FLOAT16 ? kernels.float16 : kernels.bfloat16;
  std::vector<uint16_t> padded;
  if constexpr (std::is_same_v<Activation, BFloat16>) {
    if (matrix.value_dtype == MACKO_BFLOAT16 && kernels.pairs_of_bfloat16 &&
        pairs_are_exact(matrix.smallest, smallest)) {
      padded.resize(wide.size());
      for (int64_t token = 0; token < tokens; ++token) {
        std::copy(x + token * cols, x + (token + 1) * cols, padded.begin() + token * width);
      }
      product.x = padded.data();
      multiply = kernels.pairs_of_bfloat16;
    }
  }
  return for_row_ranges(rows, threads, row_costs(matrix, tokens), [&](int64_t first, int64_t last) {
    multiply(product, first, last);
    for (int64_t token = 0; token < tokens; ++token) {
      const float* of_token = sums.data() + token * rows + first;
      put_rows<Activation>(of_token, bias, spoilt[token], first, last, y + token * rows);
    }
  });
}

}  // namespace
}  // namespace macko

extern "C" macko_status macko_cpu_bitmap_starts(const uint16_t* values, const int32_t* row_offsets, int64_t rows,
                                                int32_t* row_starts, int32_t threads) {
  using namespace macko;
  if (rows < 0 || !row_offsets || !row_starts || (row_offsets[rows] > 0 && !values)) return MACKO_BAD_ARGUMENT;
  const auto entries_before = [=](int64_t row) { return row_offsets[row] + row; };
  row_starts[0] = 0;
  const macko_status status = for_row_ranges(rows, threads, entries_before, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      int32_t count = 0;
      for (int64_t entry = row_offsets[row]; entry < row_offsets[row + 1]; ++entry) count += !is_zero(values[entry]);
      row_starts[row + 1] = count;
    }
  });
  for (int64_t row = 0; row < rows; ++row) row_starts[row + 1] += row_starts[row];  // no more than there are entries
  return status;
}

extern "C" macko_status macko_cpu_bitmap_fill(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                              macko_bitmap* matrix, int32_t instructions, int32_t threads) {
  using namespace macko;
  if (!is_sound(matrix) || !row_offsets || !is_runnable(instructions)) return MACKO_BAD_ARGUMENT;
  const int64_t rows = matrix->rows, cols = matrix->cols, blocks = blocks_of(cols);
  if (row_offsets[rows] > 0 && (!values || !deltas)) return MACKO_BAD_ARGUMENT;
  want_large_pages(matrix->values, int64_t{matrix->row_starts[rows]} * 2);
  want_large_pages(matrix->masks, rows * blocks * 4);
  std::fill_n(matrix->values + matrix->row_starts[rows], kBitmapPadding, uint16_t{0});
  const CompressKernels kernels = compress_kernels(instructions);
  int32_t smallest = kNoSmallest;
  std::mutex ends;
  const auto entries_before = [=](int64_t row) { return row_offsets[row] + row * blocks; };
  const macko_status status = for_row_ranges(rows, threads, entries_before, [&](int64_t first, int64_t last) {
    int32_t own_smallest = kNoSmallest;
    std::vector<uint16_t> dense(static_cast<size_t>(cols)), row_values(static_cast<size_t>(cols + kSpill));
    for (int64_t row = first; row < last; ++row) {
      unpack_row(values, deltas, row_offsets[row], row_offsets[row + 1], cols, dense.data());
      const int64_t count = kernels.nonzeros(dense.data(), cols, matrix->masks + row * blocks, row_values.data());
      own_smallest = std::min(own_smallest, smallest_of(row_values.data(), count));
      std::copy_n(row_values.data(), count, matrix->values + matrix->row_starts[row]);
    }
    const std::lock_guard<std::mutex> lock(ends);
    smallest = std::min(smallest, own_smallest);
  });
  matrix->smallest = smallest;
  return status;
}

extern "C" macko_status macko_cpu_bitmap_unpack(const macko_bitmap* matrix, uint16_t* weight, int32_t instructions,
                                                int32_t threads) {
  using namespace macko;
  if (!is_sound(matrix) || !is_runnable(instructions) || (matrix->rows > 0 && !weight)) return MACKO_BAD_ARGUMENT;
  const BitmapKernels kernels = bitmap_kernels(instructions);
  const BitmapProduct product = without_tokens(*matrix);
  const int64_t cols = matrix->cols;
  want_large_pages(weight, matrix->rows * cols * 2);
  const auto elements_before = [cols](int64_t row) { return row * cols; };
  return for_row_ranges(matrix->rows, threads, elements_before, [&](int64_t first, int64_t last) {
    kernels.unpack(product, cols, first, last, weight + first * cols);
  });
}

extern "C" macko_status macko_cpu_bitmap_spmv(const macko_bitmap* matrix, const void* x, const void* bias, void* y,
                                              int32_t x_dtype, int64_t tokens, int32_t instructions, int32_t threads) {
  using namespace macko;
  if (!is_sound(matrix) || !is_runnable(instructions) || tokens < 0) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y) return MACKO_BAD_ARGUMENT;
  const BitmapKernels kernels = bitmap_kernels(instructions);
  return with_activation(x_dtype, [&](auto activation) {
    return spmv<decltype(activation)>(*matrix, x, bias, y, tokens, kernels, threads);
  });
}
