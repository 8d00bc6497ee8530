// Which instruction sets a call may use.
#pragma once

#include "cpu/bitmap.h"
#include "cpu/compress.h"
#include "cpu/strips.h"

namespace macko {

int32_t best_instructions();             // a macko_instructions
bool is_runnable(int32_t instructions);  // whether this CPU has them
BitmapKernels bitmap_kernels(int32_t instructions);
CompressKernels compress_kernels(int32_t instructions);
StripsKernels strips_kernels(int32_t instructions);

}  // namespace macko
