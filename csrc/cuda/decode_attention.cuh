// Attention of one new token a text over a cache of keys and values (macko_attention of macko.h): norms of queries and
// keys, rotary embedding, the cache's new slot, softmax and the sum of the values, in one kernel.
//
// A block takes a share of the slots for up to Group query heads of one key-value head, so that each key and value is
// read once. A warp reads several slots at a time, Lanes lanes a slot; every such group of lanes keeps its own running
// maximum and sums (online softmax, Milakov and Gimelshein, arXiv 1805.02867), which are merged at the end: in the
// warp, in the block, and by the last block of a head (flash-decoding). Scores are in units of log2, so that exp2
// serves.
#pragma once

#include "cuda/dependent_launch.cuh"
#include "cuda/input.cuh"
#include "cuda/sliced.cuh"

namespace macko {

constexpr float kLog2E = 1.4426950408889634f;

template <int Lanes_, int Group_>
struct AttentionConfig {
  static constexpr int Lanes = Lanes_;  // that read a slot, 8 elements each
  static constexpr int Group = Group_;  // query heads of a block
  static constexpr int HeadDim = 8 * Lanes;
  static constexpr int Warps = 8;
  static constexpr int Threads = Warps * kWarpSize;
  static constexpr int SlotsOfWarp = kWarpSize / Lanes;  // that a warp reads at once
  static constexpr int SlotsOfBlock = Warps * SlotsOfWarp;
  static constexpr int InFlight = Group == 1 ? 4 : 2;  // reads of a lane on their way
};

// Running softmax of one query head in a group of lanes: each lane has 8 elements of the sum.
struct Running {
  float most, total, sums[8];

  __device__ __forceinline__ void add(float score, const float (&value)[8]) {
    const float now = fmaxf(most, score), keep = exp2f(most - now), weight = exp2f(score - now);
    total = total * keep + weight;
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = fmaf(sums[i], keep, weight * value[i]);
    most = now;
  }
};

template <typename T>
__device__ __forceinline__ void to_floats(float (&out)[8], uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 p = pair_to_float<T>(words[i]);
    out[2 * i] = p.x;
    out[2 * i + 1] = p.y;
  }
}

// A head of the new token, by one warp: normalised if there is a weight, then rotated. Rounded as transformers rounds.
template <typename T, int HeadDim>
__device__ __forceinline__ void rotate_head(T* to, const T* from, const T* norm, float epsilon, const T* cosines,
                                            const T* sines) {
  constexpr int kHalf = HeadDim / 2, kSteps = (kHalf + kWarpSize - 1) / kWarpSize;
  float low[kSteps] = {}, high[kSteps] = {};
  float squares = 0.0f;
#pragma unroll
  for (int s = 0; s < kSteps; s++) {
    const int i = lane_index() + s * kWarpSize;
    if (i >= kHalf) break;
    low[s] = to_float(from[i]);
    high[s] = to_float(from[i + kHalf]);
    squares += low[s] * low[s] + high[s] * high[s];
  }
  const float scale = norm ? rsqrtf(warp_sum(squares) / HeadDim + epsilon) : 1.0f;
#pragma unroll
  for (int s = 0; s < kSteps; s++) {
    const int i = lane_index() + s * kWarpSize;
    if (i >= kHalf) break;
    if (norm) {
      low[s] = rounded<T>(to_float(norm[i]) * rounded<T>(low[s] * scale));
      high[s] = rounded<T>(to_float(norm[i + kHalf]) * rounded<T>(high[s] * scale));
    }
    const float first = rounded<T>(low[s] * to_float(cosines[i])) + rounded<T>(-high[s] * to_float(sines[i]));
    const float second =
        rounded<T>(high[s] * to_float(cosines[i + kHalf])) + rounded<T>(low[s] * to_float(sines[i + kHalf]));
    to[i] = from_float<T>(first);
    to[i + kHalf] = from_float<T>(second);
  }
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::Threads) decode_attention(const macko_attention a) {
  constexpr int kLanes = Config::Lanes, kGroup = Config::Group, kDim = Config::HeadDim, kInFlight = Config::InFlight;
  static_assert(kGroup + 1 < Config::Warps, "a warp prepares each query head, one the key");
  __shared__ __align__(16) T queries[kGroup][kDim];
  __shared__ __align__(16) T new_key[kDim];
  __shared__ float merged[Config::Warps][kGroup][kDim + 2];
  __shared__ bool is_last;

  const int heads_of_kv = a.heads / a.kv_heads, tiles = (heads_of_kv + kGroup - 1) / kGroup;
  const int text = blockIdx.z, kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles, split = blockIdx.x;
  const int first_head = kv_head * heads_of_kv + tile * kGroup, group = min(kGroup, heads_of_kv - tile * kGroup);
  const int lane = lane_index() % kLanes, place = warp_index() * Config::SlotsOfWarp + lane_index() / kLanes;

  // The cache's earlier slots are as old as the token before, and its first kernel was complete before any other began.
  const int slot = __ldcg(a.slot), begin_of_text = __ldcg(a.first + text);
  const int begin = a.window > 0 ? max(begin_of_text, slot - a.window + 1) : begin_of_text;
  const int share = (slot - begin + gridDim.x - 1) / gridDim.x;
  const int from = begin + split * share, to = min(from + share, slot);  // of the earlier slots, the new one apart
  const int64_t head_start = (static_cast<int64_t>(text) * a.kv_heads + kv_head) * a.capacity * kDim;
  const T* const keys = static_cast<const T*>(a.keys) + head_start;
  const T* const values = static_cast<const T*>(a.values) + head_start;
  uint4 next_keys[kInFlight], next_values[kInFlight];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const int at = first + i * Config::SlotsOfBlock + place;
      if (at >= to) break;
      next_keys[i] = load_once(reinterpret_cast<const uint4*>(keys + static_cast<int64_t>(at) * kDim) + lane);
      next_values[i] = load_once(reinterpret_cast<const uint4*>(values + static_cast<int64_t>(at) * kDim) + lane);
    }
  };
  fetch(from);

  let_next_kernel_start();
  wait_for_previous_kernel();
  const T* const qkv = static_cast<const T*>(a.qkv) + static_cast<int64_t>(text) * (a.heads + 2 * a.kv_heads) * kDim;
  const T* const new_value = qkv + static_cast<int64_t>(a.heads + a.kv_heads + kv_head) * kDim;
  const bool has_new = split == gridDim.x - 1;
  {
    const int64_t position = static_cast<int64_t>(slot - begin_of_text) * kDim;
    const T* const cosines = static_cast<const T*>(a.cosines) + position;
    const T* const sines = static_cast<const T*>(a.sines) + position;
    const int warp = warp_index();
    if (warp < group) {
      rotate_head<T, kDim>(queries[warp], qkv + static_cast<int64_t>(first_head + warp) * kDim,
                           static_cast<const T*>(a.query_norm), a.norm_epsilon, cosines, sines);
    } else if (warp == kGroup && has_new) {
      rotate_head<T, kDim>(new_key, qkv + static_cast<int64_t>(a.heads + kv_head) * kDim,
                           static_cast<const T*>(a.key_norm), a.norm_epsilon, cosines, sines);
    }
  }
  __syncthreads();
  float query[kGroup][8];
#pragma unroll
  for (int g = 0; g < kGroup; g++) {
    to_floats<T>(query[g], *reinterpret_cast<const uint4*>(&queries[g < group ? g : 0][lane * 8]));
#pragma unroll
    for (int i = 0; i < 8; i++) query[g][i] *= a.scale * kLog2E;
  }

  Running running[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; g++) running[g] = {-INFINITY, 0.0f, {}};
  const auto score_of = [&](int g, const float (&key)[8]) {
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) score = fmaf(query[g][i], key[i], score);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) score += __shfl_xor_sync(kAllLanes, score, distance);
    return score;
  };
  for (int first = from; first < to; first += kInFlight * Config::SlotsOfBlock) {
    uint4 now_keys[kInFlight], now_values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; i++) now_keys[i] = next_keys[i], now_values[i] = next_values[i];
    fetch(first + kInFlight * Config::SlotsOfBlock);
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const bool is_there = first + i * Config::SlotsOfBlock + place < to;
      float key[8], value[8];
      to_floats<T>(key, now_keys[i]);
      to_floats<T>(value, now_values[i]);
#pragma unroll
      for (int g = 0; g < kGroup; g++) {
        const float score = score_of(g, key);  // with all lanes, also those that have no slot
        if (is_there) running[g].add(score, value);
      }
    }
  }
  if (has_new && warp_index() == 0) {
    float key[8], value[8];
    const uint4 key_bits = *reinterpret_cast<const uint4*>(&new_key[lane * 8]);
    const uint4 value_bits = *reinterpret_cast<const uint4*>(new_value + lane * 8);
    to_floats<T>(key, key_bits);
    to_floats<T>(value, value_bits);
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      const float score = score_of(g, key);
      if (place == 0) running[g].add(score, value);
    }
    if (place == 0 && tile == 0) {
      const int64_t at = head_start + static_cast<int64_t>(slot) * kDim;
      reinterpret_cast<uint4*>(static_cast<T*>(a.keys) + at)[lane] = key_bits;
      reinterpret_cast<uint4*>(static_cast<T*>(a.values) + at)[lane] = value_bits;
    }
  }

  // The groups of a warp, then the warps of the block.
#pragma unroll
  for (int g = 0; g < kGroup; g++) {
    float most = running[g].most;
#pragma unroll
    for (int distance = kLanes; distance < kWarpSize; distance *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, distance));
    }
    const float keep = most == -INFINITY ? 0.0f : exp2f(running[g].most - most);
    float total = running[g].total * keep;
#pragma unroll
    for (int distance = kLanes; distance < kWarpSize; distance *= 2) {
      total += __shfl_xor_sync(kAllLanes, total, distance);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float sum = running[g].sums[i] * keep;
#pragma unroll
      for (int distance = kLanes; distance < kWarpSize; distance *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      if (lane_index() < kLanes) merged[warp_index()][g][lane * 8 + i] = sum;
    }
    if (lane_index() == 0) {
      merged[warp_index()][g][kDim] = most;
      merged[warp_index()][g][kDim + 1] = total;
    }
  }
  __syncthreads();
  const int64_t first_row = static_cast<int64_t>(text) * a.heads + first_head;
  T* const y = static_cast<T*>(a.y) + first_row * kDim;
  float* const partial = a.partial + first_row * gridDim.x * (kDim + 2);  // [heads][splits][kDim + 2]
  const bool alone = gridDim.x == 1;
  for (int i = threadIdx.x; i < group * kDim; i += Config::Threads) {
    const int g = i / kDim, d = i % kDim;
    float most = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Config::Warps; warp++) most = fmaxf(most, merged[warp][g][kDim]);
#pragma unroll
    for (int warp = 0; warp < Config::Warps; warp++) {
      const float keep = most == -INFINITY ? 0.0f : exp2f(merged[warp][g][kDim] - most);
      total = fmaf(merged[warp][g][kDim + 1], keep, total);
      sum = fmaf(merged[warp][g][d], keep, sum);
    }
    if (alone) {
      y[i] = from_float<T>(sum / total);
    } else {
      float* const row = partial + (static_cast<int64_t>(g) * gridDim.x + split) * (kDim + 2);
      row[d] = sum;
      if (d == 0) row[kDim] = most, row[kDim + 1] = total;
    }
  }
  if (alone) return;

  // The last block of these heads to get here merges what all have written.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* const ticket = a.tickets + first_row;
    is_last = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < group * kDim; i += Config::Threads) {
    const float* const rows = partial + static_cast<int64_t>(i / kDim) * gridDim.x * (kDim + 2);
    float most = -INFINITY, total = 0.0f, sum = 0.0f;
    for (int s = 0; s < gridDim.x; s++) most = fmaxf(most, __ldcg(rows + s * (kDim + 2) + kDim));
    for (int s = 0; s < gridDim.x; s++) {
      const float* const row = rows + s * (kDim + 2);
      const float keep = exp2f(__ldcg(row + kDim) - most);
      total = fmaf(__ldcg(row + kDim + 1), keep, total);
      sum = fmaf(__ldcg(row + i % kDim), keep, sum);
    }
    y[i] = from_float<T>(sum / total);
  }
}

template <typename T, typename Config>
cudaError_t launch_attention_config(const macko_attention& a, int device, cudaStream_t stream) {
  const int tiles = (a.heads / a.kv_heads + Config::Group - 1) / Config::Group;
  const dim3 grid(a.splits, a.kv_heads * tiles, a.texts);
  return launch_overlapping<decode_attention<T, Config>>(grid, Config::Threads, 0, device, stream, a);
}

template <typename T, int Lanes>
cudaError_t launch_attention_lanes(const macko_attention& a, int device, cudaStream_t stream) {
  return a.heads == a.kv_heads ? launch_attention_config<T, AttentionConfig<Lanes, 1>>(a, device, stream)
                               : launch_attention_config<T, AttentionConfig<Lanes, 4>>(a, device, stream);
}

template <typename T>
cudaError_t launch_attention(const macko_attention& a, int device, cudaStream_t stream) {
  switch (a.head_dim) {
    case 16: return launch_attention_lanes<T, 2>(a, device, stream);
    case 32: return launch_attention_lanes<T, 4>(a, device, stream);
    case 64: return launch_attention_lanes<T, 8>(a, device, stream);
    case 128: return launch_attention_lanes<T, 16>(a, device, stream);
    default: return launch_attention_lanes<T, 32>(a, device, stream);
  }
}

}  // namespace macko
