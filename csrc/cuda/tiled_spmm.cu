// Entry point of SpMM on the tiled layout.
#include "cuda/spmm_call.h"
#include "cuda/tiled.cuh"

using namespace macko;

macko_status macko_cuda_tiled_spmm(const macko_tiled* matrix, const void* x, const void* bias, void* y, int64_t tokens,
                                   int32_t device, void* stream) {
  if (!is_valid(matrix) || tokens < 0) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y || !is_aligned(x, 16)) return MACKO_BAD_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const SpmmCall call = {matrix, x, bias, y, device, static_cast<cudaStream_t>(stream)};
  return status_of(matrix->value_dtype == MACKO_FLOAT16 ? launch_spmm_fp16(call, tokens)
                                                        : launch_spmm_bf16(call, tokens));
}
