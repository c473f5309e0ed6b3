// What every kernel of the fused product is launched with.
#pragma once

#include "launch.cuh"
#include "linear_weight.cuh"

namespace qsharded {

struct LinearSizes {
  int64_t m;  // rows of x
  int64_t rows;
  int blocks_per_row;
  int sms;  // of the device
};

template <typename T>
struct LinearArguments {
  PackedWeight w;
  const T* x;
  int m;
  T* y;
  const T* bias;  // or null
  uint8_t* workspace;
  int sms;

  LinearSizes sizes() const { return {m, w.rows, w.blocks_per_row, sms}; }
};

}  // namespace qsharded
