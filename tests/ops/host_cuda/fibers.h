// A block's threads on one host thread, with barriers: each runs to its next barrier before the next one does.
#pragma once
#include <ucontext.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

class Fibers {
 public:
  // Run body(thread) for each of `count` threads. FASTLIP_HOST_ORDER=down lets the last thread go first.
  static void run(unsigned count, const std::function<void(unsigned)>& body) {
    const char* const order = std::getenv("FASTLIP_HOST_ORDER");
    const bool down = order != nullptr && *order == 'd';
    Fibers& self = instance();
    while (self.threads_.size() < count) self.threads_.push_back(std::make_unique<Thread>());
    self.body_ = &body;
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = *self.threads_[i];
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Fibers::enter, 0);
    }
    self.active_ = true;
    for (unsigned left = count; left > 0;) {
      for (unsigned i = 0; i < count; ++i) {
        self.current_ = down ? count - 1 - i : i;
        Thread& thread = *self.threads_[self.current_];
        if (thread.done) continue;
        self.resumed(self.current_);
        swapcontext(&self.scheduler_, &thread.context);
        if (thread.done) --left;
      }
    }
    self.active_ = false;
  }

  // Where a thread waits for the others; those that have ended are not waited for, as on a GPU.
  static void barrier() {
    Fibers& self = instance();
    if (self.active_) swapcontext(&self.threads_[self.current_]->context, &self.scheduler_);
  }

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

  static void enter() {
    Fibers& self = instance();
    const unsigned mine = self.current_;
    (*self.body_)(mine);
    self.threads_[mine]->done = true;
    swapcontext(&self.threads_[mine]->context, &self.scheduler_);
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  ucontext_t scheduler_;
  const std::function<void(unsigned)>* body_ = nullptr;
  unsigned current_ = 0;
  bool active_ = false;
};
