// Unpacking on the CPU, and the spans that validation needs.
#include <algorithm>

#include "cpu/parallel.h"
#include "format.h"
#include "macko.h"

extern "C" macko_status macko_cpu_unpack(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                         int64_t rows, int64_t cols, uint16_t* weight, int32_t threads) {
  using namespace macko;
  if (rows < 0 || cols < 1 || !row_offsets || (rows > 0 && !weight)) return MACKO_BAD_ARGUMENT;
  if (row_offsets[rows] > 0 && (!values || !deltas)) return MACKO_BAD_ARGUMENT;
  const auto elements_before = [cols](int64_t row) { return row * cols; };
  return for_row_ranges(rows, threads, elements_before, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      uint16_t* target = weight + row * cols;
      std::fill(target, target + cols, uint16_t{0});
      int64_t column = -1;
      for (int64_t entry = row_offsets[row]; entry < row_offsets[row + 1]; ++entry) {
        column += delta_at(deltas, entry) + 1;
        target[column] = values[entry];
      }
    }
  });
}

extern "C" macko_status macko_cpu_row_spans(const uint8_t* deltas, const int32_t* row_offsets, int64_t rows,
                                            int64_t* spans) {
  using namespace macko;
  if (rows < 0 || !row_offsets || (rows > 0 && !spans) || (row_offsets[rows] > 0 && !deltas)) return MACKO_BAD_ARGUMENT;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t span = 0;
    for (int64_t entry = row_offsets[row]; entry < row_offsets[row + 1]; ++entry) span += delta_at(deltas, entry) + 1;
    spans[row] = span;
  }
  return MACKO_OK;
}
