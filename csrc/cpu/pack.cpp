// Packing on the CPU, in two passes: count the entries of each row, then write them.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/instructions.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

// The largest magnitude of a row, by its bits, which rise with it.
int32_t largest_of(const uint16_t* row, int64_t cols) {
  int16_t largest = 0;
  for (int64_t column = 0; column < cols; ++column) {
    largest = std::max(largest, static_cast<int16_t>(row[column] & 0x7fff));
  }
  return largest;
}

void raise_to(std::atomic<int32_t>& largest, int32_t value) {
  for (int32_t before = largest; before < value && !largest.compare_exchange_weak(before, value);) {
  }
}

// Writes the entries of rows, each by itself. Where two rows share a byte of deltas, the one with its first half writes
// it, so that no two threads write to the same place.
class RowWriter {
 public:
  RowWriter(const uint16_t* weight, int64_t rows, int64_t cols, const int32_t* row_offsets,
            const CompressKernels& kernels)
      : weight_(weight),
        rows_(rows),
        cols_(cols),
        row_offsets_(row_offsets),
        kernels_(kernels),
        row_values_(static_cast<size_t>(cols + kSpill)),
        columns_(static_cast<size_t>(cols + kSpill + 1)) {}

  void write(int64_t row, uint16_t* values, uint8_t* deltas) {
    const int64_t first = row_offsets_[row], last = row_offsets_[row + 1];
    if (first == last) return;
    uint8_t* columns = columns_.data() + 1;
    columns[-1] = kMaxDelta;  // column -1, modulo 16
    kernels_.entries(weight_ + row * cols_, cols_, row_values_.data(), columns);
    std::copy_n(row_values_.data(), last - first, values + first);
    if (last % 2) columns[last - first] = static_cast<uint8_t>(columns[last - first - 1] + 1 + first_delta_after(row));
    const int64_t even = first + first % 2;
    put_deltas(columns + (even - first), (last + 1) / 2 - even / 2, deltas + even / 2);
  }

 private:
  // Deltas are less than 16, so the columns modulo 16 tell them.
  static void put_deltas(const uint8_t* columns, int64_t bytes, uint8_t* deltas) {
    for (int64_t byte = 0; byte < bytes; ++byte, columns += 2) {
      const int low = (columns[0] - columns[-1] - 1) & kMaxDelta, high = (columns[1] - columns[0] - 1) & kMaxDelta;
      deltas[byte] = static_cast<uint8_t>(low | high << kDeltaBits);
    }
  }

  // The delta of the entry that follows a row's last one, 0 if there is none.
  int first_delta_after(int64_t row) const {
    do ++row;
    while (row < rows_ && row_offsets_[row] == row_offsets_[row + 1]);
    if (row >= rows_) return 0;
    const uint16_t* columns = weight_ + row * cols_;
    int delta = 0;
    while (delta < kMaxDelta && is_zero(columns[delta])) ++delta;
    return delta;
  }

  const uint16_t* weight_;
  int64_t rows_, cols_;
  const int32_t* row_offsets_;
  CompressKernels kernels_;
  std::vector<uint16_t> row_values_;
  std::vector<uint8_t> columns_;
};

}  // namespace
}  // namespace macko

extern "C" int32_t macko_abi_version(void) { return MACKO_ABI_VERSION; }

extern "C" macko_status macko_cpu_row_offsets(const uint16_t* weight, int64_t rows, int64_t cols, int32_t* row_offsets,
                                              int32_t* largest, int32_t instructions, int32_t threads) {
  using namespace macko;
  if (rows < 0 || cols < 1 || !row_offsets || !largest || (rows > 0 && !weight) || !is_runnable(instructions)) {
    return MACKO_BAD_ARGUMENT;
  }
  const CompressKernels kernels = compress_kernels(instructions);
  const auto elements_before = [cols](int64_t row) { return row * cols; };
  std::atomic<int32_t> largest_of_all{0};
  const macko_status status = for_row_ranges(rows, threads, elements_before, [&](int64_t first, int64_t last) {
    int32_t own_largest = 0;
    for (int64_t row = first; row < last; ++row) {
      const uint16_t* columns = weight + row * cols;
      own_largest = std::max(own_largest, largest_of(columns, cols));
      row_offsets[row + 1] = static_cast<int32_t>(std::min<int64_t>(kernels.count(columns, cols), INT32_MAX));
    }
    raise_to(largest_of_all, own_largest);
  });
  if (status != MACKO_OK) return status;
  *largest = largest_of_all;
  int64_t total = 0;
  row_offsets[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    total += row_offsets[row + 1];
    if (total > kMaxEntries) return MACKO_TOO_MANY_ENTRIES;
    row_offsets[row + 1] = static_cast<int32_t>(total);
  }
  return MACKO_OK;
}

extern "C" macko_status macko_cpu_pack(const uint16_t* weight, int64_t rows, int64_t cols, const int32_t* row_offsets,
                                       uint16_t* values, uint8_t* deltas, int32_t instructions, int32_t threads) {
  using namespace macko;
  if (rows < 0 || cols < 1 || !row_offsets || (rows > 0 && !weight) || !is_runnable(instructions)) {
    return MACKO_BAD_ARGUMENT;
  }
  const int64_t entries = row_offsets[rows];
  if (entries > 0 && (!values || !deltas)) return MACKO_BAD_ARGUMENT;
  const CompressKernels kernels = compress_kernels(instructions);
  const int64_t padded = (entries + kEntryAlignment - 1) / kEntryAlignment * kEntryAlignment;
  want_large_pages(values, padded * 2);
  want_large_pages(deltas, padded / 2);
  std::fill(values + entries, values + padded, uint16_t{0});
  std::fill(deltas + (entries + 1) / 2, deltas + padded / 2, uint8_t{0});
  const auto elements_before = [cols](int64_t row) { return row * cols; };
  return for_row_ranges(rows, threads, elements_before, [&](int64_t first, int64_t last) {
    RowWriter writer(weight, rows, cols, row_offsets, kernels);
    for (int64_t row = first; row < last; ++row) writer.write(row, values, deltas);
  });
}
