// y = x W^T for one row of x and weights that are too small to pay for the tables of linear_vector.cuh: the values of W's
// bytes come from a table of pairs, and a CTA has whole rows, so that nothing is left to sum.
//
// The warps share out a row's slices, in as many passes as it takes. Weights enter the sums unrounded, as there.
#pragma once

#include <algorithm>

#include "linear_row_batch.cuh"

namespace qsharded {

constexpr int kFewestSmallWarps = 8;  // for the map's entries
constexpr int kMostSmallWarps = 16;
constexpr int kSmallCtasPerSm = 2;  // one computes while the other waits for its warps

// A lane's eight columns of x.
template <typename T>
struct OwnColumns {
  float x[8];

  // 0 beyond the last column.
  __device__ void load(const LinearArguments<T>& a, int slice) {
    const int column = slice * kSlice + threadIdx.x % kWarp * 8;
    uint4 packed = {};
    if (column < a.w.blocks_per_row * kBlock) packed = __ldg(reinterpret_cast<const uint4*>(a.x + column));
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(reinterpret_cast<const T*>(&packed)[i]);
  }

  __device__ float times(const float2 (&codebook)[4]) const {
    float first = __fmul_rn(codebook[0].x, x[0]), second = __fmul_rn(codebook[0].y, x[1]);
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      first = __fmaf_rn(codebook[i].x, x[2 * i], first), second = __fmaf_rn(codebook[i].y, x[2 * i + 1], second);
    }
    return first + second;
  }
};

// At least 8 rows: the last batch ends with the last row, and may share rows with the one before it.
template <typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(kMostSmallWarps* kWarp, kSmallCtasPerSm)
    linear_vector_small_kernel(const __grid_constant__ LinearArguments<T> a, int passes) {
  __shared__ __align__(1024) uint8_t codebook[CodebookTable::kBytes];
  __shared__ float map[256];
  __shared__ float sums_of_warps[2][kMostSmallWarps][kRowBatch];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int batches = static_cast<int>((a.w.rows + kRowBatch - 1) / kRowBatch);
  const auto first_row = [&](int number) { return min(number * int64_t{kRowBatch}, a.w.rows - kRowBatch); };

  RowBatch batch;
  OwnColumns<T> own;
  const AbsmaxMap<kDoubleQuant> absmax_map(a.w);
  batch.template load<kDoubleQuant>(a.w, first_row(blockIdx.x), warp);
  own.load(a, warp);
  CodebookTable::fill<kFewestSmallWarps * kWarp>(codebook, a.w.codebook, blockDim.x);
  absmax_map.store(map);
  __syncthreads();

  const CodebookTable table(codebook);
  for (int number = blockIdx.x, turn = 0; number < batches; number += gridDim.x, ++turn) {
    float sum = 0;
    for (int pass = 0; pass < passes; ++pass) {
      const int slice = pass * warps + warp;
      const bool last_pass = pass + 1 == passes;
      const bool inside = slice * kSliceBlocks + lane / 8 < a.w.blocks_per_row;
      float rows[kRowBatch];
#pragma unroll
      for (int i = 0; i < kRowBatch; ++i) {
        float2 pairs[4];
        table.look_up(batch.codes[i], pairs);
        rows[i] = own.times(pairs);
      }
      sum += batch.template scaled_sum<kDoubleQuant>(rows, map, absmax_map.offset, inside);
      const int next_slice = last_pass ? warp : slice + warps;
      batch.template load<kDoubleQuant>(a.w, first_row(last_pass ? number + gridDim.x : number), next_slice);
      if (passes > 1) own.load(a, next_slice);
    }
    // over the blocks: lane r is left with row r
#pragma unroll
    for (int distance = 8; distance < kWarp; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    auto& sums = sums_of_warps[turn % 2];  // the other half may still be read
    if (lane < kRowBatch) sums[warp][lane] = sum;
    __syncthreads();
    if (warp != turn % warps || lane >= kRowBatch) continue;
    const int64_t row = first_row(number) + lane;
    float total = 0;
    for (int i = 0; i < warps; ++i) total += sums[i][lane];
    if (a.bias) total += static_cast<float>(a.bias[row]);
    a.y[row] = static_cast<T>(total);
  }
}

template <typename T>
cudaError_t launch_vector_small(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = a.w.absmax_scales ? linear_vector_small_kernel<T, true> : linear_vector_small_kernel<T, false>;
  const int slices = slices_of(a.w.blocks_per_row), passes = ceil_div(slices, kMostSmallWarps);
  const int warps = std::max(static_cast<int>(ceil_div(slices, passes)), kFewestSmallWarps);
  const int batches = ceil_div(a.w.rows, kRowBatch), most = a.sms * kSmallCtasPerSm;
  kernel<<<std::min(batches, most), warps * kWarp, 0, stream>>>(a, passes);
  return cudaGetLastError();
}

}  // namespace qsharded
