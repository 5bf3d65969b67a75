// Shared memory of the blocks that run together. What nobody wrote is NaN as a floating-point number of any width.
#pragma once
#include <cstddef>
#include <cstring>
#include <vector>

#include "fibers.h"

class HostShared {
 public:
  static constexpr size_t kStatic = 48 * 1024;  // as much of it as a block may have

  // Of a block's: what FASTLIP_HOST_SHARED says, so that samples can be made to exceed it.
  static int limit() {
    const char* const bytes = std::getenv("FASTLIP_HOST_SHARED");
    return std::atoi(bytes ? bytes : "200000");
  }

  // New memory for the block, with `dynamic` bytes of the launch.
  static void start(unsigned block, size_t dynamic) {
    HostShared& mine = of(block);
    mine.dynamic_ = dynamic;
    mine.limit_ = limit();
    mine.bytes_.assign(kStatic + dynamic + kFence + kAlign, 0xFF);
    std::memset(mine.base() + kStatic + dynamic, kMark, kFence);
  }
  static void end(unsigned block) {
    HostShared& mine = of(block);
    for (size_t i = 0; i < kFence; ++i) {
      if (mine.base()[kStatic + mine.dynamic_ + i] != kMark) host_abort("written past the end of shared memory");
    }
  }

  // The current block's: the one variable that a kernel declares, and what its launch asked for.
  template <typename T>
  static T& variable() {
    static_assert(sizeof(T) <= kStatic && alignof(T) <= kAlign);
    HostShared& mine = of(Fibers::block_in_cluster());
    if (sizeof(T) + mine.dynamic_ > mine.limit_) host_abort("more shared memory than a block may have");
    return *reinterpret_cast<T*>(mine.base());
  }
  static unsigned char* dynamic() { return of(Fibers::block_in_cluster()).base() + kStatic; }

  // Where another block of the cluster has what lies at `at` in this one.
  template <typename T>
  static T* map(T* at, unsigned block) {
    if (block >= Fibers::blocks_in_cluster()) host_abort("no such block in the cluster");
    if (!Fibers::begun(block)) host_abort("shared memory of a block that has not begun");
    if (Fibers::ended(block)) host_abort("shared memory of a block that has ended");
    HostShared& mine = of(Fibers::block_in_cluster());
    const ptrdiff_t offset = reinterpret_cast<unsigned char*>(at) - mine.base();
    if (offset < 0 || offset + sizeof(T) > kStatic + mine.dynamic_) host_abort("not in shared memory");
    return reinterpret_cast<T*>(of(block).base() + offset);
  }

 private:
  static constexpr size_t kFence = 64, kAlign = 128;
  static constexpr unsigned char kMark = 0xA5;

  static HostShared& of(unsigned block) {
    static HostShared blocks[Fibers::kMostBlocks];
    return blocks[block];
  }
  unsigned char* base() {
    const auto at = reinterpret_cast<uintptr_t>(bytes_.data());
    return bytes_.data() + (kAlign - at % kAlign) % kAlign;
  }

  std::vector<unsigned char> bytes_;
  size_t dynamic_ = 0, limit_ = 0;
};
