// Entry point of the attention of a decoded token.
#include "cuda/launch.h"

namespace macko {
cudaError_t launch_attention_fp16(const macko_attention& attention, int device, cudaStream_t stream);
cudaError_t launch_attention_bf16(const macko_attention& attention, int device, cudaStream_t stream);

namespace {

constexpr int kMaxSplits = 64;

bool is_valid(const macko_attention& a) {
  const bool head_dim_is_known =
      a.head_dim == 16 || a.head_dim == 32 || a.head_dim == 64 || a.head_dim == 128 || a.head_dim == 256;
  const bool counts_are_sane = a.texts >= 1 && a.texts <= UINT16_MAX && a.kv_heads >= 1 && a.heads >= a.kv_heads &&
                               a.heads <= UINT16_MAX && a.heads % a.kv_heads == 0 && a.capacity >= 1 && a.window >= 0 &&
                               a.splits >= 1 && a.splits <= kMaxSplits;
  for (const void* pointer : {a.qkv, static_cast<const void*>(a.keys), static_cast<const void*>(a.values), a.cosines,
                              a.sines, static_cast<const void*>(a.y)}) {
    if (!pointer || !is_aligned(pointer, 16)) return false;
  }
  return head_dim_is_known && counts_are_sane && a.slot && a.first && (a.splits == 1 || (a.partial && a.tickets)) &&
         (a.dtype == MACKO_FLOAT16 || a.dtype == MACKO_BFLOAT16);
}

}  // namespace
}  // namespace macko

using namespace macko;

macko_status macko_cuda_decode_attention(const macko_attention* attention, int32_t device, void* stream) {
  if (!attention || !is_valid(*attention)) return MACKO_BAD_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.status() != MACKO_OK) return guard.status();
  const auto launch = attention->dtype == MACKO_FLOAT16 ? launch_attention_fp16 : launch_attention_bf16;
  return status_of(launch(*attention, device, static_cast<cudaStream_t>(stream)));
}
