// The threads that take a step of a job together.
//
// On a busy machine the system stops one of them for some milliseconds while the others wait at a barrier, so these
// leave it behind: they begin the step again, without it and in memory of their own, and it joins them later. A step
// must therefore only read what the one before has written (`input`), and write to what nobody else uses (`output`,
// `space`): numbers that are given again once nobody is left who might still write there.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#if !defined(__wasm__)
#include <chrono>
#include <vector>
#endif

namespace sparsemae {

class Crew;
class Team;

struct Job {
  // By every member of a crew; what it reads through `call` of the caller's memory, it reads in step 0.
  void (*run)(const void* call, std::size_t thread, Crew&);
  // Sees to it that there are so many states (inputs and outputs) and spaces; may throw.
  void (*reserve)(const void* call, std::size_t states, std::size_t spaces);
  std::size_t steps;
};

// Of the last step; both stay as they are until the next job.
struct StepsResult {
  std::size_t output, space;
};

#if defined(__wasm__)
// WebAssembly has one thread.
class Crew {
 public:
  std::size_t step = 0, first_stage = 0, size = 1, input = 0, output = 0, space = 0;

  std::size_t rank(std::size_t) const { return 0; }
  bool left_behind() const { return false; }
  void barrier(std::size_t) {}
  void begin_stage(std::size_t) {}
  std::atomic<std::uint32_t>& counter(std::size_t, std::size_t) { return counter_; }

 private:
  std::atomic<std::uint32_t> counter_{0};
};

#else

class Crew {
 public:
  static constexpr std::size_t kStages = 12;  // of a step that can have counters

  std::size_t step = 0, first_stage = 0, size = 0;  // first_stage: those before are done
  std::size_t input = 0, output = 0, space = 0;

  std::size_t rank(std::size_t thread) const { return ranks_[thread]; }  // below size
  // The others go on without this thread: nothing of what it does in this step is used.
  bool left_behind() const { return state_.load(std::memory_order_acquire) & 1; }
  // Returns when all of the crew have come here, or have left this thread behind.
  void barrier(std::size_t thread);
  // Before each stage that the thread has to itself: a lone one shares the rest of the step with those who have come
  // back since it began.
  void begin_stage(std::size_t stage) {
    if (size == 1 && stage > first_stage) share(stage);
  }
  // 0 when the step begins.
  std::atomic<std::uint32_t>& counter(std::size_t rank, std::size_t stage) { return members_[rank].counters[stage]; }

 private:
  friend class Team;
  void share(std::size_t stage);
  struct alignas(64) Member {
    std::atomic<std::uint32_t> counters[kStages];
    std::atomic<std::uint32_t> arrived;  // at the barrier whose state is two less
  };

  Team* team_ = nullptr;
  Job job_{};
  std::shared_ptr<const void> call_;
  std::vector<std::size_t> ranks_;  // of the team's threads
  std::vector<Member> members_;
  bool given_up_ = false;  // its step was begun again
  std::chrono::steady_clock::time_point begin_;
  std::atomic<std::int64_t> patience_ns_;              // how long a barrier waits
  std::atomic<std::int64_t> longest_wait_ns_;          // at a barrier
  alignas(64) std::atomic<std::size_t> inside_{0};     // members that may still run the step
  alignas(64) std::atomic<std::uint32_t> arrived_{0};  // at the barrier that is next
  alignas(64) std::atomic<std::uint32_t> state_{0};    // 2 * barriers passed, + 1 once it is given up
};
#endif

}  // namespace sparsemae
