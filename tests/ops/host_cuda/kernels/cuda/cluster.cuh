// Clusters on the host.
#pragma once
#include "fibers.h"
#include "shared_memory.h"

namespace fastlip::cuda {
inline void cluster_sync() { Fibers::cluster_barrier(); }
template <typename V>
V* cluster_address(V* at, int rank) {
  return HostShared::map(at, static_cast<unsigned>(rank));
}
}  // namespace fastlip::cuda
