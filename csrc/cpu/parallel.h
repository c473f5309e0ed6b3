// Splits a range among threads: those of the OpenMP runtime that PyTorch has loaded. Threads of our own would compete with
// its threads, which wait for their next work at full speed for some milliseconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// Of libgomp's ABI, which LLVM's and Intel's runtimes offer too. PyTorch loads its runtime for all to see
// (libtorch_global_deps) and this library finds it when it is loaded itself; null where there is none.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned threads,
                                                    unsigned flags);

namespace qsharded {

// Calls work(first, last) on disjoint ranges that cover [0, count), on at most `threads` threads, this one included; on
// this one alone where there is no OpenMP. A thread takes `step` at a time and so never waits for one that the system
// runs later; as much should take longer than waking one.
template <typename Work>
void parallel_ranges(int64_t count, int64_t step, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto run = [&] {
    for (int64_t first = next.fetch_add(step); first < count; first = next.fetch_add(step))
      work(first, std::min(first + step, count));
  };
  const auto useful = static_cast<unsigned>(std::min<int64_t>(threads, count / step));
  if (useful <= 1 || !GOMP_parallel) return run();
  GOMP_parallel([](void* data) { (*static_cast<decltype(run)*>(data))(); }, &run, useful, 0);
}

}  // namespace qsharded
