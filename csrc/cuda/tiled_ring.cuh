// How the records of a tiled matrix come into shared memory, while a warp works on those before.
//
// OthersCopy: whether the caller uses cp.async as well, and waits for all of it.
#pragma once

#include "cuda/tiled.cuh"

namespace macko {

// Whether this lane is the one that does what only one of a converged warp shall do; the compiler knows that it is one.
__device__ __forceinline__ bool is_elected() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
#else
  return lane_index() == 0;
#endif
}

// A warp's ring of records in shared memory: `count` of them, whose starts lie one behind the other. One lane starts
// bulk copies (sm_90), or all lanes copy 16 bytes each at a time.
template <int Slots, bool OthersCopy = false>
struct RecordRing {
  const uint8_t* records;
  const uint32_t* next;  // start of the record to fetch
  int left;              // records to fetch
  uint32_t slots;        // in shared memory
  uint32_t slot_bytes;
  uint32_t barriers;          // one a slot
  uint32_t from = 0, to = 0;  // where the record to fetch begins and ends, in kRecordAlignment bytes

  __device__ __forceinline__ RecordRing(const uint8_t* records, const uint32_t* starts, int count,
                                        uint32_t slots_of_warp, uint32_t slot_bytes, uint32_t barriers_of_warp,
                                        bool initializes = true)
      : records(records),
        next(starts + 1),
        left(count),
        slots(slots_of_warp),
        slot_bytes(slot_bytes),
        barriers(barriers_of_warp) {
    if (count > 0) {
      from = next[-1];
      to = next[0];
    }
#if __CUDA_ARCH__ >= 900
    if (initializes && is_elected()) {
#pragma unroll
      for (int i = 0; i < Slots; i++) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  // Starts to copy the next record, if there is one, to a slot that no lane reads any more.
  __device__ __forceinline__ void fetch(int slot) {
    const uint32_t target = slots + slot * slot_bytes;
    if (left > 0) {
      [[maybe_unused]] const uint8_t* const source = records + static_cast<int64_t>(from) * kRecordAlignment;
#if __CUDA_ARCH__ >= 900
      if (is_elected()) {
        const uint32_t bytes = (to - from) * kRecordAlignment, barrier = barriers + slot * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
            "l"(source), "r"(bytes), "r"(barrier)
            : "memory");
      }
#elif __CUDA_ARCH__ >= 800
      for (uint32_t i = lane_index(); i < to - from; i += kWarpSize) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + i * 16), "l"(source + i * 16)
                     : "memory");
      }
#endif
      left--;
      from = to;
      next++;
      if (left > 0) to = next[0];
    }
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  // Waits for a slot's record; `round` is how often the slot has been waited for.
  __device__ __forceinline__ uint32_t wait(int slot, uint32_t round) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred p;\n"
        "WAIT:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @p bra DONE;\n bra WAIT;\nDONE:\n}" ::"r"(
            barriers + slot * 8),
        "r"(round & 1)
        : "memory");
#elif __CUDA_ARCH__ >= 800
    // Others' copies are groups of their own, and have been waited for.
    if constexpr (!OthersCopy) asm volatile("cp.async.wait_group %0;" ::"n"(Slots - 1) : "memory");
    __syncwarp();
#endif
    return slots + slot * slot_bytes;
  }
};

}  // namespace macko
