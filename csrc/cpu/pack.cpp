// Packing on the CPU, in two passes: count the entries of each row, then write them.
#include <algorithm>
#include <mutex>

#include "cpu/parallel.h"
#include "format.h"
#include "macko.h"

namespace macko {
namespace {

// Calls emit(column, gap) for each nonzero of a row, gap being the columns skipped since the previous one.
template <typename Emit>
void for_nonzeros(const uint16_t* row, int64_t cols, const Emit& emit) {
  int64_t previous = -1;
  for (int64_t column = 0; column < cols; ++column) {
    if (is_zero(row[column])) continue;
    emit(column, column - previous - 1);
    previous = column;
  }
}

// Writes the deltas of consecutive entries to zeroed bytes, two a byte. The other half of the first or the last byte
// may belong to a neighbouring range, which another thread writes, so these two are combined under a lock.
class DeltaWriter {
 public:
  DeltaWriter(uint8_t* deltas, int64_t entry, std::mutex& ends)
      : deltas_(deltas), entry_(entry), ends_(ends), is_shared_(entry & 1) {}
  ~DeltaWriter() {
    if (entry_ & 1) combine();
  }
  DeltaWriter(const DeltaWriter&) = delete;
  DeltaWriter& operator=(const DeltaWriter&) = delete;

  void put(int delta) {
    byte_ |= static_cast<uint8_t>(delta << ((entry_ & 1) * kDeltaBits));
    if (entry_ & 1) {
      if (is_shared_) combine();
      else deltas_[entry_ >> 1] = byte_;
      byte_ = 0;
      is_shared_ = false;
    }
    ++entry_;
  }

 private:
  void combine() {
    const std::lock_guard<std::mutex> lock(ends_);
    deltas_[entry_ >> 1] |= byte_;
  }

  uint8_t* deltas_;
  int64_t entry_;
  std::mutex& ends_;
  bool is_shared_;  // the byte that is filled now is the first and begins with another range's entry
  uint8_t byte_ = 0;
};

}  // namespace
}  // namespace macko

extern "C" int32_t macko_abi_version(void) { return MACKO_ABI_VERSION; }

extern "C" macko_status macko_cpu_row_offsets(const uint16_t* weight, int64_t rows, int64_t cols, int32_t* row_offsets,
                                              int32_t threads) {
  using namespace macko;
  if (rows < 0 || cols < 1 || !row_offsets || (rows > 0 && !weight)) return MACKO_BAD_ARGUMENT;
  const auto elements_before = [cols](int64_t row) { return row * cols; };
  const macko_status status = for_row_ranges(rows, threads, elements_before, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      int64_t entries = 0;
      for_nonzeros(weight + row * cols, cols, [&](int64_t, int64_t gap) { entries += gap / kBridge + 1; });
      row_offsets[row + 1] = static_cast<int32_t>(std::min<int64_t>(entries, INT32_MAX));
    }
  });
  if (status != MACKO_OK) return status;
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
                                       uint16_t* values, uint8_t* deltas, int32_t threads) {
  using namespace macko;
  if (rows < 0 || cols < 1 || !row_offsets || (rows > 0 && !weight)) return MACKO_BAD_ARGUMENT;
  const int64_t entries = row_offsets[rows];
  if (entries > 0 && (!values || !deltas)) return MACKO_BAD_ARGUMENT;
  const int64_t padded = (entries + kEntryAlignment - 1) / kEntryAlignment * kEntryAlignment;
  std::fill(values, values + padded, uint16_t{0});
  std::fill(deltas, deltas + padded / 2, uint8_t{0});
  const auto elements_before = [cols](int64_t row) { return row * cols; };
  std::mutex ends;
  return for_row_ranges(rows, threads, elements_before, [=, &ends](int64_t first, int64_t last) {
    DeltaWriter row_deltas(deltas, row_offsets[first], ends);
    for (int64_t row = first; row < last; ++row) {
      const uint16_t* source = weight + row * cols;
      uint16_t* value = values + row_offsets[row];
      for_nonzeros(source, cols, [&](int64_t column, int64_t gap) {
        for (; gap >= kBridge; gap -= kBridge, ++value) row_deltas.put(kMaxDelta);
        row_deltas.put(static_cast<int>(gap));
        *value++ = source[column];
      });
    }
  });
}
