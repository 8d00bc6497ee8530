// SpMV on bfloat16. A file a dtype, so that they compile side by side.
#include "cuda/sliced_spmv.cuh"

namespace macko {
cudaError_t launch_spmv_bf16(const macko_sliced& matrix, const void* x, const void* bias, void* y, int64_t tokens,
                             int device, cudaStream_t stream) {
  return launch_spmv(matrix, static_cast<const __nv_bfloat16*>(x), static_cast<const __nv_bfloat16*>(bias),
                     static_cast<__nv_bfloat16*>(y), tokens, device, stream);
}
}  // namespace macko
