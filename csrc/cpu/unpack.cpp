// Unpacking on the CPU, and the spans that validation needs.
#include "cpu/unpack.h"

#include <algorithm>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

// How far each of the eight entries whose deltas are these four bytes stands behind the entry before them, a byte each.
uint64_t steps_of(const uint8_t* deltas) {
  uint64_t steps = deltas[0] | deltas[1] << 8 | deltas[2] << 16 | uint64_t{deltas[3]} << 24;
  steps = (steps | steps << 16) & 0x0000ffff0000ffffu;
  steps = (steps | steps << 8) & 0x00ff00ff00ff00ffu;
  steps = (steps | steps << 4) & 0x0f0f0f0f0f0f0f0fu;
  constexpr uint64_t kOnes = 0x0101010101010101u;
  return (steps + kOnes) * kOnes;  // the sum of each byte and those below, at most 128
}

}  // namespace

void unpack_row(const uint16_t* values, const uint8_t* deltas, int64_t entry, int64_t last, int64_t cols,
                uint16_t* row) {
  std::fill(row, row + cols, uint16_t{0});
  int64_t column = -1;
  const auto put_one = [&] {
    column += delta_at(deltas, entry) + 1;
    row[column] = values[entry++];
  };
  if (entry % 2 && entry < last) put_one();
  for (; entry + 8 <= last; entry += 8) {
    const uint64_t steps = steps_of(deltas + entry / 2);
    for (int i = 0; i < 8; ++i) row[column + static_cast<int64_t>(steps >> 8 * i & 0xff)] = values[entry + i];
    column += static_cast<int64_t>(steps >> 56);
  }
  while (entry < last) put_one();
}

}  // namespace macko

extern "C" macko_status macko_cpu_unpack(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                         int64_t rows, int64_t cols, uint16_t* weight, int32_t threads) {
  using namespace macko;
  if (rows < 0 || cols < 1 || !row_offsets || (rows > 0 && !weight)) return MACKO_BAD_ARGUMENT;
  if (row_offsets[rows] > 0 && (!values || !deltas)) return MACKO_BAD_ARGUMENT;
  want_large_pages(weight, rows * cols * 2);
  const auto elements_before = [cols](int64_t row) { return row * cols; };
  return for_row_ranges(rows, threads, elements_before, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      unpack_row(values, deltas, row_offsets[row], row_offsets[row + 1], cols, weight + row * cols);
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
