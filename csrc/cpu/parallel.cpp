#include "cpu/parallel.h"

namespace macko {
namespace {
std::atomic<ThreadTeam> team{nullptr};
}

ThreadTeam thread_team() { return team.load(std::memory_order_acquire); }

}  // namespace macko

extern "C" void macko_cpu_use_openmp(void* gomp_parallel) {
  macko::team.store(reinterpret_cast<macko::ThreadTeam>(gomp_parallel), std::memory_order_release);
}
