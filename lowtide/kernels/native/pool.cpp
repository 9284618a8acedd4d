// The team of threads, and the loop over the calls of a program.

#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "kernels.h"
#include "lowtide.h"

namespace lowtide {

namespace {

struct Scratch {
  uint8_t* memory = nullptr;
  int64_t bytes = 0;
};

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

}  // namespace

// The state of one parallel loop is a single word: the loop's number, an open bit, and the count
// of helpers inside. A helper enters only while the loop is open, so the caller never waits for a
// helper that has not woken up.
class Team {
 public:
  explicit Team(int threads) : threads_(threads), scratch_(threads), process_(process_id()) {
    helpers_.reserve(threads - 1);
    for (int thread = 1; thread < threads; ++thread) {
      try {
        helpers_.emplace_back([this, thread] { help(thread); });
      } catch (const std::system_error&) {
        break;  // The system gives no more threads; those that run share the work.
      }
    }
  }

  ~Team() {
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& helper : helpers_) helper.join();
    for (auto& scratch : scratch_) std::free(scratch.memory);
  }

  void run(int64_t chunks, Body body, void* arguments) {
    if (threads_ == 1 || chunks == 1) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(arguments, chunk, 0);
      return;
    }
    body_ = body;
    arguments_ = arguments;
    chunks_ = chunks;
    next_.store(0, std::memory_order_relaxed);
    const uint64_t number = (state_.load(std::memory_order_relaxed) >> 32) + 1;
    state_.store((number << 32) | OPEN, std::memory_order_release);
    work(0);
    state_.fetch_and(~static_cast<uint64_t>(OPEN), std::memory_order_acq_rel);
    wait_until_empty();
  }

  // Between runs helpers sleep. The first kernels of a run do not wait for them to wake up.
  void awake(bool on) {
    if (threads_ == 1) return;
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      awake_.store(on, std::memory_order_release);
    }
    if (on) wake_.notify_all();
  }

  int threads() const { return threads_; }
  long process() const { return process_; }

  uint8_t* scratch(int thread, int64_t bytes) {
    Scratch& own = scratch_[thread];
    if (own.bytes < bytes) {
      std::free(own.memory);
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      own.memory = static_cast<uint8_t*>(std::aligned_alloc(64, rounded));
      own.bytes = own.memory == nullptr ? 0 : rounded;
    }
    return own.memory;
  }

  std::atomic<int32_t> outcome{0};

 private:
  static constexpr uint64_t OPEN = 1ull << 31;
  static constexpr uint64_t INSIDE = OPEN - 1;

  void work(int thread) {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks_) return;
      body_(arguments_, chunk, thread);
    }
  }

  void wait_until_empty() {
    for (int spins = 0; (state_.load(std::memory_order_acquire) & INSIDE) != 0; ++spins) {
      pause_briefly();
      if (spins > 1000) std::this_thread::yield();
    }
  }

  void help(int thread) {
    uint64_t done = 0;
    int idle = 0;
    while (!stop_.load(std::memory_order_relaxed)) {
      uint64_t state = state_.load(std::memory_order_acquire);
      const bool open = (state & OPEN) != 0 && (state >> 32) != done;
      if (open && state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
        done = state >> 32;
        work(thread);
        state_.fetch_sub(1, std::memory_order_release);
        idle = 0;
      } else if (!open) {
        rest(++idle);
      }
    }
  }

  // Between two kernels of a run a helper spins; outside of runs it sleeps.
  void rest(int idle) {
    pause_briefly();
    if (awake_.load(std::memory_order_acquire)) {
      if (idle > 2000) std::this_thread::yield();
    } else if (idle > 2000) {
      std::unique_lock<std::mutex> lock(sleep_);
      wake_.wait(lock, [this] { return awake_.load() || stop_.load(); });
    }
  }

  std::mutex sleep_;
  std::condition_variable wake_;
  int threads_;
  std::vector<std::thread> helpers_;
  std::vector<Scratch> scratch_;
  long process_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> awake_{false};
  int64_t chunks_ = 0;
  Body body_ = nullptr;
  void* arguments_ = nullptr;
};

void parallel(Team& team, int64_t chunks, Body body, void* arguments) {
  team.run(chunks, body, arguments);
}

int threads_of(const Team& team) { return team.threads(); }

uint8_t* scratch_of(Team& team, int thread, int64_t bytes) { return team.scratch(thread, bytes); }

void report(Team& team, int32_t outcome) {
  team.outcome.fetch_or(outcome, std::memory_order_relaxed);
}

namespace {

std::mutex team_mutex;
Team* shared_team = nullptr;

// The team of this process. After a fork the threads of the old one are gone, so it is abandoned.
Team& team_of(int threads) {
  if (shared_team != nullptr && shared_team->process() != process_id()) shared_team = nullptr;
  if (shared_team != nullptr && shared_team->threads() != threads) {
    delete shared_team;
    shared_team = nullptr;
  }
  if (shared_team == nullptr) shared_team = new Team(threads);
  return *shared_team;
}

int32_t run_on(Team& team, const Table& table, const Call* calls, int64_t count) {
  team.outcome.store(0);
  team.awake(true);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t kernel = calls[i].kernel;
    if (kernel < 0 || kernel >= KERNELS || calls[i].arguments == nullptr) {
      team.awake(false);
      return BAD_CALL;
    }
    table.run[kernel](calls[i].arguments, team);
  }
  team.awake(false);
  return team.outcome.load();
}

}  // namespace

// While one program uses the team, any other runs on its caller's thread alone.
int32_t run_calls(const Table& table, const Call* calls, int64_t count, int threads) {
  std::unique_lock<std::mutex> lock(team_mutex, std::try_to_lock);
  if (lock.owns_lock()) return run_on(team_of(threads < 1 ? 1 : threads), table, calls, count);
  Team alone(1);
  return run_on(alone, table, calls, count);
}

}  // namespace lowtide
