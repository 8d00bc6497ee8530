// Attention of a decoded token on bfloat16. A file a dtype, so that they compile side by side.
#include "cuda/decode_attention.cuh"

namespace macko {
cudaError_t launch_attention_bf16(const macko_attention& attention, int device, cudaStream_t stream) {
  return launch_attention<__nv_bfloat16>(attention, device, stream);
}
}  // namespace macko
