// SpMM on float16. A file a dtype, so that they compile side by side.
#include "cuda/tiled_spmm_launch.cuh"

namespace macko {
cudaError_t launch_spmm_fp16(const SpmmCall& call, int64_t tokens) { return launch_spmm<__half>(call, tokens); }
cudaError_t ask_workspace_fp16(const SpmmCall& call, int64_t tokens, int64_t* bytes) {
  return ask_workspace<__half>(call, tokens, bytes);
}
}  // namespace macko
