#include "dispatch.h"

#include <stdexcept>

#if defined(SPARSEMAE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sparsemae {
namespace {

#if defined(SPARSEMAE_X86)
bool bit(unsigned value, unsigned index) { return value >> index & 1; }

// Linux gives a process its tile registers only when it asks for them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool request_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

struct Processor {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false, avx512fp16 = false;

  Processor() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return;  // the system saves vector registers
    const bool fma = bit(c, 12);
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xE6) == 0xE6, tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const bool vbmi2 = bit(c, 6), amx_bits = bit(d, 22) && bit(d, 24) && bit(d, 25);  // BF16, TILE, INT8
    avx2 = ymm && fma && bit(b, 5);
    avx512 = avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
    const bool fp16_bit = bit(d, 23);
    unsigned a1, b1, c1, d1;
    avx512bf16 = avx512 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && bit(a1, 5);
    amx = avx512bf16 && vbmi2 && amx_bits && tiles && request_tiles();
    avx512fp16 = amx && fp16_bit;
  }
};
#endif

}  // namespace

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> tables;
#if defined(SPARSEMAE_X86)
  static const Processor processor;
  if (processor.avx512fp16) tables.push_back(avx512fp16_kernels());
  if (processor.amx) tables.push_back(amx_kernels());
  if (processor.avx512bf16) tables.push_back(avx512bf16_kernels());
  if (processor.avx512) tables.push_back(avx512_kernels());
  if (processor.avx2) tables.push_back(avx2_kernels());
#endif
  tables.push_back(portable_kernels());
  return tables;
}

static bool can_run(const Kernels& table, const Needs& needs) {
  if (needs.exact && table.math != std::string("fp32")) return false;
  if (needs.odd_heads && table.even_heads) return false;
  return table.max_magnitude == 0.0f || needs.max_input < table.max_magnitude;
}

// Whether one further down is not faster for such a model.
static bool is_best(const Kernels& table, const Needs& needs) {
  return needs.density <= table.max_density && !(needs.quantize && table.embedding && table.embedding()->quantize);
}

const Kernels* choose_kernels(const std::string& isa, const Needs& needs) {
  std::string names;
  bool reached = isa.empty();
  for (const Kernels* table : usable_kernels()) {
    const bool named = isa == table->name;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
    reached = reached || named;
    if (reached && can_run(*table, needs) && (named || is_best(*table, needs))) return table;
  }
  throw std::invalid_argument("instruction set must be one of " + names + " on this processor, got '" + isa + "'");
}

}  // namespace sparsemae
