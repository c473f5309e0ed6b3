// What the NF4 kernels share: the format's sizes and the launch's result.
//
// In these files a block is a quantization block. A thread block is a CTA, for both occur side by side; an SM is a streaming
// multiprocessor, and M are rows of x.
#pragma once

#include <cstdint>

#include "../qsharded.h"

namespace qsharded {

constexpr int kWarp = 32;
constexpr int kBlock = 64;                 // weights that share an absmax
constexpr int kAbsmaxBlock = 256;          // absmax values that share a second-level scale
constexpr float kSmallestScale = 1e-38f;   // keeps the reciprocal finite in an all-zero block
constexpr int kFewestSharedBytes = 99 << 10;  // that a CTA can have on any device from sm_80 on: on sm_86, 89 and 120
constexpr int64_t kMostBlocks = 1u << 31;  // block numbers are 32-bit in the kernels: 2^37 weights

inline int result_of(cudaError_t error) { return error == cudaSuccess ? QSHARDED_OK : QSHARDED_CUDA_ERROR + error; }

inline int launch_result() { return result_of(cudaGetLastError()); }

inline unsigned ceil_div(int64_t size, int64_t step) { return static_cast<unsigned>((size + step - 1) / step); }

// 1 / scale as the format has it: correctly rounded, finite for every finite scale.
__device__ inline float reciprocal(float scale) { return __frcp_rn(fmaxf(scale, kSmallestScale)); }

// An absmax of the second level: rounded after each step, as the format has it.
__device__ inline float decode_absmax(float entry, float scale, float offset) {
  return __fadd_rn(__fmul_rn(entry, scale), offset);
}

}  // namespace qsharded
