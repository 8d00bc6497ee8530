// SpMM on float16. A file a dtype, so that they compile side by side.
#include "cuda/tiled_spmm.cuh"

namespace macko {
cudaError_t launch_spmm_fp16(const SpmmCall& call, int64_t tokens) { return launch_spmm<__half>(call, tokens); }
}  // namespace macko
