// Memory that is about to be written for the first time.
#pragma once

#include <cstdint>

namespace macko {

// Asks the system for large pages under memory that will be written from end to end. Each page costs a fault when it is
// first touched; with small ones these take longer than packing or unpacking does.
void want_large_pages(void* memory, int64_t bytes);

}  // namespace macko
