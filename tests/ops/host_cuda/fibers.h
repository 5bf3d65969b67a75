// A block's threads on one host thread, with barriers of a block and of a warp: each runs to its next barrier before
// the next one does.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

class Fibers {
 public:
  static constexpr unsigned kMost = 1024, kWarp = 32;

  // Run body(thread) for each of `count` threads. FASTLIP_HOST_ORDER=down lets the last thread go first.
  static void run(unsigned count, const std::function<void(unsigned)>& body) {
    const char* const order = std::getenv("FASTLIP_HOST_ORDER");
    const bool down = order != nullptr && *order == 'd';
    Fibers& self = instance();
    while (self.threads_.size() < count) self.threads_.push_back(std::make_unique<Thread>());
    self.body_ = &body;
    self.block_ = {count};
    for (unsigned i = 0; i < kMost / kWarp; ++i) self.warps_[i] = {};
    for (unsigned i = 0; i < count; ++i) {
      ++self.warps_[i / kWarp].members;
      Thread& thread = *self.threads_[i];
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Fibers::enter, 0);
    }
    self.active_ = true;
    while (self.block_.members > 0) {
      self.moved_ = false;
      for (unsigned i = 0; i < count; ++i) {
        self.current_ = down ? count - 1 - i : i;
        Thread& thread = *self.threads_[self.current_];
        if (thread.done) continue;
        self.resumed(self.current_);
        swapcontext(&self.scheduler_, &thread.context);
      }
      if (!self.moved_) {
        std::fprintf(stderr, "threads wait at different barriers\n");
        std::abort();
      }
    }
    self.active_ = false;
  }

  // Where a thread waits for the others of its block, or of its warp; those that have ended are not waited for, as on a
  // GPU.
  static void barrier() { instance().wait(instance().block_); }
  static void warp_barrier() { instance().wait(instance().warps_[instance().current_ / kWarp]); }

  std::function<void(unsigned)> resumed;  // called before a thread goes on

  static Fibers& instance() {
    static Fibers fibers;
    return fibers;
  }

 private:
  struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    bool done = false;
  };
  struct Barrier {
    unsigned members = 0, arrived = 0, passed = 0;
  };

  void wait(Barrier& at) {
    if (!active_) return;
    const unsigned turn = at.passed;
    ++at.arrived;
    moved_ = true;
    do {
      swapcontext(&threads_[current_]->context, &scheduler_);
      if (at.passed == turn && at.arrived == at.members) {
        at.arrived = 0;
        ++at.passed;
        moved_ = true;
      }
    } while (at.passed == turn);
  }

  static void enter() {
    Fibers& self = instance();
    const unsigned mine = self.current_;
    (*self.body_)(mine);
    self.threads_[mine]->done = self.moved_ = true;
    --self.block_.members;
    --self.warps_[mine / kWarp].members;
    swapcontext(&self.threads_[mine]->context, &self.scheduler_);
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  ucontext_t scheduler_;
  const std::function<void(unsigned)>* body_ = nullptr;
  Barrier block_, warps_[kMost / kWarp];
  unsigned current_ = 0;
  bool active_ = false, moved_ = false;
};
