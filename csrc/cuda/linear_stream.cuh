// y = x W^T for few rows of x on sm_90 and sm_100: the copy engine streams W and x to a ring in shared memory, so that the
// load-store pipe, which bounds these kernels, is left to the look-ups; from there on as in linear_mma.cuh.
//
// Units are those of a Partition: a tile of rows of W times a piece of 256 columns, each a slot of the ring. One warp
// orders copies; groups of four warps take units in turn. Lane t of four has block t of its rows.
#pragma once

#include <algorithm>

#include "linear_block_levels.cuh"
#include "linear_mma_tile.cuh"
#include "tensor_map.cuh"

namespace qsharded {

constexpr int kMostStreamBytes = 227 << 10;  // of shared memory

// kPermuted of the eight words of a row's block, in one row of two, are decoded by BlockLevels, the others by LevelTable:
// the one keeps the integer pipe busy, the other the load-store pipe.
template <int kGroups_, int kSubtiles_, int kMTiles_, int kSlots_, int kPermuted_>
struct StreamShape {
  static constexpr int kGroups = kGroups_, kSubtiles = kSubtiles_, kMTiles = kMTiles_, kSlots = kSlots_;
  static constexpr int kPermuted = kPermuted_;
  // A slot is one group's for good: whoever waits for a barrier's phase has waited for the one before it.
  static_assert(kSlots % kGroups == 0 && kSlots > kGroups);
  static constexpr int kRowWarps = 4;
  static constexpr int kWarps = kGroups * kRowWarps;  // and one that orders copies
  static constexpr int kThreads = (kWarps + 1) * kWarp;
  static_assert(kWarps * kWarp >= 256);  // the map's entries
  static constexpr int kRows = kRowWarps * kSubtiles * 16;
  static constexpr int kM = kMTiles * 8;
  static constexpr int kSums = kSubtiles * kMTiles * 4;  // that a lane holds

  // of a slot; tensor maps' swizzle wants multiples of 1,024 for the first two
  static constexpr int kCodeBytes = kRows * (kPiece / 2), kXBytes = kM * kPiece * 2, kAbsmaxBytes = kRows * 16;
  static constexpr int kXAt = kCodeBytes, kAbsmaxAt = kXAt + kXBytes;
  static constexpr int kSlotBytes = kAbsmaxAt + kAbsmaxBytes;
  static_assert(kSlotBytes % 1024 == 0);

  // of the block's memory
  static constexpr int kTableAt = kSlots * kSlotBytes, kSumsAt = kTableAt + LevelTable::kBytes;
  static constexpr int kMapAt = kSumsAt + kWarps * kSums * kWarp * 4, kLevelsAt = kMapAt + kMapBytes;
  static constexpr int kSharedBytes = kLevelsAt + 16 * 4;
  static_assert(kSharedBytes + 1024 <= kMostStreamBytes);  // with the barriers

  // The launches of kM rows of x each share the processors.
  static Partition partition(const LinearSizes& s) {
    const int processors = std::max<int>(s.processors / ceil_div(s.m, kM), 1);
    return Partition::of(ceil_div(s.rows, kRows), ceil_div(s.blocks_per_row, kPieceBlocks), processors);
  }

  static __device__ constexpr bool permuted(int word) {
    return (word + 1) * kPermuted / kWords != word * kPermuted / kWords;
  }
};

struct StreamMaps {
  CUtensorMap codes;   // [rows, bytes of codes]
  CUtensorMap x;       // [blocks, m, 64]: a box is the four lanes' blocks
  CUtensorMap absmax;  // [rows, entries]
};

inline int absmax_bytes(const PackedWeight& w) { return w.absmax_scales ? 1 : 4; }

// Tensor maps take rows that are multiples of 16 bytes apart and do not overlap.
inline bool streams(const PackedWeight& w) {
  return w.absmax_row_stride >= w.blocks_per_row && w.absmax_row_stride * absmax_bytes(w) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(w.absmax) % 16 == 0;
}

template <typename Shape, typename T>
cudaError_t encode_maps(const LinearArguments<T>& a, StreamMaps* maps) {
  const cuuint64_t rows = a.w.rows, m = a.m, blocks = a.w.blocks_per_row, entry = absmax_bytes(a.w);
  const BoxedTensor<2> codes = {CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w.codes, {blocks * (kBlock / 2), rows},
                                {blocks * (kBlock / 2)}, {kPiece / 2, Shape::kRows}, CU_TENSOR_MAP_SWIZZLE_128B};
  const BoxedTensor<3> x = {CU_TENSOR_MAP_DATA_TYPE_UINT16, a.x, {kBlock, m, blocks}, {blocks * kBlock * 2, kBlock * 2},
                            {kBlock, Shape::kM, kPieceBlocks}, CU_TENSOR_MAP_SWIZZLE_128B};
  const BoxedTensor<2> absmax = {entry == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT32, a.w.absmax,
                                 {blocks, rows}, {a.w.absmax_row_stride * entry},
                                 {static_cast<cuuint32_t>(16 / entry), Shape::kRows}, CU_TENSOR_MAP_SWIZZLE_NONE};
  cudaError_t error = codes.encode(&maps->codes);
  if (error == cudaSuccess) error = x.encode(&maps->x);
  return error == cudaSuccess ? absmax.encode(&maps->absmax) : error;
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

  template <bool kDoubleQuant>
  __device__ void copy(const StreamMaps& maps, const Partition& partition, int unit, int number, int m0) const {
    const int tile = unit / partition.chunks, block = unit % partition.chunks * kPieceBlocks, slot = number % Shape::kSlots;
    uint8_t* const to = slots + slot * Shape::kSlotBytes;
    expect_bytes(full + slot, Shape::kSlotBytes);
    const int entry = kDoubleQuant ? block / 16 * 16 : block;  // boxes begin at multiples of 16 bytes
    copy_box(to + Shape::kAbsmaxAt, maps.absmax, entry, tile * Shape::kRows, full + slot);
    copy_box(to, maps.codes, block * (kBlock / 2), tile * Shape::kRows, full + slot);
    copy_box(to + Shape::kXAt, maps.x, 0, m0, block, full + slot);
  }
};

__device__ inline uint2 load_shared_8(uint32_t address) {
  uint2 loaded;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(loaded.x), "=r"(loaded.y) : "r"(address));
  return loaded;
}

__device__ inline uint4 load_shared_16(uint32_t address) {
  uint4 loaded;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
               : "r"(address));
  return loaded;
}

// The groups' sums of a tile, for each place among a group's warps. Nobody waits: the last warp to come adds them up, in
// the order of the groups, while the others go on to the next tile.
template <typename Shape>
struct GroupSums {
  float* own;  // of this lane, in the first group
  int* arrived;
  int* done;  // tiles

  template <typename T>
  __device__ void join(const float (&sums)[Shape::kSums], int group, int number, const MmaTile<Shape, T>& out) const {
    constexpr int kGroup = Shape::kRowWarps * Shape::kSums * kWarp;
    const int lane = threadIdx.x % kWarp;
    while (*static_cast<volatile int*>(done) != number) {
    }
    __threadfence_block();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Shape::kSums; ++i) own[group * kGroup + i * kWarp] = sums[i];
    __threadfence_block();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(arrived, 1);
    if (__shfl_sync(~0u, before, 0) + 1 != Shape::kGroups * (number + 1)) return;
    __threadfence_block();
#pragma unroll
    for (int i = 0; i < Shape::kSums; ++i) {
      float sum = 0;
#pragma unroll
      for (int of = 0; of < Shape::kGroups; ++of) sum += own[of * kGroup + i * kWarp];
      out.write(i, sum);
    }
    __threadfence_block();
    __syncwarp();
    if (lane == 0) *static_cast<volatile int*>(done) = number + 1;
  }
};
#endif

template <typename Shape, typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    linear_stream_kernel(const __grid_constant__ LinearArguments<T> a, const __grid_constant__ Partition partition,
                         const __grid_constant__ StreamMaps maps) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSubtiles = Shape::kSubtiles, kGroups = Shape::kGroups;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[Shape::kSlots];
  __shared__ uint64_t empty[Shape::kSlots];
  __shared__ int arrived[Shape::kRowWarps];
  __shared__ int done[Shape::kRowWarps];
  const Ring<Shape> ring = {shared, full, empty};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, m0 = blockIdx.y * Shape::kM;
  const int begin = partition.begin(blockIdx.x), end = partition.begin(blockIdx.x + 1), chunks = partition.chunks;

  if (warp == Shape::kWarps) {
    const auto copy = [&](int unit) { ring.template copy<kDoubleQuant>(maps, partition, unit, unit - begin, m0); };
    if (lane == 0) {
      ring.init();
      for (int unit = begin; unit < end && unit < begin + Shape::kSlots; ++unit) copy(unit);
    }
    __syncthreads();
    if (lane != 0) return;
    for (int unit = begin + Shape::kSlots; unit < end; ++unit) {
      const int before = unit - begin - Shape::kSlots;
      wait_for(empty + before % Shape::kSlots, before / Shape::kSlots % 2);
      copy(unit);
    }
    return;
  }

  let_next_kernel_start();
  const int group = warp / Shape::kRowWarps, row_warp = warp % Shape::kRowWarps, t = lane % 4;
  const int own_row = row_warp * kSubtiles * 16 + lane / 4;  // and every eighth after it
  const unsigned blocks = a.w.blocks_per_row, padded_blocks = chunks * kPieceBlocks;
  float* const map = reinterpret_cast<float*>(shared + Shape::kMapAt);
  float* const levels = reinterpret_cast<float*>(shared + Shape::kLevelsAt);

  // the second level of absmax comes by loads, a unit ahead: 256 blocks share an entry
  int unit = begin + group, next_tile = unit / chunks;
  unsigned block = unit % chunks * kPieceBlocks + t;
  float scales[2 * kSubtiles] = {};
  const auto load_scales = [&](bool more) {
    if constexpr (kDoubleQuant) {
#pragma unroll
      for (int i = 0; i < 2 * kSubtiles; ++i) {
        const int64_t row = min(next_tile * int64_t{Shape::kRows} + own_row + i * 8, a.w.rows - 1);
        load_if(scales[i], a.w.absmax_scales + (static_cast<unsigned>(row) * blocks + block) / kAbsmaxBlock,
                more && block < blocks);
      }
    }
  };
  const AbsmaxMap<kDoubleQuant> absmax_map(a.w);
  load_scales(unit < end);
  LevelTable::fill<Shape::kWarps * kWarp>(shared + Shape::kTableAt, a.w.levels);
  absmax_map.store(map);
  if (threadIdx.x < 16) levels[threadIdx.x] = __ldg(a.w.levels + threadIdx.x);
  if (threadIdx.x < Shape::kRowWarps) arrived[threadIdx.x] = done[threadIdx.x] = 0;
  __syncthreads();

  const LevelTable table(shared + Shape::kTableAt);
  const GroupSums<Shape> groups = {
      reinterpret_cast<float*>(shared + Shape::kSumsAt) + row_warp * Shape::kSums * kWarp + lane, arrived + row_warp,
      done + row_warp};
  const uint32_t swizzle = lane / 4 * 16;  // of rows of 128 bytes, W's and x's
  int slot = group, parity = 0;
  const int first_tile = begin / chunks;
  for (int tile = first_tile; tile * chunks < end; ++tile) {
    const int tile_end = min(end, (tile + 1) * chunks);
    float sums[Shape::kSums] = {};
    for (; unit < tile_end; unit += kGroups) {
      const bool inside = block < blocks;
      wait_for(full + slot, parity);
      float absmax[2 * kSubtiles];
#pragma unroll
      for (int i = 0; i < 2 * kSubtiles; ++i) {
        const uint8_t* const at = ring.slots + slot * Shape::kSlotBytes + Shape::kAbsmaxAt + (own_row + i * 8) * 16;
        if constexpr (kDoubleQuant) {
          absmax[i] = decode_absmax(map[at[block % 16]], scales[i], absmax_map.offset);
        } else {
          absmax[i] = reinterpret_cast<const float*>(at)[t];
        }
        if (!inside) absmax[i] = 0;
      }
      block += kGroups * kPieceBlocks;
      while (block >= padded_blocks) block -= padded_blocks, ++next_tile;
      load_scales(unit + kGroups < end);

      const uint32_t slot_at = shared_address(ring.slots) + slot * Shape::kSlotBytes;
      const uint32_t codes = slot_at + own_row * (kPiece / 2);
      const uint32_t x = slot_at + Shape::kXAt + (t * Shape::kM + lane / 4) * (kBlock * 2);
#pragma unroll
      for (int pair = 0; pair < kWords / 2; ++pair) {
        // each of the four lanes begins with another pair of words: they find their codes and x in different banks
        const int own_pair = pair ^ t;
        uint2 words[2 * kSubtiles];
#pragma unroll
        for (int i = 0; i < 2 * kSubtiles; ++i) {
          words[i] = load_shared_8(codes + i * 8 * (kPiece / 2) + ((t * (kBlock / 2) + own_pair * 8) ^ swizzle));
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint4 b[Shape::kMTiles];
#pragma unroll
          for (int m = 0; m < Shape::kMTiles; ++m) {
            b[m] = load_shared_16(x + m * 8 * (kBlock * 2) + ((own_pair * 32 + j * 16) ^ swizzle));
          }
#pragma unroll
          for (int i = 0; i < kSubtiles; ++i) {
            const auto word = [&](int row) { return j == 0 ? words[2 * i + row].x : words[2 * i + row].y; };
            uint32_t upper[4], lower[4];
            table.template decode<T>(word(1), absmax[2 * i + 1], lower);
            if (Shape::permuted(2 * pair + j)) {
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
    groups.join(sums, group, tile - first_tile, MmaTile<Shape, T>(a, partition, tile, m0, row_warp));
  }
#endif
}

template <typename Shape, typename T>
cudaError_t launch_stream(const LinearArguments<T>& a, cudaStream_t stream) {
  const auto kernel = a.w.absmax_scales ? linear_stream_kernel<Shape, T, true> : linear_stream_kernel<Shape, T, false>;
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
