// What kernels share that multiply by mma.m16n8k16: the instruction, where a lane's accumulators belong, and the second
// kernel, which adds the partial sums that several CTAs have of a tile.
//
// A shape has kSubtiles x 16 rows of W to a warp, kMTiles x 8 rows of x, and kRows x kM accumulators to a tile.
#pragma once

#include "linear_arguments.cuh"
#include "linear_partition.cuh"

namespace qsharded {

__device__ inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A warp's part of a tile of y: to y itself, or, where other CTAs have parts of the tile too, to the workspace.
template <typename Shape, typename T>
struct MmaTile {
  const LinearArguments<T>& a;
  int64_t first_row;
  int m0, own_row;
  float* partial;  // or null

  // own_row: of the lane's first accumulator, from the tile's first; every eighth after it is its too.
  __device__ MmaTile(const LinearArguments<T>& a, const Partition& partition, int tile, int m0, int own_row)
      : a(a), first_row(static_cast<int64_t>(tile) * Shape::kRows), m0(m0), own_row(own_row) {
    const int first_unit = tile * partition.chunks;
    const bool split = first_unit < partition.begin(blockIdx.x) ||
                       first_unit + partition.chunks > partition.begin(blockIdx.x + 1);
    const int64_t number = static_cast<int64_t>(blockIdx.y) * partition.partials() + partition.partial(tile, blockIdx.x);
    partial = split ? reinterpret_cast<float*>(a.workspace) + number * (Shape::kM * Shape::kRows) : nullptr;
  }

  // The lane's accumulator number i, as mma lays them out.
  __device__ void write(int i, float sum) const {
    const int lane = threadIdx.x % kWarp;
    const int subtile = i / (Shape::kMTiles * 4), m_tile = i / 4 % Shape::kMTiles;
    const int row = own_row + subtile * 16 + (i % 4) / 2 * 8;
    const int m = m_tile * 8 + lane % 4 * 2 + i % 2;
    if (m0 + m >= a.m || first_row + row >= a.w.rows) return;
    if (partial) {
      partial[m * Shape::kRows + row] = sum;
    } else {
      if (a.bias) sum += static_cast<float>(a.bias[first_row + row]);
      a.y[(m0 + m) * a.w.rows + first_row + row] = static_cast<T>(sum);
    }
  }
};

// Adds, in the order of the CTAs, the partial sums of the tiles that several of them share.
template <typename T>
__global__ void __launch_bounds__(256)
    sum_partials_kernel(const LinearArguments<T> a, const Partition partition, int tile_rows, int tile_m) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int m = blockIdx.y;
  const int tile = static_cast<int>(row / tile_rows);
  const bool inside = row < a.w.rows;
  const int first = inside ? partition.first_cta(tile) : 0, last = inside ? partition.last_cta(tile) : 0;
  pdl_wait();
  if (first == last) return;
  const int64_t number = static_cast<int64_t>(m / tile_m) * partition.partials() + partition.partial(tile, first);
  const float* partial =
      reinterpret_cast<const float*>(a.workspace) + (number * tile_m + m % tile_m) * tile_rows + row % tile_rows;
  const int64_t stride = static_cast<int64_t>(tile_m) * tile_rows;
  float sum = 0;
  for (int i = 0; i <= last - first; ++i) sum += __ldcg(partial + i * stride);
  if (a.bias) sum += static_cast<float>(a.bias[row]);
  a.y[m * a.w.rows + row] = static_cast<T>(sum);
}

template <typename Shape>
int64_t mma_workspace(const LinearSizes& s) {
  const int64_t partials = static_cast<int64_t>(ceil_div(s.m, Shape::kM)) * Shape::partition(s).partials();
  return partials * Shape::kM * Shape::kRows * sizeof(float);
}

template <typename Shape, typename T>
cudaError_t launch_sum_partials(const LinearArguments<T>& a, const Partition& partition, cudaStream_t stream) {
  if (partition.partials() == 0) return cudaSuccess;
  return launch_pdl(sum_partials_kernel<T>, dim3(ceil_div(a.w.rows, 256), a.m), 256, 0, stream, a, partition,
                            Shape::kRows, Shape::kM);
}

}  // namespace qsharded
