// What every launcher needs: the right GPU made current, a grid of warps, and CUDA's errors as a status.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "macko.h"

namespace macko {

constexpr int kWarpSize = 32;
constexpr int kBlockWarps = 8;  // warps of a block where each takes a row
constexpr int kBlockThreads = kBlockWarps * kWarpSize;
constexpr int64_t kMaxGpuSide = int64_t{1} << 30;  // rows and columns that kernels count in 32 bits, with room to spare

inline thread_local const char* last_cuda_error = "no CUDA call has failed";

// What went wrong, and of a driver that is too old, what it lacks. It stays until this thread asks again.
const char* text_of(cudaError_t error);

// Keeps the text of an error for macko_cuda_error.
inline macko_status status_of(cudaError_t error) {
  if (error == cudaSuccess) return MACKO_OK;
  cudaGetLastError();  // else the next launch would be blamed for it
  last_cuda_error = text_of(error);
  return MACKO_CUDA_FAILED;
}

// Makes a GPU current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    status_ = status_of(cudaGetDevice(&previous_));
    if (status_ != MACKO_OK || previous_ == device) return;
    status_ = status_of(cudaSetDevice(device));
    changed_ = status_ == MACKO_OK;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  macko_status status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  macko_status status_ = MACKO_OK;
};

// Calls launch() with a GPU current and says whether what it launched could start.
template <typename Launch>
macko_status launch_on(int32_t device, const Launch& launch) {
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  launch();
  return status_of(cudaGetLastError());
}

// Whether kernels can count the rows and columns of a matrix.
constexpr bool fits_gpu(int64_t rows, int64_t cols) {
  return rows >= 0 && rows <= kMaxGpuSide && cols >= 1 && cols <= kMaxGpuSide;
}

// Whether vector loads from this address are allowed.
inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Blocks of kBlockThreads that give each row a warp.
constexpr unsigned blocks_for(int64_t rows) { return static_cast<unsigned>((rows + kBlockWarps - 1) / kBlockWarps); }

}  // namespace macko
