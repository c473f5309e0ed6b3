// Splits a range among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace qsharded {

// Calls work(first, last) on disjoint ranges that cover [0, count), on at most `threads` threads, this one included.
// A thread takes `step` at a time and so never waits for one that the system runs later; as much should take longer
// than starting a thread.
template <typename Work>
void parallel_ranges(int64_t count, int64_t step, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t first = next.fetch_add(step); first < count; first = next.fetch_add(step))
      work(first, std::min(first + step, count));
  };
  const int64_t useful = std::min<int64_t>(threads, count / step);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < useful; ++i) {
    try {
      others.emplace_back(run);
    } catch (const std::system_error&) {
      break;  // the system grants no more threads: the rest is done here
    }
  }
  run();
  for (std::thread& other : others) other.join();
}

}  // namespace qsharded
