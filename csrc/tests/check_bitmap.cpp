// The bitmap layout (csrc/cpu/bitmap.h).
#include <algorithm>
#include <cstdint>
#include <vector>

#include "layouts.h"

Bitmap::Bitmap(const Canonical& packed, int set, int threads)
    : Layout("bitmap", macko_cpu_instructions()),
      values(0),
      masks(packed.rows * ((packed.cols + 31) / 32)),
      row_starts(packed.rows + 1) {
  check(macko_cpu_bitmap_starts(packed.values.get(), packed.row_offsets.get(), packed.rows, row_starts.get(),
                                threads) == MACKO_OK,
        "macko_cpu_bitmap_starts");
  values = Array<uint16_t>(row_starts[packed.rows] + 32);
  matrix = {
      values.get(), masks.get(), row_starts.get(), static_cast<int32_t>(packed.rows), static_cast<int32_t>(packed.cols),
      packed.dtype, -1};
  check(macko_cpu_bitmap_fill(packed.values.get(), packed.deltas.get(), packed.row_offsets.get(), &matrix, set,
                              threads) == MACKO_OK,
        "macko_cpu_bitmap_fill");
}

macko_status Bitmap::spmv(const void* x, const void* bias, void* y, int x_dtype, int64_t tokens, int set,
                          int threads) const {
  return macko_cpu_bitmap_spmv(&matrix, x, bias, y, x_dtype, tokens, set, threads);
}

void check_bitmap(const Matrix& matrix, const Canonical& packed, int threads) {
  const int64_t rows = matrix.rows, cols = matrix.cols, words = (cols + 31) / 32;
  std::vector<uint16_t> values;
  std::vector<uint32_t> masks(static_cast<size_t>(rows * words), 0);
  std::vector<int32_t> starts{0};
  int32_t smallest = 0x7f80;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < cols; ++column) {
      const uint16_t value = matrix.weight[row * cols + column];
      if ((value & 0x7fff) == 0) continue;
      values.push_back(value);
      masks[row * words + column / 32] |= 1u << column % 32;
      smallest = std::min<int32_t>(smallest, value & 0x7fff);
    }
    starts.push_back(static_cast<int32_t>(values.size()));
  }
  values.resize(values.size() + 32, 0);
  for (int set = 0; set <= macko_cpu_instructions(); ++set) {
    const About about(kInstructions[set]);
    const Bitmap bitmap(packed, set, threads);
    check_same(bitmap.values, Array<uint16_t>(values), "the bitmap's values");
    check_same(bitmap.masks, Array<uint32_t>(masks), "the bitmap's masks");
    check_same(bitmap.row_starts, Array<int32_t>(starts), "the bitmap's row starts");
    check(bitmap.matrix.smallest == smallest, "the bitmap's smallest value is another");
    const Array<uint16_t> back(rows * cols);
    check(macko_cpu_bitmap_unpack(&bitmap.matrix, back.get(), set, threads) == MACKO_OK, "macko_cpu_bitmap_unpack");
    check_same(back, Array<uint16_t>(matrix.unpacked()), "the bitmap's dense matrix");
  }
}
