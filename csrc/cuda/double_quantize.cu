// NF4's second level: absmax - mean to 8 bits under one scale for 256 values, in steps that ranks can take together.
#include "nf4.cuh"

namespace qsharded {
namespace {

constexpr int kTile = kWarp;  // rows and columns that a warp turns at a time

// This lane's column of a tile; outside the matrix its nearest entry.
__device__ void load_column(const float* absmax, int64_t rows, int64_t columns, int64_t row, int64_t column,
                            float (&values)[kTile]) {
  column = min(column, columns - 1);
#pragma unroll
  for (int i = 0; i < kTile; ++i) values[i] = absmax[min(row + i, rows - 1) * columns + column];
}

// A lane adds one row from left to right; the tile turns coalesced reads into a row a lane.
__global__ void __launch_bounds__(kWarp)
    row_sums_kernel(const float* absmax, int64_t rows, int64_t columns, double* row_sums) {
  __shared__ float tile[kTile][kTile + 1];  // the odd width keeps a column's entries in different banks
  const int lane = threadIdx.x;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  float values[kTile];
  load_column(absmax, rows, columns, first_row, lane, values);
  double sum = 0;
  for (int64_t column = 0; column < columns; column += kTile) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) tile[i][lane] = column + lane < columns ? values[i] : 0;  // 0 changes no sum
    __syncwarp();
    // the next tile is on its way during the additions
    if (column + kTile < columns) load_column(absmax, rows, columns, first_row, column + kTile + lane, values);
#pragma unroll
    for (int i = 0; i < kTile; ++i) sum += tile[lane][i];
    __syncwarp();
  }
  if (first_row + lane < rows) row_sums[first_row + lane] = sum;
}

constexpr int kSumThreads = 1024;

// In any order; valid in thread 0.
__device__ double sum_of(const double* values, int64_t count) {
  __shared__ double warp_sums[kSumThreads / kWarp];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += values[i];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    sum = warp_sums[threadIdx.x];
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  }
  return sum;
}

// The sum in row order is one chain of dependent additions. Summed side by side first: no term is negative, so
// two orders differ by at most 2^-53 of the sum for every addition on the longest way of either, and where both ends
// of that interval give the same fp32, the order does not matter. One weight in thousands takes the chain.
__global__ void __launch_bounds__(kSumThreads)
    offset_kernel(const double* row_sums, int64_t rows, int64_t values, float* offset) {
  const double sum = sum_of(row_sums, rows);
  if (threadIdx.x != 0) return;
  const double doubt = static_cast<double>(2 * rows + 64) * 0x1p-53 * 2;  // twice what the additions can err
  const double divisor = static_cast<double>(values);
  const float low = __double2float_rn(__dmul_rd(sum, 1 - doubt) / divisor);
  const float high = __double2float_rn(__dmul_ru(sum, 1 + doubt) / divisor);
  if (low == high) {
    *offset = low;
    return;
  }
  double in_order = 0;
  for (int64_t row = 0; row < rows; ++row) in_order += row_sums[row];
  *offset = __double2float_rn(in_order / divisor);
}

constexpr int kThreads = 256;
constexpr int kThresholds = 255;
constexpr int kTreeDepth = 8;                  // of the thresholds' tree
constexpr int kValues = kAbsmaxBlock / kWarp;  // of a lane

// The thresholds as a complete binary tree, level after level: lanes that search meet in one entry or, but for the two
// lowest levels, in different banks. In ascending order they would meet in one bank.
__device__ void fill(float (&tree)[kThresholds], const float* thresholds) {
  const unsigned node = threadIdx.x + 1;
  if (node > kThresholds) return;
  const unsigned level = 31 - __clz(node), place = node - (1u << level);
  tree[threadIdx.x] = thresholds[((2 * place + 1) << (kTreeDepth - 1 - level)) - 1];
}

// How many thresholds lie below.
__device__ unsigned code_of(float scaled, const float (&tree)[kThresholds]) {
  unsigned node = 0;
#pragma unroll
  for (int level = 0; level < kTreeDepth; ++level) node = 2 * node + 1 + (tree[node] < scaled);
  return node - kThresholds;
}

// A warp has one second-level block, of which `first` and `count` may cut off the ends.
template <bool kFindScale, bool kEncode>
__global__ void __launch_bounds__(kThreads)
    second_level_kernel(const float* absmax, int64_t first, int64_t count, const float* offset, float* scales,
                        const float* thresholds, uint8_t* codes) {
  __shared__ float tree[kThresholds];
  if (kEncode) fill(tree, thresholds);
  if (kEncode) __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int64_t block = first / kAbsmaxBlock + (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t start = block * kAbsmaxBlock - first + lane;  // this lane's first value, among those given
  if (block * kAbsmaxBlock >= first + count) return;
  float values[kValues];
  float scale = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int64_t at = start + i * kWarp;
    values[i] = at >= 0 && at < count ? __fsub_rn(absmax[at], *offset) : 0;
    scale = fmaxf(scale, fabsf(values[i]));
  }
  if constexpr (kFindScale) {
    for (int step = kWarp / 2; step > 0; step /= 2) scale = fmaxf(scale, __shfl_xor_sync(~0u, scale, step));
    if (lane == 0) scales[block] = scale;
  }
  if constexpr (!kEncode) return;
  const float factor = reciprocal(kFindScale ? scale : scales[block]);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int64_t at = start + i * kWarp;
    if (at < 0 || at >= count) continue;
    codes[at] = static_cast<uint8_t>(code_of(__fmul_rn(values[i], factor), tree));
  }
}

template <bool kFindScale, bool kEncode>
int second_level(const float* absmax, int64_t first, int64_t count, const float* offset, float* scales,
                 const float* thresholds, uint8_t* codes, void* stream) {
  if (count == 0) return QSHARDED_OK;
  const int64_t blocks = (first + count - 1) / kAbsmaxBlock - first / kAbsmaxBlock + 1;
  second_level_kernel<kFindScale, kEncode>
      <<<ceil_div(blocks * kWarp, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          absmax, first, count, offset, scales, thresholds, codes);
  return launch_result();
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_absmax_row_sums(const float* absmax, int64_t rows, int64_t blocks_per_row, double* row_sums,
                                  void* stream) {
  if (rows == 0) return QSHARDED_OK;
  row_sums_kernel<<<ceil_div(rows, kTile), kWarp, 0, static_cast<cudaStream_t>(stream)>>>(absmax, rows,
                                                                                         blocks_per_row, row_sums);
  return launch_result();
}

int qsharded_cuda_absmax_offset(const double* row_sums, int64_t rows, int64_t values, float* offset, void* stream) {
  offset_kernel<<<1, kSumThreads, 0, static_cast<cudaStream_t>(stream)>>>(row_sums, rows, values, offset);
  return launch_result();
}

int qsharded_cuda_absmax_scales(const float* absmax, int64_t first, int64_t count, const float* offset, float* scales,
                                void* stream) {
  return second_level<true, false>(absmax, first, count, offset, scales, nullptr, nullptr, stream);
}

int qsharded_cuda_absmax_encode(const float* absmax, int64_t first, int64_t count, const float* offset,
                                const float* scales, const float* thresholds, uint8_t* codes, void* stream) {
  return second_level<false, true>(absmax, first, count, offset, const_cast<float*>(scales), thresholds, codes,
                                   stream);
}

int qsharded_cuda_absmax_scales_and_codes(const float* absmax, int64_t count, const float* offset,
                                          const float* thresholds, float* scales, uint8_t* codes, void* stream) {
  return second_level<true, true>(absmax, 0, count, offset, scales, thresholds, codes, stream);
}
