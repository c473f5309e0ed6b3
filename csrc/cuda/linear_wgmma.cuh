// y = x W^T for more rows of x on Hopper: W by way of registers into wgmma, as A; x in shared memory, as B.
//
//                  k-tile: 256 columns of W, 4 quantization blocks         CTA's shared memory
//                  +----------+----------+----------+----------+           W ring, kWStages stages:
//   consumer       | k-step 0 | k-step 1 | k-step 2 | k-step 3 |             codes [kRows, 128 bytes], absmax [kRows, 16]
//   warpgroup 0    | 64 x 64  |          |          |          |           x ring, kXStages stages:
//   (64 rows of W) +----------+----------+----------+----------+             kXStageKSteps k-steps [kM, 64], swizzled
//   warpgroup 1    |          |          |          |          |           codebook of byte pairs, absmax map, codebook
//                  +----------+----------+----------+----------+
//
//   producer warp of W (TMA)   -> W ring --load_shared, decode--> registers (A) --+
//   producer warp of x (bulk)  -> x ring -------- matrix descriptor (B) ----------+--> wgmma m64nXk16, 4 a k-step
//
// A first kernel writes x to the workspace as shared memory wants it (swizzle_x_kernel): k-step after k-step, the columns
// that the lanes hold of two words of a k-tile, in their order, rows in wgmma's 128-byte swizzle. While the tensor cores work
// on one k-step the consumers decode the next. A stage is full when its bytes have come, and empty when all consumer warps
// have arrived at its barrier.
#pragma once

#include "linear_arguments.cuh"
#include "linear_block_codebook.cuh"
#include "linear_partition.cuh"
#include "linear_ring.cuh"
#include "wgmma.cuh"

// wgmma exists in code built for sm_90a alone
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QSHARDED_HAS_WGMMA 1
#endif

namespace qsharded {

// ---- Tile configuration ----

constexpr int kKSteps = kWords / 2;  // of a k-tile

// By rows of x. More rows leave less shared memory for stages of them.
struct Wgmma32Large {
  static constexpr int kWarpgroups = 3;    // consumers, of 64 rows of W each
  static constexpr int kM = 32;            // rows of x
  static constexpr int kXStages = 8;       // of the ring of x
  static constexpr int kXStageKSteps = 2;  // k-steps of a stage: kKSteps or a part of it
  static constexpr int kPermuted = 4;      // of a block's eight words, in the upper of a lane's two rows; see is_permuted
};
struct Wgmma32 {
  static constexpr int kWarpgroups = 2, kM = 32, kXStages = 16, kXStageKSteps = 2, kPermuted = 4;
};
struct Wgmma64Large {
  static constexpr int kWarpgroups = 3, kM = 64, kXStages = 4, kXStageKSteps = 2, kPermuted = 4;
};
struct Wgmma64 {
  static constexpr int kWarpgroups = 2, kM = 64, kXStages = 8, kXStageKSteps = 2, kPermuted = 6;
};
struct Wgmma128 {
  static constexpr int kWarpgroups = 2, kM = 128, kXStages = 4, kXStageKSteps = 2, kPermuted = 8;
};
struct Wgmma256 {
  static constexpr int kWarpgroups = 2, kM = 256, kXStages = 4, kXStageKSteps = 1, kPermuted = 8;
};

// What follows from a configuration.
template <typename Config>
struct WgmmaShape {
  static constexpr int kWarpgroups = Config::kWarpgroups, kM = Config::kM, kXStages = Config::kXStages;
  static constexpr int kXStageKSteps = Config::kXStageKSteps, kPermuted = Config::kPermuted;
  static_assert((kXStages & (kXStages - 1)) == 0 && kXStages > 2);
  static constexpr int kWStages = 3;
  static constexpr int kConsumerWarps = kWarpgroups * 4;
  static constexpr int kConsumerThreads = kConsumerWarps * kWarp;
  static constexpr int kRows = kWarpgroups * 64;
  static constexpr int kInstructionM = kM < 128 ? kM : 128;
  static constexpr int kInstructions = kM / kInstructionM;
  static constexpr int kAccumulators = kM / 2;  // that a lane holds

  // The accumulators of 256 rows of x take more registers than are every thread's share, so the producers hand theirs to
  // the consumers. setmaxnreg is for whole warpgroups, so there are four producer warps then. What the kernel is launched
  // with must suffice, else all wait for ever.
  static constexpr bool kUsesSetmaxnreg = kM > 128;
  static constexpr int kThreads = kConsumerThreads + (kUsesSetmaxnreg ? 4 : 2) * kWarp;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kRegisters =
      kUsesSetmaxnreg ? kConsumerThreads * kConsumerRegisters + 4 * kWarp * kProducerRegisters : 0;

  static constexpr int kKStepBytes = kM * 128;
  static constexpr int kChunkBytes = kKSteps * kKStepBytes;
  static constexpr int kXStageBytes = kXStageKSteps * kKStepBytes;
  static constexpr int kCodeBytes = kRows * kCodeRow, kAbsmaxBytes = kRows * kAbsmaxRow;
  static constexpr int kWStageBytes = kCodeBytes + kAbsmaxBytes;
  static_assert(kWStageBytes % kBoxAlignment == 0);

  // of the CTA's memory
  static constexpr int kXAt = kWStages * kWStageBytes, kTableAt = kXAt + kXStages * kXStageBytes;
  static constexpr int kMapAt = kTableAt + CodebookTable::kBytes, kCodebookAt = kMapAt + kMapBytes;
  static constexpr int kSharedBytes = kCodebookAt + 16 * 4;
  static_assert(kSharedBytes + 1024 <= kMostRingBytes);  // with the barriers

  static Partition partition(const LinearSizes& s) {
    return Partition::of(ceil_div(s.rows, kRows), ceil_div(s.blocks_per_row, kKTileBlocks), s.sms);
  }
};

// ---- Workspace ----

// Its parts.
struct WgmmaWorkspace {
  float* partials;  // accumulators of each consumer thread of each CTA
  int* flags;       // of each CTA: its partial sum is there
  uint8_t* swizzled_x;

  template <typename Shape>
  static WgmmaWorkspace of(uint8_t* workspace, const Partition& partition) {
    const int64_t flags = partials_bytes<Shape>(partition), swizzled = flags + flags_bytes(partition);
    return {reinterpret_cast<float*>(workspace), reinterpret_cast<int*>(workspace + flags), workspace + swizzled};
  }

  template <typename Shape>
  static int64_t bytes(const Partition& partition) {
    const int64_t swizzled = static_cast<int64_t>(partition.chunks) * Shape::kChunkBytes;
    return partials_bytes<Shape>(partition) + flags_bytes(partition) + swizzled;
  }

 private:
  static constexpr int64_t kAlignment = 128;  // of bulk copies, and more

  static int64_t flags_bytes(const Partition& partition) {
    return (partition.ctas * sizeof(int) + kAlignment - 1) / kAlignment * kAlignment;
  }

  template <typename Shape>
  static int64_t partials_bytes(const Partition& partition) {
    return static_cast<int64_t>(partition.ctas) * Shape::kAccumulators * Shape::kConsumerThreads * sizeof(float);
  }
};

// ---- x, swizzled ----

// One 16-byte granule a thread: the pairs that lanes t = 0..3 hold of one half of a k16 step, each of its own pair of words
// (own_pair). Flags are lowered besides.
template <typename T>
__global__ void __launch_bounds__(256)
    swizzle_x_kernel(const T* x, int m, int columns, int tile_m, WgmmaWorkspace workspace, int ctas, int granules) {
  pdl_launch_dependents();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < ctas) workspace.flags[i] = 0;
  if (i >= granules) return;
  const int q = i % 8, row = i / 8 % tile_m, k_step = i / 8 / tile_m;
  uint32_t pairs[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int column = k_step / kKSteps * kKTile + kBlock * t + (k_step % kKSteps ^ t) * 16 + q * 2;
    const bool inside = row < m && column < columns;
    pairs[t] = inside ? __ldg(reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(row) * columns + column)) : 0;
  }
  auto* const swizzled = reinterpret_cast<uint4*>(workspace.swizzled_x);
  swizzled[i - q + (q ^ (row % 8))] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
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

// ---- Rings and their producers ----

// Both rings, as one CTA sees them.
template <typename Shape>
struct WgmmaRings {
  uint8_t* shared;
  uint64_t* w_full;   // barriers: a stage's bytes have come
  uint64_t* w_empty;  // all consumer warps have read them
  uint64_t* x_full;
  uint64_t* x_empty;

  __device__ void init() const {
    for (int i = 0; i < Shape::kWStages; ++i) init_barrier(w_full + i, 1), init_barrier(w_empty + i, Shape::kConsumerWarps);
    for (int i = 0; i < Shape::kXStages; ++i) init_barrier(x_full + i, 1), init_barrier(x_empty + i, Shape::kConsumerWarps);
    publish_barriers();
  }

  __device__ uint8_t* w_stage(unsigned stage) const { return shared + stage * Shape::kWStageBytes; }
  __device__ uint8_t* x_stage(unsigned stage) const { return shared + Shape::kXAt + stage * Shape::kXStageBytes; }
};

// Issue the copies of a CTA's units of W, or its loads of x, one after the other; one thread each.
template <typename Shape, Absmax kAbsmax>
struct WProducer {
  WgmmaRings<Shape> rings;
  int tile, k_tile;
  PipelineState<Shape::kWStages> at = {};

  __device__ void copy_next(const WeightMaps& maps, int k_tiles) {
    wait_for(rings.w_empty + at.stage, at.phase);
    uint8_t* const to = rings.w_stage(at.stage);
    uint64_t* const full = rings.w_full + at.stage;
    expect_bytes(full, weight_bytes<kAbsmax>(Shape::kRows));
    copy_weight<kAbsmax>(to, to + Shape::kCodeBytes, maps, tile * Shape::kRows, k_tile * kKTileBlocks, full);
    if (++k_tile == k_tiles) k_tile = 0, ++tile;
    at.advance();
  }
};

template <typename Shape>
struct XProducer {
  WgmmaRings<Shape> rings;
  const uint8_t* swizzled_x;
  int load;  // of a row of x
  PipelineState<Shape::kXStages> at = {};

  __device__ void copy_next(int loads) {
    wait_for(rings.x_empty + at.stage, at.phase);
    copy_bulk(rings.x_stage(at.stage), swizzled_x + static_cast<int64_t>(load) * Shape::kXStageBytes, Shape::kXStageBytes,
              rings.x_full + at.stage);
    if (++load == loads) load = 0;
    at.advance();
  }
};

template <typename Shape>
__device__ inline void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(Shape::kConsumerThreads) : "memory");
}
#endif

// ---- A tile's accumulators: written, or handed to the CTA that began the tile ----

template <typename Shape, typename T>
__device__ inline void write_tile(const LinearArguments<T>& a, const float (&accumulators)[Shape::kAccumulators], int tile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = static_cast<int64_t>(tile) * Shape::kRows + warp * 16 + lane / 4 + h * 8;
    if (row >= a.w.rows) continue;
    const float bias = a.bias ? static_cast<float>(a.bias[row]) : 0;
#pragma unroll
    for (int i = 0; i < Shape::kAccumulators / 2; ++i) {
      const int m = lane % 4 * 2 + i / 2 * 8 + i % 2;
      if (m < a.m) a.y[m * a.w.rows + row] = static_cast<T>(accumulators[i / 2 * 4 + h * 2 + i % 2] + bias);
    }
  }
}

#if QSHARDED_HAS_WGMMA
// A CTA that begins within a tile leaves its accumulators to the CTA that began the tile. Every CTA has a place for them,
// and a flag.
template <typename Shape>
__device__ inline void leave_partial(int cta, const WgmmaWorkspace& workspace,
                                     const float (&accumulators)[Shape::kAccumulators]) {
  float* own =
      workspace.partials + static_cast<int64_t>(cta) * Shape::kAccumulators * Shape::kConsumerThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < Shape::kAccumulators; ++i) own[i * Shape::kConsumerThreads] = accumulators[i];
  sync_consumers<Shape>();
  if (threadIdx.x != 0) return;
  __threadfence();
  asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(workspace.flags + cta) : "memory");
}

template <typename Shape>
__device__ inline void add_partial_of(int cta, const WgmmaWorkspace& workspace,
                                      float (&accumulators)[Shape::kAccumulators]) {
  if (threadIdx.x == 0) {
    const int* const flag = workspace.flags + cta;
    int raised = 0;
    while (!raised) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  }
  sync_consumers<Shape>();
  const float* theirs =
      workspace.partials + static_cast<int64_t>(cta) * Shape::kAccumulators * Shape::kConsumerThreads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < Shape::kAccumulators; ++i) accumulators[i] += __ldcg(theirs + i * Shape::kConsumerThreads);
}
#endif

// ---- Kernel ----

template <typename Shape, typename T, Absmax kAbsmax>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ LinearArguments<T> a, const __grid_constant__ Partition partition,
                        const __grid_constant__ WgmmaWorkspace workspace, const __grid_constant__ WeightMaps maps) {
#if QSHARDED_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t w_full[Shape::kWStages];
  __shared__ uint64_t w_empty[Shape::kWStages];
  __shared__ uint64_t x_full[Shape::kXStages];
  __shared__ uint64_t x_empty[Shape::kXStages];
  const WgmmaRings<Shape> rings = {shared, w_full, w_empty, x_full, x_empty};
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int chunks = partition.chunks;
  // From the last to the first: a CTA waits for CTAs of higher numbers, which were started before it, so that waiting ends
  // whatever else the device runs.
  const int own_cta = gridDim.x - 1 - blockIdx.x;
  const int begin = partition.begin(own_cta), end = partition.begin(own_cta + 1);
  constexpr int kLoads = kKSteps / Shape::kXStageKSteps;  // of x, a k-tile

  if (warp >= Shape::kConsumerWarps) {
    if constexpr (Shape::kUsesSetmaxnreg) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kProducerRegisters));
    }
    // W's and x's waiting must not hold each other up: a warp for each
    const bool produces_w = threadIdx.x == Shape::kConsumerThreads;
    const bool produces_x = threadIdx.x == Shape::kConsumerThreads + kWarp;
    WProducer<Shape, kAbsmax> w_producer = {rings, begin / chunks, begin % chunks};
    if (produces_w) {
      rings.init();
      w_producer.copy_next(maps, chunks);
    }
    if (produces_x) {
      pdl_wait();  // for swizzled_x and the flags, which no other thread uses
      asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    if (produces_w) {
      for (int unit = begin + 1; unit < end; ++unit) w_producer.copy_next(maps, chunks);
    } else if (produces_x) {
      XProducer<Shape> x_producer = {rings, workspace.swizzled_x, begin % chunks * kLoads};
      for (int load = 0; load < (end - begin) * kLoads; ++load) x_producer.copy_next(chunks * kLoads);
    }
    return;
  }

  if constexpr (Shape::kUsesSetmaxnreg) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kConsumerRegisters));
  }
  float* const map = reinterpret_cast<float*>(shared + Shape::kMapAt);
  float* const codebook = reinterpret_cast<float*>(shared + Shape::kCodebookAt);
  const int own_row = warp * 16 + lane / 4;
  const unsigned blocks = a.w.blocks_per_row;
  int tile = begin / chunks, next_tile = tile;
  unsigned block = begin % chunks * kKTileBlocks + lane % 4;
  RowsAbsmax<2, kAbsmax> rows;
  const auto begin_tile = [&] { rows.begin(a.w, static_cast<unsigned>(next_tile) * Shape::kRows + own_row); };
  const auto load_absmax = [&](bool more) { rows.load(a.w, block, more && block < blocks); };
  begin_tile();
  const AbsmaxMap<kAbsmax != Absmax::kFloats> absmax_map(a.w);
  load_absmax(true);
  CodebookTable::fill<Shape::kConsumerThreads>(shared + Shape::kTableAt, a.w.codebook);
  absmax_map.store(map);
  if (threadIdx.x < 16) codebook[threadIdx.x] = __ldg(a.w.codebook + threadIdx.x);
  __syncthreads();

  const CodebookTable table(shared + Shape::kTableAt);
  uint2 words[2];  // of a k-step, loaded a k-step ahead
  unsigned w_stage = 0, w_phase = 0, load = 0;  // of x, in use
  const auto release_x = [&](unsigned load) { arrive(x_empty + load % Shape::kXStages, lane == 0); };
  for (int unit = begin; unit < end; ++tile) {
    const int tile_end = min(end, (tile + 1) * chunks);
    float accumulators[Shape::kAccumulators] = {};
    uint32_t operand[2][4][4];
    for (bool first = true; unit < tile_end; ++unit, first = false) {
      wait_for(w_full + w_stage, w_phase);
      const uint8_t* const codes = rings.w_stage(w_stage) + own_row * kCodeRow;
      const uint8_t* const absmax_box = rings.w_stage(w_stage) + Shape::kCodeBytes + own_row * kAbsmaxRow;
      const auto load_words = [&](int k_step) {
        const uint32_t at = shared_address(codes) + words_at(own_pair(k_step));
        words[0] = load_shared_8(at), words[1] = load_shared_8(at + 8 * kCodeRow);
      };
      float absmax[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        absmax[i] = rows.of_row(i, absmax_box + i * 8 * kAbsmaxRow, block, block < blocks, map, absmax_map.offset);
      }
      block += kKTileBlocks;
      if (block >= chunks * kKTileBlocks) block -= chunks * kKTileBlocks, ++next_tile, begin_tile();
      load_absmax(unit + 1 < end);
      load_words(0);
      const BlockCodebook<T> block_codebook(reinterpret_cast<const float4*>(codebook), absmax[0]);
#pragma unroll
      for (int k_step = 0; k_step < kKSteps; ++k_step) {
        const uint2 upper = words[0], lower = words[1];
        if (k_step + 1 < kKSteps) load_words(k_step + 1);
        uint32_t(&now)[4][4] = operand[k_step % 2];
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          uint32_t u[4], l[4];
          if (is_permuted(2 * k_step + word, Shape::kPermuted)) {
            block_codebook.decode(word == 0 ? upper.x : upper.y, u);
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
        if (k_step % Shape::kXStageKSteps == 0) wait_for(x_full + load % Shape::kXStages, load / Shape::kXStages % 2);
        pin(now);
        const uint64_t b =
            matrix_at(shared_address(rings.x_stage(load % Shape::kXStages)) +
                      k_step % Shape::kXStageKSteps * Shape::kKStepBytes);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k16 = 0; k16 < 4; ++k16) {
#pragma unroll
          for (int j = 0; j < Shape::kInstructions; ++j) {
            auto* own = reinterpret_cast<float(*)[Shape::kInstructionM / 2]>(accumulators + j * Shape::kInstructionM / 2);
            wgmma<T>(*own, now[k16], b + k16 * 2 + j * (Shape::kInstructionM * 128 / 16));
          }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (k_step == kKSteps - 1) arrive(w_empty + w_stage, lane == 0);
        // the k-step before is done with, and so is its operand
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k_step % Shape::kXStageKSteps == 0 && (k_step > 0 || !first)) release_x(load - 1);
        if (k_step % Shape::kXStageKSteps == Shape::kXStageKSteps - 1) ++load;
      }
      if (++w_stage == Shape::kWStages) w_stage = 0, w_phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release_x(load - 1);
    if (tile * chunks < begin) {
      leave_partial<Shape>(own_cta, workspace, accumulators);
    } else {
      for (int cta = own_cta + 1; partition.begin(cta) < (tile + 1) * chunks; ++cta) {
        add_partial_of<Shape>(cta, workspace, accumulators);
      }
      write_tile<Shape>(a, accumulators, tile);
    }
  }
#endif
}

template <typename Shape>
int64_t wgmma_workspace(const LinearSizes& s) {
  return WgmmaWorkspace::bytes<Shape>(Shape::partition(s));
}

// ---- Launch ----

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
  swizzle_x_kernel<T><<<ceil_div(granules, 256), 256, 0, stream>>>(a.x, a.m, a.w.blocks_per_row * kBlock, Shape::kM,
                                                                   workspace, partition.ctas, granules);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return launch_pdl(kernel, partition.ctas, Shape::kThreads, Shape::kSharedBytes, stream, a, partition,
                            workspace, maps);
}

}  // namespace qsharded
