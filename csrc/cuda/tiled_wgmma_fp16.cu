// SpMM of many tokens on float16, on Hopper. A file a dtype, so that they compile side by side.
#include "cuda/tiled_wgmma.cuh"

namespace macko {
cudaError_t launch_groups_fp16(const SpmmCall& call, int multiprocessors, int64_t tokens) {
  return launch_groups<__half>(call, multiprocessors, tokens);
}
}  // namespace macko
