// A fixed team of threads that run one job at a time, with a barrier inside the job.
//
// Waiting spins for some 50 microseconds and then sleeps: a forward has many short stages, so that sleeping at once
// would cost a wake-up each, and spinning for long collapses when another process wants the core (the one that is
// waited for cannot run).
//
// A process that forks keeps only the thread that did: in the child, every pool begins anew with a team that is not
// locked, and starts its threads with its next job.
#pragma once

#include <cstddef>
#if !defined(__wasm__)
#include <memory>
#include <mutex>
#endif

namespace sparsemae {

#if defined(__wasm__)
// WebAssembly has one thread.
class ThreadPool {
 public:
  using Job = void (*)(void* context, std::size_t thread);
  struct Lock {
    ~Lock() {}
  };

  explicit ThreadPool(std::size_t) {}
  Lock acquire() { return {}; }
  std::size_t size() const { return 1; }
  void run(Job job, void* context) { job(context, 0); }
  void barrier() {}
};
#else

class ThreadPool {
 public:
  using Job = void (*)(void* context, std::size_t thread);

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
  void run(Job job, void* context);
  // Inside a job: returns when all threads have come here.
  void barrier();

 private:
  class Team;
  struct Registry;  // of all pools, for forks

  std::size_t wanted_;
  std::unique_ptr<Team> team_;
};
#endif

}  // namespace sparsemae
