#include "team.h"

#include <algorithm>
#include <new>
#include <system_error>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
#include <immintrin.h>
#endif

namespace sparsemae {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::nanoseconds;

constexpr nanoseconds kSpin = microseconds(50);         // of a wait whose end is not in sight
constexpr nanoseconds kSpinInJob = microseconds(1000);  // of one that others of the same job end soon
constexpr nanoseconds kShortestPatience = microseconds(100);
constexpr nanoseconds kUnknownPatience = microseconds(5000);  // with a step that was never timed
constexpr unsigned kMostDoublings = 16;
constexpr std::int64_t kEndless = std::numeric_limits<std::int64_t>::max();

void relax() {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins until done(), for some time; whether it was done.
template <class F>
bool spin(nanoseconds time, const F& done) {
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() - start < time);
  return false;
}

}  // namespace

// Whether a thread that was left behind may still use what is_used(crew) is true for.
template <class F>
bool Team::in_use(const F& is_used) const {
  return std::any_of(crews_.begin(), crews_.end(), [&](const Crew& c) {
    return c.given_up_ && c.inside_.load(std::memory_order_acquire) && is_used(c);
  });
}

std::size_t Team::free_state(std::size_t except) const {
  std::size_t i = 0;
  while (i == except || in_use([&](const Crew& c) { return c.input == i || c.output == i; })) ++i;
  return i;
}

std::size_t Team::free_space() const {
  std::size_t i = 0;
  while (in_use([&](const Crew& c) { return c.space == i; })) ++i;
  return i;
}

Team::Part Team::first_step() const { return {0, 0, free_state(kNone), free_state(kNone), free_space()}; }

// Enough for this step and, whoever is left behind later on, all that follow.
void Team::reserve(const Job& job, const void* call) const {
  job.reserve(call, free_state(free_state(kNone)) + 1, free_space() + 1);
}

// What no quiet step comes near, and little beside the milliseconds for which a system stops a thread. Where crews are
// given up again and again it is more: the waits may be the step's own.
nanoseconds Team::patience(const Pace& pace) {
  const nanoseconds once = pace.time == nanoseconds::max()
                               ? kUnknownPatience
                               : std::max(kShortestPatience, 2 * pace.longest_wait + pace.time / 8);
  return once * (1 << pace.doublings);
}

// Makes the crew of all threads that member(t) is true for.
template <class F>
void Team::compose(const Part& part, const F& member) {
  Crew& crew = *std::find_if(crews_.begin(), crews_.end(),
                             [](const Crew& c) { return c.inside_.load(std::memory_order_acquire) == 0; });
  crew.step = part.step;
  crew.first_stage = part.first_stage;
  crew.input = part.input;
  crew.output = part.output;
  crew.space = part.space;
  crew.job_ = job_;
  crew.call_ = call_;
  crew.given_up_ = false;
  crew.size = 0;
  for (std::size_t t = 0; t < size(); ++t) crew.ranks_[t] = member(t) ? crew.size++ : kNone;
  for (std::size_t i = 0; i < crew.size; ++i) {
    for (auto& counter : crew.members_[i].counters) counter.store(0, std::memory_order_relaxed);
    crew.members_[i].arrived.store(0, std::memory_order_relaxed);
  }
  crew.begin_ = Clock::now();
  crew.patience_ns_.store(job_.reserve ? patience(paces_[part.step]).count() : kEndless, std::memory_order_relaxed);
  crew.longest_wait_ns_.store(0, std::memory_order_relaxed);
  crew.arrived_.store(0, std::memory_order_relaxed);
  crew.state_.store(0, std::memory_order_relaxed);
  crew.inside_.store(crew.size, std::memory_order_relaxed);
  for (std::size_t t = 0; t < size(); ++t) {
    if (crew.ranks_[t] == kNone) continue;
    seats_[t].place = away;
    seats_[t].crew.store(&crew, std::memory_order_release);
  }
}

template <class F>
void Team::wait_for_stragglers(const F& of) {
  const auto gone = [&] {
    const std::lock_guard lock(mutex_);
    return !in_use(of);
  };
  while (!gone()) std::this_thread::sleep_for(kSpin);
}

Team::~Team() {
  stop_ = true;
  publish();
  for (auto& worker : workers_) worker.join();
}

void Team::start(std::size_t threads) {
  seats_ = std::vector<Seat>(threads);
  workers_.reserve(threads - 1);
  try {
    while (size() < threads) workers_.emplace_back([this, t = size()] { take_part(t); });
  } catch (const std::system_error&) {  // a limit on processes or memory: those that run will do
  }
  // a thread is in one crew, and may have a seat in the next
  crews_ = std::vector<Crew>(2 * size() + 1);
  for (Crew& crew : crews_) {
    crew.team_ = this;
    crew.ranks_.resize(size());
    crew.members_ = std::vector<Crew::Member>(size());
  }
  idle_ = false;
}

void Team::run(void (*job)(void*, std::size_t), void* context) {
  struct Whole {
    void (*job)(void*, std::size_t);
    void* context;
  } whole{job, context};
  wait_for_stragglers([](const Crew&) { return true; });
  begin({[](const void* call, std::size_t thread, Crew&) {
           const auto* w = static_cast<const Whole*>(call);
           w->job(w->context, thread);
         },
         nullptr, 1},
        {std::shared_ptr<void>(), &whole});
}

StepsResult Team::run_steps(const Job& job, std::shared_ptr<const void> call) {
  if (paces_.size() != job.steps) paces_.assign(job.steps, {});
  begin(job, std::move(call));
  wait_for_stragglers([](const Crew& crew) { return crew.step == 0; });
  return result_;
}

void Team::begin(const Job& job, std::shared_ptr<const void> call) {
  {
    const std::lock_guard lock(mutex_);
    if (job.reserve) reserve(job, call.get());
    job_ = job;
    call_ = std::move(call);
    done_ = false;
    compose(first_step(), [&](std::size_t t) { return t == 0 || seats_[t].place != away; });
  }
  publish();
  take_part(0);
  call_.reset();
}

void Team::publish() {
  published_.fetch_add(1, std::memory_order_release);
  published_.notify_all();
}

void Team::take_part(std::size_t thread) {
  while (Crew* crew = next(thread)) {
    crew->job_.run(crew->call_.get(), thread, *crew);
    finish(thread, *crew);
  }
}

// The crew that the thread has a seat in; null: the job or the team has come to its end.
Crew* Team::next(std::size_t thread) {
  Seat& seat = seats_[thread];
  for (;;) {
    std::uint8_t place = asleep;
    seat.place.compare_exchange_strong(place, awake);
    const std::uint32_t seen = published_.load(std::memory_order_acquire);
    if (Crew* crew = seat.crew.exchange(nullptr, std::memory_order_acq_rel)) return crew;
    if (stop_ || (thread == 0 && done_)) return nullptr;
    const auto changed = [&] { return published_.load(std::memory_order_acquire) != seen; };
    if (spin(done_ ? kSpin : kSpinInJob, changed)) continue;
    place = awake;
    seat.place.compare_exchange_strong(place, asleep);
    while (!changed()) published_.wait(seen, std::memory_order_acquire);
  }
}

void Team::finish(std::size_t thread, Crew& crew) {
  switch (meet(crew, thread)) {
    case Met::passed:
      break;
    case Met::last:
      complete(crew);
      break;
    case Met::left: {
      const std::lock_guard lock(mutex_);
      if (!seats_[thread].crew.load(std::memory_order_relaxed)) seats_[thread].place = awake;
    }
  }
  crew.inside_.fetch_sub(1, std::memory_order_release);
}

Team::Met Team::meet(Crew& crew, std::size_t thread) {
  const std::uint32_t at = crew.state_.load(std::memory_order_acquire);
  if (at & 1) return Met::left;
  crew.members_[crew.rank(thread)].arrived.store(at + 2, std::memory_order_relaxed);
  if (crew.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < crew.size) return wait(crew, at);
  crew.arrived_.store(0, std::memory_order_relaxed);
  std::uint32_t expected = at;
  if (!crew.state_.compare_exchange_strong(expected, at + 2, std::memory_order_acq_rel)) return Met::left;
  crew.state_.notify_all();
  return Met::last;
}

Team::Met Team::wait(Crew& crew, std::uint32_t at) {
  const auto start = Clock::now();
  std::uint32_t now = at;
  const auto changed = [&] { return (now = crew.state_.load(std::memory_order_acquire)) != at; };
  while (!changed()) {
    const std::int64_t patience = crew.patience_ns_.load(std::memory_order_relaxed);
    const nanoseconds time = patience == kEndless ? kSpin : std::min(kSpinInJob, nanoseconds(patience));
    if (spin(time, changed)) break;
    if (patience == kEndless)
      crew.state_.wait(at, std::memory_order_acquire);
    else if ((Clock::now() - start).count() >= patience)
      begin_again(crew, at);
    else
      std::this_thread::sleep_for(kSpin);
  }
  if (now & 1) return Met::left;
  const std::int64_t waited = nanoseconds(Clock::now() - start).count();
  if (waited > crew.longest_wait_ns_.load(std::memory_order_relaxed))
    crew.longest_wait_ns_.store(waited, std::memory_order_relaxed);
  return Met::passed;
}

void Team::complete(const Crew& crew) {
  {
    const std::lock_guard lock(mutex_);
    const nanoseconds time = Clock::now() - crew.begin_;
    if (job_.reserve && crew.size > 1) {
      Pace& pace = paces_[crew.step];
      if (crew.size == size() && !crew.first_stage && time < pace.time) {
        pace.time = time;
        pace.longest_wait = nanoseconds(crew.longest_wait_ns_.load(std::memory_order_relaxed));
      }
      if (pace.doublings) --pace.doublings;
    }
    const auto member = [&](std::size_t t) { return crew.ranks_[t] != kNone; };
    if (crew.step + 1 < job_.steps) {
      compose({crew.step + 1, 0, crew.output, free_state(crew.output), free_space()},
              [&](std::size_t t) { return member(t) || seats_[t].place == awake; });
    } else {
      result_ = {crew.output, crew.space};
      for (std::size_t t = 0; t < size(); ++t)
        if (member(t)) seats_[t].place = awake;
      done_ = true;
    }
  }
  publish();
}

// Those that wait at the barrier take the step again, without the others.
void Team::begin_again(Crew& crew, std::uint32_t at) {
  {
    const std::lock_guard lock(mutex_);
    if (crew.state_.load(std::memory_order_acquire) != at) return;
    crew.given_up_ = true;
    try {
      reserve(crew.job_, crew.call_.get());
    } catch (const std::bad_alloc&) {
      crew.given_up_ = false;
      crew.patience_ns_.store(kEndless, std::memory_order_relaxed);
      return;
    }
    std::uint32_t expected = at;
    if (!crew.state_.compare_exchange_strong(expected, at + 1, std::memory_order_acq_rel)) {
      crew.given_up_ = false;
      return;
    }
    unsigned& doublings = paces_[crew.step].doublings;
    doublings = std::min(doublings + 1, kMostDoublings);
    const auto waits = [&](std::size_t t) {
      return crew.ranks_[t] != kNone && crew.members_[crew.ranks_[t]].arrived.load(std::memory_order_relaxed) == at + 2;
    };
    for (std::size_t t = 0; t < size(); ++t)
      if (crew.ranks_[t] != kNone && !waits(t) && seats_[t].crew.exchange(nullptr, std::memory_order_acq_rel)) {
        seats_[t].place = asleep;  // it has not begun
        crew.inside_.fetch_sub(1, std::memory_order_release);
      }
    compose(crew.step ? Part{crew.step, 0, crew.input, free_state(crew.input), free_space()} : first_step(), waits);
  }
  publish();
  crew.state_.notify_all();
}

// The rest of a lone thread's step goes to it and to those who wait for a seat.
void Team::share(Crew& crew, std::size_t stage) {
  const auto waits = [&](const Seat& seat) { return seat.place == awake; };
  if (std::none_of(seats_.begin(), seats_.end(), waits)) return;
  {
    const std::lock_guard lock(mutex_);
    if (crew.left_behind()) return;
    crew.state_.fetch_or(1, std::memory_order_acq_rel);
    compose({crew.step, stage, crew.input, crew.output, crew.space},
            [&](std::size_t t) { return crew.ranks_[t] != kNone || waits(seats_[t]); });
  }
  publish();
}

void Crew::barrier(std::size_t thread) { team_->meet(*this, thread); }
void Crew::share(std::size_t stage) { team_->share(*this, stage); }

}  // namespace sparsemae
