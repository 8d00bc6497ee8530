// Sliced layout -> dense. A warp takes some neighbouring shares of a slice. A lane spreads some units of its row out in
// shared memory; then the warp writes the rows one after the other, in vectors of eight columns.
#include "cuda/sliced.cuh"
#include "cuda/warp.cuh"

namespace macko {
namespace {

constexpr int kVectorColumns = 8;  // of a 16-byte vector
constexpr int kUnpackWarps = 2;    // of a block; their buffers fit the 48 KB that need no asking
// Elements of a row's buffer: room for the longest unit behind what was left of a vector. An odd number of vectors, so
// that the same vector of eight rows lies in different banks.
constexpr int kBufferElements = 33 * kVectorColumns;
constexpr int kLanesPerRow = 8;  // that write a row together

// Shares of a slice that a warp unpacks. Where one warp's columns end and another's begin, vectors are written in
// pieces: eight warps a slice keep that rare and are still enough of them.
__host__ __device__ constexpr int shares_per_task(int warps) { return warps < 16 ? 1 : warps / 8; }

template <int DeltaBits>
__global__ void __launch_bounds__(kUnpackWarps* kWarpSize)
    unpack_slices(const macko_sliced matrix,
                  uint16_t* __restrict__ weight) {  // out: [rows, cols] bits of 16-bit floats, at a multiple of 16
  using U = Unit<DeltaBits>;
  constexpr int kLongest = U::kEntries * (U::kMaxDelta + 1);  // columns that a unit can reach over
  static_assert(kVectorColumns - 1 + kLongest <= kBufferElements, "a unit must fit its row's buffer");
  __shared__ uint4 buffers[kUnpackWarps][kWarpSize][kBufferElements / kVectorColumns];
  const int shares = shares_per_task(matrix.warps), tasks = matrix.warps / shares;  // of a slice
  const int task = blockIdx.x * kUnpackWarps + warp_index(), slice = task / tasks;
  if (slice >= matrix.slices) return;
  const int lane = lane_index(), height = matrix.height, cols = matrix.cols;
  const int first_share = task % tasks * shares, last_share = first_share + shares - 1;
  const int own_row = lane < height ? row_at(matrix, slice, lane) : -1;
  const bool has_row = own_row >= 0;
  const int slice_begin = matrix.unit_offsets[slice], slice_end = matrix.unit_offsets[slice + 1];
  const Share first(slice_begin, slice_end, matrix.warps, first_share);
  const Share last(slice_begin, slice_end, matrix.warps, last_share);
  int left = last.begin + last.count - first.begin;  // units
  const bool is_last = last_share + 1 == matrix.warps;

  // Columns are counted from the 16-byte boundary at or before the row, so that vectors are aligned for any cols.
  const int64_t row_begin = has_row ? static_cast<int64_t>(own_row) * cols : 0;
  const int shift = static_cast<int>(row_begin % kVectorColumns);
  const int row_end = has_row ? shift + cols : 0;
  const int begin = has_row ? shift + matrix.starts[(slice * matrix.warps + first_share) * height + lane]
                            : 0;                       // of this warp's columns
  int end = begin;                                     // of the columns spread out so far
  int base = begin / kVectorColumns * kVectorColumns;  // the buffer's first column

  uint4(&rows)[kWarpSize][kBufferElements / kVectorColumns] = buffers[warp_index()];
  uint16_t* const mine = reinterpret_cast<uint16_t*>(rows[lane]);
  for (uint4& vector : rows[lane]) vector = make_uint4(0, 0, 0, 0);

  // The next unit of the lane's row is on its way while one is spread out.
  const uint4* values =
      static_cast<const uint4*>(matrix.values) + static_cast<int64_t>(first.begin) * U::kVectors * height + lane;
  const uint32_t* deltas = matrix.deltas + static_cast<int64_t>(first.begin) * height + lane;
  uint4 next_values[U::kVectors];
  uint32_t next_deltas = 0;
  const auto fetch = [&] {
#pragma unroll
    for (int v = 0; v < U::kVectors; v++) next_values[v] = load_once(values + v * height);
    next_deltas = load_once(deltas);
    values += U::kVectors * height;
    deltas += height;
  };
  if (left > 0 && has_row) fetch();
  while (left > 0) {
    do {
      left--;
      if (has_row) {
        uint4 vectors[U::kVectors];
#pragma unroll
        for (int v = 0; v < U::kVectors; v++) vectors[v] = next_values[v];
        const UnitOffsets<DeltaBits> offsets(next_deltas);
        if (left > 0) fetch();
        uint16_t* const out = mine + (end - base);
#pragma unroll
        for (int v = 0; v < U::kVectors; v++) {
          const uint32_t words[4] = {vectors[v].x, vectors[v].y, vectors[v].z, vectors[v].w};
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const int entry = 8 * v + i;
            out[offsets.of(entry) + entry] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
          }
        }
        end += offsets.span();
      }
    } while (left > 0 && __all_sync(kAllLanes, end - base + kLongest <= kBufferElements));
    // All but the last vector, which the next unit may fill; at the end, everything.
    const bool done = left == 0;
    const int written = done ? end : end / kVectorColumns * kVectorColumns;
    __syncwarp();
#pragma unroll 2
    for (int row = 0; row < height; row += kWarpSize / kLanesPerRow) {
      const int other = row + lane / kLanesPerRow;
      const int its_base = __shfl_sync(kAllLanes, base, other), its_written = __shfl_sync(kAllLanes, written, other);
      const int its_begin = __shfl_sync(kAllLanes, begin, other), its_row_end = __shfl_sync(kAllLanes, row_end, other);
      uint16_t* const out = weight + __shfl_sync(kAllLanes, row_begin - shift, other);
      const int its_end = min(its_written, its_row_end);
      for (int v = lane % kLanesPerRow; its_base + v * kVectorColumns < its_written; v += kLanesPerRow) {
        const int column = its_base + v * kVectorColumns;
        const uint4 vector = rows[other][v];
        rows[other][v] = make_uint4(0, 0, 0, 0);
        if (column >= its_begin && column + kVectorColumns <= its_end) {
          *reinterpret_cast<uint4*>(out + column) = vector;
        } else {  // a first or last vector, of which other warps write the rest
          const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
          for (int i = 0; i < kVectorColumns; i++) {
            if (column + i >= its_begin && column + i < its_end) {
              out[column + i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
            }
          }
        }
      }
    }
    __syncwarp();
    if (!done && written > base) {  // the vector that is not full moves to the front
      const int last = (written - base) / kVectorColumns;
      rows[lane][0] = rows[lane][last];
      rows[lane][last] = make_uint4(0, 0, 0, 0);
      base = written;
    }
  }
  if (!is_last) return;
  for (int other = 0; other < height; other++) {  // what lies behind the rows' last entries
    uint16_t* const out = weight + __shfl_sync(kAllLanes, row_begin - shift, other);
    const int its_row_end = __shfl_sync(kAllLanes, row_end, other);
    for (int c = __shfl_sync(kAllLanes, end, other) + lane; c < its_row_end; c += kWarpSize) out[c] = 0;
  }
}

}  // namespace
}  // namespace macko

using namespace macko;

macko_status macko_cuda_sliced_unpack(const macko_sliced* matrix, uint16_t* weight, int32_t device, void* stream) {
  if (!is_valid(matrix) || (matrix->rows && (!weight || !is_aligned(weight, 16)))) return MACKO_BAD_ARGUMENT;
  if (matrix->rows == 0) return MACKO_OK;
  return launch_on(device, [&] {
    const auto kernel = matrix->delta_bits == 2 ? unpack_slices<2> : unpack_slices<4>;
    const int tasks = matrix->slices * (matrix->warps / shares_per_task(matrix->warps));
    const int blocks = (tasks + kUnpackWarps - 1) / kUnpackWarps;
    kernel<<<blocks, kUnpackWarps * kWarpSize, 0, static_cast<cudaStream_t>(stream)>>>(*matrix, weight);
  });
}
