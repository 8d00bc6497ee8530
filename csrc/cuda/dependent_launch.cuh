// Kernels of a stream that overlap: programmatic dependent launch, in code for sm_90 and newer; elsewhere nothing
// happens.
//
// A kernel may start while the one before still runs, once every block of that one has called let_next_kernel_start().
// wait_for_previous_kernel() returns when the one before is done, and so, by induction, all before it. What other
// kernels write may be read after the wait only. Before it: weights, and whatever was complete before the stream's last
// kernel that never calls let_next_kernel_start().
#pragma once

#include <atomic>
#include <mutex>

#include "cuda/launch.h"

namespace macko {

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int kMaxGpus = 64;

// Whether a kernel's code calls what is above: it is not a matter of the GPU, which also runs what was compiled for
// older ones. Asked of CUDA once a kernel and GPU.
template <auto Kernel>
cudaError_t overlaps_launches(int device, bool* overlaps) {
  static int versions[kMaxGpus];  // 0 is not known yet; every thread that finds nothing writes the same
  int version = device < kMaxGpus ? versions[device] : 0;
  if (version == 0) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, Kernel);
    if (error != cudaSuccess) return error;
    version = attributes.ptxVersion;
    if (device < kMaxGpus) versions[device] = version;
  }
  *overlaps = version >= 90;
  return cudaSuccess;
}

// Allows a kernel so many bytes of dynamic shared memory a block, on the current GPU, and has it set up for so many
// blocks a multiprocessor and some more bytes: or kernels whose needs differ a little may wait until it is set up anew.
template <typename... Parameters>
cudaError_t allow_shared_bytes(void (*kernel)(Parameters...), int64_t bytes, int blocks, int multiprocessor_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const int64_t percent = 115 * blocks * bytes / multiprocessor_bytes + 1;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              static_cast<int>(percent < 100 ? percent : 100));
}

// What a kernel has been allowed so far, on each GPU; several threads may ask for more at once.
class AllowedBytes {
 public:
  template <typename... Parameters>
  cudaError_t at_least(void (*kernel)(Parameters...), int64_t bytes, int blocks, int multiprocessor_bytes, int device) {
    if (device < kMaxGpus && allowed_[device] >= bytes) return cudaSuccess;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (device < kMaxGpus && allowed_[device] >= bytes) return cudaSuccess;
    const cudaError_t error = allow_shared_bytes(kernel, bytes, blocks, multiprocessor_bytes);
    if (error == cudaSuccess && device < kMaxGpus) allowed_[device] = bytes;
    return error;
  }

 private:
  std::mutex mutex_;
  std::atomic<int64_t> allowed_[kMaxGpus] = {};
};

// Queues a kernel that calls wait_for_previous_kernel(), early if it can be.
template <auto Kernel, typename... Arguments>
cudaError_t launch_overlapping(dim3 grid, int threads, int64_t shared_bytes, int device, cudaStream_t stream,
                               Arguments... arguments) {
  bool overlaps = false;
  const cudaError_t error = overlaps_launches<Kernel>(device, &overlaps);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, Kernel, arguments...);
}

// The same in clusters of so many blocks, on sm_90 or newer.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping_clusters(void (*kernel)(Parameters...), int blocks, int cluster, int threads,
                                        int64_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace macko
