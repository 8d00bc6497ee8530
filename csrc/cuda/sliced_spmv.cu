// Entry point of SpMV on the sliced layout.
#include "cuda/sliced.cuh"

namespace macko {
cudaError_t launch_spmv_fp16(const macko_sliced& matrix, const void* x, const void* bias, void* y, int64_t tokens,
                             int device, cudaStream_t stream);
cudaError_t launch_spmv_bf16(const macko_sliced& matrix, const void* x, const void* bias, void* y, int64_t tokens,
                             int device, cudaStream_t stream);
}  // namespace macko

using namespace macko;

int64_t macko_cuda_sliced_max_cols(int32_t device) {
  const int64_t columns = shared_bytes_for_x(device) / 2 - kPaddingColumns;
  return columns < 0 ? 0 : columns > UINT16_MAX ? UINT16_MAX : columns;
}

macko_status macko_cuda_sliced_spmv(const macko_sliced* matrix, const void* x, const void* bias, void* y,
                                    int64_t tokens, int32_t device, void* stream) {
  if (!is_valid(matrix) || tokens < 0) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0 || tokens == 0) return MACKO_OK;
  if (!x || !y) return MACKO_BAD_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const auto launch = matrix->value_dtype == MACKO_FLOAT16 ? launch_spmv_fp16 : launch_spmv_bf16;
  return status_of(launch(*matrix, x, bias, y, tokens, device, static_cast<cudaStream_t>(stream)));
}
