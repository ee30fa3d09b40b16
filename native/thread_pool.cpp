#include "thread_pool.h"

#include <set>
#include <utility>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "team.h"

namespace sparsemae {

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
  std::unique_lock lock(team_->calls);
  if (team_->idle()) team_->start(wanted_);
  return lock;
}

std::size_t ThreadPool::size() const { return team_->idle() ? wanted_ : team_->size(); }
void ThreadPool::run(void (*job)(void*, std::size_t), void* context) { team_->run(job, context); }
StepsResult ThreadPool::run_steps(const Job& job, std::shared_ptr<const void> call) {
  return team_->run_steps(job, std::move(call));
}

}  // namespace sparsemae
