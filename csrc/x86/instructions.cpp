// What this CPU can do, and the system lets it do.
#include "cpu/bitmap.h"
#include "cpu/strips.h"

namespace macko {

int32_t x86_instructions() {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  if (!has_avx2) return MACKO_PORTABLE;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
  return has_avx512 ? MACKO_AVX512 : MACKO_AVX2;
}

bool x86_has_bf16() { return __builtin_cpu_supports("avx512bf16"); }

BitmapKernels x86_kernels(int32_t instructions) {
  return instructions == MACKO_AVX512 ? avx512_kernels(x86_has_bf16()) : avx2_kernels();
}

}  // namespace macko
