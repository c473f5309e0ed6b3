// y = x W^T for few rows of x on sm_90 and sm_100: the copy engine streams W and x to a ring in shared memory
// (linear_ring.cuh); from there on as in linear_mma.cuh.
//
// Units are those of a Partition: a tile of rows of W times a piece of 256 columns, each a slot of the ring. One warp
// orders copies; groups of warps take units in turn. Lane t of four has block t of its rows.
#pragma once

#include <algorithm>

#include "linear_block_levels.cuh"
#include "linear_mma_tile.cuh"
#include "linear_ring.cuh"

namespace qsharded {

// kPermuted: of the eight words of a row's block, in one row of two, as is_permuted has it.
template <int kGroups_, int kRowWarps_, int kSubtiles_, int kMTiles_, int kSlots_, int kPermuted_>
struct StreamShape {
  static constexpr int kGroups = kGroups_, kRowWarps = kRowWarps_, kSubtiles = kSubtiles_;
  static constexpr int kMTiles = kMTiles_, kSlots = kSlots_, kPermuted = kPermuted_;
  // A slot is one group's for good: whoever waits for a barrier's phase has waited for the one before it.
  static_assert(kSlots % kGroups == 0 && kSlots > kGroups);
  static constexpr int kWarps = kGroups * kRowWarps;  // and one that orders copies
  static constexpr int kThreads = (kWarps + 1) * kWarp;
  static_assert(kWarps * kWarp >= 256);  // the map's entries
  static constexpr int kRows = kRowWarps * kSubtiles * 16;
  static constexpr int kM = kMTiles * 8;
  static constexpr int kSums = kSubtiles * kMTiles * 4;  // that a lane holds

  // of a slot
  static constexpr int kCodeBytes = kRows * kCodeRow, kXBytes = kM * kPiece * 2, kAbsmaxBytes = kRows * kAbsmaxRow;
  static constexpr int kXAt = kCodeBytes, kAbsmaxAt = kXAt + kXBytes;
  static constexpr int kSlotBytes = (kAbsmaxAt + kAbsmaxBytes + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;

  // of the block's memory
  static constexpr int kTableAt = kSlots * kSlotBytes, kSumsAt = kTableAt + LevelTable::kBytes;
  static constexpr int kMapAt = kSumsAt + kWarps * kSums * kWarp * 4, kLevelsAt = kMapAt + kMapBytes;
  static constexpr int kSharedBytes = kLevelsAt + 16 * 4;
  static_assert(kSharedBytes + 1024 <= kMostRingBytes);  // with the barriers

  // The launches of kM rows of x each share the processors.
  static Partition partition(const LinearSizes& s) {
    const int processors = std::max<int>(s.processors / ceil_div(s.m, kM), 1);
    return Partition::of(ceil_div(s.rows, kRows), ceil_div(s.blocks_per_row, kPieceBlocks), processors);
  }
};

struct StreamMaps {
  WeightMaps w;
  CUtensorMap x;  // [blocks, m, 64]: a box is the four lanes' blocks
};

template <typename Shape, typename T>
cudaError_t encode_maps(const LinearArguments<T>& a, StreamMaps* maps) {
  const cuuint64_t m = a.m, blocks = a.w.blocks_per_row;
  const BoxedTensor<3> x = {CU_TENSOR_MAP_DATA_TYPE_UINT16, a.x, {kBlock, m, blocks}, {blocks * kBlock * 2, kBlock * 2},
                            {kBlock, Shape::kM, kPieceBlocks}, CU_TENSOR_MAP_SWIZZLE_128B};
  const cudaError_t error = encode_weight(a.w, Shape::kRows, &maps->w);
  return error == cudaSuccess ? x.encode(&maps->x) : error;
}

#if __CUDA_ARCH__ >= 900
// The ring, as one thread block sees it.
template <typename Shape>
struct Ring {
  uint8_t* slots;
  uint64_t* full;   // barriers: a slot's copies are there
  uint64_t* empty;  // its group has read them

  __device__ void init() const {
    for (int i = 0; i < Shape::kSlots; ++i) init_barrier(full + i, 1), init_barrier(empty + i, Shape::kRowWarps);
    publish_barriers();
  }
};

// Orders the copies of a thread block's units, one after the other; by one thread.
template <typename Shape, Absmax kAbsmax>
struct RingFiller {
  Ring<Shape> ring;
  int tile, piece, m0;
  RingPlace<Shape::kSlots> at = {};

  __device__ void copy_next(const StreamMaps& maps, int pieces) {
    wait_for(ring.empty + at.slot, at.parity);
    uint8_t* const to = ring.slots + at.slot * Shape::kSlotBytes;
    uint64_t* const full = ring.full + at.slot;
    const int block = piece * kPieceBlocks;
    expect_bytes(full, weight_bytes<kAbsmax>(Shape::kRows) + Shape::kXBytes);
    copy_weight<kAbsmax>(to, to + Shape::kAbsmaxAt, maps.w, tile * Shape::kRows, block, full);
    copy_box(to + Shape::kXAt, maps.x, 0, m0, block, full);
    if (++piece == pieces) piece = 0, ++tile;
    at.advance();
  }
};

// The groups' sums of a tile, for one place among a group's warps. The group whose unit is the tile's last, so that it has
// least to wait for, adds them up in the order of the groups, while the others go on to the next tile.
template <typename Shape>
struct GroupSums {
  float* own;        // of this lane, in the first group
  uint64_t* put;     // barriers: all groups' sums of a tile are there
  uint64_t* summed;  // and have been read

  // Every lane arrives: one for its warp, after __syncwarp, is as right and as fast, but racecheck cannot tell.
  __device__ void init() const { init_barrier(put, Shape::kGroups * kWarp), init_barrier(summed, kWarp); }

  // Tile number so much of this thread block's.
  template <typename T>
  __device__ void join(const float (&sums)[Shape::kSums], int group, int last, int number,
                       const MmaTile<Shape, T>& out) const {
    constexpr int kGroup = Shape::kRowWarps * Shape::kSums * kWarp;
    const int parity = number & 1;
    wait_for(summed, parity ^ 1);  // of the tile before
#pragma unroll
    for (int i = 0; i < Shape::kSums; ++i) own[group * kGroup + i * kWarp] = sums[i];
    arrive(put, true);
    if (group != last) return;
    wait_for(put, parity);
#pragma unroll
    for (int i = 0; i < Shape::kSums; ++i) {
      float sum = 0;
#pragma unroll
      for (int of = 0; of < Shape::kGroups; ++of) sum += own[of * kGroup + i * kWarp];
      out.write(i, sum);
    }
    arrive(summed, true);
  }
};
#endif

template <typename Shape, typename T, Absmax kAbsmax>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_stream_kernel(const __grid_constant__ LinearArguments<T> a, const __grid_constant__ Partition partition,
                         const __grid_constant__ StreamMaps maps) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSubtiles = Shape::kSubtiles, kGroups = Shape::kGroups;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[Shape::kSlots];
  __shared__ uint64_t empty[Shape::kSlots];
  __shared__ uint64_t put[Shape::kRowWarps];
  __shared__ uint64_t summed[Shape::kRowWarps];
  const Ring<Shape> ring = {shared, full, empty};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, m0 = blockIdx.y * Shape::kM;
  const int begin = partition.begin(blockIdx.x), end = partition.begin(blockIdx.x + 1), chunks = partition.chunks;

  if (warp == Shape::kWarps) {
    RingFiller<Shape, kAbsmax> filler = {ring, begin / chunks, begin % chunks, m0};
    const int first_end = min(end, begin + kGroups);
    if (lane == 0) {
      for (int i = 0; i < Shape::kRowWarps; ++i) GroupSums<Shape>{nullptr, put + i, summed + i}.init();
      ring.init();
      // the groups' first slots, ahead of a ring's worth of others
      for (int unit = begin; unit < first_end; ++unit) filler.copy_next(maps, chunks);
    }
    __syncthreads();
    if (lane != 0) return;
    for (int unit = first_end; unit < end; ++unit) filler.copy_next(maps, chunks);
    return;
  }

  let_next_kernel_start();
  const int group = warp / Shape::kRowWarps, row_warp = warp % Shape::kRowWarps, t = lane % 4;
  const int own_row = row_warp * kSubtiles * 16 + lane / 4;  // and every eighth after it
  const unsigned blocks = a.w.blocks_per_row, padded_blocks = chunks * kPieceBlocks;
  float* const map = reinterpret_cast<float*>(shared + Shape::kMapAt);
  float* const levels = reinterpret_cast<float*>(shared + Shape::kLevelsAt);

  int unit = begin + group, next_tile = unit / chunks;
  unsigned block = unit % chunks * kPieceBlocks + t;
  RowsAbsmax<2 * kSubtiles, kAbsmax> rows;
  const auto begin_tile = [&] { rows.begin(a.w, static_cast<unsigned>(next_tile) * Shape::kRows + own_row); };
  const auto load_absmax = [&](bool more) { rows.load(a.w, block, more && block < blocks); };
  begin_tile();
  const AbsmaxMap<kAbsmax != Absmax::kFloats> absmax_map(a.w);
  load_absmax(unit < end);
  LevelTable::fill<Shape::kWarps * kWarp>(shared + Shape::kTableAt, a.w.levels);
  absmax_map.store(map);
  if (threadIdx.x < 16) levels[threadIdx.x] = __ldg(a.w.levels + threadIdx.x);
  __syncthreads();

  const LevelTable table(shared + Shape::kTableAt);
  const GroupSums<Shape> groups = {
      reinterpret_cast<float*>(shared + Shape::kSumsAt) + row_warp * Shape::kSums * kWarp + lane, put + row_warp,
      summed + row_warp};
  const uint32_t swizzle = row_swizzle();
  int slot = group, parity = 0;
  const int first_tile = begin / chunks;
  for (int tile = first_tile; tile * chunks < end; ++tile) {
    const int tile_end = min(end, (tile + 1) * chunks);
    float sums[Shape::kSums] = {};
    for (; unit < tile_end; unit += kGroups) {
      const bool inside = block < blocks;
      wait_for(full + slot, parity);
      const uint8_t* const absmax_box = ring.slots + slot * Shape::kSlotBytes + Shape::kAbsmaxAt + own_row * kAbsmaxRow;
      float absmax[2 * kSubtiles];
#pragma unroll
      for (int i = 0; i < 2 * kSubtiles; ++i) {
        absmax[i] = rows.of_row(i, absmax_box + i * 8 * kAbsmaxRow, block, inside, map, absmax_map.offset);
      }
      block += kGroups * kPieceBlocks;
      while (block >= padded_blocks) block -= padded_blocks, ++next_tile, begin_tile();
      load_absmax(unit + kGroups < end);

      const uint32_t slot_at = shared_address(ring.slots) + slot * Shape::kSlotBytes;
      const uint32_t codes = slot_at + own_row * kCodeRow;
      const uint32_t x = slot_at + Shape::kXAt + (t * Shape::kM + lane / 4) * (kBlock * 2);
#pragma unroll
      for (int pair = 0; pair < kWords / 2; ++pair) {
        const int own = own_pair(pair);
        uint2 words[2 * kSubtiles];
#pragma unroll
        for (int i = 0; i < 2 * kSubtiles; ++i) {
          words[i] = load_shared_8(codes + i * 8 * kCodeRow + words_at(own));
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint4 b[Shape::kMTiles];
#pragma unroll
          for (int m = 0; m < Shape::kMTiles; ++m) {
            b[m] = load_shared_16(x + m * 8 * (kBlock * 2) + ((own * 32 + j * 16) ^ swizzle));
          }
#pragma unroll
          for (int i = 0; i < kSubtiles; ++i) {
            const auto word = [&](int row) { return j == 0 ? words[2 * i + row].x : words[2 * i + row].y; };
            uint32_t upper[4], lower[4];
            table.template decode<T>(word(1), absmax[2 * i + 1], lower);
            if (is_permuted(2 * pair + j, Shape::kPermuted)) {
              BlockLevels<T>(reinterpret_cast<const float4*>(levels), absmax[2 * i]).decode(word(0), upper);
            } else {
              table.template decode<T>(word(0), absmax[2 * i], upper);
            }
            auto* sum = reinterpret_cast<float(*)[4]>(sums + i * Shape::kMTiles * 4);
#pragma unroll
            for (int m = 0; m < Shape::kMTiles; ++m) {
              multiply(sum[m], upper[0], lower[0], upper[1], lower[1], b[m].x, b[m].y, T{});
              multiply(sum[m], upper[2], lower[2], upper[3], lower[3], b[m].z, b[m].w, T{});
            }
          }
        }
      }
      __syncwarp();
      arrive(empty + slot, lane == 0);
      slot += kGroups;
      if (slot >= Shape::kSlots) slot -= Shape::kSlots, parity ^= 1;
    }
    const int last = (tile_end - 1 - begin) % kGroups;
    groups.join(sums, group, last, tile - first_tile, MmaTile<Shape, T>(a, partition, tile, m0, row_warp));
  }
#endif
}

template <typename Shape, typename T>
cudaError_t launch_stream(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = by_absmax(a.w, [](auto absmax) { return linear_stream_kernel<Shape, T, absmax.value>; });
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  StreamMaps maps;
  error = encode_maps<Shape>(a, &maps);
  if (error != cudaSuccess) return error;
  const Partition partition = Shape::partition(a.sizes());
  const dim3 grid(partition.blocks, ceil_div(a.m, Shape::kM));
  kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(a, partition, maps);
  error = cudaGetLastError();
  return error != cudaSuccess ? error : launch_sum_partials<Shape>(a, partition, stream);
}

}  // namespace qsharded
