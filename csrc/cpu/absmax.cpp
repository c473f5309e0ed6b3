// NF4's second level on the CPU: absmax - mean to 8 bits under one scale for 256 values, in steps that ranks can take
// together.
#include <algorithm>
#include <cmath>

#include "../qsharded.h"
#include "nf4_kernels.h"
#include "parallel.h"
#include "scalar_types.h"

namespace qsharded {
namespace {

constexpr int kRowsSideBySide = 8;  // a row's additions wait for each other; those of eight rows do not
// Many times what waking a thread takes.
constexpr int64_t kRowsAtATime = 1024;
constexpr int64_t kBlocksAtATime = 128;

// Of `rows` rows, kRowsSideBySide or fewer.
void sum_rows(const float* absmax, int64_t rows, int64_t columns, double* row_sums) {
  double sums[kRowsSideBySide] = {};
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t row = 0; row < rows; ++row) sums[row] += absmax[row * columns + column];
  std::copy_n(sums, rows, row_sums);
}

// What `count` values that begin at value `first` of their weight hold of its second-level blocks: work(block, begin,
// end), the last two counted from `first`.
template <typename Work>
void parallel_second_level(int64_t first, int64_t count, int threads, const Work& work) {
  if (count == 0) return;
  const int64_t before = first / kAbsmaxBlock, blocks = (first + count - 1) / kAbsmaxBlock + 1 - before;
  parallel_ranges(blocks, kBlocksAtATime, threads, [=, &work](int64_t begin, int64_t end) {
    for (int64_t block = before + begin; block < before + end; ++block) {
      const int64_t start = block * kAbsmaxBlock - first;
      work(block, std::max<int64_t>(start, 0), std::min(start + kAbsmaxBlock, count));
    }
  });
}

float largest_distance(const float* absmax, int64_t begin, int64_t end, float offset) {
  float largest = 0;
  for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(absmax[i] - offset));
  return largest;
}

// How many of the 255 thresholds lie below a value: a look-up by its upper 15 bits, sign and exponent and six of the
// mantissa, finds how many lie below all floats that share them, and seldom more than one lies among those.
class Codes {
 public:
  explicit Codes(const float* thresholds) {
    std::copy_n(thresholds, kThresholds, thresholds_);
    thresholds_[kThresholds] = INFINITY;
    for (uint32_t key = 0, code = 0; key < kPositive; ++key) below_[key] = code = advance(code, float_of(key << kShift));
    // of negative keys the largest is the lowest value
    for (uint32_t key = 2 * kPositive, code = 0; key-- > kPositive;)
      below_[key] = code = advance(code, float_of(((key + 1) << kShift) - 1));
  }

  uint8_t of(float value) const {
    const uint32_t code = below_[bits_of(value) >> kShift];
    return static_cast<uint8_t>(advance(code + (thresholds_[code] < value), value));
  }

 private:
  static constexpr int kThresholds = 255, kShift = 17;
  static constexpr uint32_t kPositive = 1u << (31 - kShift);  // keys of floats without a sign bit

  uint32_t advance(uint32_t code, float value) const {
    while (thresholds_[code] < value) ++code;
    return code;
  }

  float thresholds_[kThresholds + 1];
  uint8_t below_[2 * kPositive];
};

void encode(const float* absmax, int64_t begin, int64_t end, float offset, float scale, const Codes& code,
            uint8_t* codes) {
  const float reciprocal = 1.0f / std::max(scale, kSmallestAbsmax);
  for (int64_t i = begin; i < end; ++i) codes[i] = code.of((absmax[i] - offset) * reciprocal);
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cpu_absmax_row_sums(const float* absmax, int64_t rows, int64_t blocks_per_row, double* row_sums,
                                 int threads) {
  parallel_ranges(rows, kRowsAtATime, threads, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kRowsSideBySide)
      sum_rows(absmax + row * blocks_per_row, std::min<int64_t>(kRowsSideBySide, last - row), blocks_per_row,
               row_sums + row);
  });
  return QSHARDED_OK;
}

int qsharded_cpu_absmax_offset(const double* row_sums, int64_t rows, int64_t values, float* offset,
                               int /*threads*/) {
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += row_sums[row];
  *offset = static_cast<float>(sum / static_cast<double>(values));
  return QSHARDED_OK;
}

int qsharded_cpu_absmax_scales(const float* absmax, int64_t first, int64_t count, const float* offset, float* scales,
                               int threads) {
  parallel_second_level(first, count, threads, [=](int64_t block, int64_t begin, int64_t end) {
    scales[block] = largest_distance(absmax, begin, end, *offset);
  });
  return QSHARDED_OK;
}

int qsharded_cpu_absmax_encode(const float* absmax, int64_t first, int64_t count, const float* offset,
                               const float* scales, const float* thresholds, uint8_t* codes, int threads) {
  const Codes code(thresholds);
  parallel_second_level(first, count, threads, [=, &code](int64_t block, int64_t begin, int64_t end) {
    encode(absmax, begin, end, *offset, scales[block], code, codes);
  });
  return QSHARDED_OK;
}

int qsharded_cpu_absmax_scales_and_codes(const float* absmax, int64_t count, const float* offset,
                                         const float* thresholds, float* scales, uint8_t* codes, int threads) {
  const Codes code(thresholds);
  parallel_second_level(0, count, threads, [=, &code](int64_t block, int64_t begin, int64_t end) {
    scales[block] = largest_distance(absmax, begin, end, *offset);
    encode(absmax, begin, end, *offset, scales[block], code, codes);
  });
  return QSHARDED_OK;
}
