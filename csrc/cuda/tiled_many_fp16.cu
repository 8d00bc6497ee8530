// SpMM of 17 tokens and more in a workspace on float16, on Hopper. A file a dtype, so that they compile side by side.
#include "cuda/tiled_many_launch.cuh"

namespace macko {
cudaError_t plan_many_fp16(const SpmmCall& call, int multiprocessors, int tokens, ManyPlan* plan) {
  return plan_many<__half>(call, multiprocessors, tokens, plan);
}
cudaError_t launch_many_fp16(const SpmmCall& call, const ManyPlan& plan, int tokens) {
  return launch_many<__half>(call, plan, tokens);
}
}  // namespace macko
