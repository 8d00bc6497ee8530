// Which plan a product of many tokens has (csrc/cuda/tiled_many_plan.h), and how its kernels are launched.
#pragma once

#include <cfloat>

#include "cuda/dependent_launch.cuh"
#include "cuda/spmm_call.h"
#include "cuda/tiled_many.cuh"

namespace macko {

// How many clusters of so many blocks a GPU runs at a time.
template <typename T, typename Config>
cudaError_t ask_clusters(int device, int ranks, int* clusters) {
  static int known[kMaxGpus][kMaxRanks + 1];  // 0 is not known yet; every thread that finds nothing writes the same
  if (device < kMaxGpus && known[device][ranks]) {
    *clusters = known[device][ranks];
    return cudaSuccess;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = ranks;
  config.blockDim = Config::Threads;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, spmm_many<T, Config>, &config);
  if (error == cudaSuccess && device < kMaxGpus) known[device][ranks] = *clusters;
  return error;
}

template <typename T, typename Config>
cudaError_t launch_many_plan(const SpmmCall& call, const ManyPlan& plan, int tokens) {
  static bool allowed[kMaxGpus];  // as much shared memory as there is; every thread that finds false writes true
  const TiledGroup& group = *call.group;
  const auto kernel = spmm_many<T, Config>;
  if (call.device >= kMaxGpus || !allowed[call.device]) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBlockSharedBytes);
    if (error != cudaSuccess) return error;
    if (call.device < kMaxGpus) allowed[call.device] = true;
  }
  const RowBlocks row_blocks(group, Config::Tiles);
  const int token_blocks = (tokens + Config::Tokens - 1) / Config::Tokens, panels = panels_of(group.cols);
  const Shares shares(plan.blocks, plan.ranks, row_blocks.count, token_blocks, panels);
  uint8_t* const x = static_cast<uint8_t*>(call.workspace);
  float4* const partial = reinterpret_cast<float4*>(x + plan.panels_bytes);
  uint32_t* const flags = reinterpret_cast<uint32_t*>(x + plan.panels_bytes + plan.partial_bytes);
  const dim3 grid((panels + kBlockWarps - 1) / kBlockWarps, token_blocks * (Config::Tokens / 8));
  const cudaError_t error = launch_overlapping<write_panels<Config::Tokens>>(
      grid, kBlockThreads, 0, call.device, call.stream, static_cast<const uint16_t*>(call.x), (group.cols + 7) / 8 * 8,
      tokens, panels, x, flags, plan.partial_bytes ? plan.blocks * Config::Groups : 0);
  if (error != cudaSuccess) return error;
  return launch_overlapping_clusters(
      kernel, plan.blocks, plan.ranks, Config::Threads, plan.shared_bytes, call.stream, group, row_blocks, shares,
      static_cast<const uint8_t*>(x), static_cast<const T*>(call.bias), static_cast<const T*>(call.residual),
      static_cast<T*>(call.y), partial, flags, tokens, plan.panel_slots, plan.record_slots, plan.record_slot_bytes);
}

// The best plan of those for a shape, if it is better than the one that there is.
template <typename T, typename Config>
cudaError_t improve_plan(const SpmmCall& call, int multiprocessors, int tokens, float panel_time, ManyPlan* best) {
  const TiledGroup& group = *call.group;
  const int row_blocks = RowBlocks(group, Config::Tiles).count, panels = panels_of(group.cols);
  const int64_t products = int64_t{row_blocks} * ((tokens + Config::Tokens - 1) / Config::Tokens);
  const auto consider = [&](int64_t blocks, int ranks, float time) {
    ManyPlan plan = {};
    plan.shape = Config::kShape;
    plan.blocks = static_cast<int>(blocks);
    plan.ranks = ranks;
    plan.time = time;
    if (time < best->time && plan.fill(group, tokens, row_blocks)) *best = plan;
  };
  for (int ranks = 2; ranks <= kMaxRanks && ranks <= panels; ranks++) {
    int clusters = 0;
    const cudaError_t error = ask_clusters<T, Config>(call.device, ranks, &clusters);
    if (error != cudaSuccess) return error;
    if (products > clusters) break;
    consider(products * ranks, ranks, (panels + ranks - 1) / ranks * panel_time + kClusterTime);
  }
  if (products <= multiprocessors) consider(products, 1, panels * panel_time + kProductTime);
  if (products * panels >= multiprocessors && products * panels <= INT_MAX) {
    consider(multiprocessors, 1, static_cast<float>(products * panels) / multiprocessors * panel_time + kRangeTime);
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t plan_many(const SpmmCall& call, int multiprocessors, int tokens, ManyPlan* plan) {
  *plan = {};
  plan->time = FLT_MAX;
  cudaError_t error = cudaSuccess;
  const auto consider = [&](auto config, float panel_time) {
    if (error == cudaSuccess) {
      error = improve_plan<T, decltype(config)>(call, multiprocessors, tokens, panel_time, plan);
    }
  };
  if (tokens <= 32) {
    consider(ManyConfig<3, 32>(), kPanelTime32);
  } else if (tokens <= 64) {
    consider(ManyConfig<3, 64>(), kPanelTime64);
  } else {
    consider(ManyConfig<2, 256>(), kPanelTime256);
    consider(ManyConfig<2, 192>(), kPanelTime192);
    consider(ManyConfig<3, 128>(), kPanelTime128);
  }
  return error;
}

template <typename T>
cudaError_t launch_many(const SpmmCall& call, const ManyPlan& plan, int tokens) {
  if (plan.shape.tokens == 256) return launch_many_plan<T, ManyConfig<2, 256>>(call, plan, tokens);
  if (plan.shape.tokens == 192) return launch_many_plan<T, ManyConfig<2, 192>>(call, plan, tokens);
  if (plan.shape.tokens == 128) return launch_many_plan<T, ManyConfig<3, 128>>(call, plan, tokens);
  if (plan.shape.tokens == 64) return launch_many_plan<T, ManyConfig<3, 64>>(call, plan, tokens);
  return launch_many_plan<T, ManyConfig<3, 32>>(call, plan, tokens);
}

}  // namespace macko
