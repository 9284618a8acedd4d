// The C interface, and the choice of the best instruction set of this machine.

#include "kernels.h"

#define LOWTIDE_DECLARE(set) \
  namespace lowtide {        \
  namespace set {            \
  extern const Table table;  \
  }                          \
  }

LOWTIDE_DECLARE(portable)
#if defined(__x86_64__)
LOWTIDE_DECLARE(avx2)
LOWTIDE_DECLARE(avxvnni)
LOWTIDE_DECLARE(avx512vnni)
#include <cpuid.h>
#endif

namespace lowtide {
namespace {

enum Set : int32_t { PORTABLE = 1, AVX2 = 2, AVXVNNI = 4, AVX512VNNI = 8 };

#if defined(__x86_64__)
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

// __builtin_cpu_supports also asks whether the system saves the registers.
int32_t find_sets() {
  int32_t sets = PORTABLE;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) sets |= AVX2;
  if (avx2 && has_avx_vnni()) sets |= AVXVNNI;
  if (avx2 && avx512 && __builtin_cpu_supports("avx512vnni")) sets |= AVX512VNNI;
#endif
  return sets;
}

int32_t sets_of_machine() {
  static const int32_t sets = find_sets();
  return sets;
}

// The table of one set, or null where the machine does not have it.
const Table* table_of(int32_t set) {
  const int32_t sets = sets_of_machine();
  if (set == 0) {
    for (int32_t best = AVX512VNNI; best > PORTABLE; best >>= 1) {
      if (sets & best) return table_of(best);
    }
    return &portable::table;
  }
  if ((sets & set) == 0) return nullptr;
#if defined(__x86_64__)
  if (set == AVX512VNNI) return &avx512vnni::table;
  if (set == AVXVNNI) return &avxvnni::table;
  if (set == AVX2) return &avx2::table;
#endif
  return set == PORTABLE ? &portable::table : nullptr;
}

}  // namespace
}  // namespace lowtide

extern "C" {

int32_t lowtide_abi(void) { return LOWTIDE_ABI; }

int32_t lowtide_instruction_sets(void) { return lowtide::sets_of_machine(); }

// The layout is the same for all sets.
int64_t lowtide_attention_scratch(const Attention* a) {
  return lowtide::portable::table.attention_scratch(*a);
}

int32_t lowtide_run(const Call* calls, int64_t count, int32_t threads, int32_t set) {
  const lowtide::Table* table = lowtide::table_of(set);
  if (table == nullptr) return BAD_CALL;
  return lowtide::run_calls(*table, calls, count, threads);
}

int64_t lowtide_sizeof(int32_t which) {
  static const int64_t sizes[] = {sizeof(Gemm),      sizeof(GroupMoments), sizeof(Stream),
                                  sizeof(LayerNorm), sizeof(Attention),    sizeof(Row),
                                  sizeof(Arrange),   sizeof(Hash),         sizeof(Checksum),
                                  sizeof(Sink),      sizeof(Weight),       sizeof(Operand)};
  constexpr int32_t count = sizeof(sizes) / sizeof(sizes[0]);
  return which >= 0 && which < count ? sizes[which] : -1;
}
}
