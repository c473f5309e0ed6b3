// What each instruction set provides: runs of whole, contiguous NF4 blocks. Strides, double quantization and threads
// are nf4.cpp's.
#pragma once

#include <cstdint>

namespace qsharded {

constexpr int kBlock = 64;             // weights that share an absmax
constexpr int kBlockBytes = kBlock / 2;
constexpr int kCodes = 16;
constexpr int kMidpoints = kCodes - 1;
constexpr int kAbsmaxBlock = 256;          // absmax values that share a second-level scale
constexpr float kSmallestAbsmax = 1e-38f;  // keeps the reciprocal finite in an all-zero block
constexpr int kDtypes = 3;                 // QSHARDED_FLOAT32, QSHARDED_BFLOAT16, QSHARDED_FLOAT16

// code = how many midpoints lie below weight * (1 / max(absmax, 1e-38)), in fp32: a tie goes down. Midpoints lie more
// than 1/15 apart.
using EncodeBlocks = void (*)(const void* weight, int64_t blocks, const float* midpoints, uint8_t* codes,
                              float* absmax);
// out = codebook[code] * absmax, in fp32, rounded to the output's type.
using DecodeBlocks = void (*)(const uint8_t* codes, const float* absmax, int64_t blocks, const float* codebook,
                              void* out);

struct NF4Kernels {
  EncodeBlocks encode[kDtypes];
  DecodeBlocks decode[kDtypes];
};

extern const NF4Kernels kPortableKernels;
#if defined(__x86_64__)
extern const NF4Kernels kAvx2Kernels;
extern const NF4Kernels kAvx512Kernels;
#endif

}  // namespace qsharded
