// y = x W^T for few rows of x: W by way of registers into mma.m16n8k16, as A; x in shared memory, as B.
//
// Axes: rows = rows of W (columns of y), columns = columns of W; m = rows of x. A thread block walks its stretch of
// (tile, chunk) units. kRowWarps x kColumnWarps warps share a unit; each has kSubtiles x 16 rows and kPieces pieces of
// 128 columns of it, so x is read from shared memory once a piece and then stays in registers. Codes come a piece or more
// ahead: to registers, or by bulk copies to a ring of the warp's own.
#pragma once

#include "bulk_copy.cuh"
#include "linear_partition.cuh"
#include "linear_weight.cuh"

namespace qsharded {

template <typename T>
struct LinearArguments {
  PackedWeight w;
  const T* x;
  int m;
  T* y;
  const T* bias;      // or null
  float* partials;    // the workspace
  Partition partition;
};

__device__ inline void copy_async(void* shared, const void* global, bool inside) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(inside ? 16 : 0));
}

__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int kPieces = 2;  // that a warp takes of a chunk: fewer barriers than with one

template <int kRowWarps_, int kColumnWarps_, int kSubtiles_, int kMTiles_, int kSlots_ = 0>
struct MmaShape {
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kSubtiles = kSubtiles_;
  static constexpr int kMTiles = kMTiles_;
  static constexpr int kSlots = kSlots_;  // of a warp's ring of pieces, filled by bulk copies; 0: codes go to registers
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kRowWarps * kSubtiles * 16;
  static constexpr int kColumns = kColumnWarps * kPieces * kPiece;
  static constexpr int kM = kMTiles * 8;
  static constexpr int kSums = kSubtiles * kMTiles * 4;  // that a lane holds
  static constexpr int kStageBytes = kM * kColumns * 2;
  static constexpr int kSlotBytes = kSubtiles * 16 * kPiece / 2;
  static constexpr int kSumBytes = kColumnWarps > 1 ? kWarps * kSums * kWarp * 4 : 0;
  static constexpr int kSharedBytes = kTableBytes + kMapBytes + kWarps * kSlots * kSlotBytes + 2 * kStageBytes + kSumBytes;
};

// Where a 16-byte granule of x lies: the four lanes that read together find consecutive granules, and odd rows the
// other half of the banks.
__device__ inline int granule_at(int m, int granule) {
  const int in_piece = granule % 16;
  return granule - in_piece + ((in_piece % 4 * 4 + in_piece / 4) ^ (m % 2 * 4));
}

template <typename Shape, typename T>
__device__ inline void stage_x(uint8_t* stage, const LinearArguments<T>& a, int m0, int chunk, bool inside) {
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

template <typename Shape, typename T>
__device__ void write_tile(const LinearArguments<T>& a, float (&sums)[Shape::kSums], float* shared, int tile, int m0) {
  constexpr int kColumnWarps = Shape::kColumnWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row_warp = warp / kColumnWarps, column_warp = warp % kColumnWarps;
  const int first_unit = tile * a.partition.chunks;
  const bool split = first_unit < a.partition.begin(blockIdx.x) ||
                     first_unit + a.partition.chunks > a.partition.begin(blockIdx.x + 1);
  const int64_t tile_row = static_cast<int64_t>(tile) * Shape::kRows;
  float* partial = a.partials + (static_cast<int64_t>(blockIdx.y) * a.partition.slots() +
                                 a.partition.slot(tile, blockIdx.x)) * (Shape::kM * Shape::kRows);
  const auto write = [&](int i, float sum) {
    const int subtile = i / (Shape::kMTiles * 4), m_tile = i / 4 % Shape::kMTiles;
    const int row = (row_warp * Shape::kSubtiles + subtile) * 16 + lane / 4 + (i % 4) / 2 * 8;
    const int m = m_tile * 8 + lane % 4 * 2 + i % 2;
    if (m0 + m >= a.m || tile_row + row >= a.w.rows) return;
    if (split) {
      partial[m * Shape::kRows + row] = sum;
    } else {
      if (a.bias) sum += static_cast<float>(a.bias[tile_row + row]);
      a.y[(m0 + m) * a.w.rows + tile_row + row] = static_cast<T>(sum);
    }
  };
  if constexpr (kColumnWarps == 1) {
#pragma unroll
    for (int i = 0; i < Shape::kSums; ++i) write(i, sums[i]);
  } else {
    float* own = shared + row_warp * kColumnWarps * Shape::kSums * kWarp + lane;
#pragma unroll
    for (int i = 0; i < Shape::kSums; ++i) own[(column_warp * Shape::kSums + i) * kWarp] = sums[i];
    __syncthreads();
    for (int i = column_warp; i < Shape::kSums; i += kColumnWarps) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kColumnWarps; ++j) sum += own[(j * Shape::kSums + i) * kWarp];
      write(i, sum);
    }
    // the next tile's sums are written after another barrier
  }
}

template <typename Shape, typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_mma_kernel(const LinearArguments<T> a, const __grid_constant__ CUtensorMap codes) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const table = shared;
  float* const map = reinterpret_cast<float*>(shared + kTableBytes);
  uint8_t* const rings = shared + kTableBytes + kMapBytes;
  uint8_t* const stages = rings + Shape::kWarps * Shape::kSlots * Shape::kSlotBytes;
  float* const exchange = reinterpret_cast<float*>(stages + 2 * Shape::kStageBytes);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column_warp = warp % Shape::kColumnWarps;
  const int first_row = warp / Shape::kColumnWarps * Shape::kSubtiles * 16;
  const int m0 = blockIdx.y * Shape::kM;
  const int begin = a.partition.begin(blockIdx.x), end = a.partition.begin(blockIdx.x + 1);
  int tile = begin / a.partition.chunks, chunk = begin % a.partition.chunks;
  constexpr bool kBulk = Shape::kSlots > 0;

#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const auto block_of = [&](int chunk, int piece) {
    return ((chunk * Shape::kColumnWarps + column_warp) * kPieces + piece) * kPieceBlocks + own_block();
  };
  const auto load = [&](Strip& strip, int i, int tile, int chunk, int piece, bool inside) {
    const TileRows rows(a.w, static_cast<int64_t>(tile) * Shape::kRows);
    if constexpr (!kBulk) load_codes(strip, a.w, rows, first_row + i * 16, block_of(chunk, piece), inside);
    load_absmax<kDoubleQuant>(strip, a.w, rows, first_row + i * 16, block_of(chunk, piece), inside);
  };

#if __CUDA_ARCH__ >= 900
  __shared__ uint64_t full[kBulk ? Shape::kWarps * Shape::kSlots : 1];
  uint8_t* const ring = rings + warp * Shape::kSlots * Shape::kSlotBytes;
  uint64_t* const own_full = full + warp * Shape::kSlots;
  const int pieces = (end - begin) * kPieces;
  // Piece number `n` of this warp goes to slot n % kSlots.
  const auto copy_piece = [&](int n) {
    if (lane != 0 || n >= pieces) return;
    const int slot = n % (kBulk ? Shape::kSlots : 1);
    const int unit = begin + n / kPieces, tile = unit / a.partition.chunks, chunk = unit % a.partition.chunks;
    const int column = ((chunk * Shape::kColumnWarps + column_warp) * kPieces + n % kPieces) * (kPiece / 2);
    copy_box(ring + slot * Shape::kSlotBytes, codes, column, tile * Shape::kRows + first_row, Shape::kSlotBytes,
             own_full + slot);
  };
  if constexpr (kBulk) {
    if (lane == 0) {
      for (int i = 0; i < Shape::kSlots; ++i) init_barrier(own_full + i);
      publish_barriers();
    }
    for (int i = 0; i < Shape::kSlots; ++i) copy_piece(i);
    __syncwarp();
  }
  int slot = 0, parity = 0, number = 0;
#endif
  Strip strips[Shape::kSubtiles];
#pragma unroll
  for (int i = 0; i < Shape::kSubtiles; ++i) {
    strips[i] = empty_strip();
    load(strips[i], i, tile, chunk, 0, begin < end);
  }
  stage_x<Shape>(stages, a, m0, chunk, begin < end);
  fill_table<Shape::kThreads>(table, a.w.levels);
  float offset = 0;
  if constexpr (kDoubleQuant) offset = fill_map<Shape::kThreads>(map, a.w);
  const uint32_t copy = table_copy();

  float sums[Shape::kSums] = {};
  for (int unit = begin; unit < end; ++unit) {
    const bool last_of_tile = chunk + 1 == a.partition.chunks, more = unit + 1 < end;
    const int next_tile = last_of_tile ? tile + 1 : tile, next_chunk = last_of_tile ? 0 : chunk + 1;
    const int stage = (unit - begin) & 1;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    stage_x<Shape>(stages + (stage ^ 1) * Shape::kStageBytes, a, m0, next_chunk, more);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      uint4 b[Shape::kMTiles][4];
#pragma unroll
      for (int j = 0; j < Shape::kMTiles; ++j) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const int m = j * 8 + lane / 4;
          const int granule = (column_warp * kPieces + piece) * 16 + ((word * 4 + lane % 4) ^ (m % 2 * 4));
          b[j][word] = *reinterpret_cast<const uint4*>(stages + stage * Shape::kStageBytes +
                                                       (m * (Shape::kColumns / 8) + granule) * 16);
        }
      }
      const bool inside = block_of(chunk, piece) < a.w.blocks_per_row;
#if __CUDA_ARCH__ >= 900
      if constexpr (kBulk) {
        wait_for(own_full + slot, parity);
#pragma unroll
        for (int i = 0; i < Shape::kSubtiles; ++i) {
          const auto* rows = reinterpret_cast<const uint4*>(ring + slot * Shape::kSlotBytes) + i * 64 + lane;
          strips[i].codes = {rows[0], rows[32]};
        }
        __syncwarp();  // every lane has its codes
        copy_piece(number + Shape::kSlots);
        ++number;
        if (++slot == Shape::kSlots) slot = 0, parity ^= 1;
      }
#endif
#pragma unroll
      for (int i = 0; i < Shape::kSubtiles; ++i) {
        const float absmax = decode_absmax<kDoubleQuant>(strips[i].absmax, map, offset, inside);
        const float upper_absmax = __shfl_sync(~0u, absmax, lane & ~1);
        const float lower_absmax = __shfl_sync(~0u, absmax, lane | 1);
        const uint4 &u = strips[i].codes.upper, &l = strips[i].codes.lower;
        auto* sum = reinterpret_cast<float(*)[4]>(sums + i * Shape::kMTiles * 4);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const uint32_t upper = word == 0 ? u.x : word == 1 ? u.y : word == 2 ? u.z : u.w;
          const uint32_t lower = word == 0 ? l.x : word == 1 ? l.y : word == 2 ? l.z : l.w;
          uint32_t operand[4];
          decode_step<T, 0>(upper, lower, table, copy, upper_absmax, lower_absmax, operand);
#pragma unroll
          for (int j = 0; j < Shape::kMTiles; ++j) multiply(sum[j], operand, b[j][word].x, b[j][word].y, T{});
          decode_step<T, 1>(upper, lower, table, copy, upper_absmax, lower_absmax, operand);
#pragma unroll
          for (int j = 0; j < Shape::kMTiles; ++j) multiply(sum[j], operand, b[j][word].z, b[j][word].w, T{});
        }
        // its registers are free: what comes next in this place, to be used when the other subtiles are done
        if (piece + 1 < kPieces) {
          load(strips[i], i, tile, chunk, piece + 1, true);
        } else {
          load(strips[i], i, next_tile, next_chunk, 0, more);
        }
      }
    }
    if (last_of_tile || !more) {
      write_tile<Shape>(a, sums, exchange, tile, m0);
#pragma unroll
      for (int i = 0; i < Shape::kSums; ++i) sums[i] = 0;
    }
    tile = next_tile;
    chunk = next_chunk;
  }
}

// Sums, in the order of the thread blocks, the partial sums of the tiles that several of them share.
template <typename T>
__global__ void __launch_bounds__(256) sum_partials_kernel(const LinearArguments<T> a, int tile_rows, int tile_m) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int m = blockIdx.y;
  const int tile = static_cast<int>(row / tile_rows);
  const bool inside = row < a.w.rows;
  const int first = inside ? a.partition.first_block(tile) : 0, last = inside ? a.partition.last_block(tile) : 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (first == last) return;
  const int64_t slot = static_cast<int64_t>(m / tile_m) * a.partition.slots() + a.partition.slot(tile, first);
  const float* partial = a.partials + (slot * tile_m + m % tile_m) * tile_rows + row % tile_rows;
  const int64_t stride = static_cast<int64_t>(tile_m) * tile_rows;
  float sum = 0;
  for (int i = 0; i <= last - first; ++i) sum += __ldcg(partial + i * stride);
  if (a.bias) sum += static_cast<float>(a.bias[row]);
  a.y[m * a.w.rows + row] = static_cast<T>(sum);
}

template <typename T>
cudaError_t launch_sum(const LinearArguments<T>& a, int tile_rows, int tile_m, cudaStream_t stream) {
  int device, major;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute overlap = {};  // its launch with the end of the first kernel; it waits for the sums itself
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ceil_div(a.w.rows, 256), a.m);
  config.blockDim = 256;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, sum_partials_kernel<T>, a, tile_rows, tile_m);
}

template <typename Shape, typename T>
cudaError_t launch_mma(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = a.w.absmax_scales ? linear_mma_kernel<Shape, T, true> : linear_mma_kernel<Shape, T, false>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(a.partition.blocks, ceil_div(a.m, Shape::kM));
  CUtensorMap codes = {};
  if (Shape::kSlots > 0) {
    error = describe_bytes(&codes, a.w.codes, a.w.rows, a.w.blocks_per_row * (kBlock / 2), Shape::kSubtiles * 16,
                           kPiece / 2);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(a, codes);
  error = cudaGetLastError();
  if (error != cudaSuccess || a.partition.slots() == 0) return error;
  return launch_sum(a, Shape::kRows, Shape::kM, stream);
}

}  // namespace qsharded
