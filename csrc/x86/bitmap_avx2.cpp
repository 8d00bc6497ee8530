// The bitmap layout with AVX2, FMA and F16C: eight columns at a time, by shuffles that a table holds for each byte of
// bits.
#include <immintrin.h>

#include "cpu/bitmap_rows.h"
#include "cpu/shuffles.h"

namespace macko {
namespace {

struct Prefetching {
  static void prefetch(const void* memory) { _mm_prefetch(static_cast<const char*>(memory), _MM_HINT_T0); }
};

// The same for columns of 32 bits, filled in their upper half: bfloat16 as float32.
struct UpperShuffles {
  alignas(32) uint8_t bytes[256][32];

  constexpr UpperShuffles() : bytes() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int column = 0; column < 8; ++column) {
        for (int byte = 0; byte < 2; ++byte) {
          bytes[bits][4 * column + byte] = 0x80;
          bytes[bits][4 * column + 2 + byte] = kShuffles.bytes[bits][2 * column + byte];
        }
      }
    }
  }
};
constexpr UpperShuffles kUpperShuffles;

__m128i load_values(const uint16_t* values) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)); }

__m128i expand_halves(uint32_t bits, const uint16_t* values) {
  return _mm_shuffle_epi8(load_values(values), _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.bytes[bits])));
}

struct Float16 {
  static __m256 load(uint32_t bits, const uint16_t* values) { return _mm256_cvtph_ps(expand_halves(bits, values)); }
};

struct BFloat16 {
  static __m256 load(uint32_t bits, const uint16_t* values) {
    const __m256i both = _mm256_broadcastsi128_si256(load_values(values));
    const __m256i shuffle = _mm256_load_si256(reinterpret_cast<const __m256i*>(kUpperShuffles.bytes[bits]));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, shuffle));
  }
};

template <typename Value>
struct Avx2 : Prefetching {
  static constexpr int kTokens = 2, kSums = 2;
  using Input = float;
  struct Weights {
    __m256 columns[4];
  };
  struct Columns {
    __m256 eights[4];
  };
  struct Sum {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
  };

  static Weights expand(uint32_t mask, const uint16_t*& values) {
    Weights weights;
    for (int part = 0; part < 4; ++part) {
      // How many bits lie before this part, rather than one part after the other: loads need not wait for each other.
      const uint32_t before = mask & ((1u << 8 * part) - 1);
      weights.columns[part] = Value::load(mask >> 8 * part & 0xffu, values + _mm_popcnt_u32(before));
    }
    values += _mm_popcnt_u32(mask);
    return weights;
  }

  static Columns load(const float* x) {
    return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24)};
  }

  // Where x is used twice, compilers would rather load it twice.
  static Columns load_once(const float* x) {
    const Columns columns = load(x);
    for (const __m256& eight : columns.eights) asm("" : : "x"(eight));
    return columns;
  }

  static void add(Sum& sum, const Weights& weights, const Columns& x) {
    sum.even = _mm256_fmadd_ps(weights.columns[0], x.eights[0], sum.even);
    sum.odd = _mm256_fmadd_ps(weights.columns[1], x.eights[1], sum.odd);
    sum.even = _mm256_fmadd_ps(weights.columns[2], x.eights[2], sum.even);
    sum.odd = _mm256_fmadd_ps(weights.columns[3], x.eights[3], sum.odd);
  }

  static void add(Sum& sum, const Weights& weights, const float* x) { add(sum, weights, load(x)); }

  static void join(Sum& sum, const Sum& other) {
    sum.even = _mm256_add_ps(sum.even, other.even);
    sum.odd = _mm256_add_ps(sum.odd, other.odd);
  }

  static float total(const Sum& sum) {
    const __m256 lanes = _mm256_add_ps(sum.even, sum.odd);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

// Two rows with the only token, each added up as multiply_row does. Loads are what there is too little of: x is loaded
// once for both. Two streams need more prefetching than one, words (a line of them for 16 blocks) as well as values.
template <typename Set>
void multiply_two_rows(const BitmapProduct& product, int64_t first_row) {
  static_assert(Set::kSums == 2);
  constexpr int kPrefetchMasks = 1024, kBlocksOfLine = 16;
  struct Row {
    const uint16_t* values;
    const uint32_t* masks;
    typename Set::Sum even, odd;  // of the blocks

    Row(const BitmapProduct& product, int64_t row)
        : values(product.values + product.row_starts[row]), masks(product.masks + row * product.blocks) {}
    void prefetch_masks(int64_t block) const { Set::prefetch(masks + block + kPrefetchMasks); }
    void add(int64_t block, const typename Set::Columns& x, typename Set::Sum& sum) {
      Set::prefetch(values + 2 * kPrefetch);
      Set::add(sum, Set::expand(masks[block], values), x);
    }
    float total() {
      Set::join(even, odd);
      return Set::total(even);
    }
  };
  const float* x = static_cast<const float*>(product.x);
  Row upper(product, first_row), lower(product, first_row + 1);
  int64_t block = 0;
  for (; block + 2 <= product.blocks; block += 2) {
    if (block % kBlocksOfLine == 0) {
      upper.prefetch_masks(block);
      lower.prefetch_masks(block);
    }
    const typename Set::Columns first = Set::load_once(x + block * kBlock);
    upper.add(block, first, upper.even);
    lower.add(block, first, lower.even);
    const typename Set::Columns second = Set::load_once(x + (block + 1) * kBlock);
    upper.add(block + 1, second, upper.odd);
    lower.add(block + 1, second, lower.odd);
  }
  if (block < product.blocks) {
    const typename Set::Columns last = Set::load_once(x + block * kBlock);
    upper.add(block, last, upper.even);
    lower.add(block, last, lower.even);
  }
  product.sums[first_row] = upper.total();
  product.sums[first_row + 1] = lower.total();
}

template <typename Value>
void multiply(const BitmapProduct& product, int64_t row, int64_t last_row) {
  if (product.tokens == 1) {
    for (; row + 2 <= last_row; row += 2) multiply_two_rows<Avx2<Value>>(product, row);
  }
  multiply_rows<Avx2<Value>>(product, row, last_row);
}

void widen(const uint16_t* halves, int64_t count, float* floats) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(load_values(halves + i)));
  for (; i < count; ++i) floats[i] = _cvtsh_ss(halves[i]);
}

void unpack(const BitmapProduct& product, int64_t cols, int64_t first_row, int64_t last_row, uint16_t* weight) {
  unpack_rows(product, cols, first_row, last_row, weight,
              [](uint32_t mask, const uint16_t*& values, uint16_t* columns) {
                for (int part = 0; part < 4; ++part) {
                  const uint32_t bits = mask >> 8 * part & 0xffu;
                  _mm_storeu_si128(reinterpret_cast<__m128i*>(columns + 8 * part), expand_halves(bits, values));
                  values += _mm_popcnt_u32(bits);
                }
              });
}

}  // namespace

BitmapKernels avx2_kernels() { return {multiply<Float16>, multiply<BFloat16>, nullptr, widen, unpack}; }

}  // namespace macko
