#include "dispatch.h"

#include <stdexcept>

#include "processor.h"

namespace sparsemae {
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> tables;
#if defined(SPARSEMAE_X86)
  const Processor& processor = this_processor();
  if (processor.avx512fp16) tables.push_back(avx512fp16_kernels());
  if (processor.amx && processor.avx512vnni && processor.avx512vbmi) tables.push_back(amxvnni_kernels());
  if (processor.amx) tables.push_back(amx_kernels());
  if (processor.avx512bf16 && processor.avx512vnni && processor.avx512vbmi) tables.push_back(avx512vnni_kernels());
  if (processor.avx512bf16) tables.push_back(avx512bf16_kernels());
  if (processor.avx512) tables.push_back(avx512_kernels());
  if (processor.avxvnni) tables.push_back(avxvnni_kernels());
  if (processor.avx2) tables.push_back(avx2_kernels());
#elif defined(SPARSEMAE_NEON)
  if (this_processor().neonfp16) tables.push_back(neonfp16_kernels());
  tables.push_back(neon_kernels());  // every such processor has it
#endif
  tables.push_back(portable_kernels());
  return tables;
}

static bool can_run(const Kernels& table, const Needs& needs) {
  if (!needs.quantize && table.math == std::string("int8")) return false;
  if (needs.exact && table.math != std::string("fp32")) return false;
  if (needs.odd_heads && table.even_heads) return false;
  return table.max_magnitude == 0.0f || needs.max_input < table.max_magnitude;
}

// Whether one further down is not faster for such a model.
static bool is_best(const Kernels& table, const Needs& needs) {
  return needs.density <= table.max_density && (needs.quantize || !table.best_for_int8) &&
         !(needs.quantize && table.embedding && table.embedding()->quantize);
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
