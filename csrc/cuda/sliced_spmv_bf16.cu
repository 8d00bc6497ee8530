// SpMV on bfloat16. A file a dtype, so that they compile side by side.
#include "cuda/sliced_spmv.cuh"

namespace macko {
cudaError_t launch_spmv_bf16(const SpmvCall& call, int64_t tokens) {
  return call.wide ? launch_spmv(Spmv<__nv_bfloat16, float>(call), tokens)
                   : launch_spmv(Spmv<__nv_bfloat16, __nv_bfloat16>(call), tokens);
}
}  // namespace macko
