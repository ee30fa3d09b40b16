#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <set>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
#include <immintrin.h>
#endif

namespace sparsemae {
namespace {

void relax() {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Until `value` differs from `old`.
void wait_change(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kSpin = std::chrono::microseconds(50);
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 16; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (Clock::now() - start < kSpin);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

class ThreadPool::Team {
 public:
  ~Team() {
    stop_ = true;
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  std::mutex mutex;

  std::size_t size() const { return workers_.size() + 1; }

  void start(std::size_t threads) {
    workers_.reserve(threads - 1);
    try {
      while (size() < threads) workers_.emplace_back([this, t = size()] { work(t); });
    } catch (const std::system_error&) {  // a limit on processes or memory: those that run will do
    }
    idle_ = false;
  }
  bool idle() const { return idle_; }

  void run(Job job, void* context) {
    job_ = job;
    context_ = context;
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    job(context, 0);
    barrier();
  }

  void barrier() {
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, std::memory_order_release);
      phase_.notify_all();
    } else {
      wait_change(phase_, phase);
    }
  }

 private:
  void work(std::size_t thread) {
    for (std::uint32_t seen = 0;; ++seen) {
      wait_change(started_, seen);
      if (stop_) return;
      job_(context_, thread);
      barrier();
    }
  }

  std::vector<std::thread> workers_;
  bool idle_ = true;  // its threads are not started yet
  Job job_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<std::uint32_t> started_{0};  // counts jobs
  alignas(64) std::atomic<std::uint32_t> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};  // counts barriers
};

#if defined(_WIN32)
struct ThreadPool::Registry {
  static void add(ThreadPool*) {}
  static void remove(ThreadPool*) {}
};
#else
struct ThreadPool::Registry {
  std::mutex mutex;
  std::set<ThreadPool*> pools;

  static Registry& instance() {
    static Registry* registry = [] {
      pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); }, [] { instance().renew(); });
      return new Registry;  // never destroyed: a process may fork while it ends
    }();
    return *registry;
  }
  static void add(ThreadPool* pool) {
    const std::lock_guard lock(instance().mutex);
    instance().pools.insert(pool);
  }
  static void remove(ThreadPool* pool) {
    const std::lock_guard lock(instance().mutex);
    instance().pools.erase(pool);
  }

 private:
  // In the child. What is left of the parent's teams stays as it is: joining threads that are not there would never
  // end.
  void renew() {
    for (ThreadPool* pool : pools) {
      static_cast<void>(pool->team_.release());
      pool->team_ = std::make_unique<Team>();
    }
    mutex.unlock();
  }
};
#endif

ThreadPool::ThreadPool(std::size_t threads) : team_(std::make_unique<Team>()) {
  team_->start(threads);
  wanted_ = team_->size();
  Registry::add(this);
}

ThreadPool::~ThreadPool() { Registry::remove(this); }

std::unique_lock<std::mutex> ThreadPool::acquire() {
  std::unique_lock lock(team_->mutex);
  if (team_->idle()) team_->start(wanted_);
  return lock;
}

std::size_t ThreadPool::size() const { return team_->idle() ? wanted_ : team_->size(); }
void ThreadPool::run(Job job, void* context) { team_->run(job, context); }
void ThreadPool::barrier() { team_->barrier(); }

}  // namespace sparsemae
