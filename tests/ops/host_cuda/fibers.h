// The threads of a block, or of the blocks of a cluster, on one host thread, with barriers of a warp, a block and a
// cluster. A warp goes on until all of its lanes wait for others, before the next warp does; a block until all of its
// warps do: what lacks a barrier finds the others as far behind as they can be.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

[[noreturn]] inline void host_abort(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::abort();
}

class Fibers {
 public:
  static constexpr unsigned kMost = 1024, kWarp = 32, kMostBlocks = 16;

  // Run `body` as each of `count` threads of each of `blocks` blocks. FASTLIP_HOST_ORDER=down lets the last of lanes,
  // warps and blocks go first.
  static void run(unsigned blocks, unsigned count, const std::function<void()>& body) {
    if (blocks > kMostBlocks || count > kMost || count == 0) host_abort("more threads or blocks than there may be");
    const char* const order = std::getenv("FASTLIP_HOST_ORDER");
    instance().run_all(blocks, count, order != nullptr && *order == 'd', body);
  }

  // Where a thread waits for the others of its warp, block or cluster; those that have ended are not waited for, as on
  // a GPU.
  static void warp_barrier() { instance().wait(instance().block().warps[instance().thread_ / kWarp]); }
  static void barrier() { instance().wait(instance().block().barrier); }
  static void cluster_barrier() { instance().wait(instance().cluster_); }

  // A number for this thread's next exchange with the other lanes, the same for all lanes of a warp that have had as
  // many, and never used again.
  static uint64_t next_call() { return ++instance().current().calls; }
  static bool begun(unsigned block) { return instance().blocks_[block].begun; }
  static bool ended(unsigned block) { return instance().blocks_[block].barrier.members == 0; }
  static unsigned block_in_cluster() { return instance().block_; }
  static unsigned blocks_in_cluster() { return instance().block_count_; }

  std::function<void(unsigned, unsigned)> resumed;  // called with block and thread before a thread goes on

  static Fibers& instance() {
    static Fibers fibers;
    return fibers;
  }

 private:
  struct Barrier {
    unsigned members = 0, arrived = 0;
    uint64_t passed = 0;

    void release() {
      if (arrived < members || members == 0) return;
      arrived = 0;
      ++passed;
    }
    void leave() {
      --members;
      release();
    }
  };
  struct Thread {
    std::unique_ptr<char[]> stack;
    jmp_buf at;
    Barrier* waits = nullptr;
    uint64_t turn = 0, calls = 0;
    bool done = true;

    bool ready() const { return !done && (waits == nullptr || waits->passed != turn); }
  };
  struct Block {
    Barrier barrier, warps[kMost / kWarp];
    bool begun = false;
    std::vector<Thread> threads{kMost};
  };

  Block& block() { return blocks_[block_]; }
  Thread& current() { return block().threads[thread_]; }

  void run_all(unsigned blocks, unsigned count, bool down, const std::function<void()>& body) {
    body_ = &body;
    down_ = down;
    block_count_ = blocks;
    count_ = count;
    ++runs_;
    cluster_ = {blocks * count};
    for (unsigned b = 0; b < blocks; ++b) {
      blocks_[b].barrier = {count};
      blocks_[b].begun = false;
      for (Barrier& warp : blocks_[b].warps) warp = {};
      for (unsigned i = 0; i < count; ++i) {
        ++blocks_[b].warps[i / kWarp].members;
        Thread& thread = blocks_[b].threads[i];
        thread.waits = nullptr;
        thread.done = false;
        thread.calls = runs_ << 32;
        block_ = b;
        thread_ = i;
        if (!thread.stack) create(thread);
      }
    }
    while (run_blocks()) {
    }
    if (cluster_.members > 0) host_abort("threads wait at different barriers");
  }

  unsigned nth(unsigned i, unsigned count) const { return down_ ? count - 1 - i : i; }

  // Each: whether any thread went on. They begin again with the first as soon as all have passed a barrier.
  bool run_blocks() {
    for (unsigned i = 0; i < block_count_; ++i) {
      if (run_warps(nth(i, block_count_))) return true;
    }
    return false;
  }
  bool run_warps(unsigned b) {
    const unsigned warps = (count_ + kWarp - 1) / kWarp;
    const uint64_t passed = cluster_.passed;
    bool any = false;
    for (unsigned i = 0; i < warps && cluster_.passed == passed; ++i) {
      const uint64_t before = blocks_[b].barrier.passed;
      any |= run_lanes(b, nth(i, warps));
      if (blocks_[b].barrier.passed != before) i = -1;
    }
    return any;
  }
  bool run_lanes(unsigned b, unsigned warp) {
    const unsigned first = warp * kWarp, lanes = count_ - first < kWarp ? count_ - first : kWarp;
    const uint64_t block = blocks_[b].barrier.passed, cluster = cluster_.passed;
    bool any = false;
    for (bool more = true; more;) {
      more = false;
      for (unsigned i = 0; i < lanes; ++i) {
        const unsigned thread = first + nth(i, lanes);
        if (!blocks_[b].threads[thread].ready()) continue;
        block_ = b;
        blocks_[b].begun = true;
        thread_ = thread;
        resumed(b, thread);
        if (_setjmp(scheduler_) == 0) _longjmp(current().at, 1);
        more = any = true;
        if (blocks_[b].barrier.passed != block || cluster_.passed != cluster) return true;
      }
    }
    return any;
  }

  void wait(Barrier& at) {
    Thread& thread = current();
    thread.waits = &at;
    thread.turn = at.passed;
    ++at.arrived;
    at.release();
    pause(thread);
  }
  void pause(Thread& thread) {
    if (_setjmp(thread.at) == 0) _longjmp(scheduler_, 1);
  }

  // A stack, once for all runs: switching by ucontext costs system calls.
  void create(Thread& thread) {
    constexpr size_t kStack = 1 << 17;
    thread.stack.reset(new char[kStack]);
    ucontext_t start, back;
    getcontext(&start);
    start.uc_stack.ss_sp = thread.stack.get();
    start.uc_stack.ss_size = kStack;
    start.uc_link = nullptr;
    makecontext(&start, &Fibers::enter, 0);
    back_ = &back;
    swapcontext(&back, &start);
  }
  static void enter() {
    Fibers& self = instance();
    Thread& thread = self.current();
    if (_setjmp(thread.at) == 0) setcontext(self.back_);
    for (;;) {
      (*self.body_)();
      thread.done = true;
      self.block().warps[self.thread_ / kWarp].leave();
      self.block().barrier.leave();
      self.cluster_.leave();
      self.pause(thread);
    }
  }

  Block blocks_[kMostBlocks];
  Barrier cluster_;
  jmp_buf scheduler_;
  ucontext_t* back_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  unsigned block_ = 0, thread_ = 0, block_count_ = 0, count_ = 0;
  uint64_t runs_ = 0;
  bool down_ = false;
};
