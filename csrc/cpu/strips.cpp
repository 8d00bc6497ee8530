// The strips: how they are made of a bitmap, and their products, by what this CPU can do.
#include "cpu/strips.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/bitmap.h"
#include "cpu/bits.h"
#include "cpu/exactness.h"
#include "cpu/float16.h"
#include "cpu/instructions.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/strips_groups.h"
#include "macko.h"

namespace macko {
namespace {

constexpr int kWords = kStrip / kBlock;  // of a bitmap's row, in a strip

int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }
int64_t strips_of(int64_t cols) { return (cols + kStrip - 1) / kStrip; }

bool is_planned(const macko_strips* matrix) {
  if (!matrix || matrix->rows < 0 || matrix->cols < 1 || !is_value_dtype(matrix->value_dtype)) return false;
  return matrix->lengths && matrix->row_ids && matrix->chunk_starts;
}

bool is_sound(const macko_strips* matrix) { return is_planned(matrix) && matrix->groups; }

bool is_same_matrix(const macko_bitmap* bitmap, const macko_strips* matrix) {
  return bitmap && bitmap->values && bitmap->masks && bitmap->row_starts && bitmap->rows == matrix->rows &&
         bitmap->cols == matrix->cols && bitmap->value_dtype == matrix->value_dtype;
}

// Rows of a chunk, walked through strip by strip in a bitmap.
class Chunk {
 public:
  Chunk(const macko_bitmap& bitmap, int64_t chunk)
      : blocks_(blocks_of(bitmap.cols)),
        rows_(std::min<int64_t>(kChunk, bitmap.rows - chunk * kChunk)),
        masks_(bitmap.masks + chunk * kChunk * blocks_) {
    for (int64_t row = 0; row < rows_; ++row) {
      values_[row] = bitmap.values + bitmap.row_starts[chunk * kChunk + row];
    }
  }

  // How many values each row has in a strip; those of the rows that a last chunk lacks are none.
  void count(int64_t strip, uint8_t* counts) const {
    std::fill_n(counts, kChunk, uint8_t{0});
    for (int64_t row = 0; row < rows_; ++row) {
      for (int word = 0; word < kWords; ++word) counts[row] += static_cast<uint8_t>(count_bits(mask(row, strip, word)));
    }
  }

  // Calls put(column of the strip, value) for the values of a row in a strip, each strip in turn.
  template <typename Put>
  void take(int64_t row, int64_t strip, const Put& put) {
    for (int word = 0; word < kWords; ++word) {
      for (uint32_t bits = mask(row, strip, word); bits; bits &= bits - 1) {
        put(word * kBlock + first_bit(bits), *values_[row]++);
      }
    }
  }

  int64_t rows() const { return rows_; }

 private:
  uint32_t mask(int64_t row, int64_t strip, int word) const {
    const int64_t block = strip * kWords + word;
    return block < blocks_ ? masks_[row * blocks_ + block] : 0;
  }

  int64_t blocks_, rows_;
  const uint32_t* masks_;
  const uint16_t* values_[kChunk];
};

// Sorts a chunk's rows by their numbers of values, most first, and says how many groups each tile has.
int64_t plan_strip(const uint8_t* counts, uint8_t* lengths, uint8_t* row_ids) {
  int places[kStrip + 1] = {};  // of the next row with this many values
  for (int row = 0; row < kChunk; ++row) ++places[counts[row]];
  for (int count = kStrip, before = 0; count >= 0; --count) before += std::exchange(places[count], before);
  for (int row = 0; row < kChunk; ++row) row_ids[places[counts[row]]++] = static_cast<uint8_t>(row);
  int64_t groups = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    lengths[tile] = static_cast<uint8_t>((counts[row_ids[tile * kTile]] + 1) / 2);
    groups += lengths[tile];
  }
  return groups;
}

// Chunks [first, last) to dense rows.
void unpack_chunks(const macko_strips& matrix, int64_t first, int64_t last, uint16_t* weight) {
  const int64_t cols = matrix.cols, tiles = strips_of(cols) * kTiles;
  const bool is_bfloat16 = matrix.value_dtype == MACKO_BFLOAT16;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t rows = std::min<int64_t>(kChunk, matrix.rows - chunk * kChunk);
    std::fill_n(weight, rows * cols, uint16_t{0});
    const uint8_t* group = matrix.groups + matrix.chunk_starts[chunk] * kGroup;
    const uint8_t* lengths = matrix.lengths + chunk * tiles;
    const uint8_t* ids = matrix.row_ids + chunk * tiles * kTile;
    for (int64_t tile = 0; tile < tiles; ++tile, ids += kTile) {
      uint16_t* strip = weight + tile / kTiles * kStrip;
      for (int length = lengths[tile]; length > 0; --length, group += kGroup) {
        for (int slot = 0; slot < kSlots; ++slot) {
          const uint16_t value = value_at(group, slot);
          if (value) strip[ids[row_of(is_bfloat16, slot)] * cols + group[slot]] = value;
        }
      }
    }
    weight += rows * cols;
  }
}

// x as the kernels read it, and what it holds.
struct Input {
  std::vector<uint16_t> x, x_low;
  std::vector<float> spoilt;
  int32_t smallest = INT32_MAX;

  Input(int64_t tokens, int64_t width, bool is_wide)
      : x(static_cast<size_t>(tokens * width), 0), spoilt(static_cast<size_t>(tokens), 0.f) {
    if (is_wide) x_low.resize(x.size(), 0);
  }
};

// Of the values' dtype, float16 or bfloat16, whose infinity is `infinity`.
void take_halves(const uint16_t* x, int64_t tokens, int64_t cols, int64_t width, int16_t infinity, Input& input) {
  for (int64_t token = 0; token < tokens; ++token, x += cols) {
    std::copy_n(x, cols, input.x.begin() + token * width);
    int16_t largest = 0, smallest = INT16_MAX;
    for (int64_t i = 0; i < cols; ++i) {
      const int16_t magnitude = static_cast<int16_t>(x[i] & 0x7fff);
      largest = std::max(largest, magnitude);
      smallest = std::min(smallest, magnitude == 0 ? int16_t{INT16_MAX} : magnitude);
    }
    if (largest >= infinity) input.spoilt[token] = kSpoilt;
    input.smallest = std::min(input.smallest, int32_t{smallest} << 16);  // of bfloat16; nobody asks float16's
  }
}

template <typename Activation>
void take_wide(const typename Activation::Storage* x, int64_t tokens, int64_t cols, int64_t width, Input& input) {
  std::vector<float> floats(static_cast<size_t>(cols));
  for (int64_t token = 0; token < tokens; ++token, x += cols) {
    for (int64_t i = 0; i < cols; ++i) floats[i] = Activation::load(x[i]);
    if (!range_of(floats.data(), cols).is_finite()) input.spoilt[token] = kSpoilt;
    for (int64_t i = 0; i < cols; ++i) {
      const uint32_t bits = bits_of_float(floats[i]);
      input.x[token * width + i] = static_cast<uint16_t>(bits >> 16);
      input.x_low[token * width + i] = static_cast<uint16_t>(bits);
    }
  }
}

template <typename Activation>
macko_status spmv(const macko_strips& matrix, const void* x_any, const void* bias_any, void* y_any, bool is_wide,
                  int64_t tokens, const StripsKernels& kernels, int32_t threads) {
  using Storage = typename Activation::Storage;
  const Storage* bias = static_cast<const Storage*>(bias_any);
  Storage* y = static_cast<Storage*>(y_any);
  const int64_t rows = matrix.rows, cols = matrix.cols, strips = strips_of(cols), width = strips * kStrip;
  const bool is_bfloat16 = matrix.value_dtype == MACKO_BFLOAT16;
  Input input(tokens, width, is_wide);
  MultiplyChunk multiply;
  if (is_wide) {
    take_wide<Activation>(static_cast<const Storage*>(x_any), tokens, cols, width, input);
    multiply = is_bfloat16 ? kernels.bfloat16_wide : kernels.float16_wide;
  } else {
    const int16_t infinity = is_bfloat16 ? 0x7f80 : 0x7c00;
    take_halves(static_cast<const uint16_t*>(x_any), tokens, cols, width, infinity, input);
    const bool is_exact = kernels.pairs_of_bfloat16 && pairs_are_exact(matrix.smallest, input.smallest);
    multiply = !is_bfloat16 ? kernels.float16 : is_exact ? kernels.pairs_of_bfloat16 : kernels.bfloat16;
  }
  const uint16_t* x_low = is_wide ? input.x_low.data() : nullptr;
  const StripsProduct product{matrix.groups, matrix.lengths, matrix.row_ids, matrix.chunk_starts,
                              strips,        input.x.data(), x_low,          tokens};
  const auto cost_before = [&](int64_t chunk) { return matrix.chunk_starts[chunk] * kSlots * tokens; };
  return for_row_ranges(chunks_of(rows), threads, cost_before, [&](int64_t first, int64_t last) {
    std::vector<float> sums(static_cast<size_t>(tokens * kChunk));
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::fill(sums.begin(), sums.end(), 0.f);
      multiply(product, chunk, sums.data());
      const int64_t first_row = chunk * kChunk, last_row = std::min(first_row + kChunk, rows);
      for (int64_t token = 0; token < tokens; ++token) {
        const float* of_token = sums.data() + token * kChunk;
        put_rows<Activation>(of_token, bias, input.spoilt[token], first_row, last_row, y + token * rows);
      }
    }
  });
}

}  // namespace
}  // namespace macko

extern "C" macko_status macko_cpu_strips_plan(const macko_bitmap* bitmap, macko_strips* matrix, int32_t threads) {
  using namespace macko;
  if (!is_planned(matrix) || !is_same_matrix(bitmap, matrix)) return MACKO_BAD_ARGUMENT;
  const int64_t chunks = chunks_of(matrix->rows), strips = strips_of(matrix->cols);
  matrix->smallest = bitmap->smallest;
  matrix->chunk_starts[0] = 0;
  const auto cost_before = [=](int64_t chunk) { return chunk * strips * kChunk * kWords; };
  const macko_status status = for_row_ranges(chunks, threads, cost_before, [=](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const Chunk rows(*bitmap, chunk);
      int64_t groups = 0;
      for (int64_t strip = 0, at = chunk * strips; strip < strips; ++strip, ++at) {
        uint8_t counts[kChunk];
        rows.count(strip, counts);
        groups += plan_strip(counts, matrix->lengths + at * kTiles, matrix->row_ids + at * kChunk);
      }
      matrix->chunk_starts[chunk + 1] = groups;
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) matrix->chunk_starts[chunk + 1] += matrix->chunk_starts[chunk];
  return status;
}

extern "C" macko_status macko_cpu_strips_fill(const macko_bitmap* bitmap, macko_strips* matrix, int32_t threads) {
  using namespace macko;
  if (!is_sound(matrix) || !is_same_matrix(bitmap, matrix)) return MACKO_BAD_ARGUMENT;
  const int64_t chunks = chunks_of(matrix->rows), tiles = strips_of(matrix->cols) * kTiles;
  const bool is_bfloat16 = matrix->value_dtype == MACKO_BFLOAT16;
  want_large_pages(matrix->groups, matrix->chunk_starts[chunks] * kGroup);
  const auto cost_before = [=](int64_t chunk) { return matrix->chunk_starts[chunk] * kSlots; };
  return for_row_ranges(chunks, threads, cost_before, [=](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      Chunk rows(*bitmap, chunk);
      uint8_t* group = matrix->groups + matrix->chunk_starts[chunk] * kGroup;
      std::fill(group, matrix->groups + matrix->chunk_starts[chunk + 1] * kGroup, uint8_t{0});
      const uint8_t* ids = matrix->row_ids + chunk * tiles * kTile;
      for (int64_t tile = 0; tile < tiles; ++tile, ids += kTile) {
        const int length = matrix->lengths[chunk * tiles + tile];
        for (int row = 0; row < kTile; ++row) {
          if (ids[row] >= rows.rows()) continue;  // one that the last chunk lacks
          int64_t entry = 0;
          rows.take(ids[row], tile / kTiles, [&](int column, uint16_t value) {
            uint8_t* to = group + entry / 2 * kGroup;
            const int slot = slot_of(is_bfloat16, row, entry++);
            to[slot] = static_cast<uint8_t>(column);
            std::memcpy(to + kSlots + 2 * slot, &value, sizeof value);
          });
        }
        group += length * kGroup;
      }
    }
  });
}

extern "C" macko_status macko_cpu_strips_unpack(const macko_strips* matrix, int64_t first_row, int64_t last_row,
                                                uint16_t* weight, int32_t threads) {
  using namespace macko;
  if (!is_sound(matrix) || first_row < 0 || first_row > last_row || last_row > matrix->rows) return MACKO_BAD_ARGUMENT;
  if (first_row % kChunk || (last_row % kChunk && last_row != matrix->rows)) return MACKO_BAD_ARGUMENT;
  if (first_row == last_row) return MACKO_OK;
  if (!weight) return MACKO_BAD_ARGUMENT;
  const int64_t cols = matrix->cols, from = first_row / kChunk;
  want_large_pages(weight, (last_row - first_row) * cols * 2);
  const auto cost_before = [=](int64_t chunk) { return chunk * kChunk * cols; };
  return for_row_ranges(chunks_of(last_row) - from, threads, cost_before, [=](int64_t first, int64_t last) {
    unpack_chunks(*matrix, from + first, from + last, weight + first * kChunk * cols);
  });
}

extern "C" macko_status macko_cpu_strips_spmv(const macko_strips* matrix, const void* x, const void* bias, void* y,
                                              int32_t x_dtype, int64_t tokens, int32_t instructions, int32_t threads) {
  using namespace macko;
  if (!is_sound(matrix) || !is_runnable(instructions) || tokens < 0) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y) return MACKO_BAD_ARGUMENT;
  const StripsKernels kernels = strips_kernels(instructions);
  const bool is_wide = x_dtype != matrix->value_dtype;
  return with_activation(x_dtype, [&](auto activation) {
    return spmv<decltype(activation)>(*matrix, x, bias, y, is_wide, tokens, kernels, threads);
  });
}
