// Dense rows compressed with AVX-512: `vpcompressw` and `vpcompressb` (VBMI2), 32 columns at a time.
#include <immintrin.h>

#include "cpu/compress_rows.h"

namespace macko {
namespace {

struct Avx512 {
  static uint32_t nonzeros(const uint16_t* columns) {
    return _mm512_test_epi16_mask(_mm512_loadu_si512(columns), _mm512_set1_epi16(0x7fff));
  }

  static int count(uint32_t bits) { return _mm_popcnt_u32(bits); }

  static void put_values(const uint16_t* columns, uint32_t nonzeros, uint32_t entries, uint16_t* values) {
    const __m512i block = _mm512_maskz_loadu_epi16(nonzeros, columns);
    _mm512_storeu_si512(values, _mm512_maskz_compress_epi16(entries, block));
  }

  static void put_columns(uint32_t entries, uint8_t* places) {
    const __m256i columns =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(places), _mm256_maskz_compress_epi8(entries, columns));
  }
};

}  // namespace

CompressKernels avx512_compress_kernels() { return compress_kernels<Avx512>(); }

}  // namespace macko
