// Which kernel multiplies how many tokens from the tiled layout, in which blocks.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cuda/dependent_launch.cuh"
#include "cuda/spmm_call.h"
#include "cuda/tiled_spmm.cuh"

namespace macko {

// What is asked of CUDA once a GPU.
struct SpmmGpu {
  int multiprocessors = 0;     // 0 is not known yet
  int shared_bytes = 0;        // of a multiprocessor
  int block_shared_bytes = 0;  // at most, of a block
  int major = 0;               // of its capability
};
inline cudaError_t ask_gpu(int device, SpmmGpu* gpu) {
  static SpmmGpu known[kMaxGpus];  // written with the same values by every thread that finds nothing
  if (device < kMaxGpus && known[device].multiprocessors) {
    *gpu = known[device];
    return cudaSuccess;
  }
  const std::pair<int*, cudaDeviceAttr> questions[] = {
      {&gpu->shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&gpu->block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&gpu->major, cudaDevAttrComputeCapabilityMajor},
      {&gpu->multiprocessors, cudaDevAttrMultiProcessorCount},
  };
  for (const auto& [answer, attribute] : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(answer, attribute, device);
    if (error != cudaSuccess) return error;
  }
  if (device < kMaxGpus) {
    // The number of multiprocessors last, since it says that the others are there.
    known[device].shared_bytes = gpu->shared_bytes;
    known[device].block_shared_bytes = gpu->block_shared_bytes;
    known[device].major = gpu->major;
    known[device].multiprocessors = gpu->multiprocessors;
  }
  return cudaSuccess;
}

template <typename T, typename Config>
cudaError_t launch_spmm_config(const SpmmCall& call, const SpmmGpu& gpu, int tokens) {
  static AllowedBytes allowed;
  const TiledGroup& group = *call.group;
  const int64_t bytes = Config::shared_bytes(group.record_bytes);
  constexpr auto kernel = spmm_strips<T, Config>;
  const cudaError_t error = allowed.at_least(kernel, bytes, Config::Blocks, gpu.shared_bytes, call.device);
  if (error != cudaSuccess) return error;
  return launch_overlapping<kernel>((group.strips + Config::Strips - 1) / Config::Strips, Config::Threads, bytes,
                                    call.device, call.stream, group, static_cast<const T*>(call.x),
                                    static_cast<const T*>(call.bias), static_cast<const T*>(call.residual),
                                    static_cast<T*>(call.y), tokens);
}

// At most 8 * Eights tokens, in the fastest block of those measured (docs/design.md) that fits the GPU.
template <typename T, int Eights>
cudaError_t launch_spmm_some(const SpmmCall& call, const SpmmGpu& gpu, int tokens) {
  const TiledGroup& group = *call.group;
  const int tiles = group.most_tiles(), panels = panels_of(group.cols);
  const int of_each = (group.strips + gpu.multiprocessors - 1) / gpu.multiprocessors;  // strips of a multiprocessor
  const auto launch = [&](auto config) { return launch_spmm_config<T, decltype(config)>(call, gpu, tokens); };
  const auto fits = [&](auto config) {
    using Config = decltype(config);
    constexpr int kDeclared = 512;  // at most: barriers and rows of strips
    return tiles <= Config::Tiles && Config::shared_bytes(group.record_bytes) + kDeclared <= gpu.block_shared_bytes;
  };
  // Strips have at most 4 tiles, or 5 where each multiprocessor has one (tiled_plan.py), unless somebody cuts them
  // otherwise.
  const bool one = of_each == 1, two = of_each == 2, threes = of_each % 3 == 0;
  if constexpr (Eights == 1) {
    using Long = SpmmConfig<1, 24, 4, 1, 2, 1, false>;
    using Few = SpmmConfig<1, 16, 4, 1, 2, 2, false>;
    using LongHigh = SpmmConfig<1, 24, 6, 1, 2, 1, false>;
    using High = SpmmConfig<1, 12, 6, 1, 2, 2, false>;
    using Three = SpmmConfig<1, 8, 4, 1, 2, 3, false>;
    using Four = SpmmConfig<1, 8, 4, 1, 2, 4, false>;
    const bool is_long = panels >= 96;
    if (one && is_long && fits(Long())) return launch(Long());
    if ((one || two) && fits(Few())) return launch(Few());
    if (one && is_long && fits(LongHigh())) return launch(LongHigh());
    if (one && fits(High())) return launch(High());
    if (!threes && fits(Four())) return launch(Four());
    if (fits(Three())) return launch(Three());
  } else if constexpr (Eights == 2) {
    using One = SpmmConfig<1, 16, 4, 2, 2, 1, false>;
    using OneHigh = SpmmConfig<1, 20, 6, 2, 2, 1, false>;
    using Two = SpmmConfig<1, 12, 4, 2, 2, 2, false>;
    using Three = SpmmConfig<1, 8, 4, 2, 2, 3, false>;
    using Four = SpmmConfig<1, 6, 4, 2, 2, 4, false>;
    if (one && fits(One())) return launch(One());
    if (one && fits(OneHigh())) return launch(OneHigh());
    if (two && fits(Two())) return launch(Two());
    if (!threes && fits(Four())) return launch(Four());
    if (fits(Three())) return launch(Three());
  } else {
    using One = SpmmConfig<1, 16, 4, 4, 2, 1, false>;
    using OneHigh = SpmmConfig<1, 16, 6, 4, 2, 1, false>;
    using Two = SpmmConfig<2, 10, 4, 4, 2, 1, true>;
    using Three = SpmmConfig<3, 8, 4, 4, 2, 1, true>;
    if (one && fits(One())) return launch(One());
    if (one && fits(OneHigh())) return launch(OneHigh());
    if (two && fits(Two())) return launch(Two());
    if (fits(Three())) return launch(Three());
  }
  return launch(SpmmConfig<1, 4, 8, Eights, 2, 1, false>());
}

#ifdef MACKO_SM90A
// How all tokens are multiplied at once in a workspace; none where others are faster, for more tokens than a grid has
// blocks for, and where that kernel cannot run.
template <typename T>
cudaError_t plan_spmm(const SpmmCall& call, const SpmmGpu& gpu, int64_t tokens, ManyPlan* plan) {
  *plan = {};
  constexpr int64_t kMost = int64_t{65535} * 8 / 768 * 768;  // write_panels takes 8 a row of its grid
  if (gpu.major != 9 || tokens <= MACKO_TILED_FEW_TOKENS || tokens > kMost) return cudaSuccess;
  const auto make = std::is_same_v<T, __half> ? plan_many_fp16 : plan_many_bf16;
  const int all = static_cast<int>(tokens);
  const cudaError_t error = make(call, gpu.multiprocessors, all, plan);
  if (all <= kGroupTokens && groups_time(*call.group, gpu.multiprocessors, all) < plan->time) *plan = {};
  return error;
}
#endif

// Bytes of the workspace in which so many tokens are multiplied fastest.
template <typename T>
cudaError_t ask_workspace([[maybe_unused]] const SpmmCall& call, [[maybe_unused]] int64_t tokens, int64_t* bytes) {
  *bytes = 0;
#ifdef MACKO_SM90A
  SpmmGpu gpu;
  ManyPlan plan;
  cudaError_t error = ask_gpu(call.device, &gpu);
  if (error == cudaSuccess) error = plan_spmm<T>(call, gpu, tokens, &plan);
  if (error == cudaSuccess) *bytes = plan.workspace_bytes;
  return error;
#else
  return cudaSuccess;
#endif
}

// All tokens, as many at a time as a block takes.
template <typename T>
cudaError_t launch_spmm(const SpmmCall& all, int64_t tokens) {
  SpmmGpu gpu;
  const cudaError_t unknown = ask_gpu(all.device, &gpu);
  if (unknown != cudaSuccess) return unknown;
#ifdef MACKO_SM90A
  ManyPlan plan;
  const cudaError_t unplanned = plan_spmm<T>(all, gpu, tokens, &plan);
  if (unplanned != cudaSuccess) return unplanned;
  if (plan.workspace_bytes > 0 && plan.workspace_bytes <= all.workspace_bytes) {
    const auto launch = std::is_same_v<T, __half> ? launch_many_fp16 : launch_many_bf16;
    return launch(all, plan, static_cast<int>(tokens));
  }
  if (gpu.major == 9 && tokens > MACKO_TILED_FEW_TOKENS) {
    const auto launch = std::is_same_v<T, __half> ? launch_groups_fp16 : launch_groups_bf16;
    return launch(all, gpu.multiprocessors, gpu.shared_bytes, tokens);
  }
#endif
  return for_some_tokens(all, tokens, 32, [&](const SpmmCall& call, int now) {
    return now > 16  ? launch_spmm_some<T, 4>(call, gpu, now)
           : now > 8 ? launch_spmm_some<T, 2>(call, gpu, now)
                     : launch_spmm_some<T, 1>(call, gpu, now);
  });
}

}  // namespace macko
