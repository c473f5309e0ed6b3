// How the fused product is shared out: tiles of rows of W times chunks of its columns are laid in a row, tile after tile,
// and every thread block takes an equal stretch of these units (stream-K). A tile that several blocks share is left by
// each as a partial sum in the workspace, and summed in the order of the blocks: the same bits in every run.
#pragma once

namespace qsharded {

struct Partition {
  int tiles;
  int chunks;     // units of a tile
  int blocks;     // thread blocks
  int step;       // units that stay together: 1, or chunks where blocks take whole tiles and nothing is left to sum
  int steps;      // of each block,
  int remainder;  // and one more of the first so many

  // Whether whole tiles fill the processors nearly as well as parts: at 0.9 the second kernel would cost more than it wins.
  static bool fills(int tiles, int processors) {
    const int waves = (tiles + processors - 1) / processors;
    return tiles >= 0.9 * waves * processors;
  }

  static Partition of(int tiles, int chunks, int processors) {
    const int step = fills(tiles, processors) ? chunks : 1, all_steps = tiles * chunks / step;
    const int blocks = all_steps < processors ? all_steps : processors;
    return {tiles, chunks, blocks, step, all_steps / blocks, all_steps % blocks};
  }

  __host__ __device__ int begin(int block) const {
    return (block * steps + (block < remainder ? block : remainder)) * step;
  }

  __host__ __device__ int block_of(int unit) const {
    const int at = unit / step, in_longer = remainder * (steps + 1);
    return at < in_longer ? at / (steps + 1) : remainder + (at - in_longer) / steps;
  }

  __host__ __device__ int first_block(int tile) const { return block_of(tile * chunks); }
  __host__ __device__ int last_block(int tile) const { return block_of((tile + 1) * chunks - 1); }

  // Going on to the next tile or block raises the sum by one, so no two partial sums share a slot.
  __host__ __device__ int slot(int tile, int block) const { return tile + block; }
  __host__ __device__ int slots() const { return step == 1 ? tiles + blocks : 0; }
};

}  // namespace qsharded
