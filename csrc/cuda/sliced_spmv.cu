// Entry point of SpMV on the sliced layout.
#include "cuda/input.cuh"
#include "cuda/sliced.cuh"
#include "cuda/spmv_call.h"

using namespace macko;

int64_t macko_cuda_sliced_max_cols(int32_t device) {
  const int64_t columns = shared_bytes_for_x(device) / 2 - kPaddingColumns;
  return columns < 0 ? 0 : columns > UINT16_MAX ? UINT16_MAX : columns;
}

macko_status macko_cuda_sliced_spmv(const macko_sliced* matrix, const macko_input* input, const void* x,
                                    const void* bias, const void* residual, void* y, int32_t x_dtype, int64_t tokens,
                                    int32_t device, void* stream) {
  if (!is_valid(matrix) || tokens < 0) return MACKO_BAD_ARGUMENT;
  const bool wide = x_dtype == MACKO_FLOAT32;
  if (wide ? residual != nullptr || (input && input->transform != MACKO_PLAIN) : x_dtype != matrix->value_dtype) {
    return MACKO_BAD_ARGUMENT;
  }
  if (matrix->rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y) return MACKO_BAD_ARGUMENT;
  const macko_input plain = {nullptr, 0.0f, MACKO_PLAIN};
  const macko_input& used = input ? *input : plain;
  if (!is_valid(used, x, matrix->cols) || (used.transform != MACKO_PLAIN && tokens != 1)) return MACKO_BAD_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const SpmvCall call = {matrix, used, wide, x, bias, residual, y, device, static_cast<cudaStream_t>(stream)};
  return status_of(matrix->value_dtype == MACKO_FLOAT16 ? launch_spmv_fp16(call, tokens)
                                                        : launch_spmv_bf16(call, tokens));
}
