// Dense -> sliced layout. A warp takes a row, 32 columns at a time.
#include "cuda/gap_walk.cuh"
#include "cuda/sliced.cuh"
#include "cuda/warp.cuh"

namespace macko {
namespace {

template <int DeltaBits>
__global__ void __launch_bounds__(kBlockThreads)
    count_entries(const uint16_t* __restrict__ weight,  // [rows, cols] bits of 16-bit floats
                  int rows, int cols,
                  int32_t* __restrict__ counts) {  // out: [rows]
  const int row = blockIdx.x * kBlockWarps + warp_index();
  if (row >= rows) return;
  const int entries = row_entries<DeltaBits>(weight + int64_t{row} * cols, cols);
  if (lane_index() == 0) counts[row] = entries;
}

// Where the entries of one row go.
template <int DeltaBits>
struct RowWriter {
  using U = Unit<DeltaBits>;
  const macko_sliced& matrix;
  int slice, place;  // the row's place in its slice
  int first_unit, units;

  __device__ RowWriter(const macko_sliced& matrix, int slice, int place) : matrix(matrix), slice(slice), place(place) {
    first_unit = matrix.unit_offsets[slice];
    units = matrix.unit_offsets[slice + 1] - first_unit;
  }

  // `column` is the entry's own; the unit that it begins may be where a warp's share starts.
  __device__ void write(int entry, uint16_t bits, int delta, int column) const {
    const int64_t unit = first_unit + entry / U::kEntries;
    const int in_unit = entry % U::kEntries;
    const int64_t vector = (unit * U::kVectors + in_unit / 8) * matrix.height + place;
    if (bits) reinterpret_cast<uint16_t*>(matrix.values)[vector * 8 + in_unit % 8] = bits;
    // Lanes write entries of the same word at the same time.
    if (delta) atomicOr(matrix.deltas + unit * matrix.height + place, uint32_t(delta) << DeltaBits * in_unit);
    if (in_unit == 0) note_start(entry / U::kEntries, column - delta);
  }

  // The starts of the shares in which the row has no entries left, only zeros that each go one column on. `last` is the
  // row's last column with an entry.
  __device__ void finish(int entries, int last) const {
    for (int warp = lane_index(); warp < matrix.warps; warp += kWarpSize) {
      const int behind = begin_of(warp) * U::kEntries - entries;
      if (behind >= 0) set_start(warp, min(last + 1 + behind, matrix.cols));
    }
  }

 private:
  // The first unit, within the slice, of a warp's share; see Share.
  __device__ int begin_of(int warp) const { return warp * (units / matrix.warps) + min(warp, units % matrix.warps); }
  __device__ void set_start(int warp, int column) const {
    matrix.starts[(slice * matrix.warps + warp) * matrix.height + place] = static_cast<uint16_t>(column);
  }
  __device__ void note_start(int unit, int column) const {
    const int each = units / matrix.warps, rest = units % matrix.warps, longer = rest * (each + 1);
    const int warp = unit < longer ? unit / (each + 1) : rest + (unit - longer) / max(each, 1);
    if (unit == begin_of(warp)) set_start(warp, column);
  }
};

template <int DeltaBits>
__global__ void __launch_bounds__(kBlockThreads)
    fill(const uint16_t* __restrict__ weight,  // [rows, cols] bits of 16-bit floats
         const macko_sliced matrix) {          // its values and deltas are zero
  const int position = blockIdx.x * kBlockWarps + warp_index();
  const int slice = position / matrix.height, place = position % matrix.height;
  if (slice >= matrix.slices) return;
  const int row = row_at(matrix, slice, place);
  if (row < 0) return;
  const RowWriter<DeltaBits> writer(matrix, slice, place);
  int written = 0;
  const auto write = [&](const Element& element) {
    const int up_to = warp_sum_up_to(element.entries);
    const int entry = written + up_to - 1;
    uint16_t bits = element.bits;
    int column = element.column, delta = element.delta;
    for (int i = 0; i < element.entries; ++i) {  // backwards: the nonzero, then the zeros that bridge the gap before it
      writer.write(entry - i, bits, delta, column);
      column -= delta + 1;
      bits = 0;
      delta = Unit<DeltaBits>::kMaxDelta;
    }
    written += of_last_lane(up_to);
  };
  const int last = for_elements<DeltaBits>(weight + int64_t{row} * matrix.cols, matrix.cols, write);
  writer.finish(written, last);
}

}  // namespace
}  // namespace macko

using namespace macko;

macko_status macko_cuda_sliced_entries(const uint16_t* weight, int64_t rows, int64_t cols, int32_t delta_bits,
                                       int32_t* counts, int32_t device, void* stream) {
  if (!fits_gpu(rows, cols) || (delta_bits != 2 && delta_bits != 4) || (rows && (!weight || !counts))) {
    return MACKO_BAD_ARGUMENT;
  }
  if (rows == 0) return MACKO_OK;
  return launch_on(device, [&] {
    const auto kernel = delta_bits == 2 ? count_entries<2> : count_entries<4>;
    kernel<<<blocks_for(rows), kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(weight, static_cast<int>(rows),
                                                                                      static_cast<int>(cols), counts);
  });
}

macko_status macko_cuda_sliced_pack(const uint16_t* weight, const macko_sliced* matrix, int32_t device, void* stream) {
  if (!is_valid(matrix) || (matrix->rows && !weight)) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0) return MACKO_OK;
  return launch_on(device, [&] {
    const auto kernel = matrix->delta_bits == 2 ? fill<2> : fill<4>;
    const int64_t places = int64_t{matrix->slices} * matrix->height;
    kernel<<<blocks_for(places), kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(weight, *matrix);
  });
}
