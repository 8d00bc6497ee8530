// Attention of a decoded token on float16. A file a dtype, so that they compile side by side.
#include "cuda/decode_attention.cuh"

namespace macko {
cudaError_t launch_attention_fp16(const macko_attention& attention, int device, cudaStream_t stream) {
  return launch_attention<__half>(attention, device, stream);
}
}  // namespace macko
