// The C interface of the native library: all that Python may call (macko_llm/native.py).
//
// Matrices are [rows, cols], row-major and contiguous. A packed matrix is three arrays (docs/format.md):
//   values       [padded] 16-bit floats
//   deltas       [padded / 2] bytes
//   row_offsets  [rows + 1] int32
// Functions check their arguments, not the data: packed arrays must have passed validation when they were loaded.
// They keep no state, may be called from any thread, and never throw.
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

#define MACKO_ABI_VERSION 1

typedef enum macko_status {
  MACKO_OK = 0,
  MACKO_BAD_ARGUMENT = 1,      // a null pointer, a negative size, an unknown dtype
  MACKO_TOO_MANY_ENTRIES = 2,  // the packed matrix would not fit int32 offsets
  MACKO_OUT_OF_MEMORY = 3,     // a temporary buffer or a thread could not be had
} macko_status;

typedef enum macko_dtype {
  MACKO_FLOAT16 = 0,
  MACKO_BFLOAT16 = 1,
  MACKO_FLOAT32 = 2,
} macko_dtype;

// MACKO_ABI_VERSION of the library that was built; a caller refuses any other.
MACKO_API int32_t macko_abi_version(void);

// First half of packing: where each row's entries begin. The last offset is the number of entries.
MACKO_API macko_status macko_cpu_row_offsets(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                             int64_t rows, int64_t cols,
                                             int32_t* row_offsets,  // out: [rows + 1]
                                             int32_t threads);      // at most this many threads, at least 1

// Second half of packing: the entries, at the offsets that macko_cpu_row_offsets found.
MACKO_API macko_status macko_cpu_pack(const uint16_t* weight,  // [rows, cols] float16 or bfloat16 bits
                                      int64_t rows, int64_t cols,
                                      const int32_t* row_offsets,  // [rows + 1]
                                      uint16_t* values,            // out: [padded], the tail is zeroed
                                      uint8_t* deltas,             // out: [padded / 2], the tail is zeroed
                                      int32_t threads);            // at most this many threads, at least 1

// The dense matrix of a packed one.
MACKO_API macko_status macko_cpu_unpack(const uint16_t* values, const uint8_t* deltas, const int32_t* row_offsets,
                                        int64_t rows, int64_t cols,
                                        uint16_t* weight,  // out: [rows, cols], every element is written
                                        int32_t threads);  // at most this many threads, at least 1

// Columns that each row's entries reach over; what validation compares with cols. Offsets must be monotonic already.
MACKO_API macko_status macko_cpu_row_spans(const uint8_t* deltas, const int32_t* row_offsets, int64_t rows,
                                           int64_t* spans);  // out: [rows] last entry's column + 1, 0 for an empty row

// y = x W^T + bias for a few tokens, accumulated in float32.
MACKO_API macko_status macko_cpu_spmv(const uint16_t* values, int32_t value_dtype,  // macko_dtype: a 16-bit one
                                      const uint8_t* deltas, const int32_t* row_offsets, int64_t rows, int64_t cols,
                                      const void* x,     // [tokens, cols] of x_dtype
                                      const void* bias,  // [rows] of x_dtype, or null
                                      void* y,           // out: [tokens, rows] of x_dtype
                                      int32_t x_dtype,   // macko_dtype
                                      int64_t tokens,    // rows of x
                                      int32_t threads);  // at most this many threads, at least 1

#ifdef __cplusplus
}
#endif
