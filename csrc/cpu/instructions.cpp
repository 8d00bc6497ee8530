// The kernels of each instruction set, of those that the library is built with.
#include "cpu/instructions.h"

namespace macko {

int32_t best_instructions() {
#ifdef MACKO_X86
  return x86_instructions();
#elif defined(MACKO_ARM)
  return MACKO_NEON;
#else
  return MACKO_PORTABLE;
#endif
}

bool is_runnable(int32_t instructions) { return instructions >= MACKO_PORTABLE && instructions <= best_instructions(); }

BitmapKernels bitmap_kernels(int32_t instructions) {
#ifdef MACKO_X86
  if (instructions != MACKO_PORTABLE) return x86_kernels(instructions);
#elif defined(MACKO_ARM)
  if (instructions == MACKO_NEON) return neon_kernels();
#endif
  (void)instructions;
  return portable_kernels();
}

CompressKernels compress_kernels(int32_t instructions) {
#ifdef MACKO_X86
  if (instructions == MACKO_AVX512) return avx512_compress_kernels();
  if (instructions == MACKO_AVX2) return avx2_compress_kernels();
#endif
  (void)instructions;
  return portable_compress_kernels();
}

StripsKernels strips_kernels(int32_t instructions) {
#ifdef MACKO_X86
  if (instructions == MACKO_AVX512) return avx512_strips_kernels(x86_has_bf16());
#endif
  (void)instructions;
  return portable_strips_kernels();
}

}  // namespace macko

extern "C" int32_t macko_cpu_instructions(void) { return macko::best_instructions(); }
