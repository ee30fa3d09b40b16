// A fixed team of threads that run one job at a time, whole or step by step (crew.h).
//
// A process that forks keeps only the thread that did: in the child, every pool begins anew with a team that is not
// locked, and starts its threads with its next job.
#pragma once

#include <cstddef>
#include <memory>
#if !defined(__wasm__)
#include <mutex>
#endif

#include "crew.h"

namespace sparsemae {

#if defined(__wasm__)
class ThreadPool {
 public:
  struct Lock {
    ~Lock() {}
  };

  explicit ThreadPool(std::size_t) {}
  Lock acquire() { return {}; }
  std::size_t size() const { return 1; }
  void run(void (*job)(void* context, std::size_t thread), void* context) { job(context, 0); }
  StepsResult run_steps(const Job& job, const std::shared_ptr<const void>& call) {
    job.reserve(call.get(), 1, 1);
    for (std::size_t step = 0; step < job.steps; ++step) {
      Crew crew;
      crew.step = step;
      job.run(call.get(), 0, crew);
    }
    return {0, 0};
  }
};
#else

class ThreadPool {
 public:
  // Has fewer threads where the system does not let so many start.
  explicit ThreadPool(std::size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Before run() and what belongs to it: one caller at a time. size() and the team stay the same as long as this is
  // held.
  std::unique_lock<std::mutex> acquire();
  std::size_t size() const;
  // Runs job(context, t) for t in [0, size()), t = 0 on the calling thread, and returns when all are done.
  void run(void (*job)(void* context, std::size_t thread), void* context);
  // Runs the steps of a job. `call` lives as long as a thread that was left behind may look at it.
  StepsResult run_steps(const Job& job, std::shared_ptr<const void> call);

 private:
  struct Registry;  // of all pools, for forks

  std::size_t wanted_;
  std::unique_ptr<Team> team_;
};
#endif

}  // namespace sparsemae
