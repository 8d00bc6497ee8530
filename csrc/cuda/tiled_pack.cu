// Dense -> tiled layout. A warp takes a record.
#include "cuda/tiled.cuh"

namespace macko {
namespace {

// Which positions of the lane's unit of a step hold nonzeros: the lowest 4 bits.
__device__ __forceinline__ uint32_t unit_bits(const uint16_t* weight, int rows, int cols, int row, int column) {
  uint32_t bits = 0;
  if (row >= rows) return bits;
#pragma unroll
  for (int i = 0; i < kUnit; i++) {
    const bool nonzero = column + i < cols && (weight[static_cast<int64_t>(row) * cols + column + i] & 0x7fffu) != 0;
    bits |= static_cast<uint32_t>(nonzero) << i;
  }
  return bits;
}

// Calls body(tile, step, row, column) for the lane's units of a record, all lanes together, in the order of the values.
template <typename Body>
__device__ __forceinline__ void for_units(const macko_tiled& matrix, const Strip& strip, int panel, const Body& body) {
  for (int tile = 0; tile < strip.count; tile++) {
    for (int step = 0; step < kSteps; step++) {
      body(tile, step, (strip.first + tile) * kTileRows + lane_index() / 4,
           panel * kTileColumns + column_of(step, lane_index()));
    }
  }
}

__global__ void __launch_bounds__(kBlockThreads)
    count_record_units(const uint16_t* __restrict__ weight, const macko_tiled matrix,
                       int32_t* __restrict__ units) {  // out: [records] of kRecordAlignment bytes
  const int64_t record = static_cast<int64_t>(blockIdx.x) * kBlockWarps + warp_index();
  const int panels = panels_of(matrix.cols);
  if (record >= static_cast<int64_t>(matrix.strips) * panels) return;
  const Strip strip = StripCuts(matrix.rows, matrix.strips).strip(static_cast<int>(record / panels));
  int count = 0;
  for_units(matrix, strip, static_cast<int>(record % panels), [&](int, int, int row, int column) {
    count += __popc(unit_bits(weight, matrix.rows, matrix.cols, row, column));
  });
  count = warp_sum(count);
  const int bytes = strip.count * kHeadBytes + 2 * count;
  if (lane_index() == 0) units[record] = (bytes + kRecordAlignment - 1) / kRecordAlignment;
}

__global__ void __launch_bounds__(kBlockThreads)
    fill_records(const uint16_t* __restrict__ weight, const macko_tiled matrix) {  // its starts are there
  const int64_t record = static_cast<int64_t>(blockIdx.x) * kBlockWarps + warp_index();
  const int panels = panels_of(matrix.cols), lane = lane_index();
  if (record >= static_cast<int64_t>(matrix.strips) * panels) return;
  const Strip strip = StripCuts(matrix.rows, matrix.strips).strip(static_cast<int>(record / panels));
  uint8_t* const out =
      static_cast<uint8_t*>(matrix.records) + static_cast<int64_t>(matrix.starts[record]) * kRecordAlignment;
  uint16_t* const values = reinterpret_cast<uint16_t*>(out + strip.count * kHeadBytes);
  const int word = lane / kUnitsOfWord;
  int written = 0;
  for_units(matrix, strip, static_cast<int>(record % panels), [&](int tile, int step, int row, int column) {
    const uint32_t bits = unit_bits(weight, matrix.rows, matrix.cols, row, column);
    const int up_to = warp_sum_up_to(__popc(bits));
    int at = written + up_to - __popc(bits);
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kUnit; i++) mask |= (bits >> i & 1) << (kUnitsOfWord * i + lane % kUnitsOfWord);
#pragma unroll
    for (int distance = 1; distance < kUnitsOfWord; distance *= 2) mask |= __shfl_xor_sync(kAllLanes, mask, distance);
    if (lane % kUnitsOfWord == 0) {
      const HeadPlace place(strip.count, tile, step, word);
      *reinterpret_cast<uint32_t*>(out + place.mask) = mask;
      *reinterpret_cast<uint16_t*>(out + place.offset) = static_cast<uint16_t>(2 * at);
    }
    for (int i = 0; i < kUnit; i++) {
      if (bits >> i & 1) values[at++] = weight[static_cast<int64_t>(row) * matrix.cols + column + i];
    }
    written += of_last_lane(up_to);
  });
}

}  // namespace
}  // namespace macko

using namespace macko;

macko_status macko_cuda_tiled_count(const uint16_t* weight, int64_t rows, int64_t cols, int32_t strips, int32_t* units,
                                    int32_t device, void* stream) {
  if (!fits_gpu(rows, cols) || cols > MACKO_TILED_MAX_COLS || (rows && (!weight || !units))) return MACKO_BAD_ARGUMENT;
  if (rows == 0) return MACKO_OK;
  macko_tiled matrix = {};
  matrix.rows = static_cast<int32_t>(rows);
  matrix.cols = static_cast<int32_t>(cols);
  matrix.strips = strips;
  if (strips < 1 || strips > tiles_of(matrix.rows) || most_tiles(matrix.rows, strips) > kMaxTiles) {
    return MACKO_BAD_ARGUMENT;
  }
  return launch_on(device, [&] {
    count_record_units<<<blocks_for(int64_t{strips} * panels_of(matrix.cols)), kBlockThreads, 0,
                         static_cast<cudaStream_t>(stream)>>>(weight, matrix, units);
  });
}

macko_status macko_cuda_tiled_pack(const uint16_t* weight, const macko_tiled* matrix, int32_t device, void* stream) {
  if (!is_valid(matrix) || (matrix->rows && !weight)) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0) return MACKO_OK;
  return launch_on(device, [&] {
    fill_records<<<blocks_for(int64_t{matrix->strips} * panels_of(matrix->cols)), kBlockThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(weight, *matrix);
  });
}
