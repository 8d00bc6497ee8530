// Dense rows compressed with AVX2: eight columns at a time, by shuffles that a table holds for each byte of bits.
#include <immintrin.h>

#include "cpu/compress_rows.h"

namespace macko {
namespace {

// For each byte of bits, the places of those that are set, in their order.
struct Places {
  alignas(16) uint8_t halves[256][16];  // of 16 bits, in bytes: a shuffle
  alignas(8) uint8_t columns[256][8];

  constexpr Places() : halves(), columns() {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int column = 0; column < 8; ++column) {
        if (!(bits >> column & 1)) continue;
        halves[bits][2 * count] = static_cast<uint8_t>(2 * column);
        halves[bits][2 * count + 1] = static_cast<uint8_t>(2 * column + 1);
        columns[bits][count++] = static_cast<uint8_t>(column);
      }
    }
  }
};
constexpr Places kPlaces;

// Calls put(part, bits, before) for each byte of bits, `before` of which are set below it: stores need not wait for
// the counts of the bytes before.
template <typename Put>
inline void for_bytes(uint32_t bits, const Put& put) {
  for (int part = 0; part < 4; ++part) {
    put(part, bits >> 8 * part & 0xffu, _mm_popcnt_u32(bits & ((1u << 8 * part) - 1)));
  }
}

__m256i are_zero(const uint16_t* columns) {
  const __m256i magnitudes =
      _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)), _mm256_set1_epi16(0x7fff));
  return _mm256_cmpeq_epi16(magnitudes, _mm256_setzero_si256());
}

struct Avx2 {
  static uint32_t nonzeros(const uint16_t* columns) {
    const __m256i bytes = _mm256_packs_epi16(are_zero(columns), are_zero(columns + 16));  // eights: 0, 2, 1, 3
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0b11'01'10'00)));
  }

  static int count(uint32_t bits) { return _mm_popcnt_u32(bits); }

  static void put_values(const uint16_t* columns, uint32_t, uint32_t entries, uint16_t* values) {
    for_bytes(entries, [&](int part, uint32_t bits, int before) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + 8 * part));
      const __m128i is_nonzero = _mm_cmpgt_epi16(_mm_and_si128(eight, _mm_set1_epi16(0x7fff)), _mm_setzero_si128());
      const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kPlaces.halves[bits]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + before),
                       _mm_shuffle_epi8(_mm_and_si128(eight, is_nonzero), shuffle));
    });
  }

  static void put_columns(uint32_t entries, uint8_t* places) {
    for_bytes(entries, [&](int part, uint32_t bits, int before) {
      const __m128i columns = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.columns[bits]));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(places + before),
                       _mm_add_epi8(columns, _mm_set1_epi8(static_cast<char>(8 * (part % 2)))));
    });
  }
};

}  // namespace

CompressKernels avx2_compress_kernels() { return compress_kernels<Avx2>(); }

}  // namespace macko
