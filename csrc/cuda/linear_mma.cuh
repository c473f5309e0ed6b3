// y = x W^T for few rows of x: W by way of registers into mma.m16n8k16, as A; x in shared memory, as B.
//
//                    chunk: kColumnWarps x kKTiles k-tiles of 256 columns        CTA's shared memory
//                  +----------------------+----------------------+               codebook of byte pairs, absmax map
//   row warp 0     |  column warp 0       |  column warp 1       |               x: two stages [kM, kColumns]
//   (kSubtiles     |  block 0 1 2 3       |  block 0 1 2 3       |               accumulators of the column warps
//    x 16 rows)    +----------------------+----------------------+
//   row warp 1     |                      |                      |               lane t of four has block t of its k-tile
//                  +----------------------+----------------------+
//
//   x:     global --cp.async--> stage (the next unit's, while this one is computed) --> registers (B) --+
//   codes: global --loads, half a k-tile ahead--> registers --decode--> registers (A) ------------------+--> mma
//
// Axes: rows = rows of W (columns of y), columns = columns of W; m = rows of x. A CTA walks its stretch of (tile, chunk)
// units (linear_partition.cuh); kRowWarps x kColumnWarps warps share a unit. At a tile's end the column warps' accumulators
// are added.
#pragma once

#include <type_traits>

#include "linear_mma_tile.cuh"

namespace qsharded {

// ---- Tile configuration ----

// Named by a tile's rows of W and rows of x.
struct Mma128x8 {
  static constexpr int kRowWarps = 4;     // warps one below the other
  static constexpr int kColumnWarps = 2;  // and side by side
  static constexpr int kSubtiles = 2;     // 16 rows of W each, a warp's
  static constexpr int kMTiles = 1;       // 8 rows of x each
  static constexpr int kKTiles = 1;       // of a warp, in a chunk
};
struct Mma128x16 {
  static constexpr int kRowWarps = 4, kColumnWarps = 2, kSubtiles = 2, kMTiles = 2, kKTiles = 1;
};

// What follows from a configuration.
template <typename Config>
struct MmaShape {
  static constexpr int kRowWarps = Config::kRowWarps, kColumnWarps = Config::kColumnWarps;
  static constexpr int kSubtiles = Config::kSubtiles, kMTiles = Config::kMTiles, kKTiles = Config::kKTiles;
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kRowWarps * kSubtiles * 16;
  static constexpr int kColumns = kColumnWarps * kKTiles * kKTile;
  static constexpr int kM = kMTiles * 8;
  static constexpr int kAccumulators = kSubtiles * kMTiles * 4;  // that a lane holds
  static constexpr int kStageBytes = kM * kColumns * 2;
  static constexpr int kAccumulatorBytes = kColumnWarps > 1 ? kWarps * kAccumulators * kWarp * 4 : 0;
  static constexpr int kSharedBytes = CodebookTable::kBytes + kMapBytes + 2 * kStageBytes + kAccumulatorBytes;
  static_assert(kThreads >= 256);  // the map's entries
  static_assert(kSharedBytes <= kFewestSharedBytes);

  static Partition partition(const LinearSizes& s) {
    return Partition::of(ceil_div(s.rows, kRows), ceil_div(s.blocks_per_row * kBlock, kColumns), s.sms);
  }
};

// ---- x, swizzled to its stage ----

// 16 bytes; zeros where not inside.
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(inside ? 16 : 0));
}

// Where a 16-byte granule of x lies: the four lanes that read together find consecutive granules, and odd rows the
// other half of the banks.
__device__ inline int granule_at(int m, int granule) {
  const int in_k_tile = granule % 32;
  return granule - in_k_tile + ((in_k_tile % 8 * 4 + in_k_tile / 8) ^ (m % 2 * 4));
}

template <typename Shape, typename T>
__device__ inline void load_x_stage(uint8_t* stage, const LinearArguments<T>& a, int m0, int chunk, bool inside) {
  constexpr int kGranules = Shape::kColumns / 8, kAll = Shape::kM * kGranules;
  const int columns = a.w.blocks_per_row * kBlock;
#pragma unroll
  for (int j = 0; j < (kAll + Shape::kThreads - 1) / Shape::kThreads; ++j) {
    const int i = threadIdx.x + j * Shape::kThreads;
    if (kAll % Shape::kThreads != 0 && i >= kAll) break;
    const int m = i / kGranules, granule = i % kGranules;
    const int column = chunk * Shape::kColumns + granule * 8;
    const bool valid = inside && m0 + m < a.m && column < columns;
    const T* from = a.x + (valid ? static_cast<int64_t>(m0 + m) * columns + column : 0);
    copy_async(stage + (m * kGranules + granule_at(m, granule)) * 16, from, valid);
  }
  asm volatile("cp.async.commit_group;");
}

// ---- A tile's accumulators: added over the column warps, and written ----

template <typename Shape, typename T>
__device__ void write_tile(const LinearArguments<T>& a, const Partition& partition,
                           float (&accumulators)[Shape::kAccumulators], float* shared, int tile, int m0) {
  constexpr int kColumnWarps = Shape::kColumnWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row_warp = warp / kColumnWarps, column_warp = warp % kColumnWarps;
  const MmaTile<Shape, T> out(a, partition, tile, m0, row_warp * Shape::kSubtiles * 16 + lane / 4);
  if constexpr (kColumnWarps == 1) {
#pragma unroll
    for (int i = 0; i < Shape::kAccumulators; ++i) out.write(i, accumulators[i]);
  } else {
    float* own = shared + row_warp * kColumnWarps * Shape::kAccumulators * kWarp + lane;
#pragma unroll
    for (int i = 0; i < Shape::kAccumulators; ++i) {
      own[(column_warp * Shape::kAccumulators + i) * kWarp] = accumulators[i];
    }
    __syncthreads();
    for (int i = column_warp; i < Shape::kAccumulators; i += kColumnWarps) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kColumnWarps; ++j) sum += own[(j * Shape::kAccumulators + i) * kWarp];
      out.write(i, sum);
    }
    // the next tile's accumulators are written after another barrier
  }
}

// ---- Kernel ----

using First = std::integral_constant<int, 0>;
using Second = std::integral_constant<int, 1>;

// Where a warp is: a k-tile of a unit.
struct Place {
  int tile, chunk, k_tile;
};

template <typename Shape, typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_mma_kernel(const __grid_constant__ LinearArguments<T> a, const __grid_constant__ Partition partition) {
  constexpr int kSubtiles = Shape::kSubtiles;
  extern __shared__ __align__(1024) uint8_t shared[];
  float* const map = reinterpret_cast<float*>(shared + CodebookTable::kBytes);
  uint8_t* const stages = shared + CodebookTable::kBytes + kMapBytes;
  float* const exchange = reinterpret_cast<float*>(stages + 2 * Shape::kStageBytes);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column_warp = warp % Shape::kColumnWarps;
  const int first_row = warp / Shape::kColumnWarps * kSubtiles * 16 + lane / 4;
  const int m0 = blockIdx.y * Shape::kM;
  const int begin = partition.begin(blockIdx.x), end = partition.begin(blockIdx.x + 1);

  pdl_launch_dependents();
  const auto own_block = [&](const Place& at) {
    return ((at.chunk * Shape::kColumnWarps + column_warp) * Shape::kKTiles + at.k_tile) * kKTileBlocks + lane % 4;
  };
  Block upper[kSubtiles] = {}, lower[kSubtiles] = {};
  const auto load = [&](auto half, const Place& at, bool more) {
    const int block = own_block(at);
    const bool inside = more && block < a.w.blocks_per_row;
#pragma unroll
    for (int i = 0; i < kSubtiles; ++i) {
      const TileRows<kDoubleQuant> tile(a.w, static_cast<int64_t>(at.tile) * Shape::kRows, first_row + i * 16);
      upper[i].template load<kDoubleQuant, half.value>(a.w, tile, tile.upper, block, inside);
      lower[i].template load<kDoubleQuant, half.value>(a.w, tile, tile.lower, block, inside);
    }
  };
  Place at = {begin / partition.chunks, begin % partition.chunks, 0};
  const AbsmaxMap<kDoubleQuant> absmax_map(a.w);
  load_x_stage<Shape>(stages, a, m0, at.chunk, begin < end);
  load(First{}, at, begin < end);
  load(Second{}, at, begin < end);
  CodebookTable::fill<Shape::kThreads>(shared, a.w.codebook);
  absmax_map.store(map);
  const CodebookTable table(shared);

  float accumulators[Shape::kAccumulators] = {};
  for (int unit = begin; unit < end; ++unit) {
    const bool last_of_tile = at.chunk + 1 == partition.chunks, more_units = unit + 1 < end;
    const Place next_unit = {last_of_tile ? at.tile + 1 : at.tile, last_of_tile ? 0 : at.chunk + 1, 0};
    const int stage = (unit - begin) & 1;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    load_x_stage<Shape>(stages + (stage ^ 1) * Shape::kStageBytes, a, m0, next_unit.chunk, more_units);
#pragma unroll 1
    for (int k_tile = 0; k_tile < Shape::kKTiles; ++k_tile) {
      at.k_tile = k_tile;
      const bool last_k_tile = k_tile + 1 == Shape::kKTiles;
      const Place next = last_k_tile ? next_unit : Place{at.tile, at.chunk, k_tile + 1};
      const bool more = !last_k_tile || more_units;
      const bool inside = own_block(at) < a.w.blocks_per_row;
      float upper_absmax[kSubtiles], lower_absmax[kSubtiles];
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
        upper_absmax[i] = upper[i].template absmax<kDoubleQuant>(map, absmax_map.offset, inside);
        lower_absmax[i] = lower[i].template absmax<kDoubleQuant>(map, absmax_map.offset, inside);
      }
      const uint8_t* const x = stages + stage * Shape::kStageBytes;
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        uint4 b[Shape::kMTiles];
#pragma unroll
        for (int j = 0; j < Shape::kMTiles; ++j) {
          const int m = j * 8 + lane / 4;
          const int granule = (column_warp * Shape::kKTiles + k_tile) * 32 + ((word * 4 + lane % 4) ^ (m % 2 * 4));
          b[j] = *reinterpret_cast<const uint4*>(x + (m * (Shape::kColumns / 8) + granule) * 16);
        }
#pragma unroll
        for (int i = 0; i < kSubtiles; ++i) {
          uint32_t u[4], l[4];
          table.template decode<T>(upper[i].word(word), upper_absmax[i], u);
          table.template decode<T>(lower[i].word(word), lower_absmax[i], l);
          auto* own_accumulators = reinterpret_cast<float(*)[4]>(accumulators + i * Shape::kMTiles * 4);
#pragma unroll
          for (int j = 0; j < Shape::kMTiles; ++j) {
            multiply(own_accumulators[j], u[0], l[0], u[1], l[1], b[j].x, b[j].y, T{});
            multiply(own_accumulators[j], u[2], l[2], u[3], l[3], b[j].z, b[j].w, T{});
          }
        }
        // these registers are free for what comes next
        if (word == kWords / 2 - 1) load(First{}, next, more);
        if (word == kWords - 1) load(Second{}, next, more);
      }
    }
    if (last_of_tile || !more_units) {
      write_tile<Shape>(a, partition, accumulators, exchange, at.tile, m0);
#pragma unroll
      for (int i = 0; i < Shape::kAccumulators; ++i) accumulators[i] = 0;
    }
    at = next_unit;
  }
}

// ---- Launch ----

template <typename Shape, typename T>
cudaError_t launch_mma(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = a.w.absmax_scales ? linear_mma_kernel<Shape, T, true> : linear_mma_kernel<Shape, T, false>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const Partition partition = Shape::partition(a.sizes());
  const dim3 grid(partition.ctas, ceil_div(a.m, Shape::kM));
  kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(a, partition);
  error = cudaGetLastError();
  return error != cudaSuccess ? error : launch_sum_partials<Shape>(a, partition, stream);
}

}  // namespace qsharded
