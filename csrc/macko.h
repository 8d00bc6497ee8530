// The C interface of the native library: all that Python may call (macko_llm/native.py).
//
// Matrices are [rows, cols], row-major and contiguous. A packed matrix is three arrays (docs/format.md):
//   values       [padded] 16-bit floats
//   deltas       [padded / 2] bytes
//   row_offsets  [rows + 1] int32
// Functions check their arguments, not the data: packed arrays must have passed validation when they were loaded.
// They keep no state but the text of a CUDA error and what macko_cpu_use_openmp was given, may be called from any
// thread, and never throw.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define MACKO_API __declspec(dllexport)
#else
#define MACKO_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MACKO_ABI_VERSION 7

typedef enum macko_status {
  MACKO_OK = 0,
  MACKO_BAD_ARGUMENT = 1,      // a null pointer, a negative size, an unknown dtype
  MACKO_TOO_MANY_ENTRIES = 2,  // the packed matrix would not fit int32 offsets
  MACKO_OUT_OF_MEMORY = 3,     // a temporary buffer or a thread could not be had
  MACKO_CUDA_FAILED = 4,       // CUDA refused a call; macko_cuda_error() says why
} macko_status;

typedef enum macko_dtype {
  MACKO_FLOAT16 = 0,
  MACKO_BFLOAT16 = 1,
  MACKO_FLOAT32 = 2,
} macko_dtype;

// MACKO_ABI_VERSION of the library that was built; a caller refuses any other.
MACKO_API int32_t macko_abi_version(void);

// Has the threads of an OpenMP runtime do the work of all calls that follow, by its function GOMP_parallel; null:
// threads that each call starts for itself.
MACKO_API void macko_cpu_use_openmp(void* gomp_parallel);

// First half of packing: where each row's entries begin. The last offset is the number of entries.
MACKO_API macko_status macko_cpu_row_offsets(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                             int64_t rows, int64_t cols,
                                             int32_t* row_offsets,  // out: [rows + 1]
                                             int32_t* largest,      // out: [1] the bits of the largest magnitude
                                             int32_t instructions,  // a macko_instructions that this CPU has
                                             int32_t threads);      // at most this many threads, at least 1

// Second half of packing: the entries, at the offsets that macko_cpu_row_offsets found.
MACKO_API macko_status macko_cpu_pack(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                      int64_t rows, int64_t cols,
                                      const int32_t* row_offsets,  // [rows + 1]
                                      uint16_t* values,            // out: [padded], the tail is zeroed
                                      uint8_t* deltas,             // out: [padded / 2], the tail is zeroed
                                      int32_t instructions,        // a macko_instructions that this CPU has
                                      int32_t threads);            // at most this many threads, at least 1

// The dense matrix of a packed one.
MACKO_API macko_status macko_cpu_unpack(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                        int64_t rows, int64_t cols,
                                        uint16_t* weight,  // out: [rows, cols], every element is written
                                        int32_t threads);  // at most this many threads, at least 1

// Columns that each row's entries reach over; what validation compares with cols. Offsets must be monotonic already.
MACKO_API macko_status macko_cpu_row_spans(const uint8_t* deltas, const int32_t* row_offsets, int64_t rows,
                                           int64_t* spans);  // out: [rows] last entry's column + 1, 0 for an empty row

// y = x W^T + bias for a few tokens, accumulated in float32. A token with a NaN or an infinity has NaN in all of its y.
MACKO_API macko_status macko_cpu_spmv(const uint16_t* values, int32_t value_dtype,  // macko_dtype: a 16-bit one
                                      const uint8_t* deltas, const int32_t* row_offsets, int64_t rows, int64_t cols,
                                      const void* x,     // [tokens, cols] of x_dtype
                                      const void* bias,  // [rows] of x_dtype, or null
                                      void* y,           // out: [tokens, rows] of x_dtype
                                      int32_t x_dtype,   // macko_dtype
                                      int64_t tokens,    // rows of x
                                      int32_t threads);  // at most this many threads, at least 1

// The layout in which a CPU multiplies (csrc/cpu/bitmap.h). The caller owns the arrays.
typedef struct macko_bitmap {
  uint16_t* values;     // [row_starts[rows] + 32] 16-bit floats other than zero, row after row; the last 32 are padding
  uint32_t* masks;      // [rows][cols / 32, rounded up] a bit a column, the first in the lowest bit
  int32_t* row_starts;  // [rows + 1] the value at which each row begins
  int32_t rows;
  int32_t cols;
  int32_t value_dtype;  // macko_dtype: a 16-bit one
  int32_t smallest;     // the bits of the smallest magnitude of a value, 0x7f80 without values
} macko_bitmap;

// What a CPU's kernels are made of, each a part of the next, counted for each architecture.
typedef enum macko_instructions {
  MACKO_PORTABLE = 0,  // any C++
  MACKO_AVX2 = 1,      // x86: with FMA and F16C
  MACKO_AVX512 = 2,    // x86: F, BW, VL and VBMI2; BF16 where there is one
  MACKO_NEON = 1,      // 64-bit ARM
} macko_instructions;

// The most that this CPU can do, a macko_instructions.
MACKO_API int32_t macko_cpu_instructions(void);

// First half of making a bitmap: where each row's values begin.
MACKO_API macko_status macko_cpu_bitmap_starts(const uint16_t* values, const int32_t* row_offsets, int64_t rows,
                                               int32_t* row_starts,  // out: [rows + 1]
                                               int32_t threads);     // at most this many threads, at least 1

// Second half: values, masks and `smallest` of a bitmap that has the rest.
MACKO_API macko_status macko_cpu_bitmap_fill(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                             macko_bitmap* matrix,
                                             int32_t instructions,  // a macko_instructions that this CPU has
                                             int32_t threads);      // at most this many threads, at least 1

// The dense matrix of a bitmap.
MACKO_API macko_status macko_cpu_bitmap_unpack(const macko_bitmap* matrix,
                                               uint16_t* weight,      // out: [rows, cols], every element is written
                                               int32_t instructions,  // a macko_instructions that this CPU has
                                               int32_t threads);      // at most this many threads, at least 1

// y = x W^T + bias for a few tokens, accumulated in float32. A token with a NaN or an infinity has NaN in all of its y.
MACKO_API macko_status macko_cpu_bitmap_spmv(const macko_bitmap* matrix,
                                             const void* x,         // [tokens, cols] of x_dtype
                                             const void* bias,      // [rows] of x_dtype, or null
                                             void* y,               // out: [tokens, rows] of x_dtype
                                             int32_t x_dtype,       // macko_dtype
                                             int64_t tokens,        // rows of x
                                             int32_t instructions,  // a macko_instructions that this CPU has
                                             int32_t threads);      // at most this many threads, at least 1

// The layout in which a CPU with AVX-512 multiplies at high sparsity (csrc/cpu/strips.h). The caller owns the arrays.
// Chunks are 256 rows, the last one perhaps fewer, and strips 128 columns; both are rounded up.
typedef struct macko_strips {
  uint8_t* groups;        // [chunk_starts[chunks]][96] 32 columns of a strip, and 32 values
  uint8_t* lengths;       // [chunks][strips][16] groups of each tile, falling
  uint8_t* row_ids;       // [chunks][strips][256] rows of the chunk, in the order of the tiles' rows
  int64_t* chunk_starts;  // [chunks + 1] the group at which each chunk begins
  int32_t rows;
  int32_t cols;
  int32_t value_dtype;  // macko_dtype: a 16-bit one
  int32_t smallest;     // the bits of the smallest magnitude of a value, 0x7f80 without values
} macko_strips;

// First half of making strips of a bitmap: all but the groups, of a matrix that has the numbers.
MACKO_API macko_status macko_cpu_strips_plan(const macko_bitmap* bitmap, macko_strips* matrix,
                                             int32_t threads);  // at most this many threads, at least 1

// Second half: the groups.
MACKO_API macko_status macko_cpu_strips_fill(const macko_bitmap* bitmap, macko_strips* matrix,
                                             int32_t threads);  // at most this many threads, at least 1

// The dense matrix of whole chunks and what follows the last of them.
MACKO_API macko_status macko_cpu_strips_unpack(const macko_strips* matrix,
                                               int64_t first_row,  // a multiple of 256
                                               int64_t last_row,   // another, or all rows
                                               uint16_t* weight,   // out: [last_row - first_row, cols], all is written
                                               int32_t threads);   // at most this many threads, at least 1

// y = x W^T + bias for a few tokens, accumulated in float32. A token with a NaN or an infinity has NaN in all of its y.
MACKO_API macko_status macko_cpu_strips_spmv(const macko_strips* matrix,
                                             const void* x,         // [tokens, cols] of x_dtype
                                             const void* bias,      // [rows] of x_dtype, or null
                                             void* y,               // out: [tokens, rows] of x_dtype
                                             int32_t x_dtype,       // macko_dtype
                                             int64_t tokens,        // rows of x
                                             int32_t instructions,  // a macko_instructions that this CPU has
                                             int32_t threads);      // at most this many threads, at least 1

// The functions below exist only in a library that was built with CUDA. Their pointers are addresses on GPU `device`,
// that of `values` a multiple of 16 and that of `deltas` of 4. They queue their work on `stream`, a cudaStream_t of
// that GPU or null for its default stream, do not wait for it, and allocate nothing. The GPU that was current stays
// current. Matrices have at most 2^30 rows and as many columns.

// The text of this thread's last MACKO_CUDA_FAILED.
MACKO_API const char* macko_cuda_error(void);

// First half of packing: how many entries each row needs.
MACKO_API macko_status macko_cuda_row_entries(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                              int64_t rows, int64_t cols,
                                              int32_t* counts,  // out: [rows]
                                              int32_t device, void* stream);

// Second half of packing: the entries, at the offsets that the counts add up to.
MACKO_API macko_status macko_cuda_pack(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                       int64_t rows, int64_t cols,
                                       const int32_t* row_offsets,  // [rows + 1]
                                       uint16_t* values,            // out: [padded], zeroed by the caller
                                       uint8_t* deltas,             // out: [padded / 2], zeroed by the caller
                                       int32_t device, void* stream);

// The dense matrix of a packed one.
MACKO_API macko_status macko_cuda_unpack(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                         int64_t rows, int64_t cols,
                                         uint16_t* weight,  // out: [rows, cols], every element is written
                                         int32_t device, void* stream);

// Columns that each row's entries reach over; what validation compares with cols. Offsets must be monotonic already.
MACKO_API macko_status macko_cuda_row_spans(const uint8_t* deltas, const int32_t* row_offsets, int64_t rows,
                                            int64_t* spans,  // out: [rows] last entry's column + 1, 0 for an empty row
                                            int32_t device, void* stream);

// y = x W^T + bias for a few tokens, accumulated in float32, straight from the canonical arrays. What x holds at
// columns where a row has no entry does not reach that row's y.
MACKO_API macko_status macko_cuda_spmv_rows(const uint16_t* values, int32_t value_dtype,  // macko_dtype: a 16-bit one
                                            const uint8_t* deltas, const int32_t* row_offsets, int64_t rows,
                                            int64_t cols,
                                            const void* x,     // [tokens, cols] of x_dtype
                                            const void* bias,  // [rows] of x_dtype, or null
                                            void* y,           // out: [tokens, rows] of x_dtype
                                            int32_t x_dtype,   // macko_dtype: the values' or float32
                                            int64_t tokens,    // rows of x
                                            int32_t device, void* stream);

// A matrix in the layout that SpMV reads from GPU memory (csrc/cuda/sliced.cuh). All pointers are addresses on one GPU.
// A unit is 32 / delta_bits entries of a row. Matrices that multiply the same x may share the arrays, as a group: each
// has slices of its own, one matrix's behind the other's. The group is a matrix with the rows of all. One of its
// members is a matrix whose starts, unit_offsets and row_order point to its first slice's.
typedef struct macko_sliced {
  void* values;           // [units][entries of a unit / 8][height][8] 16-bit floats, at a multiple of 16
  uint32_t* deltas;       // [units][height], the deltas of a unit a word, its first entry in the low bits
  uint16_t* starts;       // [slices][warps][height] column that each warp's share of a row begins behind
  int32_t* unit_offsets;  // [slices + 1] unit of `values` and `deltas` at which each slice begins
  int32_t* row_order;     // [slices][height] the row at each place, counted in the whole group; -1 where there is none
  int32_t rows;
  int32_t cols;         // at most 65535
  int32_t slices;       // rows / height, rounded up for each member
  int32_t first_row;    // a member's in its group, 0 for a group: what to subtract from row_order
  int32_t value_dtype;  // macko_dtype: a 16-bit one
  int32_t delta_bits;   // 2 or 4
  int32_t height;       // rows of a slice, at most 32; a member's last slice may have fewer
  int32_t warps;        // of the block that multiplies a slice: 8, 12, 16, 20, 24 or 32
} macko_sliced;

// Zeros at the end of a row that is shorter than its slice; no row of a valid layout has more.
#define MACKO_SLICED_PADDING 256

// The most columns that a sliced matrix may have on a GPU, whose shared memory must hold x; 0 if the GPU is unknown.
MACKO_API int64_t macko_cuda_sliced_max_cols(int32_t device);

// How many entries each row needs with deltas of this width.
MACKO_API macko_status macko_cuda_sliced_entries(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                                 int64_t rows, int64_t cols, int32_t delta_bits,
                                                 int32_t* counts,  // out: [rows]
                                                 int32_t device, void* stream);

// Fills values, deltas (both zeroed by the caller) and starts of a layout whose other members are complete.
MACKO_API macko_status macko_cuda_sliced_pack(const uint16_t* weight,  // [rows, cols] bits of value_dtype
                                              const macko_sliced* matrix, int32_t device, void* stream);

// The dense matrix of a sliced one.
MACKO_API macko_status macko_cuda_sliced_unpack(const macko_sliced* matrix,
                                                uint16_t* weight,  // out: [rows, cols], every element is written
                                                int32_t device, void* stream);

// A matrix in the layout in which tensor cores multiply several tokens (csrc/cuda/tiled.cuh). All pointers are
// addresses on one GPU.
typedef struct macko_tiled {
  void* records;     // one behind the other, each at a multiple of 16 bytes
  uint32_t* starts;  // [strips * panels + 1] where each begins, in 16 bytes; a strip's panels of 64 columns in order
  int32_t rows;
  int32_t cols;          // at most MACKO_TILED_MAX_COLS
  int32_t strips;        // of 8 to 64 rows: tiles of 8 rows, spread evenly
  int32_t record_bytes;  // of the longest, rounded up to 128
  int32_t value_dtype;   // macko_dtype: a 16-bit one
} macko_tiled;
#define MACKO_TILED_MAX_COLS 131072

// How many 16 bytes each record needs.
MACKO_API macko_status macko_cuda_tiled_count(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                              int64_t rows, int64_t cols, int32_t strips,
                                              int32_t* units,  // out: [strips * panels]
                                              int32_t device, void* stream);

// Fills the records of a layout that has the rest.
MACKO_API macko_status macko_cuda_tiled_pack(const uint16_t* weight,  // [rows, cols] bits of value_dtype
                                             const macko_tiled* matrix, int32_t device, void* stream);

// The dense matrix of a tiled one.
MACKO_API macko_status macko_cuda_tiled_unpack(const macko_tiled* matrix,
                                               uint16_t* weight,  // out: [rows, cols], every element is written
                                               int32_t device, void* stream);

// y = x W^T + bias + residual, on a GPU of sm_80 or newer, accumulated in float32 and rounded before the residual is
// added: W is a few matrices with the same columns and value_dtype, one below the other. A token with a NaN or an
// infinity has one in all of its y. Starts early like macko_cuda_sliced_spmv.
#define MACKO_TILED_MEMBERS 4
MACKO_API macko_status macko_cuda_tiled_spmm(const macko_tiled* matrices,
                                             int32_t members,       // of them: 1 to MACKO_TILED_MEMBERS
                                             const void* x,         // [tokens, cols rounded up to 8] of value_dtype, at
                                                                    // a multiple of 16, finite behind the columns
                                             const void* bias,      // [all rows] of value_dtype, or null
                                             const void* residual,  // [tokens, all rows] of value_dtype, or null
                                             void* y,  // out: [tokens, all rows] of value_dtype; may be the residual
                                             void* workspace,  // at a multiple of 128, or null; after the call only
                                                               // kernels of the stream may write to it
                                             int64_t workspace_bytes,
                                             int64_t tokens,  // rows of x
                                             int32_t device, void* stream);

// The workspace with which the product of these matrices and so many tokens is fastest: none for up to
// MACKO_TILED_FEW_TOKENS, where kernels without one are faster, and where there is no code for sm_90a. With a smaller
// one the product is right, but takes a few tokens at a time.
#define MACKO_TILED_FEW_TOKENS 16
MACKO_API macko_status macko_cuda_tiled_workspace(const macko_tiled* matrices, int32_t members, int64_t tokens,
                                                  int32_t device,
                                                  int64_t* bytes);  // out

// What becomes of x before a product of one token, rounded as transformers' eager Llama rounds it.
typedef enum macko_transform {
  MACKO_PLAIN = 0,
  MACKO_RMS_NORM = 1,   // x / sqrt(mean(x^2) + norm_epsilon) * norm_weight
  MACKO_SILU_GATE = 2,  // silu(x[0 .. cols)) * x[cols .. 2 cols)
} macko_transform;

typedef struct macko_input {
  const void* norm_weight;  // [cols] of x's dtype at a multiple of 16, for MACKO_RMS_NORM
  float norm_epsilon;
  int32_t transform;  // macko_transform; all but MACKO_PLAIN need cols % 8 == 0 and x at a multiple of 16
} macko_input;

// y = x W^T + bias + residual for a few tokens, accumulated in float32. A token whose transformed x has a NaN or an
// infinity has NaN in all of its y. May start while the stream's last kernel still
// runs and then fetches weights, the norm's too: those must have been written before that kernel was queued.
MACKO_API macko_status macko_cuda_sliced_spmv(const macko_sliced* matrix,
                                              const macko_input* input,  // or null: plain; else for one token only
                                              const void* x,             // [tokens, cols] of x_dtype
                                              const void* bias,          // [rows] of x_dtype, or null
                                              const void* residual,      // [tokens, rows] of x_dtype, or null
                                              void* y,          // out: [tokens, rows] of x_dtype; may be the residual
                                              int32_t x_dtype,  // macko_dtype: value_dtype; or float32, plain and
                                                                // without a residual
                                              int64_t tokens, int32_t device, void* stream);

// Dense matrices with one input, whose outputs lie one behind the other. All on one GPU.
#define MACKO_DENSE_PARTS 3
typedef struct macko_dense {
  const void* weights[MACKO_DENSE_PARTS];  // [rows, cols] each, at a multiple of 16
  const void* biases[MACKO_DENSE_PARTS];   // [rows] each, or null
  int32_t rows[MACKO_DENSE_PARTS];         // 0 where there is no matrix
  int32_t cols;                            // a multiple of 8, at most MACKO_DENSE_MAX_COLS
  int32_t value_dtype;                     // macko_dtype: a 16-bit one
} macko_dense;
#define MACKO_DENSE_MAX_COLS 32768

// y = x W^T + bias + residual for one token, accumulated in float32; starts early like macko_cuda_sliced_spmv.
MACKO_API macko_status macko_cuda_dense_gemv(const macko_dense* matrix, const macko_input* input,
                                             const void* x,         // [cols] of value_dtype at a multiple of 16
                                             const void* residual,  // [all rows] of value_dtype, or null
                                             void* y,               // out: [all rows]; may be the residual
                                             int32_t device, void* stream);

// The transform alone, for several tokens.
MACKO_API macko_status macko_cuda_transform(const macko_input* input, const void* x,  // [tokens, cols or 2 cols]
                                            void* y,                                  // out: [tokens, cols]
                                            int64_t tokens, int64_t cols,             // at most MACKO_DENSE_MAX_COLS
                                            int32_t dtype,  // macko_dtype of all: a 16-bit one
                                            int32_t device, void* stream);

// First of a token's kernels: moves on to the next slot and looks the tokens' embeddings up. Starts late and lets
// nothing start early, so that all kernels of a token see what was written before it.
MACKO_API macko_status macko_cuda_begin_token(const int64_t* tokens,   // [texts]; what is no token counts as 0
                                              const void* embeddings,  // [vocabulary, hidden] of 16-bit values
                                              void* x,                 // out: [texts, hidden]
                                              int32_t* slot,           // [1] increased by one
                                              int64_t texts, int64_t hidden, int64_t vocabulary, int32_t device,
                                              void* stream);

// Attention of one new token a text, over a cache of keys and values. All pointers are addresses on one GPU, at
// multiples of 16; all values are of `dtype`. Texts end at one slot and begin at different ones (they are padded on the
// left).
typedef struct macko_attention {
  const void* qkv;         // [texts][heads + 2 kv_heads][head_dim] queries, keys and values of the new token
  void* keys;              // [texts][kv_heads][capacity][head_dim]; the new token's is written
  void* values;            // the same
  const void* cosines;     // [positions][head_dim] of the rotary embedding, positions counted from a text's first slot
  const void* sines;       // the same
  const void* query_norm;  // [head_dim] weight of an RMSNorm of each query before the rotation, or null
  const void* key_norm;    // the same for keys
  const int32_t* slot;     // [1] where the new token goes
  const int32_t* first;    // [texts] first slot of each text
  void* y;                 // out: [texts][heads][head_dim]
  float* partial;          // scratch: [texts][heads][splits][head_dim + 2] if splits > 1
  int32_t* tickets;        // scratch: [texts][heads], zero before and after
  float scale;             // of the scores
  float norm_epsilon;
  int32_t texts, heads, kv_heads, head_dim;  // head_dim: 16, 32, 64, 128 or 256
  int32_t capacity;                          // slots
  int32_t window;                            // most tokens that one sees, itself included; 0: all
  int32_t splits;                            // blocks that share the slots of a head, at most 64
  int32_t dtype;                             // macko_dtype: a 16-bit one
} macko_attention;

// Starts early, and reads the cache's earlier slots early: those must be complete when macko_cuda_begin_token is
// queued.
MACKO_API macko_status macko_cuda_decode_attention(const macko_attention* attention, int32_t device, void* stream);

// The most probable token of each text: the first of the largest logits; -1 where the largest is not finite.
MACKO_API macko_status macko_cuda_argmax(const void* logits,  // [texts, vocabulary] of `dtype`, a 16-bit one
                                         int64_t* tokens,     // out: [texts]
                                         uint64_t* scratch,   // [2 texts], zero before and after
                                         int64_t texts, int64_t vocabulary, int32_t dtype, int32_t device,
                                         void* stream);

#ifdef __cplusplus
}
#endif
