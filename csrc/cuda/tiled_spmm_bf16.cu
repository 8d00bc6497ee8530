// SpMM on bfloat16. A file a dtype, so that they compile side by side.
#include "cuda/tiled_spmm_launch.cuh"

namespace macko {
cudaError_t launch_spmm_bf16(const SpmmCall& call, int64_t tokens) { return launch_spmm<__nv_bfloat16>(call, tokens); }
cudaError_t ask_workspace_bf16(const SpmmCall& call, int64_t tokens, int64_t* bytes) {
  return ask_workspace<__nv_bfloat16>(call, tokens, bytes);
}
}  // namespace macko
