// The strips (csrc/cpu/strips.h), which are made of a bitmap.
#include <cstdint>
#include <utility>
#include <vector>

#include "layouts.h"

Strips::Strips(const Bitmap& bitmap, int threads)
    : Layout("strips", macko_cpu_instructions()), lengths(0), row_ids(0), groups(0), chunk_starts(0) {
  const macko_bitmap& bits = bitmap.matrix;
  const int64_t chunks = (int64_t{bits.rows} + 255) / 256, strips = (int64_t{bits.cols} + 127) / 128;
  lengths = Array<uint8_t>(chunks * strips * 16);
  row_ids = Array<uint8_t>(chunks * strips * 256);
  chunk_starts = Array<int64_t>(chunks + 1);
  matrix = {nullptr, lengths.get(), row_ids.get(), chunk_starts.get(), bits.rows, bits.cols, bits.value_dtype, -1};
  check(macko_cpu_strips_plan(&bits, &matrix, threads) == MACKO_OK, "macko_cpu_strips_plan");
  groups = Array<uint8_t>(chunk_starts[chunks] * 96);
  matrix.groups = groups.get();
  check(macko_cpu_strips_fill(&bits, &matrix, threads) == MACKO_OK, "macko_cpu_strips_fill");
}

macko_status Strips::spmv(const void* x, const void* bias, void* y, int x_dtype, int64_t tokens, int set,
                          int threads) const {
  return macko_cpu_strips_spmv(&matrix, x, bias, y, x_dtype, tokens, set, threads);
}

void check_strips(const Matrix& matrix, const Strips& strips, int threads) {
  const Array<uint16_t> back(matrix.rows * matrix.cols);
  check(macko_cpu_strips_unpack(&strips.matrix, 0, matrix.rows, back.get(), threads) == MACKO_OK,
        "macko_cpu_strips_unpack");
  check_same(back, Array<uint16_t>(matrix.unpacked()), "the strips' dense matrix");
}

// Whole chunks out of the middle, and the rest behind them, are the rows of the whole.
void check_parts_of_strips(int dtype) {
  const About about("parts of strips");
  const int64_t rows = 600, cols = 130;
  const Layouts layouts(random_matrix(rows, cols, dtype, 20));
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
      const std::vector<uint16_t> rows_of_whole(&whole[first * cols], &whole[first * cols] + (last - first) * cols);
      check_same(part, Array<uint16_t>(rows_of_whole), "a part of the dense matrix");
    }
  }
  const std::vector<std::pair<int64_t, int64_t>> refused = {{1, 256},   {0, 255},  {256, 300},
                                                            {512, 768}, {-256, 0}, {512, 256}};
  for (const auto& [first, last] : refused) {
    check(unpack(first, last, whole.get()) == MACKO_BAD_ARGUMENT, "rows that are no chunks are not refused");
  }
}
