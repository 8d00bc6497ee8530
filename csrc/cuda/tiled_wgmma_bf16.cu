// SpMM of 17 to 64 tokens on bfloat16, on Hopper. A file a dtype, so that they compile side by side.
#include "cuda/tiled_wgmma.cuh"

namespace macko {
cudaError_t launch_groups_bf16(const SpmmCall& call, int multiprocessors, int shared_bytes, int64_t tokens) {
  return launch_groups<__nv_bfloat16>(call, multiprocessors, shared_bytes, tokens);
}
}  // namespace macko
