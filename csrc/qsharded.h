// The compiled library's whole interface: plain C, no torch and no Python, so that one binary serves every version of
// both. qsharded_kernels declares the same signatures to ctypes.
#pragma once

#include <stdint.h>

#define QSHARDED_API extern "C" __attribute__((visibility("default")))

// Results of every call.
enum { QSHARDED_OK = 0, QSHARDED_BAD_DTYPE = 1, QSHARDED_BAD_ISA = 2, QSHARDED_BAD_SIZE = 3 };
// From here on a result is this plus a cudaError_t.
enum { QSHARDED_CUDA_ERROR = 1000 };

// Element types of weights and outputs.
enum { QSHARDED_FLOAT32 = 0, QSHARDED_BFLOAT16 = 1, QSHARDED_FLOAT16 = 2 };

// Instruction sets of the CPU kernels, each including those before it.
enum { QSHARDED_PORTABLE = 0, QSHARDED_AVX2 = 1, QSHARDED_AVX512 = 2 };

// The best instruction set of this machine.
QSHARDED_API int qsharded_cpu_isa(void);

// NF4 codes and absmax of `blocks` consecutive blocks of 64 weights. midpoints: the 15 thresholds between the codebook's
// values, more than 1/15 apart.
// codes: 32 bytes a block; absmax: one a block. isa: at most qsharded_cpu_isa(); threads: at most so many, here and
// below.
QSHARDED_API int qsharded_cpu_nf4_quantize(const void* weight, int dtype, int64_t blocks, const float* midpoints,
                                           uint8_t* codes, float* absmax, int isa, int threads);

// The weights of `rows` rows of `blocks_per_row` blocks. absmax: rows lie `absmax_row_stride` entries apart; 8-bit
// codes, decoded as map[code] * scales[block / 256] + offset[0] with each step rounded, or the fp32 values
// themselves where absmax_scales is null (absmax_offset and absmax_map are then unused).
QSHARDED_API int qsharded_cpu_nf4_dequantize(const uint8_t* codes, int64_t rows, int64_t blocks_per_row,
                                             const void* absmax, int64_t absmax_row_stride,
                                             const float* absmax_scales, const float* absmax_offset,
                                             const float* absmax_map, const float* codebook, void* out, int dtype,
                                             int isa, int threads);

// Double quantization in steps. absmax: `count` consecutive values that begin at value `first` of their weight; a
// second-level block is 256 values of the whole weight.

// Each row's sum in fp64, its columns added from left to right.
QSHARDED_API int qsharded_cpu_absmax_row_sums(const float* absmax, int64_t rows, int64_t blocks_per_row,
                                              double* row_sums, int threads);

// fp32(sum of row_sums / values), added from first to last on one thread. values: how many the rows hold together.
QSHARDED_API int qsharded_cpu_absmax_offset(const double* row_sums, int64_t rows, int64_t values, float* offset,
                                            int threads);

// scales[b] = max(abs(absmax - offset[0])) over what these values hold of second-level block b; other entries stay.
QSHARDED_API int qsharded_cpu_absmax_scales(const float* absmax, int64_t first, int64_t count, const float* offset,
                                            float* scales, int threads);

// How many of the 255 thresholds lie below (absmax - offset[0]) * (1 / max(scale, 1e-38)), each step rounded to fp32.
QSHARDED_API int qsharded_cpu_absmax_encode(const float* absmax, int64_t first, int64_t count, const float* offset,
                                            const float* scales, const float* thresholds, uint8_t* codes, int threads);

// Scales and codes of a whole weight in one pass.
QSHARDED_API int qsharded_cpu_absmax_scales_and_codes(const float* absmax, int64_t count, const float* offset,
                                                      const float* thresholds, float* scales, uint8_t* codes,
                                                      int threads);

// What follows is missing from a library built without nvcc. Pointers are device memory of the current device, stream is
// a cudaStream_t, and nothing waits for the device.

// QSHARDED_OK where the driver, the current device and this library fit each other.
QSHARDED_API int qsharded_cuda_probe(void);

// CUDA's words for a result from QSHARDED_CUDA_ERROR on.
QSHARDED_API const char* qsharded_cuda_error_string(int result);

// As qsharded_cpu_nf4_quantize. weight: 16-byte aligned.
QSHARDED_API int qsharded_cuda_nf4_quantize(const void* weight, int dtype, int64_t blocks, const float* midpoints,
                                            uint8_t* codes, float* absmax, void* stream);

// As qsharded_cpu_nf4_dequantize. codes, out and each of its rows: 16-byte aligned. out_row_stride: in weights.
QSHARDED_API int qsharded_cuda_nf4_dequantize(const uint8_t* codes, int64_t rows, int64_t blocks_per_row,
                                              const void* absmax, int64_t absmax_row_stride,
                                              const float* absmax_scales, const float* absmax_offset,
                                              const float* absmax_map, const float* codebook, void* out,
                                              int64_t out_row_stride, int dtype, void* stream);

// A weight among several of the same width, with the B of its adapter.
typedef struct {
  const uint8_t* codes;
  const void* absmax;
  int64_t absmax_row_stride;
  const float* absmax_scales;
  const float* absmax_offset;
  int64_t rows;
  const void* b;  // [rows, rank] float32 or bfloat16, or null
  int b_dtype;
  float scale;
  int64_t rank;
  int64_t column;  // where its B begins among the `tail` columns
} qsharded_part;

// Up to 4 weights, one below the other in bfloat16, and in `tail` columns behind each row (a multiple of 8) that row of
// scale * B, at the weight's own columns, with zeros in the others. All with double quantization or none.
QSHARDED_API int qsharded_cuda_nf4_dequantize_parts(const qsharded_part* parts, int count, int64_t blocks_per_row,
                                                    int64_t tail, const float* absmax_map, const float* codebook,
                                                    void* out, int64_t out_row_stride, void* stream);

// As their qsharded_cpu_ twins. The offset is as if added from first to last.
QSHARDED_API int qsharded_cuda_absmax_row_sums(const float* absmax, int64_t rows, int64_t blocks_per_row,
                                               double* row_sums, void* stream);
QSHARDED_API int qsharded_cuda_absmax_offset(const double* row_sums, int64_t rows, int64_t values, float* offset,
                                             void* stream);
QSHARDED_API int qsharded_cuda_absmax_scales(const float* absmax, int64_t first, int64_t count, const float* offset,
                                             float* scales, void* stream);
QSHARDED_API int qsharded_cuda_absmax_encode(const float* absmax, int64_t first, int64_t count, const float* offset,
                                             const float* scales, const float* thresholds, uint8_t* codes,
                                             void* stream);
QSHARDED_API int qsharded_cuda_absmax_scales_and_codes(const float* absmax, int64_t count, const float* offset,
                                                       const float* thresholds, float* scales, uint8_t* codes,
                                                       void* stream);

// From now on products choose their kernels as on a device that allows a thread block no more shared memory than so many
// bytes. For tests, which so run other cards' kernels on the card they have.
QSHARDED_API void qsharded_cuda_nf4_linear_assume(int shared_bytes);

// Bytes of workspace that qsharded_cuda_nf4_linear needs for these sizes on the current device; 0 for none.
QSHARDED_API int64_t qsharded_cuda_nf4_linear_workspace(int dtype, int64_t m, int64_t rows, int64_t blocks_per_row);

// y = x W^T (+ bias): x [m, 64 * blocks_per_row] and y [m, rows] of `dtype`, bfloat16 or float16, contiguous and
// 16-byte aligned, as are codes. W as qsharded_cpu_nf4_dequantize takes it. Which weights are multiplied depends on sizes
// and device: as dequantize rounds them to `dtype`; or codebook * factor rounded to it, sums of a block being multiplied by
// absmax / factor; or, for one row of x, not rounded at all. Products are summed in fp32 in an order that these sizes and the
// device fix. bias: [rows] of `dtype` or null. Up to 2^37 weights, 2^20 columns.
QSHARDED_API int qsharded_cuda_nf4_linear(const void* x, int dtype, int64_t m, const uint8_t* codes, int64_t rows,
                                          int64_t blocks_per_row, const void* absmax, int64_t absmax_row_stride,
                                          const float* absmax_scales, const float* absmax_offset,
                                          const float* absmax_map, const float* codebook, float factor,
                                          const void* bias, void* y, void* workspace, void* stream);

// The bins of a magnitude of at most 1: its upper 16 bits as fp32, counted from those of 2^-23.
enum { QSHARDED_ADAMW8BIT_BINS = 2945 };

// One AdamW step of the parameters of one type, `dtype` float32 or bfloat16, behind `blocks` consecutive blocks of state,
// of which the first is block `first_block` of all. state1, state2: a code a value, 256 a block, 16-byte aligned, with
// scales in absmax1 and absmax2; or fp32 moments where absmax1 is null. row_of_block: a block's row in the tables that
// follow. table: a row has addresses of parameter and gradient (0 for none), how many values they have, and where the
// first stands among the values of all blocks. coefficients: nine a row, as the reference has them. skip: not 0 to leave
// everything as it is. map: 256 entries, signed for state1 and unsigned for state2. search: for each bin, what the bits of
// a magnitude there are added to for the sum to have the code in bits 16 to 23; smaller magnitudes count as 2^-23. search1
// goes on with all bins for values below zero, where the sum has 255 less the code.
QSHARDED_API int qsharded_cuda_adamw8bit(void* state1, void* state2, float* absmax1, float* absmax2,
                                         int64_t first_block, int64_t blocks, const int32_t* row_of_block,
                                         const int64_t* table, const float* coefficients, const float* skip,
                                         const float* map1, const float* map2, const uint32_t* search1,
                                         const uint32_t* search2, int dtype, void* stream);

// The same for one parameter of `count` values, a multiple of 256, whose state this is, with what the launch needs to know
// in its arguments. coefficients: nine, in host memory, not needed after the call. A value whose gradient is not finite
// stays as it is and its moments become 0, as bitsandbytes' kernel has it.
QSHARDED_API int qsharded_cuda_adamw8bit_alone(void* parameter, const void* gradient, int64_t count, void* state1,
                                               void* state2, float* absmax1, float* absmax2, const float* coefficients,
                                               const float* map1, const float* map2, const uint32_t* search1,
                                               const uint32_t* search2, int dtype, void* stream);
