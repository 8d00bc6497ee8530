// Tiled layout -> dense. A warp takes a record: it copies it to shared memory, and each lane writes 16 bytes of a row
// at a time.
#include <algorithm>

#include "cuda/sliced.cuh"
#include "cuda/tiled.cuh"

namespace macko {
namespace {

constexpr int kUnpackWarps = 4;  // of a block

__global__ void __launch_bounds__(kUnpackWarps* kWarpSize)
    unpack_records(const macko_tiled matrix,
                   uint16_t* __restrict__ weight) {  // out: [rows, cols] bits of 16-bit floats, at a multiple of 16
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kUnpackWarps + warp_index();
  const int cols = matrix.cols, panels = panels_of(cols), lane = lane_index();
  if (index >= static_cast<int64_t>(matrix.strips) * panels) return;
  const Strip strip = StripCuts(matrix.rows, matrix.strips).strip(static_cast<int>(index / panels));
  uint4* const buffer = reinterpret_cast<uint4*>(shared_bytes + warp_index() * matrix.record_bytes);
  const uint32_t from = matrix.starts[index], to = matrix.starts[index + 1];
  const uint4* const source = static_cast<const uint4*>(matrix.records);
#pragma unroll 4
  for (uint32_t i = from + lane; i < to; i += kWarpSize) buffer[i - from] = load_once(source + i);
  __syncwarp();
  const uint32_t record = static_cast<uint32_t>(__cvta_generic_to_shared(buffer));
  const uint32_t values = record + strip.count * kHeadBytes;
  const LaneOfWord own;
  const auto write_tile = [&](int tile, int half, const auto& head, int of_head) {
    uint32_t words[4];
    head.expand(of_head, 0, values, own, words[0], words[1]);
    head.expand(of_head, 1, values, own, words[2], words[3]);
    const int row = (strip.first + tile) * kTileRows + lane / 4;
    const int column = static_cast<int>(index % panels) * kTileColumns + column_of(2 * half, lane);
    if (row >= matrix.rows) return;
    uint16_t* const out = weight + static_cast<int64_t>(row) * cols + column;
    if (cols % 8 == 0 && column < cols) {
      *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (column + i < cols) out[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
      }
    }
  };
  for (int tile = 0; tile < strip.count; tile += 2) {
    const uint32_t head_at = record + tile * kHeadBytes;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (tile + 1 < strip.count) {
        const HalfHead<2> head(head_at, half, own);
        write_tile(tile, half, head, 0);
        write_tile(tile + 1, half, head, 1);
      } else {
        write_tile(tile, half, HalfHead<1>(head_at, half, own), 0);
      }
    }
  }
}

}  // namespace
}  // namespace macko

using namespace macko;

macko_status macko_cuda_tiled_unpack(const macko_tiled* matrix, uint16_t* weight, int32_t device, void* stream) {
  if (!is_valid(matrix) || (matrix->rows && (!weight || !is_aligned(weight, 16)))) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0) return MACKO_OK;
  return launch_on(device, [&] {
    const int64_t records = int64_t{matrix->strips} * panels_of(matrix->cols);
    unpack_records<<<static_cast<unsigned>((records + kUnpackWarps - 1) / kUnpackWarps), kUnpackWarps * kWarpSize,
                     kUnpackWarps * matrix->record_bytes, static_cast<cudaStream_t>(stream)>>>(*matrix, weight);
  });
}
