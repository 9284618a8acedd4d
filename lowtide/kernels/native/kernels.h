// The table of kernels of one instruction set.

#pragma once
#include "lowtide.h"
#include "pool.h"

namespace lowtide {

constexpr int KERNELS = 9;

struct Table {
  void (*run[KERNELS])(const void* arguments, Team& team);
  int64_t (*attention_scratch)(const Attention& arguments);
};

int32_t run_calls(const Table& table, const Call* calls, int64_t count, int threads);

}  // namespace lowtide
