// The strips with AVX-512: two `vpermi2w` pick from the 128 columns of x that four registers hold, and `vdpbf16ps`
// (BF16), where there is one, multiplies in pairs.
#include <immintrin.h>

#include "cpu/strips.h"

namespace macko {
namespace {

constexpr int kPrefetch = 8192;  // bytes ahead; groups lie one behind the other, so this leads into the next tiles

// 128 columns of 16 bits.
struct Columns {
  __m512i parts[4];

  explicit Columns(const uint16_t* x) {
    for (int part = 0; part < 4; ++part) parts[part] = _mm512_loadu_si512(x + 32 * part);
  }

  __m512i at(__m512i columns) const {
    const __m512i low = _mm512_permutex2var_epi16(parts[0], columns, parts[1]);
    const __m512i high = _mm512_permutex2var_epi16(parts[2], columns, parts[3]);
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(columns, _mm512_set1_epi16(64)), low, high);
  }
};

// The first and the second entries of a group's rows, widened; and of float32 that come as upper and lower halves.
struct Float16 {
  static __m256i upper_half(__m512i words) { return _mm512_extracti64x4_epi64(words, 1); }
  static __m512 first(__m512i words) { return _mm512_cvtph_ps(_mm512_castsi512_si256(words)); }
  static __m512 second(__m512i words) { return _mm512_cvtph_ps(upper_half(words)); }
  static __m512 joined(__m256i high, __m256i low) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(shifted, _mm512_cvtepu16_epi32(low)));
  }
  static __m512 first(__m512i high, __m512i low) {
    return joined(_mm512_castsi512_si256(high), _mm512_castsi512_si256(low));
  }
  static __m512 second(__m512i high, __m512i low) { return joined(upper_half(high), upper_half(low)); }
};

struct BFloat16 {
  static __m512i upper(__m512i words) { return _mm512_and_si512(words, _mm512_set1_epi32(-0x10000)); }
  static __m512 first(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static __m512 second(__m512i words) { return _mm512_castsi512_ps(upper(words)); }
  static __m512 first(__m512i high, __m512i low) {
    const __m512i lower = _mm512_and_si512(low, _mm512_set1_epi32(0xffff));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(high, 16), lower));
  }
  static __m512 second(__m512i high, __m512i low) {
    return _mm512_castsi512_ps(_mm512_or_si512(upper(high), _mm512_srli_epi32(low, 16)));
  }
};

// What is done with a group: a strip of x in registers, and the sums of a tile's rows.
template <typename Value>
struct Halves {
  Columns x;

  Halves(const StripsProduct& product, int64_t column) : x(product.x + column) {}

  void add(__m512i columns, __m512i words, __m512& first, __m512& second) const {
    const __m512i picked = x.at(columns);
    first = _mm512_fmadd_ps(Value::first(words), Value::first(picked), first);
    second = _mm512_fmadd_ps(Value::second(words), Value::second(picked), second);
  }
};

struct Pairs {
  Columns x;

  Pairs(const StripsProduct& product, int64_t column) : x(product.x + column) {}

  void add(__m512i columns, __m512i words, __m512& first, __m512&) const {
    first = _mm512_dpbf16_ps(first, (__m512bh)words, (__m512bh)x.at(columns));
  }
};

template <typename Value>
struct Wide {
  Columns high, low;

  Wide(const StripsProduct& product, int64_t column) : high(product.x + column), low(product.x_low + column) {}

  void add(__m512i columns, __m512i words, __m512& first, __m512& second) const {
    const __m512i upper = high.at(columns), lower = low.at(columns);
    first = _mm512_fmadd_ps(Value::first(words), Value::first(upper, lower), first);
    second = _mm512_fmadd_ps(Value::second(words), Value::second(upper, lower), second);
  }
};

// A strip of a chunk with one token. Returns where its groups end.
template <typename Input>
inline const uint8_t* multiply_strip(const Input& x, const uint8_t* group, const uint8_t* lengths, const uint8_t* ids,
                                     float* sums) {
  for (int tile = 0; tile < kTiles && lengths[tile] > 0; ++tile) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int length = lengths[tile]; length > 0; --length, group += kGroup) {
      const char* ahead = reinterpret_cast<const char*>(group) + kPrefetch;
      _mm_prefetch(ahead, _MM_HINT_T0);
      _mm_prefetch(ahead + 64, _MM_HINT_T0);
      const __m512i columns = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group)));
      x.add(columns, _mm512_loadu_si512(group + kSlots), first, second);
    }
    const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ids + tile * kTile));
    const __m512i at = _mm512_cvtepu8_epi32(rows);
    const __m512 before = _mm512_i32gather_ps(at, sums, 4);
    _mm512_i32scatter_ps(sums, at, _mm512_add_ps(before, _mm512_add_ps(first, second)), 4);
  }
  return group;
}

// Token after token multiplies a strip, whose groups stay in the cache.
template <typename Input>
void multiply(const StripsProduct& product, int64_t chunk, float* sums) {
  const uint8_t* group = product.groups + product.chunk_starts[chunk] * kGroup;
  const uint8_t* lengths = product.lengths + chunk * product.strips * kTiles;
  const uint8_t* ids = product.row_ids + chunk * product.strips * kChunk;
  for (int64_t strip = 0; strip < product.strips; ++strip, lengths += kTiles, ids += kChunk) {
    const uint8_t* end = group;
    for (int64_t token = 0; token < product.tokens; ++token) {
      const Input x(product, (token * product.strips + strip) * kStrip);
      end = multiply_strip(x, group, lengths, ids, sums + token * kChunk);
    }
    group = end;
  }
}

}  // namespace

StripsKernels avx512_strips_kernels(bool has_bf16) {
  return {multiply<Halves<Float16>>, multiply<Halves<BFloat16>>, multiply<Wide<Float16>>, multiply<Wide<BFloat16>>,
          has_bf16 ? multiply<Pairs> : nullptr};
}

}  // namespace macko
