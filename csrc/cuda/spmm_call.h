// What the entry point of tiled SpMM hands to the file that is compiled for a dtype.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

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

// Calls launch(call, now) for all tokens, at most so many at a time.
template <typename Launch>
cudaError_t for_some_tokens(SpmmCall call, int64_t tokens, int64_t most, const Launch& launch) {
  constexpr int64_t kValueBytes = 2;
  const int64_t x_bytes = (int64_t{call.group->cols} + 7) / 8 * 8 * kValueBytes,
                y_bytes = call.group->rows * kValueBytes;
  for (; tokens > 0; tokens -= most) {
    const int64_t now = std::min(tokens, most);
    const cudaError_t error = launch(call, static_cast<int>(now));
    if (error != cudaSuccess) return error;
    call.x = static_cast<const char*>(call.x) + now * x_bytes;
    if (call.residual) call.residual = static_cast<const char*>(call.residual) + now * y_bytes;
    call.y = static_cast<char*>(call.y) + now * y_bytes;
  }
  return cudaSuccess;
}

cudaError_t launch_spmm_fp16(const SpmmCall& call, int64_t tokens);
cudaError_t launch_spmm_bf16(const SpmmCall& call, int64_t tokens);
cudaError_t ask_workspace_fp16(const SpmmCall& call, int64_t tokens, int64_t* bytes);
cudaError_t ask_workspace_bf16(const SpmmCall& call, int64_t tokens, int64_t* bytes);

// The same by warpgroups, for 17 tokens and more, up to kGroupTokens at a time, on a GPU with so many multiprocessors,
// each with so much shared memory; there where MACKO_SM90A is.
cudaError_t launch_groups_fp16(const SpmmCall& call, int multiprocessors, int shared_bytes, int64_t tokens);
cudaError_t launch_groups_bf16(const SpmmCall& call, int multiprocessors, int shared_bytes, int64_t tokens);

// The same for 17 tokens and more, all at once, in a workspace. A plan without a workspace is none.
cudaError_t plan_many_fp16(const SpmmCall& call, int multiprocessors, int tokens, ManyPlan* plan);
cudaError_t plan_many_bf16(const SpmmCall& call, int multiprocessors, int tokens, ManyPlan* plan);
cudaError_t launch_many_fp16(const SpmmCall& call, const ManyPlan& plan, int tokens);
cudaError_t launch_many_bf16(const SpmmCall& call, const ManyPlan& plan, int tokens);

}  // namespace macko
