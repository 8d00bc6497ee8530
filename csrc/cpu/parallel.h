// Splits rows over threads so that each gets about the same number of entries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "macko.h"

namespace macko {

constexpr int64_t kEntriesPerThread = 1 << 18;  // below this, starting a thread costs more than it saves

// Calls work(first_row, last_row) for disjoint ranges that cover [0, rows).
// cost_before(row): cost of the rows before `row`, non-decreasing, cost_before(rows) the total.
template <typename CostBefore, typename Work>
macko_status for_row_ranges(int64_t rows, int32_t max_threads, const CostBefore& cost_before, const Work& work) {
  const int64_t total = cost_before(rows);
  const int64_t threads = std::clamp<int64_t>(total / kEntriesPerThread, 1, std::max<int32_t>(max_threads, 1));
  if (threads == 1) {
    work(int64_t{0}, rows);
    return MACKO_OK;
  }
  std::vector<std::thread> pool;
  macko_status status = MACKO_OK;
  try {
    pool.reserve(threads - 1);
    int64_t first = 0;
    for (int64_t part = 1; part <= threads; ++part) {
      int64_t low = first, high = rows;  // the first row whose cost reaches this part's share
      if (part < threads) {
        const int64_t target = total / threads * part;
        while (low < high) {
          const int64_t middle = low + (high - low) / 2;
          if (cost_before(middle) < target) low = middle + 1;
          else high = middle;
        }
      }
      const int64_t last = high;
      if (part < threads) pool.emplace_back([=, &work] { work(first, last); });
      else work(first, last);
      first = last;
    }
  } catch (const std::exception&) {
    status = MACKO_OUT_OF_MEMORY;
  }
  for (std::thread& thread : pool) thread.join();
  return status;
}

}  // namespace macko
