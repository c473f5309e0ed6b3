// How the fused product is shared out among CTAs (stream-K). W is cut into tiles of rows, each tile into chunks of columns;
// a (tile, chunk) is a unit. Units are laid in a row, tile after tile, and every CTA takes an equal stretch of them:
//
//            chunk 0   1   2   3
//   tile 0 |  CTA 0  0   0   1 |     CTA 0 has units 0 to 2, CTA 1 units 3 to 5, ..,
//   tile 1 |      1  1   2   2 |     tiles 0 and 1 are shared: partial sums
//   tile 2 |      2  3   3   3 |
//
// A tile that several CTAs share is left by each as a partial sum in the workspace; these are added in the order of the
// CTAs: the same bits in every run. A chunk is one k-tile of 256 columns, or several (linear_mma.cuh).
#pragma once

namespace qsharded {

struct Partition {
  int tiles;
  int chunks;     // units of a tile
  int ctas;
  int step;       // units that stay together: 1, or chunks where CTAs take whole tiles and nothing is left to sum
  int steps;      // of each CTA,
  int remainder;  // and one more of the first so many

  // Whether whole tiles fill the SMs nearly as well as parts: at 0.9 the second kernel would cost more than it wins.
  static bool fills(int tiles, int sms) {
    const int waves = (tiles + sms - 1) / sms;
    return tiles >= 0.9 * waves * sms;
  }

  static Partition of(int tiles, int chunks, int sms) {
    const int step = fills(tiles, sms) ? chunks : 1, all_steps = tiles * chunks / step;
    const int ctas = all_steps < sms ? all_steps : sms;
    return {tiles, chunks, ctas, step, all_steps / ctas, all_steps % ctas};
  }

  __host__ __device__ int begin(int cta) const {
    return (cta * steps + (cta < remainder ? cta : remainder)) * step;
  }

  __host__ __device__ int cta_of(int unit) const {
    const int at = unit / step, in_longer = remainder * (steps + 1);
    return at < in_longer ? at / (steps + 1) : remainder + (at - in_longer) / steps;
  }

  __host__ __device__ int first_cta(int tile) const { return cta_of(tile * chunks); }
  __host__ __device__ int last_cta(int tile) const { return cta_of((tile + 1) * chunks - 1); }

  // Number of a partial sum. Going on to the next tile or CTA raises it by one, so no two have the same.
  __host__ __device__ int partial(int tile, int cta) const { return tile + cta; }
  __host__ __device__ int partials() const { return step == 1 ? tiles + ctas : 0; }
};

}  // namespace qsharded
