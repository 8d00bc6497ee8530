// What every check needs: how it fails, arrays of exactly one size, numbers of all dtypes, random ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "macko.h"

inline std::string subject;  // what is being checked

// More words about the subject, up to the end of a block.
struct About {
  std::string before = subject;

  explicit About(const std::string& words) { subject += (before.empty() ? "" : ", ") + words; }
  ~About() { subject = before; }
};

inline void check(bool is_right, const std::string& what) {
  if (is_right) return;
  std::fprintf(stderr, "check_cpu: %s: %s\n", subject.c_str(), what.c_str());
  std::exit(1);
}

template <typename T>
struct Array {
  int64_t size;
  std::unique_ptr<T[]> data;

  // Filled with bytes that no result consists of.
  explicit Array(int64_t size) : size(size), data(new T[static_cast<size_t>(size)]) {
    std::fill_n(reinterpret_cast<uint8_t*>(data.get()), static_cast<size_t>(size) * sizeof(T), uint8_t{0xa5});
  }
  explicit Array(const std::vector<T>& items) : Array(static_cast<int64_t>(items.size())) {
    std::copy(items.begin(), items.end(), data.get());
  }
  T* get() const { return data.get(); }
  T& operator[](int64_t at) const { return data[static_cast<size_t>(at)]; }
};

template <typename T>
void check_same(const Array<T>& got, const Array<T>& expected, const std::string& what) {
  check(got.size == expected.size, what + " has another length");
  for (int64_t i = 0; i < got.size; ++i) {
    if (got[i] != expected[i]) check(false, what + " differs at " + std::to_string(i));
  }
}

inline const char* const kDtypes[] = {"float16", "bfloat16", "float32"};
#ifdef __aarch64__
inline const char* const kInstructions[] = {"portable", "NEON"};
#else
inline const char* const kInstructions[] = {"portable", "AVX2", "AVX-512"};
#endif

// The number that 16 bits stand for.
inline double number_of(uint16_t bits, int dtype) {
  const int places = dtype == MACKO_FLOAT16 ? 10 : 7, bias = dtype == MACKO_FLOAT16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> places, mantissa = bits & ((1 << places) - 1);
  const int largest = (0x7fff >> places);
  double magnitude;
  if (exponent == largest) {
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, 1 - bias - places);
  } else {
    magnitude = std::ldexp(mantissa + (1 << places), exponent - bias - places);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

// An array of numbers of any of the three dtypes.
struct Numbers {
  int dtype;
  Array<uint8_t> bytes;

  Numbers(int dtype, int64_t count) : dtype(dtype), bytes(count * (dtype == MACKO_FLOAT32 ? 4 : 2)) {}
  void* get() const { return bytes.get(); }
  void set_not_finite(int64_t i, float number) const {
    if (dtype == MACKO_FLOAT32) {
      reinterpret_cast<float*>(bytes.get())[i] = number;
    } else {
      const uint16_t infinity = dtype == MACKO_FLOAT16 ? 0x7c00 : 0x7f80;
      reinterpret_cast<uint16_t*>(bytes.get())[i] =
          static_cast<uint16_t>(infinity | std::signbit(number) << 15 | std::isnan(number) << 6);
    }
  }
  double at(int64_t i) const {
    return dtype == MACKO_FLOAT32 ? reinterpret_cast<const float*>(bytes.get())[i]
                                  : number_of(reinterpret_cast<const uint16_t*>(bytes.get())[i], dtype);
  }
};

inline std::mt19937 engine(20261126);
inline uint32_t below(uint32_t end) { return static_cast<uint32_t>(engine() % end); }

// Between 2^-5 and 8, of either sign: no sum overflows.
inline uint16_t random_half(int dtype) {
  const uint32_t places = dtype == MACKO_FLOAT16 ? 10 : 7, bias = dtype == MACKO_FLOAT16 ? 15 : 127;
  return static_cast<uint16_t>(below(2) << 15 | (bias - 5 + below(8)) << places | below(1u << places));
}

inline Numbers random_numbers(int dtype, int64_t count) {
  Numbers numbers(dtype, count);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == MACKO_FLOAT32) {
      reinterpret_cast<float*>(numbers.get())[i] = static_cast<float>(static_cast<int32_t>(engine())) * 0x1p-30f;
    } else {
      reinterpret_cast<uint16_t*>(numbers.get())[i] = random_half(dtype);
    }
  }
  return numbers;
}
