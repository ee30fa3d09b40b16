// A fixed team of threads that run one job at a time, with a barrier inside the job.
//
// Waiting spins for some 50 microseconds and then sleeps: a forward has many short stages, so that sleeping at once
// would cost a wake-up each, and spinning for long collapses when another process wants the core (the one that is
// waited for cannot run).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsemae {

class ThreadPool {
 public:
  using Job = void (*)(void* context, std::size_t thread);

  explicit ThreadPool(std::size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  std::size_t size() const { return workers_.size() + 1; }
  // Runs job(context, t) for t in [0, size()), t = 0 on the calling thread, and returns when all are done. One caller
  // at a time.
  void run(Job job, void* context);
  // Inside a job: returns when all threads have come here.
  void barrier();

 private:
  void work(std::size_t thread);

  std::vector<std::thread> workers_;
  Job job_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<std::uint32_t> started_{0};  // counts jobs
  alignas(64) std::atomic<std::uint32_t> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};  // counts barriers
};

}  // namespace sparsemae
