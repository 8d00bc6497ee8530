// What the entry point of tiled SpMM hands to the file that is compiled for a dtype.
#pragma once

#include <cuda_runtime.h>

#include "cuda/tiled.cuh"
#include "cuda/tiled_many_plan.h"

namespace macko {

// Arguments of macko_cuda_tiled_spmm.
struct SpmmCall {
  const TiledGroup* group;
  const void* x;
  const void* bias;
  const void* residual;
  void* y;
  void* workspace;
  int64_t workspace_bytes;  // 0 if there is none
  int device;
  cudaStream_t stream;
};

cudaError_t launch_spmm_fp16(const SpmmCall& call, int64_t tokens);
cudaError_t launch_spmm_bf16(const SpmmCall& call, int64_t tokens);
cudaError_t ask_workspace_fp16(const SpmmCall& call, int64_t tokens, int64_t* bytes);
cudaError_t ask_workspace_bf16(const SpmmCall& call, int64_t tokens, int64_t* bytes);

// The same by warpgroups, for more than a few tokens, on a GPU with so many multiprocessors, each with so much
// shared memory; there where MACKO_SM90A is.
cudaError_t launch_groups_fp16(const SpmmCall& call, int multiprocessors, int shared_bytes, int64_t tokens);
cudaError_t launch_groups_bf16(const SpmmCall& call, int multiprocessors, int shared_bytes, int64_t tokens);

// The same for many tokens at once, in a workspace; a plan that takes FLT_MAX is none.
cudaError_t plan_many_fp16(const SpmmCall& call, int multiprocessors, int tokens, ManyPlan* plan);
cudaError_t plan_many_bf16(const SpmmCall& call, int multiprocessors, int tokens, ManyPlan* plan);
cudaError_t launch_many_fp16(const SpmmCall& call, const ManyPlan& plan, int tokens);
cudaError_t launch_many_bf16(const SpmmCall& call, const ManyPlan& plan, int tokens);

}  // namespace macko
