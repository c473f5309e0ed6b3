// y = x W^T for more rows of x on Hopper: W by way of registers into wgmma, as A; x in shared memory, as B.
//
// x first goes into the workspace as shared memory wants it: piece after piece of 128 columns, its columns in the order
// in which lanes hold W's, rows in wgmma's 128-byte swizzle. One bulk copy then brings a piece. One warp copies; the
// warpgroups decode and multiply, each 64 rows of W times kSubtiles, and while the tensor cores work on one half of a
// piece the next half is decoded.
#pragma once

#include "linear_mma.cuh"
#include "wgmma.cuh"

// wgmma exists in code built for sm_90a alone
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QSHARDED_HAS_WGMMA 1
#endif

namespace qsharded {

template <int kWarpgroups_, int kSubtiles_, int kM_, int kStages_>
struct WgmmaShape {
  static constexpr int kWarpgroups = kWarpgroups_, kSubtiles = kSubtiles_, kM = kM_, kStages = kStages_;
  static constexpr int kWarps = kWarpgroups * 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarpgroups * kSubtiles * 64;
  static constexpr int kColumns = kPiece;
  static constexpr int kInstructionM = kM < 128 ? kM : 128;
  static constexpr int kInstructions = kM / kInstructionM;
  static constexpr int kHalfBytes = kM * 128;  // 64 columns
  static constexpr int kStageBytes = 2 * kHalfBytes;
  static constexpr int kSharedBytes = kTableBytes + kMapBytes + kStages * kStageBytes;
};

// One 16-byte granule a thread: the pairs that lanes t = 0..3 hold of one half of a k16 step.
template <typename T>
__global__ void __launch_bounds__(256) arrange_x_kernel(const T* x, int m, int columns, int tile_m, uint4* arranged,
                                                        int granules) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= granules) return;
  const int q = i % 8, row = i / 8 % tile_m, half = i / 8 / tile_m % 2, piece = i / 16 / tile_m;
  const int within = 4 * (4 * half + q / 2) + q % 2 * 2;
  uint32_t pairs[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int column = piece * kPiece + 32 * t + within;
    const bool inside = row < m && column < columns;
    pairs[t] = inside ? __ldg(reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(row) * columns + column)) : 0;
  }
  arranged[i - q + (q ^ (row % 8))] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

#if QSHARDED_HAS_WGMMA
// Has these in registers by here: the compiler would else decode between one wgmma and the next, and wait for each.
__device__ inline void pin(uint32_t (&operand)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(operand[i / 4][i % 4])::"memory");
}

// K-major, 128-byte swizzle: groups of 8 rows lie 1,024 bytes apart.
__device__ inline uint64_t matrix_at(const void* shared) {
  return (shared_address(shared) & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}
#endif

template <typename Shape, typename T>
__device__ inline void write_sums(const LinearArguments<T>& a, const float (&sums)[Shape::kInstructionM / 2], int subtile,
                                  int instruction, int tile, bool split) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile_row = static_cast<int64_t>(tile) * Shape::kRows;
  const int64_t slot = a.partition.slot(tile, blockIdx.x);
  const int m0 = instruction * Shape::kInstructionM + lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = (warp / 4 * Shape::kSubtiles + subtile) * 64 + warp % 4 * 16 + lane / 4 + h * 8;
    if (tile_row + row >= a.w.rows) continue;
    const float bias = a.bias && !split ? static_cast<float>(a.bias[tile_row + row]) : 0;
    float* partial = a.partials + slot * (Shape::kM * Shape::kRows) + row;
    T* y = a.y + tile_row + row;
#pragma unroll
    for (int i = 0; i < Shape::kInstructionM / 4; ++i) {
      const int m = m0 + i / 2 * 8 + i % 2;
      const float sum = sums[i / 2 * 4 + h * 2 + i % 2];
      if (m >= a.m) continue;
      if (split) {
        partial[m * Shape::kRows] = sum;
      } else {
        y[m * a.w.rows] = static_cast<T>(sum + bias);
      }
    }
  }
}

template <typename Shape, typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_wgmma_kernel(const LinearArguments<T> a, const uint8_t* arranged_x) {
#if QSHARDED_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[Shape::kStages];
  __shared__ int released[Shape::kStages];  // by so many warps
  uint8_t* const table = shared;
  float* const map = reinterpret_cast<float*>(shared + kTableBytes);
  uint8_t* const stages = shared + kTableBytes + kMapBytes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int chunks = a.partition.chunks;
  const int begin = a.partition.begin(blockIdx.x), end = a.partition.begin(blockIdx.x + 1);
  int tile = begin / chunks, piece = begin % chunks;

  asm volatile("griddepcontrol.launch_dependents;");
  const auto load = [&](Strip& strip, int i, int tile, int piece, bool inside) {
    const int first_row = (warp / 4 * Shape::kSubtiles + i) * 64 + warp % 4 * 16;
    const TileRows rows(a.w, static_cast<int64_t>(tile) * Shape::kRows);
    const int block = piece * kPieceBlocks + own_block();
    load_codes(strip, a.w, rows, first_row, block, inside);
    load_absmax<kDoubleQuant>(strip, a.w, rows, first_row, block, inside);
  };
  Strip strips[Shape::kSubtiles];
#pragma unroll
  for (int i = 0; i < Shape::kSubtiles; ++i) {
    strips[i] = empty_strip();
    load(strips[i], i, tile, piece, true);
  }
  const auto copy_piece = [&](int unit, int stage) {
    copy_bulk(stages + stage * Shape::kStageBytes, arranged_x + static_cast<int64_t>(unit % chunks) * Shape::kStageBytes,
              Shape::kStageBytes, full + stage);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      init_barrier(full + i);
      released[i] = 0;
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // for arranged_x
    asm volatile("fence.proxy.async;" ::: "memory");
    for (int i = 0; i < Shape::kStages && begin + i < end; ++i) copy_piece(begin + i, i);
  }
  fill_table<Shape::kThreads>(table, a.w.levels);
  float offset = 0;
  if constexpr (kDoubleQuant) offset = fill_map<Shape::kThreads>(map, a.w);
  __syncthreads();

  // The last warp to be done with a unit's piece of x has another brought in its place.
  const auto release = [&](int unit) {
    if (lane != 0) return;
    const int stage = (unit - begin) % Shape::kStages, next = unit + Shape::kStages;
    __threadfence_block();
    if (atomicAdd_block(released + stage, 1) % Shape::kWarps != Shape::kWarps - 1 || next >= end) return;
    copy_piece(next, stage);
  };
  const uint32_t copy = table_copy();
  int stage = 0, parity = 0;
  for (int unit = begin; unit < end;) {
    const int tile_end = min(end, (tile + 1) * chunks), tile_begin = unit;
    float sums[Shape::kSubtiles][Shape::kInstructions][Shape::kInstructionM / 2] = {};
    uint32_t operand[2][4][4];
    for (; unit < tile_end; ++unit) {
      const bool wraps = piece + 1 == chunks;
      const int next_tile = wraps ? tile + 1 : tile, next_piece = wraps ? 0 : piece + 1;
      const bool inside = piece * kPieceBlocks + own_block() < a.w.blocks_per_row;
      wait_for(full + stage, parity);
#pragma unroll
      for (int i = 0; i < Shape::kSubtiles; ++i) {
        const float absmax = decode_absmax<kDoubleQuant>(strips[i].absmax, map, offset, inside);
        const float upper_absmax = __shfl_sync(~0u, absmax, lane & ~1);
        const float lower_absmax = __shfl_sync(~0u, absmax, lane | 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // the multiplications that read this operand two halves ago are done
          if (i == 0 && half == 0) {
            // the compiler would serialize wgmma that are under way at release's branches
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (unit > tile_begin) release(unit - 1);
          } else {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          }
          const uint4 &u = strips[i].codes.upper, &l = strips[i].codes.lower;
          uint32_t(&now)[4][4] = operand[half];
          const uint32_t upper[2] = {half ? u.z : u.x, half ? u.w : u.y};
          const uint32_t lower[2] = {half ? l.z : l.x, half ? l.w : l.y};
#pragma unroll
          for (int word = 0; word < 2; ++word) {
            decode_step<T, 0>(upper[word], lower[word], table, copy, upper_absmax, lower_absmax, now[2 * word]);
            decode_step<T, 1>(upper[word], lower[word], table, copy, upper_absmax, lower_absmax, now[2 * word + 1]);
          }
          if (half == 1) load(strips[i], i, next_tile, next_piece, unit + 1 < end);
          pin(now);
          const uint64_t b = matrix_at(stages + stage * Shape::kStageBytes + half * Shape::kHalfBytes);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int step = 0; step < 4; ++step) {
#pragma unroll
            for (int j = 0; j < Shape::kInstructions; ++j) {
              wgmma<T>(sums[i][j], now[step], b + step * 2 + j * (Shape::kInstructionM * 128 / 16));
            }
          }
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
      }
      if (++stage == Shape::kStages) stage = 0, parity ^= 1;
      piece = next_piece;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(unit - 1);
    const bool split = tile * chunks < begin || (tile + 1) * chunks > end;
#pragma unroll
    for (int i = 0; i < Shape::kSubtiles; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kInstructions; ++j) write_sums<Shape>(a, sums[i][j], i, j, tile, split);
    }
    ++tile;
  }
#endif
}

template <typename Shape, typename T>
cudaError_t launch_wgmma(const LinearArguments<T>& a, uint8_t* arranged_x, cudaStream_t stream) {
  const auto kernel = a.w.absmax_scales ? linear_wgmma_kernel<Shape, T, true> : linear_wgmma_kernel<Shape, T, false>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int granules = a.partition.chunks * Shape::kStageBytes / 16;
  arrange_x_kernel<T><<<ceil_div(granules, 256), 256, 0, stream>>>(
      a.x, a.m, a.w.blocks_per_row * kBlock, Shape::kM, reinterpret_cast<uint4*>(arranged_x), granules);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = a.partition.blocks;
  config.blockDim = Shape::kThreads;
  config.dynamicSmemBytes = Shape::kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, a, static_cast<const uint8_t*>(arranged_x));
  if (error != cudaSuccess || a.partition.slots() == 0) return error;
  return launch_sum(a, Shape::kRows, Shape::kM, stream);
}

}  // namespace qsharded
