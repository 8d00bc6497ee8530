// Tiled layout -> dense. A warp takes a record: it copies it to shared memory, and each lane writes 16 bytes of a row
// at a time.
#include "cuda/sliced.cuh"
#include "cuda/tiled.cuh"

namespace macko {
namespace {

constexpr int kUnpackWarps = 4;  // of a block

// A half of a tile's columns.
template <typename Head>
__device__ __forceinline__ void write_half(const macko_tiled& matrix, const Head& head, int of_head, uint32_t values,
                                           const LaneOfWord& own, int row, int column, uint16_t* __restrict__ weight) {
  uint32_t words[4];
  head.expand(of_head, 0, values, own, words[0], words[1]);
  head.expand(of_head, 1, values, own, words[2], words[3]);
  if (row >= matrix.rows) return;
  uint16_t* const out = weight + static_cast<int64_t>(row) * matrix.cols + column;
  if (matrix.cols % 8 == 0 && column < matrix.cols) {
    *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (column + i < matrix.cols) out[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
    }
  }
}

__global__ void __launch_bounds__(kUnpackWarps* kWarpSize)
    unpack_records(const macko_tiled matrix, const StripCuts cuts,
                   uint16_t* __restrict__ weight) {  // out: [rows, cols] bits of 16-bit floats, at a multiple of 16
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kUnpackWarps + warp_index();
  const int panels = panels_of(matrix.cols), lane = lane_index();
  if (index >= static_cast<int64_t>(matrix.strips) * panels) return;
  const Strip strip = cuts.strip(static_cast<int>(index / panels));
  uint4* const buffer = reinterpret_cast<uint4*>(shared_bytes + warp_index() * matrix.record_bytes);
  const uint32_t from = matrix.starts[index], to = matrix.starts[index + 1];
  const uint4* const source = static_cast<const uint4*>(matrix.records);
#pragma unroll 4
  for (uint32_t i = from + lane; i < to; i += kWarpSize) buffer[i - from] = load_once(source + i);
  __syncwarp();
  const uint32_t record = static_cast<uint32_t>(__cvta_generic_to_shared(buffer));
  const uint32_t values = record + strip.count * kHeadBytes;
  const LaneOfWord own;
  for (int tile = 0; tile < strip.count; tile += 2) {
    const uint32_t head = record + tile * kHeadBytes;
    const int row = (strip.first + tile) * kTileRows + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int column = static_cast<int>(index % panels) * kTileColumns + column_of(2 * half, lane);
      if (tile + 1 < strip.count) {
        const HalfHead<2> both(head, half, own);
        write_half(matrix, both, 0, values, own, row, column, weight);
        write_half(matrix, both, 1, values, own, row + kTileRows, column, weight);
      } else {
        write_half(matrix, HalfHead<1>(head, half, own), 0, values, own, row, column, weight);
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
                     kUnpackWarps * matrix->record_bytes + kBehindRecords, static_cast<cudaStream_t>(stream)>>>(
        *matrix, StripCuts(matrix->rows, matrix->strips), weight);
  });
}
