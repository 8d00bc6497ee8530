// A matrix in each of the layouts that CPUs multiply, and what is checked of each; layouts are made by the library,
// the canonical arrays by naive loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "macko.h"

struct Matrix {
  int64_t rows, cols;
  int dtype;
  std::vector<uint16_t> weight;  // [rows][cols]

  // What unpacking gives: zeros have one sign.
  std::vector<uint16_t> unpacked() const {
    std::vector<uint16_t> positive = weight;
    std::replace(positive.begin(), positive.end(), uint16_t{0x8000}, uint16_t{0});
    return positive;
  }
};

// Rows that are empty and full among others, and zeros of both signs.
inline Matrix random_matrix(int64_t rows, int64_t cols, int dtype, uint32_t kept_percent) {
  std::vector<uint16_t> weight(static_cast<size_t>(rows * cols));
  for (int64_t row = 0; row < rows; ++row) {
    const uint32_t kept = row % 5 == 1 ? 0 : row % 5 == 3 ? 100 : kept_percent;
    for (int64_t column = 0; column < cols; ++column) {
      weight[row * cols + column] = below(100) < kept ? random_half(dtype) : static_cast<uint16_t>(below(2) << 15);
    }
  }
  return {rows, cols, dtype, weight};
}

struct Layout {
  const char* const name;
  const int last_set;  // of the instructions that it can be multiplied with

  Layout(const char* name, int last_set) : name(name), last_set(last_set) {}
  virtual ~Layout() = default;
  virtual macko_status spmv(const void* x, const void* bias, void* y, int x_dtype, int64_t tokens, int set,
                            int threads) const = 0;
};

struct Canonical : Layout {
  const int64_t rows, cols;
  const int dtype;
  Array<uint16_t> values;
  Array<uint8_t> deltas;
  Array<int32_t> row_offsets;
  Array<int64_t> spans;

  explicit Canonical(const Matrix& matrix);
  macko_status spmv(const void* x, const void* bias, void* y, int x_dtype, int64_t tokens, int set,
                    int threads) const override;
};

struct Bitmap : Layout {
  Array<uint16_t> values;
  Array<uint32_t> masks;
  Array<int32_t> row_starts;
  macko_bitmap matrix;

  Bitmap(const Canonical& packed, int set, int threads);
  macko_status spmv(const void* x, const void* bias, void* y, int x_dtype, int64_t tokens, int set,
                    int threads) const override;
};

struct Strips : Layout {
  Array<uint8_t> lengths, row_ids, groups;
  Array<int64_t> chunk_starts;
  macko_strips matrix;

  Strips(const Bitmap& bitmap, int threads);
  macko_status spmv(const void* x, const void* bias, void* y, int x_dtype, int64_t tokens, int set,
                    int threads) const override;
};

struct Layouts {
  Canonical canonical;
  Bitmap bitmap;
  Strips strips;

  explicit Layouts(const Matrix& matrix, int threads = 1)
      : canonical(matrix), bitmap(canonical, MACKO_PORTABLE, threads), strips(bitmap, threads) {}
  std::vector<const Layout*> all() const { return {&canonical, &bitmap, &strips}; }
};

void check_canonical(const Matrix& matrix, const Canonical& expected, int threads);
void check_bitmap(const Matrix& matrix, const Canonical& packed, int threads);
void check_strips(const Matrix& matrix, const Strips& strips, int threads);
void check_parts_of_strips(int dtype);

void check_products(const Matrix& matrix, const Layouts& layouts, const std::vector<int64_t>& token_counts,
                    int threads);
void check_every_half(int dtype);
void check_tokens_that_are_not_finite(int dtype);
void check_refusals();
