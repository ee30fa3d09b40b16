#include "processor.h"

#if defined(SPARSEMAE_X86)
#include <cpuid.h>

#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(SPARSEMAE_NEON) && defined(__linux__)
#include <sys/auxv.h>
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

void identify(Processor& p) {
  unsigned a, b, c, d;
  char vendor[12];
  if (!__get_cpuid(0, &a, &b, &c, &d)) return;
  std::memcpy(vendor, &b, 4);
  std::memcpy(vendor + 4, &d, 4);
  std::memcpy(vendor + 8, &c, 4);
  p.vendor.assign(vendor, sizeof vendor);
  __get_cpuid(1, &a, &b, &c, &d);
  p.family = a >> 8 & 0xF;
  p.model = a >> 4 & 0xF;
  p.stepping = a & 0xF;
  if (p.family == 6 || p.family == 15) p.model += a >> 12 & 0xF0;
  if (p.family == 15) p.family += a >> 20 & 0xFF;
}

void find_features(Processor& p) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return;  // the system saves vector registers
  const bool fma = bit(c, 12);
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xE6) == 0xE6, tiles = (low & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  p.avx2 = ymm && fma && bit(b, 5);
  p.avx512 = p.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  p.avx512vbmi = p.avx512 && bit(c, 1);
  p.avx512vnni = p.avx512 && bit(c, 11);
  const bool vbmi2 = bit(c, 6), fp16 = bit(d, 23), amx = bit(d, 22) && bit(d, 24) && bit(d, 25);  // BF16, TILE, INT8
  unsigned a1, b1, c1, d1;
  const bool more = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
  p.avxvnni = p.avx2 && more && bit(a1, 4);
  p.avx512bf16 = p.avx512 && more && bit(a1, 5);
  p.amx = p.avx512bf16 && vbmi2 && amx && tiles && request_tiles();
  p.avx512fp16 = p.amx && fp16;
}
#elif defined(SPARSEMAE_NEON)
void find_features([[maybe_unused]] Processor& p) {
#if defined(__linux__)
  p.neonfp16 = getauxval(AT_HWCAP) & HWCAP_ASIMDHP;
#elif defined(__APPLE__)
  p.neonfp16 = true;  // every Mac's that is an Arm
#endif
}
#endif

}  // namespace

std::string Processor::name() const {
  return vendor.empty()
             ? ""
             : vendor + " " + std::to_string(family) + "/" + std::to_string(model) + "/" + std::to_string(stepping);
}

std::vector<std::string> Processor::features() const {
  std::vector<std::string> names;
  const auto add = [&](bool has, const char* feature) {
    if (has) names.emplace_back(feature);
  };
  add(avx2, "avx2");
  add(avxvnni, "avxvnni");
  add(avx512, "avx512");
  add(avx512bf16, "bf16");
  add(avx512vnni, "vnni");
  add(avx512vbmi, "vbmi");
  add(avx512fp16 || neonfp16, "fp16");
  add(amx, "amx");
  return names;
}

const Processor& this_processor() {
  static const Processor processor = [] {
    Processor p;
#if defined(SPARSEMAE_X86)
    identify(p);
    find_features(p);
#elif defined(SPARSEMAE_NEON)
    find_features(p);
#endif
    return p;
  }();
  return processor;
}

}  // namespace sparsemae
