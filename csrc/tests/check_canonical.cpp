// The canonical arrays, as docs/format.md writes them.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "layouts.h"

Canonical::Canonical(const Matrix& matrix)
    : Layout("canonical", MACKO_PORTABLE),
      rows(matrix.rows),
      cols(matrix.cols),
      dtype(matrix.dtype),
      values(0),
      deltas(0),
      row_offsets(rows + 1),
      spans(rows) {
  std::vector<uint16_t> kept;
  std::vector<uint8_t> nibbles, bytes;
  const auto put = [&](uint16_t value, int64_t delta) {
    kept.push_back(value);
    nibbles.push_back(static_cast<uint8_t>(delta));
  };
  row_offsets[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t next = 0;  // the column behind the last entry's
    for (int64_t column = 0; column < cols; ++column) {
      const uint16_t value = matrix.weight[row * cols + column];
      if (value == 0 || value == 0x8000) continue;
      for (; column - next > 15; next += 16) put(0, 15);
      put(value, column - next);
      next = column + 1;
    }
    spans[row] = next;
    row_offsets[row + 1] = static_cast<int32_t>(kept.size());
  }
  while (kept.size() % 8) put(0, 0);
  for (size_t i = 0; i < nibbles.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(nibbles[i] | nibbles[i + 1] << 4));
  }
  values = Array<uint16_t>(kept);
  deltas = Array<uint8_t>(bytes);
}

macko_status Canonical::spmv(const void* x, const void* bias, void* y, int x_dtype, int64_t tokens, int,
                             int threads) const {
  return macko_cpu_spmv(values.get(), dtype, deltas.get(), row_offsets.get(), rows, cols, x, bias, y, x_dtype, tokens,
                        threads);
}

void check_canonical(const Matrix& matrix, const Canonical& expected, int threads) {
  const int64_t rows = matrix.rows, cols = matrix.cols;
  const Array<uint16_t> dense(matrix.weight);
  int32_t largest = 0;
  for (const uint16_t value : matrix.weight) largest = std::max<int32_t>(largest, value & 0x7fff);
  const Array<int32_t> row_offsets(rows + 1);
  const Array<uint16_t> values(expected.values.size);
  const Array<uint8_t> deltas(expected.deltas.size);
  for (int set = 0; set <= macko_cpu_instructions(); ++set) {
    const About about(kInstructions[set]);
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
  const Array<int64_t> spans(rows);
  check(macko_cpu_row_spans(deltas.get(), row_offsets.get(), rows, spans.get()) == MACKO_OK, "macko_cpu_row_spans");
  check_same(spans, expected.spans, "spans");
  const Array<uint16_t> unpacked(rows * cols);
  check(
      macko_cpu_unpack(values.get(), deltas.get(), row_offsets.get(), rows, cols, unpacked.get(), threads) == MACKO_OK,
      "macko_cpu_unpack");
  check_same(unpacked, Array<uint16_t>(matrix.unpacked()), "the unpacked matrix");
}
