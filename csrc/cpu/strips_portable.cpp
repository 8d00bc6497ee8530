// The strips in plain C++.
#include "cpu/float16.h"
#include "cpu/strips_groups.h"

namespace macko {
namespace {

template <typename Value, bool kIsBFloat16, bool kWide>
void multiply(const StripsProduct& product, int64_t chunk, float* sums) {
  const uint8_t* group = product.groups + product.chunk_starts[chunk] * kGroup;
  const uint8_t* lengths = product.lengths + chunk * product.strips * kTiles;
  const uint8_t* ids = product.row_ids + chunk * product.strips * kChunk;
  for (int64_t tile = 0; tile < product.strips * kTiles; ++tile, ids += kTile) {
    for (int length = lengths[tile]; length > 0; --length, group += kGroup) {
      for (int slot = 0; slot < kSlots; ++slot) {
        const float weight = Value::load(value_at(group, slot));
        float* sum = sums + ids[row_of(kIsBFloat16, slot)];
        for (int64_t token = 0; token < product.tokens; ++token) {
          const int64_t at = (token * product.strips + tile / kTiles) * kStrip + group[slot];
          const float x =
              kWide ? float_of_bits(uint32_t{product.x[at]} << 16 | product.x_low[at]) : Value::load(product.x[at]);
          sum[token * kChunk] += weight * x;
        }
      }
    }
  }
}

}  // namespace

StripsKernels portable_strips_kernels() {
  return {multiply<Float16, false, false>, multiply<BFloat16, true, false>, multiply<Float16, false, true>,
          multiply<BFloat16, true, true>, nullptr};
}

}  // namespace macko
