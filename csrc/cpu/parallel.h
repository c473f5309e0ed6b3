// Splits a range among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace qsharded {

// Calls work(first, last) on disjoint ranges that cover [0, count), on at most `threads` threads, this one included,
// of which none has fewer than `least` but where there are no more.
template <typename Work>
void parallel_ranges(int64_t count, int64_t least, int threads, const Work& work) {
  const int64_t useful = std::max<int64_t>(1, count / least);
  const int64_t parts = std::min<int64_t>(std::max(threads, 1), useful);
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  int64_t first = 0;
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t last = count * part / parts;
    try {
      others.emplace_back(work, first, last);
    } catch (const std::system_error&) {
      break;  // the system grants no more threads: the rest is done here
    }
    first = last;
  }
  work(first, count);
  for (std::thread& other : others) other.join();
}

}  // namespace qsharded
