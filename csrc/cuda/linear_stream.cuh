// y = x W^T for few rows of x on sm_90 and sm_100: the TMA streams W and x to a ring in shared memory (linear_ring.cuh);
// consumers look codes up on their way to registers, and multiply by mma.m16n8k16.
//
//                    k-tile: 256 columns, 4 quantization blocks         ring of kStages stages, each
//                  +---------+---------+---------+---------+              codes   [kRows, 128 bytes]  swizzled
//   row warp 0     | block 0 | block 1 | block 2 | block 3 |              x       [4 blocks, kM, 64]  swizzled
//   (kSubtiles     | t 0 1 2 3 lane t of four has 16 of a  |              absmax  [kRows, 16]
//    x 16 rows)    |         | row's 64 columns of a block |            beside it: the table of byte pairs,
//                  +---------+---------+---------+---------+            accumulators of the groups, absmax map
//   row warp 1     |         |         |         |         |
//                  +---------+---------+---------+---------+
//
//   producer warp (TMA) --> stage 0, 1, 2, .. --> group 0: units 0, kGroups, ..     --+
//                                             --> group 1: units 1, kGroups + 1, .. --+--> joined per tile, in their order
//
// A unit is a (tile, k-tile) of a Partition and takes a stage. Groups of kRowWarps warps take units in turn. Four mma are a
// block's: their sums enter the group's accumulators times the block's absmax. The tensor cores see a block's columns in
// another order than memory has them, and x's alike.
#pragma once

#include <algorithm>

#include "linear_mma_tile.cuh"
#include "linear_ring.cuh"

namespace qsharded {

constexpr int kTableBytes = PairTable<__half>::kBytes;  // of either type

// ---- Tile configuration ----

// Named by a tile's rows of W and rows of x.
struct Stream128x8 {
  static constexpr int kGroups = 3;    // of warps, which take units in turn
  static constexpr int kRowWarps = 4;  // warps of a group, one below the other
  static constexpr int kSubtiles = 2;  // 16 rows of W each, a warp's
  static constexpr int kMTiles = 1;    // 8 rows of x each
  static constexpr int kStages = 6;    // of the ring
};
struct Stream128x16 {
  static constexpr int kGroups = 3, kRowWarps = 4, kSubtiles = 2, kMTiles = 2, kStages = 6;
};
struct Stream112x8 {
  static constexpr int kGroups = 2, kRowWarps = 7, kSubtiles = 1, kMTiles = 1, kStages = 8;
};
struct Stream112x16 {
  static constexpr int kGroups = 2, kRowWarps = 7, kSubtiles = 1, kMTiles = 2, kStages = 6;
};
struct Stream64x8 {
  static constexpr int kGroups = 4, kRowWarps = 2, kSubtiles = 2, kMTiles = 1, kStages = 12;
};
struct Stream64x16 {
  static constexpr int kGroups = 4, kRowWarps = 2, kSubtiles = 2, kMTiles = 2, kStages = 8;
};
struct Stream64x32 {
  static constexpr int kGroups = 2, kRowWarps = 4, kSubtiles = 1, kMTiles = 4, kStages = 6;
};
struct Stream32x8 {
  static constexpr int kGroups = 4, kRowWarps = 2, kSubtiles = 1, kMTiles = 1, kStages = 16;
};
struct Stream32x16 {
  static constexpr int kGroups = 4, kRowWarps = 2, kSubtiles = 1, kMTiles = 2, kStages = 12;
};

// What follows from a configuration.
template <typename Config>
struct StreamShape {
  static constexpr int kGroups = Config::kGroups, kRowWarps = Config::kRowWarps, kSubtiles = Config::kSubtiles;
  static constexpr int kMTiles = Config::kMTiles, kStages = Config::kStages;
  // A stage is one group's for good: whoever waits for a barrier's phase has waited for the one before it.
  static_assert(kStages % kGroups == 0 && kStages > kGroups);
  static constexpr int kConsumerWarps = kGroups * kRowWarps;  // and a producer warp
  static constexpr int kThreads = (kConsumerWarps + 1) * kWarp;
  static_assert(kConsumerWarps * kWarp >= 256);  // the map's entries
  static constexpr int kRows = kRowWarps * kSubtiles * 16;
  static constexpr int kM = kMTiles * 8;
  static constexpr int kAccumulators = kSubtiles * kMTiles * 4;  // that a lane holds

  // of a stage's memory
  static constexpr int kCodeBytes = kRows * kCodeRow, kXBytes = kM * kKTile * 2, kAbsmaxBytes = kRows * kAbsmaxRow;
  static constexpr int kXAt = kCodeBytes, kAbsmaxAt = kXAt + kXBytes;
  static constexpr int kStageBytes = (kAbsmaxAt + kAbsmaxBytes + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;

  // of the CTA's memory
  static constexpr int kTableAt = kStages * kStageBytes, kAccumulatorsAt = kTableAt + kTableBytes;
  static constexpr int kMapAt = kAccumulatorsAt + kConsumerWarps * kAccumulators * kWarp * 4;
  static constexpr int kSharedBytes = kMapAt + kMapBytes;
  static_assert(kSharedBytes + 1024 <= kMostRingBytes);  // with the barriers

  // The tiles of kM rows of x share the SMs.
  static Partition partition(const LinearSizes& s) {
    const int sms = std::max<int>(s.sms / ceil_div(s.m, kM), 1);
    return Partition::of(ceil_div(s.rows, kRows), ceil_div(s.blocks_per_row, kKTileBlocks), sms);
  }
};

struct StreamMaps {
  WeightMaps w;
  CUtensorMap x;  // [blocks, m, 64]: a box is a k-tile's blocks
};

template <typename Shape, typename T>
cudaError_t encode_maps(const LinearArguments<T>& a, StreamMaps* maps) {
  const cuuint64_t m = a.m, blocks = a.w.blocks_per_row;
  const BoxedTensor<3> x = {CU_TENSOR_MAP_DATA_TYPE_UINT16, a.x, {kBlock, m, blocks}, {blocks * kBlock * 2, kBlock * 2},
                            {kBlock, Shape::kM, kKTileBlocks}, CU_TENSOR_MAP_SWIZZLE_128B};
  const cudaError_t error = encode_weight(a.w, Shape::kRows, &maps->w);
  return error == cudaSuccess ? x.encode(&maps->x) : error;
}

#if QSHARDED_HAS_RINGS
// ---- Ring, producer, and the groups' accumulators ----

// The ring, as one CTA sees it.
template <typename Shape>
struct Ring {
  uint8_t* stages;
  uint64_t* full;   // barriers: a stage's bytes have come
  uint64_t* empty;  // its group has read them

  __device__ void init() const {
    for (int i = 0; i < Shape::kStages; ++i) init_barrier(full + i, 1), init_barrier(empty + i, Shape::kRowWarps);
    publish_barriers();
  }
};

// Issues the copies of a CTA's units, one after the other; one thread.
template <typename Shape, Absmax kAbsmax>
struct Producer {
  Ring<Shape> ring;
  int tile, k_tile, m0;
  PipelineState<Shape::kStages> at = {};

  __device__ void copy_next(const StreamMaps& maps, int k_tiles) {
    wait_for(ring.empty + at.stage, at.phase);
    uint8_t* const to = ring.stages + at.stage * Shape::kStageBytes;
    uint64_t* const full = ring.full + at.stage;
    const int block = k_tile * kKTileBlocks;
    expect_bytes(full, weight_bytes<kAbsmax>(Shape::kRows) + Shape::kXBytes);
    copy_weight<kAbsmax>(to, to + Shape::kAbsmaxAt, maps.w, tile * Shape::kRows, block, full);
    tma_load(to + Shape::kXAt, maps.x, 0, m0, block, full);
    if (++k_tile == k_tiles) k_tile = 0, ++tile;
    at.advance();
  }
};

// The groups' accumulators of a tile, for one place among a group's warps. The group whose unit is the tile's last, so that
// it has least to wait for, adds them up in the order of the groups, while the others go on to the next tile.
template <typename Shape>
struct GroupAccumulators {
  float* own;        // of this lane, in the first group
  uint64_t* put;     // barriers: all groups' accumulators of a tile are there
  uint64_t* summed;  // and have been read

  // Every lane arrives: one for its warp, after __syncwarp, is as right and as fast, but racecheck cannot tell.
  __device__ void init() const { init_barrier(put, Shape::kGroups * kWarp), init_barrier(summed, kWarp); }

  // Tile number so much of this CTA's.
  template <typename T>
  __device__ void join(const float (&accumulators)[Shape::kAccumulators], int group, int last, int number,
                       const MmaTile<Shape, T>& out) const {
    constexpr int kGroup = Shape::kRowWarps * Shape::kAccumulators * kWarp;
    const int phase = number & 1;
    wait_for(summed, phase ^ 1);  // of the tile before
#pragma unroll
    for (int i = 0; i < Shape::kAccumulators; ++i) own[group * kGroup + i * kWarp] = accumulators[i];
    arrive(put, true);
    if (group != last) return;
    wait_for(put, phase);
#pragma unroll
    for (int i = 0; i < Shape::kAccumulators; ++i) {
      float sum = 0;
#pragma unroll
      for (int of = 0; of < Shape::kGroups; ++of) sum += own[of * kGroup + i * kWarp];
      out.write(i, sum);
    }
    arrive(summed, true);
  }
};

// ---- A block's product ----

// Which of a subtile's first eight rows a lane has: even ones before odd ones, so that the 16 lanes that shared memory
// serves at a time find their codes in different banks of the swizzled box.
__device__ inline int lane_row() {
  const int place = threadIdx.x % kWarp / 4;
  return place < 4 ? 2 * place : 2 * place - 7;
}

// Adds a warp's rows of a block of W, times absmax of each, times the block of x. codes, x: where the lane's own lie in
// shared memory, in its first row each.
template <typename Shape, typename T>
__device__ inline void multiply_block(float (&accumulators)[Shape::kAccumulators], const PairTable<T>& table, uint32_t codes,
                                      uint32_t x, const float (&absmax)[2 * Shape::kSubtiles]) {
  uint32_t weights[2 * Shape::kSubtiles][8];
#pragma unroll
  for (int i = 0; i < 2 * Shape::kSubtiles; ++i) table.decode(load_shared_8(codes + i * 8 * kCodeRow), weights[i]);
#pragma unroll
  for (int m = 0; m < Shape::kMTiles; ++m) {
    const uint32_t row = x + m * 8 * (kBlock * 2);
    const uint4 first = load_shared_16(row), second = load_shared_16(row ^ 16);
#pragma unroll
    for (int i = 0; i < Shape::kSubtiles; ++i) {
      const auto &upper = weights[2 * i], &lower = weights[2 * i + 1];
      float sums[4] = {};
      multiply(sums, upper[0], lower[0], upper[1], lower[1], first.x, first.y, T{});
      multiply(sums, upper[2], lower[2], upper[3], lower[3], first.z, first.w, T{});
      multiply(sums, upper[4], lower[4], upper[5], lower[5], second.x, second.y, T{});
      multiply(sums, upper[6], lower[6], upper[7], lower[7], second.z, second.w, T{});
      float* const own = accumulators + (i * Shape::kMTiles + m) * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) own[j] = __fmaf_rn(absmax[2 * i + j / 2], sums[j], own[j]);
    }
  }
}
#endif

// ---- Kernel ----

template <typename Shape, typename T, Absmax kAbsmax>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_stream_kernel(const __grid_constant__ LinearArguments<T> a, const __grid_constant__ Partition partition,
                         const __grid_constant__ StreamMaps maps) {
#if QSHARDED_HAS_RINGS
  constexpr int kSubtiles = Shape::kSubtiles, kGroups = Shape::kGroups;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[Shape::kStages];
  __shared__ uint64_t empty[Shape::kStages];
  __shared__ uint64_t put[Shape::kRowWarps];
  __shared__ uint64_t summed[Shape::kRowWarps];
  const Ring<Shape> ring = {shared, full, empty};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, m0 = blockIdx.y * Shape::kM;
  const int begin = partition.begin(blockIdx.x), end = partition.begin(blockIdx.x + 1), chunks = partition.chunks;

  if (warp == Shape::kConsumerWarps) {
    Producer<Shape, kAbsmax> producer = {ring, begin / chunks, begin % chunks, m0};
    const int first_end = min(end, begin + kGroups);
    if (lane == 0) {
      for (int i = 0; i < Shape::kRowWarps; ++i) GroupAccumulators<Shape>{nullptr, put + i, summed + i}.init();
      ring.init();
      // the groups' first stages, ahead of a ring's worth of others
      for (int unit = begin; unit < first_end; ++unit) producer.copy_next(maps, chunks);
    }
    __syncthreads();
    if (lane != 0) return;
    for (int unit = first_end; unit < end; ++unit) producer.copy_next(maps, chunks);
    return;
  }

  pdl_launch_dependents();
  const int group = warp / Shape::kRowWarps, row_warp = warp % Shape::kRowWarps, t = lane % 4;
  const int own_row = row_warp * kSubtiles * 16 + lane_row();  // and every eighth after it
  const unsigned blocks = a.w.blocks_per_row, padded_blocks = chunks * kKTileBlocks;
  float* const map = reinterpret_cast<float*>(shared + Shape::kMapAt);

  // absmax: lane t of four has those of block t, for all four
  int unit = begin + group, next_tile = unit / chunks;
  unsigned block = unit % chunks * kKTileBlocks + t;
  RowsAbsmax<2 * kSubtiles, kAbsmax> rows;
  const auto begin_tile = [&] { rows.begin(a.w, static_cast<unsigned>(next_tile) * Shape::kRows + own_row); };
  const auto load_absmax = [&](bool more) { rows.load(a.w, block, more && block < blocks); };
  begin_tile();
  const AbsmaxMap<kAbsmax != Absmax::kFloats> absmax_map(a.w);
  load_absmax(unit < end);
  PairTable<T>::template fill<Shape::kConsumerWarps * kWarp>(shared + Shape::kTableAt, a.w.codebook, a.w.factor);
  absmax_map.store(map);
  __syncthreads();

  const PairTable<T> table(shared + Shape::kTableAt);
  const float unfactored = 1 / a.w.factor;
  const GroupAccumulators<Shape> groups = {
      reinterpret_cast<float*>(shared + Shape::kAccumulatorsAt) + row_warp * Shape::kAccumulators * kWarp + lane,
      put + row_warp, summed + row_warp};
  // of a k-tile's first block
  const uint32_t own_codes = own_row * kCodeRow + (t * 8 ^ own_row % 8 * 16);
  const uint32_t own_x = Shape::kXAt + lane / 4 * (kBlock * 2) + (t * 32 ^ lane / 4 * 16);
  int stage = group, phase = 0;
  const int first_tile = begin / chunks;
  for (int tile = first_tile; tile * chunks < end; ++tile) {
    const int tile_end = min(end, (tile + 1) * chunks);
    float accumulators[Shape::kAccumulators] = {};
    for (; unit < tile_end; unit += kGroups) {
      const bool inside = block < blocks;
      wait_for(full + stage, phase);
      const uint8_t* const absmax_box = ring.stages + stage * Shape::kStageBytes + Shape::kAbsmaxAt + own_row * kAbsmaxRow;
      float own_absmax[2 * kSubtiles];
#pragma unroll
      for (int i = 0; i < 2 * kSubtiles; ++i) {
        const uint8_t* const box = absmax_box + i * 8 * kAbsmaxRow;
        own_absmax[i] = unfactored * rows.of_row(i, box, block, inside, map, absmax_map.offset);
      }
      block += kGroups * kKTileBlocks;
      while (block >= padded_blocks) block -= padded_blocks, ++next_tile, begin_tile();
      load_absmax(unit + kGroups < end);

      const uint32_t stage_at = shared_address(ring.stages) + stage * Shape::kStageBytes;
#pragma unroll 1
      for (int of = 0; of < kKTileBlocks; ++of) {
        float absmax[2 * kSubtiles];
#pragma unroll
        for (int i = 0; i < 2 * kSubtiles; ++i) absmax[i] = __shfl_sync(~0u, own_absmax[i], of, kKTileBlocks);
        multiply_block<Shape>(accumulators, table, stage_at + (own_codes ^ of * (kBlock / 2)),
                              stage_at + own_x + of * Shape::kM * (kBlock * 2), absmax);
      }
      __syncwarp();
      arrive(empty + stage, lane == 0);
      stage += kGroups;
      if (stage >= Shape::kStages) stage -= Shape::kStages, phase ^= 1;
    }
    const int last = (tile_end - 1 - begin) % kGroups;
    groups.join(accumulators, group, last, tile - first_tile, MmaTile<Shape, T>(a, partition, tile, m0, own_row));
  }
#endif
}

// ---- Launch ----

template <typename Shape, typename T>
cudaError_t launch_stream(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = by_absmax(a.w, [](auto absmax) { return linear_stream_kernel<Shape, T, absmax.value>; });
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  StreamMaps maps;
  error = encode_maps<Shape>(a, &maps);
  if (error != cudaSuccess) return error;
  const Partition partition = Shape::partition(a.sizes());
  const dim3 grid(partition.ctas, ceil_div(a.m, Shape::kM));
  kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(a, partition, maps);
  error = cudaGetLastError();
  return error != cudaSuccess ? error : launch_sum_partials<Shape>(a, partition, stream);
}

}  // namespace qsharded
