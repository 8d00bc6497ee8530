// What the entry point of sliced SpMV hands to the file that is compiled for a dtype.
#pragma once

#include <cuda_runtime.h>

#include "macko.h"

namespace macko {

// Arguments of macko_cuda_sliced_spmv.
struct SpmvCall {
  const macko_sliced* matrix;
  macko_input input;
  bool wide;  // x, bias and y are float32
  const void* x;
  const void* bias;
  const void* residual;
  void* y;
  int device;
  cudaStream_t stream;
};

cudaError_t launch_spmv_fp16(const SpmvCall& call, int64_t tokens);
cudaError_t launch_spmv_bf16(const SpmvCall& call, int64_t tokens);

}  // namespace macko
