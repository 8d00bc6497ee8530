// Splits rows over threads so that each gets about the same number of entries.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "macko.h"

namespace macko {

// Below this, a thread costs more than it saves: one of a team that waits, one that must be started.
constexpr int64_t kEntriesOfTeamThread = 1 << 15, kEntriesPerThread = 1 << 18;

// Runs function(data) on that many threads at once, the caller among them: GOMP_parallel of an OpenMP runtime.
using ThreadTeam = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// What macko_cpu_use_openmp was given, or null.
ThreadTeam thread_team();

// Parts of the work, which threads take one after the other. However few threads there are, all parts are done.
template <typename Work>
struct Parts {
  const Work& work;
  std::vector<int64_t> ends;  // the rows between which the parts lie
  std::atomic<size_t> next{1};
  std::atomic<bool> ran_out{false};  // of memory: an exception must not leave a thread

  static void take(void* parts_of_caller) {
    Parts& parts = *static_cast<Parts*>(parts_of_caller);
    try {
      for (size_t part = parts.next++; part < parts.ends.size(); part = parts.next++) {
        parts.work(parts.ends[part - 1], parts.ends[part]);
      }
    } catch (const std::exception&) {
      parts.ran_out = true;
    }
  }

  macko_status status() const { return ran_out ? MACKO_OUT_OF_MEMORY : MACKO_OK; }
};

// Calls work(first_row, last_row) for disjoint ranges that cover [0, rows). Work may throw for want of memory.
// cost_before(row): cost of the rows before `row`, non-decreasing, cost_before(rows) the total.
template <typename CostBefore, typename Work>
macko_status for_row_ranges(int64_t rows, int32_t max_threads, const CostBefore& cost_before, const Work& work) {
  const int64_t total = cost_before(rows);
  const ThreadTeam team = thread_team();
  const int64_t worthwhile = total / (team ? kEntriesOfTeamThread : kEntriesPerThread);
  const int64_t threads = std::clamp<int64_t>(worthwhile, 1, std::max<int32_t>(max_threads, 1));
  try {
    if (threads == 1) {
      work(int64_t{0}, rows);
      return MACKO_OK;
    }
    Parts<Work> parts{work, std::vector<int64_t>(static_cast<size_t>(threads) + 1)};
    parts.ends.back() = rows;
    for (int64_t part = 1; part < threads; ++part) {
      int64_t low = parts.ends[part - 1], high = rows;  // the first row whose cost reaches this part's share
      const int64_t target = total / threads * part;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (cost_before(middle) < target) low = middle + 1;
        else high = middle;
      }
      parts.ends[part] = high;
    }
    if (team) {
      // Always the same number: a runtime may end threads that a smaller team leaves over.
      team(Parts<Work>::take, &parts, static_cast<unsigned>(max_threads), 0);
      return parts.status();
    }
    std::vector<std::thread> started;
    try {
      started.reserve(static_cast<size_t>(threads) - 1);
      while (started.size() + 1 < static_cast<size_t>(threads)) started.emplace_back(Parts<Work>::take, &parts);
    } catch (const std::exception&) {
      // Those that could be started do it all.
    }
    Parts<Work>::take(&parts);
    for (std::thread& thread : started) thread.join();
    return parts.status();
  } catch (const std::exception&) {
    return MACKO_OUT_OF_MEMORY;
  }
}

}  // namespace macko
