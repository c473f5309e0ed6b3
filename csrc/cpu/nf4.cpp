// The CPU's NF4 entry points: choice of instruction set, threads, and the decoding of absmax.
#include <algorithm>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../qsharded.h"
#include "nf4_kernels.h"
#include "parallel.h"

namespace qsharded {
namespace {

constexpr int64_t kBlocksAtATime = 4096;  // 45 us: many times what waking a thread takes

const NF4Kernels* kernels_for(int isa) {
  if (isa < 0 || isa > qsharded_cpu_isa()) return nullptr;
#if defined(__x86_64__)
  if (isa == QSHARDED_AVX512) return &kAvx512Kernels;
  if (isa == QSHARDED_AVX2) return &kAvx2Kernels;
#endif
  return &kPortableKernels;
}

bool known(int dtype) { return dtype >= 0 && dtype < kDtypes; }

int64_t bytes_of(int dtype) { return dtype == QSHARDED_FLOAT32 ? 4 : 2; }

// A fresh output's first touch, 4 KiB at a time, takes longer than writing what is due. Systems that do not know the advice
// ignore it.
void advise_large_pages(void* out, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(out) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(out) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Absmax {
  const void* values;  // fp32 where scales is null, else 8-bit codes
  int64_t row_stride;
  int64_t blocks_per_row;
  const float* scales;
  const float* offset;
  const float* map;

  float operator[](int64_t block) const {
    const int64_t at = block / blocks_per_row * row_stride + block % blocks_per_row;
    if (!scales) return static_cast<const float*>(values)[at];
    const float scaled = map[static_cast<const uint8_t*>(values)[at]] * scales[block / kAbsmaxBlock];
    return scaled + *offset;  // built with -ffp-contract=off: the product is rounded, as in the reference
  }
};

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cpu_isa(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return QSHARDED_PORTABLE;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? QSHARDED_AVX512 : QSHARDED_AVX2;
#else
  return QSHARDED_PORTABLE;
#endif
}

int qsharded_cpu_nf4_quantize(const void* weight, int dtype, int64_t blocks, const float* midpoints, uint8_t* codes,
                              float* absmax, int isa, int threads) {
  const NF4Kernels* kernels = kernels_for(isa);
  if (!kernels) return QSHARDED_BAD_ISA;
  if (!known(dtype)) return QSHARDED_BAD_DTYPE;
  advise_large_pages(codes, blocks * kBlockBytes);
  const int64_t block_bytes = kBlock * bytes_of(dtype);
  parallel_ranges(blocks, kBlocksAtATime, threads, [=](int64_t first, int64_t last) {
    kernels->encode[dtype](static_cast<const char*>(weight) + first * block_bytes, last - first, midpoints,
                           codes + first * kBlockBytes, absmax + first);
  });
  return QSHARDED_OK;
}

int qsharded_cpu_nf4_dequantize(const uint8_t* codes, int64_t rows, int64_t blocks_per_row, const void* absmax,
                                int64_t absmax_row_stride, const float* absmax_scales, const float* absmax_offset,
                                const float* absmax_map, const float* codebook, void* out, int dtype, int isa,
                                int threads) {
  const NF4Kernels* kernels = kernels_for(isa);
  if (!kernels) return QSHARDED_BAD_ISA;
  if (!known(dtype)) return QSHARDED_BAD_DTYPE;
  const int64_t block_bytes = kBlock * bytes_of(dtype);
  advise_large_pages(out, rows * blocks_per_row * block_bytes);
  const Absmax source = {absmax, absmax_row_stride, blocks_per_row, absmax_scales, absmax_offset, absmax_map};
  parallel_ranges(rows * blocks_per_row, kBlocksAtATime, threads, [=](int64_t first, int64_t last) {
    constexpr int64_t kRun = 256;  // absmax values decoded at a time: 1 KiB, near in cache when used
    float decoded[kRun];
    for (int64_t start = first; start < last; start += kRun) {
      const int64_t count = std::min(kRun, last - start);
      for (int64_t i = 0; i < count; ++i) decoded[i] = source[start + i];
      kernels->decode[dtype](codes + start * kBlockBytes, decoded, count, codebook,
                             static_cast<char*>(out) + start * block_bytes);
    }
  });
  return QSHARDED_OK;
}
