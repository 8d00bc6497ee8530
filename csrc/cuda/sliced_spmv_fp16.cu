// SpMV on float16. A file a dtype, so that they compile side by side.
#include "cuda/sliced_spmv.cuh"

namespace macko {
cudaError_t launch_spmv_fp16(const SpmvCall& call, int64_t tokens) {
  return call.wide ? launch_spmv(Spmv<__half, float>(call), tokens) : launch_spmv(Spmv<__half, __half>(call), tokens);
}
}  // namespace macko
