// Entry point of SpMM on the tiled layout.
#include "cuda/spmm_call.h"

using namespace macko;

macko_status macko_cuda_tiled_spmm(const macko_tiled* matrices, int32_t members, const void* x, const void* bias,
                                   const void* residual, void* y, int64_t tokens, int32_t device, void* stream) {
  if (!matrices || members < 1 || members > MACKO_TILED_MEMBERS || tokens < 0) return MACKO_BAD_ARGUMENT;
  int64_t rows = 0;
  for (int i = 0; i < members; i++) {
    const macko_tiled& matrix = matrices[i];
    if (!is_valid(&matrix) || matrix.cols != matrices->cols || matrix.value_dtype != matrices->value_dtype) {
      return MACKO_BAD_ARGUMENT;
    }
    rows += matrix.rows;
  }
  if (!fits_gpu(rows, matrices->cols)) return MACKO_BAD_ARGUMENT;
  if (rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y || !is_aligned(x, 16)) return MACKO_BAD_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const TiledGroup group(matrices, members);
  const SpmmCall call = {&group, x, bias, residual, y, device, static_cast<cudaStream_t>(stream)};
  return status_of(matrices->value_dtype == MACKO_FLOAT16 ? launch_spmm_fp16(call, tokens)
                                                          : launch_spmm_bf16(call, tokens));
}
