// Entry points of SpMM on the tiled layout.
#include "cuda/spmm_call.h"

using namespace macko;

namespace {

// Whether one kernel can multiply these matrices, and how many rows they have together.
bool can_join(const macko_tiled* matrices, int32_t members, int64_t* rows) {
  if (!matrices || members < 1 || members > MACKO_TILED_MEMBERS) return false;
  *rows = 0;
  for (int i = 0; i < members; i++) {
    const macko_tiled& matrix = matrices[i];
    if (!is_valid(&matrix) || matrix.cols != matrices->cols || matrix.value_dtype != matrices->value_dtype)
      return false;
    *rows += matrix.rows;
  }
  return fits_gpu(*rows, matrices->cols);
}

}  // namespace

macko_status macko_cuda_tiled_spmm(const macko_tiled* matrices, int32_t members, const void* x, const void* bias,
                                   const void* residual, void* y, void* workspace, int64_t workspace_bytes,
                                   int64_t tokens, int32_t device, void* stream) {
  int64_t rows = 0;
  if (!can_join(matrices, members, &rows) || tokens < 0) return MACKO_BAD_ARGUMENT;
  if (rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y || !is_aligned(x, 16)) return MACKO_BAD_ARGUMENT;
  if (workspace_bytes > 0 && (!workspace || !is_aligned(workspace, 128))) return MACKO_BAD_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const TiledGroup group(matrices, members);
  const SpmmCall call = {
      &group, x, bias, residual, y, workspace, workspace_bytes, device, static_cast<cudaStream_t>(stream)};
  return status_of(matrices->value_dtype == MACKO_FLOAT16 ? launch_spmm_fp16(call, tokens)
                                                          : launch_spmm_bf16(call, tokens));
}

macko_status macko_cuda_tiled_workspace(const macko_tiled* matrices, int32_t members, int64_t tokens, int32_t device,
                                        int64_t* bytes) {
  int64_t rows = 0;
  if (!bytes || !can_join(matrices, members, &rows) || tokens < 0) return MACKO_BAD_ARGUMENT;
  *bytes = 0;
  if (rows == 0 || tokens == 0) return MACKO_OK;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const TiledGroup group(matrices, members);
  SpmmCall call = {};
  call.group = &group;
  call.device = device;
  return status_of(matrices->value_dtype == MACKO_FLOAT16 ? ask_workspace_fp16(call, tokens, bytes)
                                                          : ask_workspace_bf16(call, tokens, bytes));
}
