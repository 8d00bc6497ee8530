// SpMV on float16. A file a dtype, so that they compile side by side.
#include "cuda/sliced_spmv.cuh"

namespace macko {
cudaError_t launch_spmv_fp16(const macko_sliced& matrix, const void* x, const void* bias, void* y, int64_t tokens,
                             int device, cudaStream_t stream) {
  return launch_spmv(matrix, static_cast<const __half*>(x), static_cast<const __half*>(bias), static_cast<__half*>(y),
                     tokens, device, stream);
}
}  // namespace macko
