// Calls every function of macko.h that works on CPUs and compares with naive loops, in float64 where there are
// products. Needs neither Python nor torch, so that it runs under sanitizers (each array is an allocation of its own,
// of exactly the size that macko.h states) and under emulators of other CPUs. Says what differs, and fails.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "macko.h"

namespace {

std::string subject;  // what is being checked

void check(bool is_right, const std::string& what) {
  if (is_right) return;
  std::fprintf(stderr, "check_cpu: %s: %s\n", subject.c_str(), what.c_str());
  std::exit(1);
}

template <typename T>
struct Array {
  int64_t size;
  std::unique_ptr<T[]> data;

  // Filled with bytes that no result consists of.
  explicit Array(int64_t size) : size(size), data(new T[static_cast<size_t>(size)]) {
    std::fill_n(reinterpret_cast<uint8_t*>(data.get()), static_cast<size_t>(size) * sizeof(T), uint8_t{0xa5});
  }
  explicit Array(const std::vector<T>& items) : Array(static_cast<int64_t>(items.size())) {
    std::copy(items.begin(), items.end(), data.get());
  }
  T* get() const { return data.get(); }
  T& operator[](int64_t at) const { return data[static_cast<size_t>(at)]; }
};

template <typename T>
void check_same(const Array<T>& got, const std::vector<T>& expected, const std::string& what) {
  check(got.size == static_cast<int64_t>(expected.size()), what + " has another length");
  for (int64_t i = 0; i < got.size; ++i) {
    if (got[i] != expected[i]) check(false, what + " differs at " + std::to_string(i));
  }
}

const char* const kDtypes[] = {"float16", "bfloat16", "float32"};
#ifdef __aarch64__
const char* const kInstructions[] = {"portable", "NEON"};
#else
const char* const kInstructions[] = {"portable", "AVX2", "AVX-512"};
#endif

// The number that 16 bits stand for.
double number_of(uint16_t bits, int dtype) {
  const int places = dtype == MACKO_FLOAT16 ? 10 : 7, bias = dtype == MACKO_FLOAT16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> places, mantissa = bits & ((1 << places) - 1);
  const int largest = (0x7fff >> places);
  double magnitude;
  if (exponent == largest) {
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, 1 - bias - places);
  } else {
    magnitude = std::ldexp(mantissa + (1 << places), exponent - bias - places);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

// An array of numbers of any of the three dtypes.
struct Numbers {
  int dtype;
  Array<uint8_t> bytes;

  Numbers(int dtype, int64_t count) : dtype(dtype), bytes(count * (dtype == MACKO_FLOAT32 ? 4 : 2)) {}
  void* get() const { return bytes.get(); }
  void set_not_finite(int64_t i, float number) const {
    if (dtype == MACKO_FLOAT32) {
      reinterpret_cast<float*>(bytes.get())[i] = number;
    } else {
      const uint16_t infinity = dtype == MACKO_FLOAT16 ? 0x7c00 : 0x7f80;
      reinterpret_cast<uint16_t*>(bytes.get())[i] =
          static_cast<uint16_t>(infinity | std::signbit(number) << 15 | std::isnan(number) << 6);
    }
  }
  double at(int64_t i) const {
    return dtype == MACKO_FLOAT32 ? reinterpret_cast<const float*>(bytes.get())[i]
                                  : number_of(reinterpret_cast<const uint16_t*>(bytes.get())[i], dtype);
  }
};

std::mt19937 engine(20261126);
uint32_t below(uint32_t end) { return static_cast<uint32_t>(engine() % end); }

// Between 2^-5 and 8, of either sign: no sum overflows.
uint16_t random_half(int dtype) {
  const uint32_t places = dtype == MACKO_FLOAT16 ? 10 : 7, bias = dtype == MACKO_FLOAT16 ? 15 : 127;
  return static_cast<uint16_t>(below(2) << 15 | (bias - 5 + below(8)) << places | below(1u << places));
}

Numbers random_numbers(int dtype, int64_t count) {
  Numbers numbers(dtype, count);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == MACKO_FLOAT32) {
      reinterpret_cast<float*>(numbers.get())[i] = static_cast<float>(static_cast<int32_t>(engine())) * 0x1p-30f;
    } else {
      reinterpret_cast<uint16_t*>(numbers.get())[i] = random_half(dtype);
    }
  }
  return numbers;
}

// The canonical arrays, as docs/format.md writes them.
struct Canonical {
  std::vector<uint16_t> values;
  std::vector<uint8_t> deltas;
  std::vector<int32_t> row_offsets{0};
  std::vector<int64_t> spans;
};

Canonical packed_naively(const std::vector<uint16_t>& weight, int64_t rows, int64_t cols) {
  Canonical packed;
  std::vector<uint8_t> nibbles;
  const auto put = [&](uint16_t value, int64_t delta) {
    packed.values.push_back(value);
    nibbles.push_back(static_cast<uint8_t>(delta));
  };
  for (int64_t row = 0; row < rows; ++row) {
    int64_t next = 0;  // the column behind the last entry's
    for (int64_t column = 0; column < cols; ++column) {
      const uint16_t value = weight[row * cols + column];
      if (value == 0 || value == 0x8000) continue;
      for (; column - next > 15; next += 16) put(0, 15);
      put(value, column - next);
      next = column + 1;
    }
    packed.spans.push_back(next);
    packed.row_offsets.push_back(static_cast<int32_t>(packed.values.size()));
  }
  while (packed.values.size() % 8) put(0, 0);
  for (size_t i = 0; i < nibbles.size(); i += 2) {
    packed.deltas.push_back(static_cast<uint8_t>(nibbles[i] | nibbles[i + 1] << 4));
  }
  return packed;
}

// x W^T + bias in float64, and how far from it float32 sums may be.
struct Product {
  std::vector<double> sums, margins;  // [tokens][rows]

  Product(const std::vector<uint16_t>& weight, int value_dtype, int64_t rows, int64_t cols, const Numbers& x,
          const Numbers* bias, int64_t tokens) {
    std::vector<double> wide(weight.size()), inputs(static_cast<size_t>(tokens * cols));
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = number_of(weight[i], value_dtype);
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

struct Bitmap {
  Array<uint16_t> values;
  Array<uint32_t> masks;
  Array<int32_t> row_starts;
  macko_bitmap matrix;

  Bitmap(const Array<uint16_t>& packed_values, const Array<uint8_t>& deltas, const Array<int32_t>& row_offsets,
         int64_t rows, int64_t cols, int dtype, int set, int threads)
      : values(0), masks(rows * ((cols + 31) / 32)), row_starts(rows + 1) {
    check(macko_cpu_bitmap_starts(packed_values.get(), row_offsets.get(), rows, row_starts.get(), threads) == MACKO_OK,
          "macko_cpu_bitmap_starts");
    values = Array<uint16_t>(row_starts[rows] + 32);
    matrix = {values.get(), masks.get(), row_starts.get(), static_cast<int32_t>(rows), static_cast<int32_t>(cols),
              dtype,        -1};
    check(
        macko_cpu_bitmap_fill(packed_values.get(), deltas.get(), row_offsets.get(), &matrix, set, threads) == MACKO_OK,
        "macko_cpu_bitmap_fill");
  }
};

void check_bitmap_arrays(const Bitmap& bitmap, const std::vector<uint16_t>& weight, int64_t rows, int64_t cols) {
  std::vector<uint16_t> values;
  std::vector<uint32_t> masks(static_cast<size_t>(bitmap.masks.size), 0);
  std::vector<int32_t> starts{0};
  int32_t smallest = 0x7f80;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < cols; ++column) {
      const uint16_t value = weight[row * cols + column];
      if ((value & 0x7fff) == 0) continue;
      values.push_back(value);
      masks[row * ((cols + 31) / 32) + column / 32] |= 1u << column % 32;
      smallest = std::min<int32_t>(smallest, value & 0x7fff);
    }
    starts.push_back(static_cast<int32_t>(values.size()));
  }
  values.resize(values.size() + 32, 0);
  check_same(bitmap.values, values, "the bitmap's values");
  check_same(bitmap.masks, masks, "the bitmap's masks");
  check_same(bitmap.row_starts, starts, "the bitmap's row starts");
  check(bitmap.matrix.smallest == smallest, "the bitmap's smallest value is another");
}

// The strips of a bitmap.
struct Strips {
  Array<uint8_t> lengths, row_ids, groups;
  Array<int64_t> chunk_starts;
  macko_strips matrix;

  Strips(const Bitmap& bitmap, int64_t rows, int64_t cols, int threads)
      : lengths((rows + 255) / 256 * ((cols + 127) / 128) * 16),
        row_ids((rows + 255) / 256 * ((cols + 127) / 128) * 256),
        groups(0),
        chunk_starts((rows + 255) / 256 + 1) {
    const macko_bitmap& bits = bitmap.matrix;
    matrix = {nullptr, lengths.get(), row_ids.get(), chunk_starts.get(), bits.rows, bits.cols, bits.value_dtype, -1};
    check(macko_cpu_strips_plan(&bits, &matrix, threads) == MACKO_OK, "macko_cpu_strips_plan");
    groups = Array<uint8_t>(chunk_starts[chunk_starts.size - 1] * 96);
    matrix.groups = groups.get();
    check(macko_cpu_strips_fill(&bits, &matrix, threads) == MACKO_OK, "macko_cpu_strips_fill");
  }
};

// Both layouts of a matrix, whose products are to be had in one way.
struct Layouts {
  Bitmap bitmap;
  Strips strips;

  Layouts(const std::vector<uint16_t>& weight, int64_t rows, int64_t cols, int dtype)
      : Layouts(packed_naively(weight, rows, cols), rows, cols, dtype) {}
  Layouts(const Canonical& packed, int64_t rows, int64_t cols, int dtype)
      : bitmap(Array<uint16_t>(packed.values), Array<uint8_t>(packed.deltas), Array<int32_t>(packed.row_offsets), rows,
               cols, dtype, MACKO_PORTABLE, 1),
        strips(bitmap, rows, cols, 1) {}

  macko_status spmv(bool by_strips, const void* x, void* y, int x_dtype, int64_t tokens, int set) const {
    return by_strips ? macko_cpu_strips_spmv(&strips.matrix, x, nullptr, y, x_dtype, tokens, set, 1)
                     : macko_cpu_bitmap_spmv(&bitmap.matrix, x, nullptr, y, x_dtype, tokens, set, 1);
  }
};

int32_t largest_magnitude(const std::vector<uint16_t>& weight) {
  int32_t largest = 0;
  for (const uint16_t value : weight) largest = std::max<int32_t>(largest, value & 0x7fff);
  return largest;
}

// All functions, with one matrix.
void check_matrix(const std::vector<uint16_t>& weight, int64_t rows, int64_t cols, int dtype,
                  const std::vector<int64_t>& token_counts, int threads) {
  const std::string shape = std::to_string(rows) + " x " + std::to_string(cols) + " " + kDtypes[dtype] + ", " +
                            std::to_string(threads) + " threads";
  subject = shape;
  const Canonical expected = packed_naively(weight, rows, cols);
  const Array<uint16_t> dense(weight);
  const int32_t largest = largest_magnitude(weight);
  const int64_t padded = static_cast<int64_t>(expected.values.size());
  const Array<int32_t> row_offsets(rows + 1);
  const Array<uint16_t> values(padded);
  const Array<uint8_t> deltas(padded / 2);
  for (int set = 0; set <= macko_cpu_instructions(); ++set) {
    subject = shape + ", " + kInstructions[set];
    int32_t found = -1;
    check(macko_cpu_row_offsets(dense.get(), rows, cols, row_offsets.get(), &found, set, threads) == MACKO_OK,
          "macko_cpu_row_offsets");
    check_same(row_offsets, expected.row_offsets, "row_offsets");
    check(found == largest, "the largest magnitude is another");
    check(macko_cpu_pack(dense.get(), rows, cols, row_offsets.get(), values.get(), deltas.get(), set, threads) ==
              MACKO_OK,
          "macko_cpu_pack");
    check_same(values, expected.values, "values");
    check_same(deltas, expected.deltas, "deltas");
  }
  subject = shape;
  const Array<int64_t> spans(rows);
  check(macko_cpu_row_spans(deltas.get(), row_offsets.get(), rows, spans.get()) == MACKO_OK, "macko_cpu_row_spans");
  check_same(spans, expected.spans, "spans");

  std::vector<uint16_t> positive = weight;
  std::replace(positive.begin(), positive.end(), uint16_t{0x8000}, uint16_t{0});
  const Array<uint16_t> unpacked(rows * cols);
  check(
      macko_cpu_unpack(values.get(), deltas.get(), row_offsets.get(), rows, cols, unpacked.get(), threads) == MACKO_OK,
      "macko_cpu_unpack");
  check_same(unpacked, positive, "the unpacked matrix");

  for (int set = 0; set <= macko_cpu_instructions(); ++set) {
    subject = shape + ", " + kInstructions[set];
    const Bitmap bitmap(values, deltas, row_offsets, rows, cols, dtype, set, threads);
    check_bitmap_arrays(bitmap, weight, rows, cols);
    const Array<uint16_t> back(rows * cols);
    check(macko_cpu_bitmap_unpack(&bitmap.matrix, back.get(), set, threads) == MACKO_OK, "macko_cpu_bitmap_unpack");
    check_same(back, positive, "the bitmap's dense matrix");
  }

  const Bitmap bitmap(values, deltas, row_offsets, rows, cols, dtype, MACKO_PORTABLE, threads);
  const Strips strips(bitmap, rows, cols, threads);
  subject = shape;
  const Array<uint16_t> back(rows * cols);
  check(macko_cpu_strips_unpack(&strips.matrix, 0, rows, back.get(), threads) == MACKO_OK, "macko_cpu_strips_unpack");
  check_same(back, positive, "the strips' dense matrix");
  for (int x_dtype = MACKO_FLOAT16; x_dtype <= MACKO_FLOAT32; ++x_dtype) {
    for (const int64_t tokens : token_counts) {
      const Numbers x = random_numbers(x_dtype, tokens * cols), some_bias = random_numbers(x_dtype, rows);
      const Numbers* bias = tokens % 2 ? &some_bias : nullptr;
      const Product expected_product(weight, dtype, rows, cols, x, bias, tokens);
      const std::string with = shape + ", " + std::to_string(tokens) + " tokens of " + kDtypes[x_dtype] + ", ";
      for (int set = -1; set <= macko_cpu_instructions(); ++set) {
        subject = with + (set < 0 ? "canonical" : kInstructions[set]);
        const Numbers y(x_dtype, tokens * rows);
        const void* start = bias ? bias->get() : nullptr;
        const macko_status status =
            set < 0 ? macko_cpu_spmv(values.get(), dtype, deltas.get(), row_offsets.get(), rows, cols, x.get(), start,
                                     y.get(), x_dtype, tokens, threads)
                    : macko_cpu_bitmap_spmv(&bitmap.matrix, x.get(), start, y.get(), x_dtype, tokens, set, threads);
        check(status == MACKO_OK, "SpMV refuses");
        expected_product.check_against(y);
        if (set < 0) continue;
        subject += ", strips";
        const Numbers of_strips(x_dtype, tokens * rows);
        check(macko_cpu_strips_spmv(&strips.matrix, x.get(), start, of_strips.get(), x_dtype, tokens, set, threads) ==
                  MACKO_OK,
              "SpMV refuses");
        expected_product.check_against(of_strips);
      }
    }
  }
}

// Rows that are empty and full among others, and zeros of both signs.
std::vector<uint16_t> random_weight(int64_t rows, int64_t cols, int dtype, uint32_t kept_percent) {
  std::vector<uint16_t> weight(static_cast<size_t>(rows * cols));
  for (int64_t row = 0; row < rows; ++row) {
    const uint32_t kept = row % 5 == 1 ? 0 : row % 5 == 3 ? 100 : kept_percent;
    for (int64_t column = 0; column < cols; ++column) {
      weight[row * cols + column] = below(100) < kept ? random_half(dtype) : static_cast<uint16_t>(below(2) << 15);
    }
  }
  return weight;
}

// Each finite value times one, and one times each: subnormal numbers, the largest and all between are exact.
void check_every_half(int dtype) {
  std::vector<uint16_t> column;
  for (int bits = 0; bits < 0x10000; ++bits) {
    if (std::isfinite(number_of(static_cast<uint16_t>(bits), dtype))) column.push_back(static_cast<uint16_t>(bits));
  }
  const int64_t count = static_cast<int64_t>(column.size());
  const uint16_t one = dtype == MACKO_FLOAT16 ? 0x3c00 : 0x3f80;
  const Layouts all(column, count, 1, dtype), ones({one}, 1, 1, dtype);
  const Array<uint16_t> x(column), single(std::vector<uint16_t>{one}), y(count);
  for (int set = 0; set <= macko_cpu_instructions(); ++set) {
    for (const bool by_strips : {false, true}) {
      for (const bool is_weight : {true, false}) {
        subject = std::string("every ") + kDtypes[dtype] + (is_weight ? " as a weight, " : " as x, ") +
                  kInstructions[set] + (by_strips ? ", strips" : "");
        const macko_status status = is_weight ? all.spmv(by_strips, single.get(), y.get(), dtype, 1, set)
                                              : ones.spmv(by_strips, x.get(), y.get(), dtype, count, set);
        check(status == MACKO_OK, "SpMV refuses");
        for (int64_t i = 0; i < count; ++i) {
          const bool is_same = number_of(y[i], dtype) == number_of(column[i], dtype);
          if (!is_same) check(false, "bits " + std::to_string(column[i]) + " change");
        }
      }
    }
  }
}

// Rows spoil that have nothing at its column, too.
void check_tokens_that_are_not_finite(int dtype) {
  const int64_t rows = 3, cols = 45;
  std::vector<uint16_t> weight(rows * cols, 0);
  weight[4] = weight[cols + 44] = random_half(dtype);  // and an empty row
  const Canonical packed = packed_naively(weight, rows, cols);
  const Array<uint16_t> values(packed.values);
  const Array<uint8_t> deltas(packed.deltas);
  const Array<int32_t> row_offsets(packed.row_offsets);
  const Layouts layouts(packed, rows, cols, dtype);
  for (int x_dtype = MACKO_FLOAT16; x_dtype <= MACKO_FLOAT32; ++x_dtype) {
    for (const float spoilt : {INFINITY, -INFINITY, NAN}) {
      const Numbers x = random_numbers(x_dtype, 2 * cols), y(x_dtype, 2 * rows);
      x.set_not_finite(cols + 7, spoilt);
      const auto check_outputs = [&](const std::string& by, macko_status status) {
        subject = std::string("a token that is not finite, ") + kDtypes[x_dtype] + ", " + by;
        check(status == MACKO_OK, "SpMV refuses");
        for (int64_t row = 0; row < rows; ++row) {
          check(std::isfinite(y.at(row)), "the token before it is spoilt");
          check(std::isnan(y.at(rows + row)), "it has a finite output");
        }
      };
      check_outputs("canonical", macko_cpu_spmv(values.get(), dtype, deltas.get(), row_offsets.get(), rows, cols,
                                                x.get(), nullptr, y.get(), x_dtype, 2, 1));
      for (int set = 0; set <= macko_cpu_instructions(); ++set) {
        for (const bool by_strips : {false, true}) {
          check_outputs(std::string(kInstructions[set]) + (by_strips ? ", strips" : ""),
                        layouts.spmv(by_strips, x.get(), y.get(), x_dtype, 2, set));
        }
      }
    }
  }
}

// Whole chunks out of the middle, and the rest behind them, are the rows of the whole.
void check_parts_of_strips(int dtype) {
  subject = "parts of strips";
  const int64_t rows = 600, cols = 130;
  const std::vector<uint16_t> weight = random_weight(rows, cols, dtype, 20);
  const Layouts layouts(weight, rows, cols, dtype);
  const macko_strips* matrix = &layouts.strips.matrix;
  const auto unpack = [&](int64_t first, int64_t last, uint16_t* out) {
    return macko_cpu_strips_unpack(matrix, first, last, out, 2);
  };
  const Array<uint16_t> whole(rows * cols);
  check(unpack(0, rows, whole.get()) == MACKO_OK, "macko_cpu_strips_unpack");
  for (const int64_t first : {0, 256, 512}) {
    for (const int64_t last : {int64_t{256}, int64_t{512}, rows}) {
      if (first >= last) continue;
      const Array<uint16_t> part((last - first) * cols);
      check(unpack(first, last, part.get()) == MACKO_OK, "macko_cpu_strips_unpack");
      check_same(part, std::vector<uint16_t>(&whole[first * cols], &whole[first * cols] + (last - first) * cols),
                 "a part of the dense matrix");
    }
  }
  const std::vector<std::pair<int64_t, int64_t>> refused = {{1, 256},   {0, 255},  {256, 300},
                                                            {512, 768}, {-256, 0}, {512, 256}};
  for (const auto& [first, last] : refused) {
    check(unpack(first, last, whole.get()) == MACKO_BAD_ARGUMENT, "rows that are no chunks are not refused");
  }
}

void check_refusals() {
  subject = "arguments that make no sense";
  const Layouts layouts(random_weight(3, 5, MACKO_FLOAT16, 50), 3, 5, MACKO_FLOAT16);
  const Array<float> x(std::vector<float>(5, 1.f)), y(3);
  for (const bool by_strips : {false, true}) {
    const auto is_refused = [&](const void* in, void* out, int x_dtype, int64_t tokens, int set) {
      return layouts.spmv(by_strips, in, out, x_dtype, tokens, set) == MACKO_BAD_ARGUMENT;
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

// What stands in for an OpenMP runtime.
void team_of_threads(void (*function)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(function, data);
  function(data);
  for (std::thread& thread : others) thread.join();
}

}  // namespace

int main() {
  check(macko_abi_version() == MACKO_ABI_VERSION, "the library is of another version");
  for (const int dtype : {MACKO_FLOAT16, MACKO_BFLOAT16}) {
    const auto random = [&](int64_t rows, int64_t cols, uint32_t kept, const std::vector<int64_t>& tokens,
                            int threads) {
      check_matrix(random_weight(rows, cols, dtype, kept), rows, cols, dtype, tokens, threads);
    };
    std::vector<int64_t> tokens;
    for (int64_t count = 0; count <= 17; ++count) tokens.push_back(count);
    random(0, 3, 50, {1}, 1);
    check_matrix({random_half(dtype)}, 1, 1, dtype, tokens, 4);
    check_matrix({0x8000}, 1, 1, dtype, tokens, 4);
    for (const int64_t cols : {2, 7, 8, 31, 32, 33, 63, 64, 65, 172}) random(7, cols, 50, {1, 2, 3}, 2);
    random(9, 172, 50, tokens, 4);
    for (const int64_t rows : {255, 256, 257, 530}) random(rows, 129, 10, {1, 2}, 2);  // chunks of strips
    for (const uint32_t kept : {1, 10, 90, 100}) random(5, 1001, kept, {1, 5}, 4);
    random(1100, 1210, 40, {1, 2}, 3);  // enough for threads of its own
    std::vector<uint16_t> one_row(18 * 131072, 0);
    std::generate_n(one_row.begin() + 16 * 131072, 131072, [&] { return random_half(dtype); });
    check_matrix(one_row, 18, 131072, dtype, {1}, 8);
    macko_cpu_use_openmp(reinterpret_cast<void*>(team_of_threads));
    random(3, 70003, 50, {1, 4}, 8);  // fewer rows than threads
    random(150, 1003, 50, {1, 4}, 4);
    macko_cpu_use_openmp(nullptr);
    check_every_half(dtype);
    check_tokens_that_are_not_finite(dtype);
    check_parts_of_strips(dtype);
  }
  check_refusals();
  std::printf("check_cpu: all as it should be, up to %s\n", kInstructions[macko_cpu_instructions()]);
  return 0;
}
