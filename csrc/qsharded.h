// The compiled library's whole interface: plain C, no torch and no Python, so that one binary serves every version of
// both. qsharded_kernels declares the same signatures to ctypes.
#pragma once

#include <stdint.h>

#define QSHARDED_API extern "C" __attribute__((visibility("default")))

// Results of every call.
enum { QSHARDED_OK = 0, QSHARDED_BAD_DTYPE = 1, QSHARDED_BAD_ISA = 2 };

// Element types of weights and outputs.
enum { QSHARDED_FLOAT32 = 0, QSHARDED_BFLOAT16 = 1, QSHARDED_FLOAT16 = 2 };

// Instruction sets of the CPU kernels, each including those before it.
enum { QSHARDED_PORTABLE = 0, QSHARDED_AVX2 = 1, QSHARDED_AVX512 = 2 };

// The best instruction set of this machine.
QSHARDED_API int qsharded_cpu_isa(void);

// NF4 codes and absmax of `blocks` consecutive blocks of 64 weights. midpoints: the 15 thresholds between levels.
// codes: 32 bytes a block; absmax: one a block. threads: at most so many; isa: at most qsharded_cpu_isa().
QSHARDED_API int qsharded_cpu_nf4_quantize(const void* weight, int dtype, int64_t blocks, const float* midpoints,
                                           uint8_t* codes, float* absmax, int threads, int isa);

// The weights of `rows` rows of `blocks_per_row` blocks. absmax: rows lie `absmax_row_stride` entries apart; 8-bit
// codes, decoded as map[code] * scales[block / 256] + offset[0] with each step rounded, or the fp32 values
// themselves where absmax_scales is null (absmax_offset and absmax_map are then unused).
QSHARDED_API int qsharded_cpu_nf4_dequantize(const uint8_t* codes, int64_t rows, int64_t blocks_per_row,
                                             const void* absmax, int64_t absmax_row_stride,
                                             const float* absmax_scales, const float* absmax_offset,
                                             const float* absmax_map, const float* levels, void* out, int dtype,
                                             int threads, int isa);
