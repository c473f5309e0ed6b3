// y = x W^T for more rows of x on Hopper: W by way of registers into wgmma, as A; x in shared memory, as B.
//
// x first goes into the workspace as shared memory wants it: slab after slab of 64 columns, those that the lanes hold of
// two words of a piece, in their order, rows in wgmma's 128-byte swizzle. Bulk copies then bring some slabs at a time to a
// ring of slots. The warpgroups have 64 rows of W each, and while the tensor cores work on one slab's columns the next
// slab's are decoded.
#pragma once

#include "bulk_copy.cuh"
#include "linear_mma.cuh"
#include "wgmma.cuh"

// wgmma exists in code built for sm_90a alone
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QSHARDED_HAS_WGMMA 1
#endif

namespace qsharded {

constexpr int kSlabs = kWords / 2;  // of a piece

template <int kWarpgroups_, int kM_, int kSlots_, int kSlotSlabs_>
struct WgmmaShape {
  static constexpr int kWarpgroups = kWarpgroups_, kM = kM_, kSlots = kSlots_;
  static constexpr int kSlotSlabs = kSlotSlabs_;  // kSlabs or a part of it
  static_assert((kSlots & (kSlots - 1)) == 0 && kSlots > 2);
  static constexpr int kWarps = kWarpgroups * 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarpgroups * 64;
  static constexpr int kInstructionM = kM < 128 ? kM : 128;
  static constexpr int kInstructions = kM / kInstructionM;
  static constexpr int kSums = kM / 2;  // that a lane holds
  static constexpr int kSlabBytes = kM * 128;
  static constexpr int kChunkBytes = kSlabs * kSlabBytes;
  static constexpr int kSlotBytes = kSlotSlabs * kSlabBytes;
  static constexpr int kSharedBytes = LevelTable::kBytes + kSlots * kSlotBytes + kMapBytes;

  static Partition partition(const LinearSizes& s) {
    return Partition::of(ceil_div(s.rows, kRows), ceil_div(s.blocks_per_row, kPieceBlocks), s.processors);
  }
};

// The workspace's parts.
struct WgmmaWorkspace {
  float* partials;  // sums for each thread of each block
  int* flags;       // for each block
  uint8_t* arranged_x;

  template <typename Shape>
  static WgmmaWorkspace of(uint8_t* workspace, const Partition& partition) {
    const int64_t flags = partials_bytes<Shape>(partition), arranged = flags + flags_bytes(partition);
    return {reinterpret_cast<float*>(workspace), reinterpret_cast<int*>(workspace + flags), workspace + arranged};
  }

  template <typename Shape>
  static int64_t bytes(const Partition& partition) {
    const int64_t arranged = static_cast<int64_t>(partition.chunks) * Shape::kChunkBytes;
    return partials_bytes<Shape>(partition) + flags_bytes(partition) + arranged;
  }

 private:
  static constexpr int64_t kAlignment = 128;  // of bulk copies, and more

  static int64_t flags_bytes(const Partition& partition) {
    return (partition.blocks * sizeof(int) + kAlignment - 1) / kAlignment * kAlignment;
  }

  template <typename Shape>
  static int64_t partials_bytes(const Partition& partition) {
    return static_cast<int64_t>(partition.blocks) * Shape::kSums * Shape::kThreads * sizeof(float);
  }
};

// One 16-byte granule a thread: the pairs that lanes t = 0..3 hold of one half of a k16 step. Flags are lowered besides.
template <typename T>
__global__ void __launch_bounds__(256)
    arrange_x_kernel(const T* x, int m, int columns, int tile_m, WgmmaWorkspace workspace, int blocks, int granules) {
  let_next_kernel_start();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < blocks) workspace.flags[i] = 0;
  if (i >= granules) return;
  const int q = i % 8, row = i / 8 % tile_m, slab = i / 8 / tile_m;
  const int within = slab % kSlabs * 16 + q * 2;
  uint32_t pairs[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int column = slab / kSlabs * kPiece + kBlock * t + within;
    const bool inside = row < m && column < columns;
    pairs[t] = inside ? __ldg(reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(row) * columns + column)) : 0;
  }
  auto* const arranged = reinterpret_cast<uint4*>(workspace.arranged_x);
  arranged[i - q + (q ^ (row % 8))] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

#if QSHARDED_HAS_WGMMA
// Has these in registers by here: the compiler would else decode between one wgmma and the next, and wait for each.
__device__ inline void pin(uint32_t (&operand)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(operand[i / 4][i % 4])::"memory");
}

// K-major, 128-byte swizzle: groups of 8 rows lie 1,024 bytes apart.
__device__ inline uint64_t matrix_at(uint32_t address) {
  return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}
#endif

template <typename Shape, typename T>
__device__ inline void write_sums(const LinearArguments<T>& a, const float (&sums)[Shape::kSums], int tile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = static_cast<int64_t>(tile) * Shape::kRows + warp * 16 + lane / 4 + h * 8;
    if (row >= a.w.rows) continue;
    const float bias = a.bias ? static_cast<float>(a.bias[row]) : 0;
#pragma unroll
    for (int i = 0; i < Shape::kSums / 2; ++i) {
      const int m = lane % 4 * 2 + i / 2 * 8 + i % 2;
      if (m < a.m) a.y[m * a.w.rows + row] = static_cast<T>(sums[i / 2 * 4 + h * 2 + i % 2] + bias);
    }
  }
}

// A block that begins within a tile leaves its part of the sums to the block that began the tile. Every block has a place
// for them, and a flag.
template <typename Shape>
__device__ inline void leave_sums(int block, const WgmmaWorkspace& workspace, const float (&sums)[Shape::kSums]) {
  float* own = workspace.partials + static_cast<int64_t>(block) * Shape::kSums * Shape::kThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < Shape::kSums; ++i) own[i * Shape::kThreads] = sums[i];
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(workspace.flags + block) : "memory");
}

template <typename Shape>
__device__ inline void add_sums_of(int block, const WgmmaWorkspace& workspace, float (&sums)[Shape::kSums]) {
  if (threadIdx.x == 0) {
    const int* const flag = workspace.flags + block;
    int raised = 0;
    while (!raised) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  }
  __syncthreads();
  const float* theirs = workspace.partials + static_cast<int64_t>(block) * Shape::kSums * Shape::kThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < Shape::kSums; ++i) sums[i] += __ldcg(theirs + i * Shape::kThreads);
}

template <typename Shape, typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ LinearArguments<T> a, const __grid_constant__ Partition partition,
                        const __grid_constant__ WgmmaWorkspace workspace) {
#if QSHARDED_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[Shape::kSlots];
  __shared__ uint64_t empty[Shape::kSlots];
  uint8_t* const slots = shared + LevelTable::kBytes;
  float* const map = reinterpret_cast<float*>(slots + Shape::kSlots * Shape::kSlotBytes);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int own_row = warp * 16 + lane / 4;
  const int chunks = partition.chunks;
  // From the last to the first: a block waits for blocks of higher numbers, which were started before it, so that waiting
  // ends whatever else the device runs.
  const int own_block = gridDim.x - 1 - blockIdx.x;
  const int begin = partition.begin(own_block), end = partition.begin(own_block + 1);
  constexpr unsigned kLoads = kSlabs / Shape::kSlotSlabs;  // of a piece
  const unsigned all_loads = (end - begin) * kLoads;
  const int piece_of_first = begin % chunks;
  int tile = begin / chunks, piece = piece_of_first;

  Block upper = {}, lower = {};
  TileRows<kDoubleQuant> rows(a.w, static_cast<int64_t>(tile) * Shape::kRows, own_row);
  const auto load = [&](auto half, int piece, bool more) {
    const int block = piece * kPieceBlocks + lane % 4;
    const bool inside = more && block < a.w.blocks_per_row;
    upper.template load<kDoubleQuant, half.value>(a.w, rows, rows.upper, block, inside);
    lower.template load<kDoubleQuant, half.value>(a.w, rows, rows.lower, block, inside);
  };
  const AbsmaxMap<kDoubleQuant> absmax_map(a.w);
  load(First{}, piece, true);
  load(Second{}, piece, true);
  // The block's load number `load` of x, into its slot; by one thread.
  const auto copy_slabs = [&](unsigned load) {
    const unsigned of_row = (piece_of_first * kLoads + load) % (chunks * kLoads), slot = load % Shape::kSlots;
    copy_bulk(slots + slot * Shape::kSlotBytes, workspace.arranged_x + static_cast<int64_t>(of_row) * Shape::kSlotBytes,
              Shape::kSlotBytes, full + slot);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kSlots; ++i) init_barrier(full + i, 1), init_barrier(empty + i, Shape::kWarps);
    publish_barriers();
    wait_for_kernel_before();  // for arranged_x and the flags, which no other thread uses
    asm volatile("fence.proxy.async;" ::: "memory");
    for (unsigned i = 0; i < Shape::kSlots && i < all_loads; ++i) copy_slabs(i);
  }
  LevelTable::fill<Shape::kThreads>(shared, a.w.levels);
  absmax_map.store(map);
  __syncthreads();

  const LevelTable table(shared);
  const auto parity_of = [](unsigned load) { return load / Shape::kSlots % 2; };
  // This warp has read what a load brought. The warps in turn see to it that another takes the place of the load before,
  // which the others have read by now.
  const auto release = [&](unsigned load) {
    arrive(empty + load % Shape::kSlots, lane == 0);
    const unsigned before = load - 1, next = before + Shape::kSlots;
    if (before % Shape::kWarps != warp || load == 0 || next >= all_loads) return;
    wait_for(empty + before % Shape::kSlots, parity_of(before));
    if (lane == 0) copy_slabs(next);
  };
  unsigned number = 0;  // of the load in use
  for (int unit = begin; unit < end;) {
    const int tile_end = min(end, (tile + 1) * chunks);
    float sums[Shape::kSums] = {};
    uint32_t operand[2][4][4];
    for (bool first = true; unit < tile_end; ++unit, first = false) {
      const bool wraps = piece + 1 == chunks;
      const int next_piece = wraps ? 0 : piece + 1;
      const bool inside = piece * kPieceBlocks + lane % 4 < a.w.blocks_per_row;
      const float upper_absmax = upper.template absmax<kDoubleQuant>(map, absmax_map.offset, inside);
      const float lower_absmax = lower.template absmax<kDoubleQuant>(map, absmax_map.offset, inside);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        uint32_t(&now)[4][4] = operand[slab % 2];
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          uint32_t u[4], l[4];
          table.template decode<T>(upper.word(2 * slab + word), upper_absmax, u);
          table.template decode<T>(lower.word(2 * slab + word), lower_absmax, l);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            now[2 * word + h][0] = u[2 * h], now[2 * word + h][1] = l[2 * h];
            now[2 * word + h][2] = u[2 * h + 1], now[2 * word + h][3] = l[2 * h + 1];
          }
        }
        if (slab == kSlabs / 2 - 1) {
          if (wraps) rows = TileRows<kDoubleQuant>(a.w, (tile + 1) * int64_t{Shape::kRows}, own_row);
          load(First{}, next_piece, unit + 1 < end);
        }
        if (slab == kSlabs - 1) load(Second{}, next_piece, unit + 1 < end);
        if (slab % Shape::kSlotSlabs == 0) wait_for(full + number % Shape::kSlots, parity_of(number));
        pin(now);
        const uint64_t b = matrix_at(shared_address(slots) + number % Shape::kSlots * Shape::kSlotBytes +
                                     slab % Shape::kSlotSlabs * Shape::kSlabBytes);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int j = 0; j < Shape::kInstructions; ++j) {
            wgmma<T>(*reinterpret_cast<float(*)[Shape::kInstructionM / 2]>(sums + j * Shape::kInstructionM / 2), now[step],
                     b + step * 2 + j * (Shape::kInstructionM * 128 / 16));
          }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // the slab before is done with, and so is its operand
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (slab % Shape::kSlotSlabs == 0 && (slab > 0 || !first)) release(number - 1);
        if (slab % Shape::kSlotSlabs == Shape::kSlotSlabs - 1) ++number;
      }
      piece = next_piece;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(number - 1);
    if (tile * chunks < begin) {
      leave_sums<Shape>(own_block, workspace, sums);
    } else {
      for (int block = own_block + 1; partition.begin(block) < (tile + 1) * chunks; ++block) {
        add_sums_of<Shape>(block, workspace, sums);
      }
      write_sums<Shape>(a, sums, tile);
    }
    ++tile;
  }
#endif
}

template <typename Shape>
int64_t wgmma_workspace(const LinearSizes& s) {
  return WgmmaWorkspace::bytes<Shape>(Shape::partition(s));
}

// At most kM rows of x.
template <typename Shape, typename T>
cudaError_t launch_wgmma(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = a.w.absmax_scales ? linear_wgmma_kernel<Shape, T, true> : linear_wgmma_kernel<Shape, T, false>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const Partition partition = Shape::partition(a.sizes());
  const WgmmaWorkspace workspace = WgmmaWorkspace::of<Shape>(a.workspace, partition);
  const int granules = partition.chunks * Shape::kChunkBytes / 16;
  arrange_x_kernel<T><<<ceil_div(granules, 256), 256, 0, stream>>>(a.x, a.m, a.w.blocks_per_row * kBlock, Shape::kM,
                                                                   workspace, partition.blocks, granules);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return launch_overlapping(kernel, partition.blocks, Shape::kThreads, Shape::kSharedBytes, stream, a, partition,
                            workspace);
}

}  // namespace qsharded
