// y = x W^T for more rows of x on Hopper: W by way of registers into wgmma, as A; x in shared memory, as B.
//
// x first goes into the workspace as shared memory wants it: slab after slab of 64 columns, those that the lanes hold of
// two words of a piece, in their order, rows in wgmma's 128-byte swizzle. One warp orders copies of pieces of W to a ring of
// slots (linear_ring.cuh), another copies of some slabs of x at a time to a second ring. The warpgroups have 64 rows of W
// each, and while the tensor cores work on one slab's columns the next slab's are decoded.
#pragma once

#include "linear_arguments.cuh"
#include "linear_block_levels.cuh"
#include "linear_partition.cuh"
#include "linear_ring.cuh"
#include "wgmma.cuh"

// wgmma exists in code built for sm_90a alone
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QSHARDED_HAS_WGMMA 1
#endif

namespace qsharded {

constexpr int kSlabs = kWords / 2;  // of a piece

// kPermuted: of the eight words of a block, in the upper of a lane's two rows, as is_permuted has it.
template <int kWarpgroups_, int kM_, int kXSlots_, int kSlotSlabs_, int kPermuted_>
struct WgmmaShape {
  static constexpr int kWarpgroups = kWarpgroups_, kM = kM_, kXSlots = kXSlots_, kPermuted = kPermuted_;
  static constexpr int kSlotSlabs = kSlotSlabs_;  // kSlabs or a part of it
  static_assert((kXSlots & (kXSlots - 1)) == 0 && kXSlots > 2);
  static constexpr int kWSlots = 3;
  static constexpr int kWarps = kWarpgroups * 4;
  static constexpr int kThreads = kWarps * kWarp;  // that multiply
  static constexpr int kRows = kWarpgroups * 64;
  static constexpr int kInstructionM = kM < 128 ? kM : 128;
  static constexpr int kInstructions = kM / kInstructionM;
  static constexpr int kSums = kM / 2;  // that a lane holds

  // Sums of 256 rows take more registers than are every thread's share: those that order copies, then a warpgroup, for they
  // hand registers over together, give theirs. What they are launched with must suffice, else all wait for ever.
  static constexpr bool kMovesRegisters = kM > 128;
  static constexpr int kAllThreads = kThreads + (kMovesRegisters ? 4 : 2) * kWarp;
  static constexpr int kFewRegisters = 24, kManyRegisters = 240;
  static constexpr int kRegisters = kMovesRegisters ? kThreads * kManyRegisters + 4 * kWarp * kFewRegisters : 0;

  static constexpr int kSlabBytes = kM * 128;
  static constexpr int kChunkBytes = kSlabs * kSlabBytes;
  static constexpr int kXSlotBytes = kSlotSlabs * kSlabBytes;
  static constexpr int kCodeBytes = kRows * kCodeRow, kAbsmaxBytes = kRows * kAbsmaxRow;
  static constexpr int kWSlotBytes = kCodeBytes + kAbsmaxBytes;
  static_assert(kWSlotBytes % kBoxAlignment == 0);

  // of the block's memory
  static constexpr int kXAt = kWSlots * kWSlotBytes, kTableAt = kXAt + kXSlots * kXSlotBytes;
  static constexpr int kMapAt = kTableAt + LevelTable::kBytes, kLevelsAt = kMapAt + kMapBytes;
  static constexpr int kSharedBytes = kLevelsAt + 16 * 4;
  static_assert(kSharedBytes + 1024 <= kMostRingBytes);  // with the barriers

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

// One 16-byte granule a thread: the pairs that lanes t = 0..3 hold of one half of a k16 step, each of its own pair of words
// (own_pair). Flags are lowered besides.
template <typename T>
__global__ void __launch_bounds__(256)
    arrange_x_kernel(const T* x, int m, int columns, int tile_m, WgmmaWorkspace workspace, int blocks, int granules) {
  let_next_kernel_start();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < blocks) workspace.flags[i] = 0;
  if (i >= granules) return;
  const int q = i % 8, row = i / 8 % tile_m, slab = i / 8 / tile_m;
  uint32_t pairs[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int column = slab / kSlabs * kPiece + kBlock * t + (slab % kSlabs ^ t) * 16 + q * 2;
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

// Both rings, as one thread block sees them.
template <typename Shape>
struct WgmmaRings {
  uint8_t* shared;
  uint64_t* w_full;   // barriers: a slot's copies are there
  uint64_t* w_empty;  // all warps have read them
  uint64_t* x_full;
  uint64_t* x_empty;

  __device__ void init() const {
    for (int i = 0; i < Shape::kWSlots; ++i) init_barrier(w_full + i, 1), init_barrier(w_empty + i, Shape::kWarps);
    for (int i = 0; i < Shape::kXSlots; ++i) init_barrier(x_full + i, 1), init_barrier(x_empty + i, Shape::kWarps);
    publish_barriers();
  }

  __device__ uint8_t* w_slot(unsigned slot) const { return shared + slot * Shape::kWSlotBytes; }
  __device__ uint8_t* x_slot(unsigned slot) const { return shared + Shape::kXAt + slot * Shape::kXSlotBytes; }
};

// Order the copies of a thread block's units of W, or loads of x, one after the other; each by one thread.
template <typename Shape, Absmax kAbsmax>
struct WFiller {
  WgmmaRings<Shape> rings;
  int tile, piece;
  RingPlace<Shape::kWSlots> at = {};

  __device__ void copy_next(const WeightMaps& maps, int pieces) {
    wait_for(rings.w_empty + at.slot, at.parity);
    uint8_t* const to = rings.w_slot(at.slot);
    uint64_t* const full = rings.w_full + at.slot;
    expect_bytes(full, weight_bytes<kAbsmax>(Shape::kRows));
    copy_weight<kAbsmax>(to, to + Shape::kCodeBytes, maps, tile * Shape::kRows, piece * kPieceBlocks, full);
    if (++piece == pieces) piece = 0, ++tile;
    at.advance();
  }
};

template <typename Shape>
struct XFiller {
  WgmmaRings<Shape> rings;
  const uint8_t* arranged_x;
  int load;  // of a row of x
  RingPlace<Shape::kXSlots> at = {};

  __device__ void copy_next(int loads) {
    wait_for(rings.x_empty + at.slot, at.parity);
    copy_bulk(rings.x_slot(at.slot), arranged_x + static_cast<int64_t>(load) * Shape::kXSlotBytes, Shape::kXSlotBytes,
              rings.x_full + at.slot);
    if (++load == loads) load = 0;
    at.advance();
  }
};

template <typename Shape>
__device__ inline void sync_multiplying() {
  asm volatile("bar.sync 1, %0;" ::"n"(Shape::kThreads) : "memory");
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

#if QSHARDED_HAS_WGMMA
// A block that begins within a tile leaves its part of the sums to the block that began the tile. Every block has a place
// for them, and a flag.
template <typename Shape>
__device__ inline void leave_sums(int block, const WgmmaWorkspace& workspace, const float (&sums)[Shape::kSums]) {
  float* own = workspace.partials + static_cast<int64_t>(block) * Shape::kSums * Shape::kThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < Shape::kSums; ++i) own[i * Shape::kThreads] = sums[i];
  sync_multiplying<Shape>();
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
  sync_multiplying<Shape>();
  const float* theirs = workspace.partials + static_cast<int64_t>(block) * Shape::kSums * Shape::kThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < Shape::kSums; ++i) sums[i] += __ldcg(theirs + i * Shape::kThreads);
}
#endif

template <typename Shape, typename T, Absmax kAbsmax>
__global__ void __launch_bounds__(Shape::kAllThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ LinearArguments<T> a, const __grid_constant__ Partition partition,
                        const __grid_constant__ WgmmaWorkspace workspace, const __grid_constant__ WeightMaps maps) {
#if QSHARDED_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t w_full[Shape::kWSlots];
  __shared__ uint64_t w_empty[Shape::kWSlots];
  __shared__ uint64_t x_full[Shape::kXSlots];
  __shared__ uint64_t x_empty[Shape::kXSlots];
  const WgmmaRings<Shape> rings = {shared, w_full, w_empty, x_full, x_empty};
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int chunks = partition.chunks;
  // From the last to the first: a block waits for blocks of higher numbers, which were started before it, so that waiting
  // ends whatever else the device runs.
  const int own_block = gridDim.x - 1 - blockIdx.x;
  const int begin = partition.begin(own_block), end = partition.begin(own_block + 1);
  constexpr int kLoads = kSlabs / Shape::kSlotSlabs;  // of a piece

  if (warp >= Shape::kWarps) {
    if constexpr (Shape::kMovesRegisters) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kFewRegisters));
    }
    // W's and x's waiting must not hold each other up: a warp for each
    const bool orders_w = threadIdx.x == Shape::kThreads, orders_x = threadIdx.x == Shape::kThreads + kWarp;
    WFiller<Shape, kAbsmax> w_filler = {rings, begin / chunks, begin % chunks};
    if (orders_w) {
      rings.init();
      w_filler.copy_next(maps, chunks);
    }
    if (orders_x) {
      wait_for_kernel_before();  // for arranged_x and the flags, which no other thread uses
      asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    if (orders_w) {
      for (int unit = begin + 1; unit < end; ++unit) w_filler.copy_next(maps, chunks);
    } else if (orders_x) {
      XFiller<Shape> x_filler = {rings, workspace.arranged_x, begin % chunks * kLoads};
      for (int load = 0; load < (end - begin) * kLoads; ++load) x_filler.copy_next(chunks * kLoads);
    }
    return;
  }

  if constexpr (Shape::kMovesRegisters) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kManyRegisters));
  }
  float* const map = reinterpret_cast<float*>(shared + Shape::kMapAt);
  float* const levels = reinterpret_cast<float*>(shared + Shape::kLevelsAt);
  const int own_row = warp * 16 + lane / 4;
  const unsigned blocks = a.w.blocks_per_row;
  int tile = begin / chunks, next_tile = tile;
  unsigned block = begin % chunks * kPieceBlocks + lane % 4;
  RowsAbsmax<2, kAbsmax> rows;
  const auto begin_tile = [&] { rows.begin(a.w, static_cast<unsigned>(next_tile) * Shape::kRows + own_row); };
  const auto load_absmax = [&](bool more) { rows.load(a.w, block, more && block < blocks); };
  begin_tile();
  const AbsmaxMap<kAbsmax != Absmax::kFloats> absmax_map(a.w);
  load_absmax(true);
  LevelTable::fill<Shape::kThreads>(shared + Shape::kTableAt, a.w.levels);
  absmax_map.store(map);
  if (threadIdx.x < 16) levels[threadIdx.x] = __ldg(a.w.levels + threadIdx.x);
  __syncthreads();

  const LevelTable table(shared + Shape::kTableAt);
  uint2 words[2];  // of a slab, loaded a slab ahead
  unsigned w_slot = 0, w_parity = 0, load = 0;  // of x, in use
  const auto release_x = [&](unsigned load) { arrive(x_empty + load % Shape::kXSlots, lane == 0); };
  for (int unit = begin; unit < end; ++tile) {
    const int tile_end = min(end, (tile + 1) * chunks);
    float sums[Shape::kSums] = {};
    uint32_t operand[2][4][4];
    for (bool first = true; unit < tile_end; ++unit, first = false) {
      wait_for(w_full + w_slot, w_parity);
      const uint8_t* const codes = rings.w_slot(w_slot) + own_row * kCodeRow;
      const uint8_t* const absmax_box = rings.w_slot(w_slot) + Shape::kCodeBytes + own_row * kAbsmaxRow;
      const auto load_words = [&](int slab) {
        const uint32_t at = shared_address(codes) + words_at(own_pair(slab));
        words[0] = load_shared_8(at), words[1] = load_shared_8(at + 8 * kCodeRow);
      };
      float absmax[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        absmax[i] = rows.of_row(i, absmax_box + i * 8 * kAbsmaxRow, block, block < blocks, map, absmax_map.offset);
      }
      block += kPieceBlocks;
      if (block >= chunks * kPieceBlocks) block -= chunks * kPieceBlocks, ++next_tile, begin_tile();
      load_absmax(unit + 1 < end);
      load_words(0);
      const BlockLevels<T> block_levels(reinterpret_cast<const float4*>(levels), absmax[0]);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint2 upper = words[0], lower = words[1];
        if (slab + 1 < kSlabs) load_words(slab + 1);
        uint32_t(&now)[4][4] = operand[slab % 2];
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          uint32_t u[4], l[4];
          if (is_permuted(2 * slab + word, Shape::kPermuted)) {
            block_levels.decode(word == 0 ? upper.x : upper.y, u);
          } else {
            table.template decode<T>(word == 0 ? upper.x : upper.y, absmax[0], u);
          }
          table.template decode<T>(word == 0 ? lower.x : lower.y, absmax[1], l);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            now[2 * word + h][0] = u[2 * h], now[2 * word + h][1] = l[2 * h];
            now[2 * word + h][2] = u[2 * h + 1], now[2 * word + h][3] = l[2 * h + 1];
          }
        }
        if (slab % Shape::kSlotSlabs == 0) wait_for(x_full + load % Shape::kXSlots, load / Shape::kXSlots % 2);
        pin(now);
        const uint64_t b =
            matrix_at(shared_address(rings.x_slot(load % Shape::kXSlots)) + slab % Shape::kSlotSlabs * Shape::kSlabBytes);
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
        if (slab == kSlabs - 1) arrive(w_empty + w_slot, lane == 0);
        // the slab before is done with, and so is its operand
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (slab % Shape::kSlotSlabs == 0 && (slab > 0 || !first)) release_x(load - 1);
        if (slab % Shape::kSlotSlabs == Shape::kSlotSlabs - 1) ++load;
      }
      if (++w_slot == Shape::kWSlots) w_slot = 0, w_parity ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release_x(load - 1);
    if (tile * chunks < begin) {
      leave_sums<Shape>(own_block, workspace, sums);
    } else {
      for (int block = own_block + 1; partition.begin(block) < (tile + 1) * chunks; ++block) {
        add_sums_of<Shape>(block, workspace, sums);
      }
      write_sums<Shape>(a, sums, tile);
    }
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
  const auto kernel = by_absmax(a.w, [](auto absmax) { return linear_wgmma_kernel<Shape, T, absmax.value>; });
  WeightMaps maps;
  cudaError_t error = encode_weight(a.w, Shape::kRows, &maps);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const Partition partition = Shape::partition(a.sizes());
  const WgmmaWorkspace workspace = WgmmaWorkspace::of<Shape>(a.workspace, partition);
  const int granules = partition.chunks * Shape::kChunkBytes / 16;
  arrange_x_kernel<T><<<ceil_div(granules, 256), 256, 0, stream>>>(a.x, a.m, a.w.blocks_per_row * kBlock, Shape::kM,
                                                                   workspace, partition.blocks, granules);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return launch_overlapping(kernel, partition.blocks, Shape::kAllThreads, Shape::kSharedBytes, stream, a, partition,
                            workspace, maps);
}

}  // namespace qsharded
