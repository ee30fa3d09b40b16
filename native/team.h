// The threads of a pool, and who of them works on what.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "crew.h"

namespace sparsemae {

// Waiting spins at first and then sleeps: a forward has many short stages, so that sleeping at once would cost a
// wake-up each, and spinning for long collapses when another process wants the core (the one that is waited for cannot
// run).
class Team {
 public:
  ~Team();

  std::mutex calls;  // one at a time

  void start(std::size_t threads);
  std::size_t size() const { return workers_.size() + 1; }
  bool idle() const { return idle_; }  // its threads are not started yet

  void run(void (*job)(void* context, std::size_t thread), void* context);
  StepsResult run_steps(const Job& job, std::shared_ptr<const void> call);

 private:
  friend class Crew;
  enum class Met { last, passed, left };
  enum Place : std::uint8_t { asleep, awake, away };  // away: in a crew, or with a seat in one
  struct alignas(64) Seat {
    std::atomic<Crew*> crew{nullptr};  // that the thread is to join
    std::atomic<std::uint8_t> place{asleep};
  };
  struct Pace {                                                                       // of a step
    std::chrono::nanoseconds time = std::chrono::nanoseconds::max(), longest_wait{};  // when all were fastest
    unsigned doublings = 0;  // of patience: one more for each crew that was given up, one less for each that was not
  };
  struct Part {  // of a job
    std::size_t step, first_stage, input, output, space;
  };
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

  void begin(const Job& job, std::shared_ptr<const void> call);
  void publish();
  void take_part(std::size_t thread);
  Crew* next(std::size_t thread);
  void finish(std::size_t thread, Crew&);
  Met meet(Crew&, std::size_t thread);
  Met wait(Crew&, std::uint32_t at);
  static std::chrono::nanoseconds patience(const Pace&);
  template <class F>
  void wait_for_stragglers(const F& of);

  // These change who has which seat.
  void complete(const Crew&);
  void begin_again(Crew&, std::uint32_t at);
  void share(Crew&, std::size_t stage);

  // With the mutex held.
  template <class F>
  void compose(const Part& part, const F& member);
  template <class F>
  bool in_use(const F& is_used) const;
  std::size_t free_state(std::size_t except) const;
  std::size_t free_space() const;
  Part first_step() const;
  void reserve(const Job& job, const void* call) const;

  std::vector<std::thread> workers_;
  std::vector<Seat> seats_;
  std::vector<Pace> paces_;  // of the steps of the last job that had several
  bool idle_ = true;
  std::atomic<bool> stop_{false}, done_{true};
  Job job_{};
  std::shared_ptr<const void> call_;
  StepsResult result_{};
  std::mutex mutex_;  // of crews, and of who has which seat
  std::vector<Crew> crews_;
  alignas(64) std::atomic<std::uint32_t> published_{0};  // counts changes of seats, and ends
};

}  // namespace sparsemae
