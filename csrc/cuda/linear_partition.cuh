// How the fused product is shared out: tiles of output columns times chunks of K are laid in a row, tile after tile, and
// every thread block takes an equal stretch of it (stream-K). A tile that several blocks share is left by each as a
// partial sum in the workspace, and summed in the order of the blocks: the same bits in every run.
#pragma once

#include <cstdint>

namespace qsharded {

struct Partition {
  int tiles;       // of output columns (rows of the weight)
  int chunks;      // of K, in each tile
  int blocks;      // thread blocks that share the work
  bool whole;      // blocks take whole tiles: nothing to sum

  __host__ __device__ int64_t begin(int block) const {
    if (whole) return static_cast<int64_t>(block) * tiles / blocks * chunks;
    return static_cast<int64_t>(block) * tiles * chunks / blocks;
  }

  // The block whose stretch holds this unit.
  __host__ __device__ int block_of(int64_t unit) const {
    if (whole) return static_cast<int>(((unit / chunks + 1) * blocks - 1) / tiles);
    return static_cast<int>(((unit + 1) * blocks - 1) / (static_cast<int64_t>(tiles) * chunks));
  }

  __host__ __device__ int first_block(int tile) const { return block_of(static_cast<int64_t>(tile) * chunks); }
  __host__ __device__ int last_block(int tile) const { return block_of(static_cast<int64_t>(tile + 1) * chunks - 1); }

  // Going from one stretch or tile to the next raises the sum by one, so no two partial sums share a slot.
  __host__ __device__ int slot(int tile, int block) const { return tile + block; }
  __host__ __device__ int slots() const { return whole ? 0 : tiles + blocks; }
};

}  // namespace qsharded
