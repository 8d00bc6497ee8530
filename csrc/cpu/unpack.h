// One row of the format.
#pragma once

#include <cstdint>

namespace macko {

// The dense row, [cols], that has the entries from `entry` to `last`.
void unpack_row(const uint16_t* values, const uint8_t* deltas, int64_t entry, int64_t last, int64_t cols,
                uint16_t* row);

}  // namespace macko
