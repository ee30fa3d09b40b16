// What this processor is and which instructions it has. Virtual machines hide its name, but not its numbers.
#pragma once

#include <string>
#include <vector>

namespace sparsemae {

struct Processor {
  std::string vendor;  // empty where cpuid is not to be had
  unsigned family = 0, model = 0, stepping = 0;
  // Each with what it builds on, and only where the operating system saves its registers.
  bool avx2 = false, avxvnni = false, avx512 = false, avx512bf16 = false, avx512vnni = false, avx512vbmi = false,
       amx = false, avx512fp16 = false, neonfp16 = false;

  std::string name() const;                   // "vendor family/model/stepping"
  std::vector<std::string> features() const;  // names of the instruction sets above
};

const Processor& this_processor();

}  // namespace sparsemae
