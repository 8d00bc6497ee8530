// Calls every function of macko.h that works on CPUs and compares with naive loops, in float64 where there are
// products. Needs neither Python nor torch, so that it runs under sanitizers (each array is an allocation of its own,
// of exactly the size that macko.h states) and under emulators of other CPUs. Says what differs, and fails.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "layouts.h"

namespace {

// All functions, with one matrix.
void check_matrix(const Matrix& matrix, const std::vector<int64_t>& token_counts, int threads) {
  const About about(std::to_string(matrix.rows) + " x " + std::to_string(matrix.cols) + " " + kDtypes[matrix.dtype] +
                    ", " + std::to_string(threads) + " threads");
  const Layouts layouts(matrix, threads);
  check_canonical(matrix, layouts.canonical, threads);
  check_bitmap(matrix, layouts.canonical, threads);
  check_strips(matrix, layouts.strips, threads);
  check_products(matrix, layouts, token_counts, threads);
}

// What stands in for an OpenMP runtime.
void team_of_threads(void (*function)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(function, data);
  function(data);
  for (std::thread& thread : others) thread.join();
}

}  // namespace

int main() {
  check(macko_abi_version() == MACKO_ABI_VERSION, "the library is of another version");
  for (const int dtype : {MACKO_FLOAT16, MACKO_BFLOAT16}) {
    const auto random = [&](int64_t rows, int64_t cols, uint32_t kept, const std::vector<int64_t>& tokens,
                            int threads) { check_matrix(random_matrix(rows, cols, dtype, kept), tokens, threads); };
    std::vector<int64_t> tokens;
    for (int64_t count = 0; count <= 17; ++count) tokens.push_back(count);
    random(0, 3, 50, {1}, 1);
    check_matrix({1, 1, dtype, {random_half(dtype)}}, tokens, 4);
    check_matrix({1, 1, dtype, {0x8000}}, tokens, 4);
    for (const int64_t cols : {2, 7, 8, 31, 32, 33, 63, 64, 65, 172}) random(7, cols, 50, {1, 2, 3}, 2);
    random(9, 172, 50, tokens, 4);
    for (const int64_t rows : {255, 256, 257, 530}) random(rows, 129, 10, {1, 2}, 2);  // chunks of strips
    for (const uint32_t kept : {1, 10, 90, 100}) random(5, 1001, kept, {1, 5}, 4);
    random(1100, 1210, 40, {1, 2}, 3);  // enough for threads of its own
    std::vector<uint16_t> one_row(18 * 131072, 0);
    std::generate_n(one_row.begin() + 16 * 131072, 131072, [&] { return random_half(dtype); });
    check_matrix({18, 131072, dtype, one_row}, {1}, 8);
    macko_cpu_use_openmp(reinterpret_cast<void*>(team_of_threads));
    random(3, 70003, 50, {1, 4}, 8);  // fewer rows than threads
    random(150, 1003, 50, {1, 4}, 4);
    macko_cpu_use_openmp(nullptr);
    check_every_half(dtype);
    check_tokens_that_are_not_finite(dtype);
    check_parts_of_strips(dtype);
  }
  check_refusals();
  std::printf("check_cpu: all as it should be, up to %s\n", kInstructions[macko_cpu_instructions()]);
  return 0;
}
