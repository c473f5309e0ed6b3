// y = x W^T for one row of x, without decoding W: what a byte of codes contributes depends on the byte and on its two
// columns' x alone, so a table of all 256 contributions is made for every pair of columns, and W's bytes look sums up.
// Weights thus enter the sums unrounded, in fp32; one weight alone gives what dequantize gives.
//
//                  slice: 256 columns           shared memory: for each lane and each of its 4 bytes a table of 256 sums
//               | lane 0: 8 | lane 1 | .. | 31 |
//   batch of    +-----------+--------+----+----+      warp 0: batches 0, 16, ..   lanes' sums --exchange halves--> a row a lane
//   32 rows     |  4 bytes  |        |    |    |      warp 1: batches 1, 17, ..   times absmax, over the blocks
//               +-----------+--------+----+----+                                  -> workspace [slices, rows]
//                                                     second kernel: adds the slices in order
//
// A CTA has a slice of 256 columns and a stretch of W's rows. A lane has the slice's bytes 4 lane to 4 lane + 3
// of every row, in a bank of its own. 32 rows make a batch of a warp: their sums over the lanes are taken by exchanging
// halves, so that a lane is left with a row. Each slice leaves its sums in the workspace; they are added in order.
#pragma once

#include "linear_row_batch.cuh"

namespace qsharded {

constexpr int kVectorWarps = 16;  // one for every first code, when the tables are made
constexpr int kBatch = 32;        // rows
constexpr int kEntryRow = kWarp * 4;             // bytes: an entry of every lane
constexpr int kSumTable = 256 * kEntryRow;       // for every lane's byte j
constexpr int kSumTableBytes = 4 * kSumTable;
constexpr int kVectorSharedBytes = kSumTableBytes + kMapBytes;

// ---- Tables ----

// Warp f writes the entries of the bytes whose first code is f.
template <typename T>
__device__ inline void fill_sum_tables(uint8_t* tables, const uint4& own_x, const float (&codebook)[16], float first_value) {
  const int lane = threadIdx.x % kWarp, first_code = threadIdx.x / kWarp;
  const T* x = reinterpret_cast<const T*>(&own_x);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float first = __fmul_rn(first_value, static_cast<float>(x[2 * j]));
    const float second_x = static_cast<float>(x[2 * j + 1]);
#pragma unroll
    for (int code = 0; code < 16; ++code) {
      const int byte = first_code * 16 + code;
      const float sum = __fmaf_rn(codebook[code], second_x, first);
      *reinterpret_cast<float*>(tables + j * kSumTable + byte * kEntryRow + lane * 4) = sum;
    }
  }
}

// ---- Kernel ----

// A warp's next 32 rows.
using Batch = RowBatch[kBatch / kRowBatch];

// At least 32 rows: the last batch ends with the last row, and may share rows with the one before it.
template <typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(kVectorWarps * kWarp, 1)
    linear_vector_kernel(const __grid_constant__ LinearArguments<T> a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  float* const map = reinterpret_cast<float*>(shared + kSumTableBytes);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t batches = (a.w.rows + kBatch - 1) / kBatch;
  const int begin = static_cast<int>(batches * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(batches * (blockIdx.y + 1) / gridDim.y);
  const auto first_row = [&](int number) { return min(number * int64_t{kBatch}, a.w.rows - kBatch); };

  pdl_launch_dependents();
  const int column = blockIdx.x * kSlice + lane * 8;
  uint4 own_x = {};
  if (column < a.w.blocks_per_row * kBlock) own_x = __ldg(reinterpret_cast<const uint4*>(a.x + column));
  float codebook[16];
#pragma unroll
  for (int code = 0; code < 16; ++code) codebook[code] = __ldg(a.w.codebook + code);
  const float first_value = __ldg(a.w.codebook + warp);
  const AbsmaxMap<kDoubleQuant> absmax_map(a.w);
  Batch batch;
  const auto load = [&](int part, int64_t row) {
    batch[part].template load<kDoubleQuant>(a.w, row + part * kRowBatch, blockIdx.x);
  };
#pragma unroll
  for (int part = 0; part < 4; ++part) load(part, first_row(begin + warp));
  fill_sum_tables<T>(shared, own_x, codebook, first_value);
  absmax_map.store(map);
  __syncthreads();

  float* const partials = reinterpret_cast<float*>(a.workspace);
  const bool inside = blockIdx.x * kSliceBlocks + lane / 8 < a.w.blocks_per_row;
  const uint32_t own_entries = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + lane * 4;
  for (int of_first_warp = begin; of_first_warp < end; of_first_warp += kVectorWarps) {
    const int number = of_first_warp + warp;
    const int64_t next_row = first_row(number + kVectorWarps);
    float sums[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      float row[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float entry[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t at = __dp4a(batch[part].codes[i], static_cast<uint32_t>(kEntryRow) << 8 * j, own_entries);
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(entry[j]) : "r"(at + j * kSumTable));
        }
        row[i] = (entry[0] + entry[1]) + (entry[2] + entry[3]);
      }
      sums[part] = batch[part].template scaled_sum<kDoubleQuant>(row, map, absmax_map.offset, inside);
      load(part, next_row);
    }
    // over the blocks: lane 8 p + r is left with row r of part p
#pragma unroll
    for (int i = 0; i < 2; ++i) sums[i] = exchange(sums[i], sums[i + 2], 16);
    const float sum = exchange(sums[0], sums[1], 8);
    if (number < end) partials[blockIdx.x * a.w.rows + first_row(number) + lane] = sum;
  }
}

// ---- The second kernel, and the launch ----

// Each row's sums of the slices, from first to last.
template <typename T>
__global__ void __launch_bounds__(128) sum_slices_kernel(const __grid_constant__ LinearArguments<T> a, int slices) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  pdl_wait();
  if (row >= a.w.rows) return;
  const float* const partials = reinterpret_cast<const float*>(a.workspace) + row;
  float sum = 0;
#pragma unroll 16
  for (int i = 0; i < slices; ++i) sum += __ldcg(partials + i * a.w.rows);
  if (a.bias) sum += static_cast<float>(a.bias[row]);
  a.y[row] = static_cast<T>(sum);
}

inline int64_t vector_workspace(const LinearSizes& s) { return slices_of(s.blocks_per_row) * s.rows * sizeof(float); }

template <typename T>
cudaError_t launch_vector(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = a.w.absmax_scales ? linear_vector_kernel<T, true> : linear_vector_kernel<T, false>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kVectorSharedBytes);
  if (error != cudaSuccess) return error;
  const int slices = slices_of(a.w.blocks_per_row), stretches = slices < a.sms ? a.sms / slices : 1;
  kernel<<<dim3(slices, stretches), kVectorWarps * kWarp, kVectorSharedBytes, stream>>>(a);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return launch_pdl(sum_slices_kernel<T>, ceil_div(a.w.rows, 128), 128, 0, stream, a, slices);
}

}  // namespace qsharded
