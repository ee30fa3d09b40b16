// Jobs of several steps on a team whose threads are held up now and then: crew THREADS CALLS. Prints how many
// states it came to: two where nobody was ever left behind. Fails where a result differs from that of one thread.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

constexpr std::size_t kUnits = 64, kSteps = 6;
using Units = std::vector<std::uint64_t>;

std::uint64_t mix(std::uint64_t a, std::uint64_t b) { return (a ^ (b >> 7)) * 0x9E3779B97F4A7C15u + b; }

struct Memory {
  std::vector<Units> states, spaces;
};

struct Call {
  Memory* memory;
  std::vector<std::uint64_t> start;
};

// A held-up thread finishes its piece long after the others have gone on.
void work(std::uint64_t seed) {
  thread_local std::mt19937 random(static_cast<unsigned>(seed));
  const auto pause = random() % 400;
  if (pause == 0) std::this_thread::sleep_for(std::chrono::milliseconds(4));
  if (pause == 1) std::this_thread::sleep_for(std::chrono::microseconds(300));
}

void run(const void* context, std::size_t thread, sparsemae::Crew& crew) {
  const Call& call = *static_cast<const Call*>(context);
  const Units& in = crew.step ? call.memory->states[crew.input] : call.start;
  Units &out = call.memory->states[crew.output], &space = call.memory->spaces[crew.space];
  std::size_t stage = 0;
  const auto share = [&](const auto& unit) {
    if (stage++ < crew.first_stage) return;
    if (stage > crew.first_stage + 1) crew.barrier(thread);
    crew.begin_stage(stage - 1);
    for (std::size_t i = 0; i < crew.size; ++i) {
      const std::size_t owner = (crew.rank(thread) + i) % crew.size, end = kUnits * (owner + 1) / crew.size;
      for (std::size_t at; !crew.left_behind() &&
                           (at = kUnits * owner / crew.size + crew.counter(owner, stage - 1).fetch_add(1)) < end;) {
        work(thread + 1);
        unit(at);
      }
    }
  };
  share([&](std::size_t u) { space[u] = mix(in[u], in[(u + 1) % kUnits]); });
  share([&](std::size_t u) { out[u] = mix(space[u], space[(u + 5) % kUnits]); });
  share([&](std::size_t u) { out[u] += crew.step; });
}

void reserve(const void* context, std::size_t states, std::size_t spaces) {
  Memory& memory = *static_cast<const Call*>(context)->memory;
  while (memory.states.size() < states) memory.states.emplace_back(kUnits);
  while (memory.spaces.size() < spaces) memory.spaces.emplace_back(kUnits);
}

Units expected(Units in) {
  Units space(kUnits), out(kUnits);
  for (std::size_t step = 0; step < kSteps; ++step) {
    for (std::size_t u = 0; u < kUnits; ++u) space[u] = mix(in[u], in[(u + 1) % kUnits]);
    for (std::size_t u = 0; u < kUnits; ++u) out[u] = mix(space[u], space[(u + 5) % kUnits]) + step;
    in = out;
  }
  return in;
}

}  // namespace

int main(int, char** argv) {
  const std::size_t threads = std::strtoul(argv[1], nullptr, 10), calls = std::strtoul(argv[2], nullptr, 10);
  Memory memory;
  memory.states.reserve(2 * threads + 2);
  memory.spaces.reserve(threads + 1);
  sparsemae::ThreadPool pool(threads);
  for (std::size_t i = 0; i < calls; ++i) {
    const auto lock = pool.acquire();
    Call* call = new Call{&memory, Units(kUnits)};
    for (std::size_t u = 0; u < kUnits; ++u) call->start[u] = mix(i, u);
    const Units wanted = expected(call->start);
    const auto result = pool.run_steps({run, reserve, kSteps}, std::shared_ptr<const Call>(call));
    if (memory.states[result.output] != wanted) {
      std::printf("call %zu differs\n", i);
      return 1;
    }
    if (i % 16 == 0) {  // a job that is not cut in steps waits for all
      std::atomic<std::size_t> ran{0};
      pool.run([](void* context, std::size_t) { ++*static_cast<std::atomic<std::size_t>*>(context); }, &ran);
      if (ran != pool.size()) return 2;
    }
  }
  std::printf("%zu states\n", memory.states.size());
  return 0;
}
