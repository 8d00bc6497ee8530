// Products in every layout, with every set of instructions, against naive ones in float64.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "layouts.h"

namespace {

// x W^T + bias in float64, and how far from it float32 sums may be.
struct Product {
  std::vector<double> sums, margins;  // [tokens][rows]

  Product(const Matrix& matrix, const Numbers& x, const Numbers* bias, int64_t tokens) {
    const int64_t rows = matrix.rows, cols = matrix.cols;
    std::vector<double> wide(matrix.weight.size()), inputs(static_cast<size_t>(tokens * cols));
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = number_of(matrix.weight[i], matrix.dtype);
    for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = x.at(static_cast<int64_t>(i));
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t row = 0; row < rows; ++row) {
        double sum = bias ? bias->at(row) : 0., size = std::abs(sum);
        int64_t terms = 2;
        for (int64_t column = 0; column < cols; ++column) {
          const double product = wide[row * cols + column] * inputs[token * cols + column];
          sum += product, size += std::abs(product), terms += product != 0;
        }
        sums.push_back(sum);
        margins.push_back(static_cast<double>(terms) * 0x1p-24 * size);
      }
    }
  }

  // Rounded once more, to y's dtype.
  void check_against(const Numbers& y) const {
    const double unit = y.dtype == MACKO_FLOAT16 ? 0x1p-11 : y.dtype == MACKO_BFLOAT16 ? 0x1p-8 : 0x1p-24;
    for (size_t i = 0; i < sums.size(); ++i) {
      const double off = std::abs(y.at(static_cast<int64_t>(i)) - sums[i]);
      const bool is_near = off <= margins[i] + std::abs(sums[i]) * unit + 0x1p-25;  // not so where off is NaN
      if (!is_near) check(false, "y differs at " + std::to_string(i) + " by " + std::to_string(off));
    }
  }
};

}  // namespace

void check_products(const Matrix& matrix, const Layouts& layouts, const std::vector<int64_t>& token_counts,
                    int threads) {
  for (int x_dtype = MACKO_FLOAT16; x_dtype <= MACKO_FLOAT32; ++x_dtype) {
    for (const int64_t tokens : token_counts) {
      const Numbers x = random_numbers(x_dtype, tokens * matrix.cols), some_bias = random_numbers(x_dtype, matrix.rows);
      const Numbers* bias = tokens % 2 ? &some_bias : nullptr;
      const Product expected(matrix, x, bias, tokens);
      const About about(std::to_string(tokens) + " tokens of " + kDtypes[x_dtype]);
      for (const Layout* layout : layouts.all()) {
        for (int set = 0; set <= layout->last_set; ++set) {
          const About by(std::string(layout->name) + ", " + kInstructions[set]);
          const Numbers y(x_dtype, tokens * matrix.rows);
          check(layout->spmv(x.get(), bias ? bias->get() : nullptr, y.get(), x_dtype, tokens, set, threads) == MACKO_OK,
                "SpMV refuses");
          expected.check_against(y);
        }
      }
    }
  }
}

// Each finite value times one, and one times each: subnormal numbers, the largest and all between are exact.
void check_every_half(int dtype) {
  std::vector<uint16_t> column;
  for (int bits = 0; bits < 0x10000; ++bits) {
    if (std::isfinite(number_of(static_cast<uint16_t>(bits), dtype))) column.push_back(static_cast<uint16_t>(bits));
  }
  const int64_t count = static_cast<int64_t>(column.size());
  const uint16_t one = dtype == MACKO_FLOAT16 ? 0x3c00 : 0x3f80;
  const Layouts all({count, 1, dtype, column}), ones({1, 1, dtype, {one}});
  const Array<uint16_t> x(column), single(std::vector<uint16_t>{one}), y(count);
  const auto check_exact = [&](const Layouts& layouts, const Array<uint16_t>& in, int64_t tokens) {
    for (const Layout* layout : layouts.all()) {
      for (int set = 0; set <= layout->last_set; ++set) {
        const About by(std::string(layout->name) + ", " + kInstructions[set]);
        check(layout->spmv(in.get(), nullptr, y.get(), dtype, tokens, set, 1) == MACKO_OK, "SpMV refuses");
        for (int64_t i = 0; i < count; ++i) {
          const bool is_same = number_of(y[i], dtype) == number_of(column[i], dtype);
          if (!is_same) check(false, "bits " + std::to_string(column[i]) + " change");
        }
      }
    }
  };
  const About about(std::string("every ") + kDtypes[dtype]);
  {
    const About as("as a weight");
    check_exact(all, single, 1);
  }
  const About as("as x");
  check_exact(ones, x, count);
}

// Rows spoil that have nothing at its column, too.
void check_tokens_that_are_not_finite(int dtype) {
  const int64_t rows = 3, cols = 45;
  Matrix matrix{rows, cols, dtype, std::vector<uint16_t>(rows * cols, 0)};
  matrix.weight[4] = matrix.weight[cols + 44] = random_half(dtype);  // and an empty row
  const Layouts layouts(matrix);
  for (int x_dtype = MACKO_FLOAT16; x_dtype <= MACKO_FLOAT32; ++x_dtype) {
    for (const float spoilt : {INFINITY, -INFINITY, NAN}) {
      const Numbers x = random_numbers(x_dtype, 2 * cols), y(x_dtype, 2 * rows);
      x.set_not_finite(cols + 7, spoilt);
      const About about(std::string("a token that is not finite, ") + kDtypes[x_dtype]);
      for (const Layout* layout : layouts.all()) {
        for (int set = 0; set <= layout->last_set; ++set) {
          const About by(std::string(layout->name) + ", " + kInstructions[set]);
          check(layout->spmv(x.get(), nullptr, y.get(), x_dtype, 2, set, 1) == MACKO_OK, "SpMV refuses");
          for (int64_t row = 0; row < rows; ++row) {
            check(std::isfinite(y.at(row)), "the token before it is spoilt");
            check(std::isnan(y.at(rows + row)), "it has a finite output");
          }
        }
      }
    }
  }
}

void check_refusals() {
  const About about("arguments that make no sense");
  const Layouts layouts(random_matrix(3, 5, MACKO_FLOAT16, 50));
  const Array<float> x(std::vector<float>(5, 1.f)), y(3);
  for (const Layout* layout :
       {static_cast<const Layout*>(&layouts.bitmap), static_cast<const Layout*>(&layouts.strips)}) {
    const About by(layout->name);
    const auto is_refused = [&](const void* in, void* out, int x_dtype, int64_t tokens, int set) {
      return layout->spmv(in, nullptr, out, x_dtype, tokens, set, 1) == MACKO_BAD_ARGUMENT;
    };
    check(!is_refused(x.get(), y.get(), MACKO_FLOAT32, 1, MACKO_PORTABLE), "those that make sense are refused");
    check(is_refused(nullptr, y.get(), MACKO_FLOAT32, 1, MACKO_PORTABLE), "no x");
    check(is_refused(x.get(), nullptr, MACKO_FLOAT32, 1, MACKO_PORTABLE), "no y");
    check(is_refused(x.get(), y.get(), MACKO_FLOAT32 + 1, 1, MACKO_PORTABLE), "an unknown dtype of x");
    check(is_refused(x.get(), y.get(), MACKO_FLOAT32, -1, MACKO_PORTABLE), "fewer than no tokens");
    check(is_refused(x.get(), y.get(), MACKO_FLOAT32, 1, -1), "less than portable instructions");
    check(is_refused(x.get(), y.get(), MACKO_FLOAT32, 1, macko_cpu_instructions() + 1),
          "instructions that are not there");
  }
}
