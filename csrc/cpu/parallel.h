// Splits a range of blocks among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace qsharded {

// Below this a thread costs more than it saves: 4,096 blocks take about as long as starting one.
constexpr int64_t kLeastBlocksPerThread = 4096;

// Calls work(first, last) on disjoint ranges that cover [0, blocks), on at most `threads` threads, this one included.
template <typename Work>
void parallel_blocks(int64_t blocks, int threads, const Work& work) {
  const int64_t useful = std::max<int64_t>(1, blocks / kLeastBlocksPerThread);
  const int64_t parts = std::min<int64_t>(std::max(threads, 1), useful);
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  int64_t first = 0;
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t last = blocks * part / parts;
    try {
      others.emplace_back(work, first, last);
    } catch (const std::system_error&) {
      break;  // the system grants no more threads: the rest is done here
    }
    first = last;
  }
  work(first, blocks);
  for (std::thread& other : others) other.join();
}

}  // namespace qsharded
