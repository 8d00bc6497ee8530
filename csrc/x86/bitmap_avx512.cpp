// The bitmap layout with AVX-512: `vpexpandw` (VBMI2) puts values at the columns that a mask names, 32 at a time, and
// `vdpbf16ps` (BF16), where there is one, multiplies them in pairs.
#include <immintrin.h>

#include "cpu/bitmap_rows.h"

namespace macko {
namespace {

struct Prefetching {
  static void prefetch(const uint16_t* values) { _mm_prefetch(reinterpret_cast<const char*>(values), _MM_HINT_T0); }
};

// `vpexpandw` waits for what its target held before, even where nothing of that is kept. So the target is a register
// that was zeroed just now, which costs nothing: else every block would wait for the one before.
__m512i zeros() {
  __m512i zero;
  asm("vpxor %x0, %x0, %x0" : "=x"(zero));
  return zero;
}

__m512i expand_words(uint32_t mask, const uint16_t*& values) {
  const __m512i words = _mm512_mask_expand_epi16(zeros(), mask, _mm512_loadu_si512(values));
  values += _mm_popcnt_u32(mask);
  return words;
}

struct Float16 {
  static __m512 widen(__m256i words) { return _mm512_cvtph_ps(words); }
};

struct BFloat16 {
  static __m512 widen(__m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
};

template <typename Value>
struct Avx512 : Prefetching {
  static constexpr int kTokens = 4, kSums = 2;
  using Input = float;
  struct Weights {
    __m512 low, high;
  };
  struct Sum {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  };

  static Weights expand(uint32_t mask, const uint16_t*& values) {
    const __m512i words = expand_words(mask, values);
    return {Value::widen(_mm512_castsi512_si256(words)), Value::widen(_mm512_extracti64x4_epi64(words, 1))};
  }

  static void add(Sum& sum, const Weights& weights, const float* x) {
    sum.low = _mm512_fmadd_ps(weights.low, _mm512_loadu_ps(x), sum.low);
    sum.high = _mm512_fmadd_ps(weights.high, _mm512_loadu_ps(x + 16), sum.high);
  }

  static void join(Sum& sum, const Sum& other) {
    sum.low = _mm512_add_ps(sum.low, other.low);
    sum.high = _mm512_add_ps(sum.high, other.high);
  }

  static float total(const Sum& sum) { return _mm512_reduce_add_ps(_mm512_add_ps(sum.low, sum.high)); }
};

// kFew: words with more than 16 values are rare. Then half a vector is loaded, which crosses a line half as often.
template <bool kFew>
struct Pairs : Prefetching {
  static constexpr int kTokens = 4, kSums = 4;
  using Input = uint16_t;
  using Weights = __m512i;
  struct Sum {
    __m512 pairs = _mm512_setzero_ps();
  };

  static Weights expand(uint32_t mask, const uint16_t*& values) {
    if (!kFew || _mm_popcnt_u32(mask) > 16) return expand_words(mask, values);
    const __m256i few = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    values += _mm_popcnt_u32(mask);
    return _mm512_mask_expand_epi16(zeros(), mask, _mm512_zextsi256_si512(few));
  }

  static void add(Sum& sum, const Weights& weights, const uint16_t* x) {
    const __m512i columns = _mm512_loadu_si512(x);
    sum.pairs = _mm512_dpbf16_ps(sum.pairs, (__m512bh)weights, (__m512bh)columns);
  }

  static void join(Sum& sum, const Sum& other) { sum.pairs = _mm512_add_ps(sum.pairs, other.pairs); }

  static float total(const Sum& sum) { return _mm512_reduce_add_ps(sum.pairs); }
};

void multiply_pairs(const BitmapProduct& product, int64_t row, int64_t last_row) {
  for (; row < last_row; ++row) {
    const int64_t count = product.row_starts[row + 1] - product.row_starts[row];
    const bool has_few = count <= product.blocks * 10;
    (has_few ? multiply_rows<Pairs<true>> : multiply_rows<Pairs<false>>)(product, row, row + 1);
  }
}

void widen(const uint16_t* halves, int64_t count, float* floats) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
    _mm512_mask_storeu_ps(floats + i, there, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, halves + i)));
  }
}

void unpack(const BitmapProduct& product, int64_t cols, int64_t first_row, int64_t last_row, uint16_t* weight) {
  unpack_rows(product, cols, first_row, last_row, weight,
              [](uint32_t mask, const uint16_t*& values, uint16_t* columns) {
                _mm512_storeu_si512(columns, expand_words(mask, values));
              });
}

}  // namespace

BitmapKernels avx512_kernels(bool has_bf16) {
  return {multiply_rows<Avx512<Float16>>, multiply_rows<Avx512<BFloat16>>, has_bf16 ? multiply_pairs : nullptr, widen,
          unpack};
}

}  // namespace macko
