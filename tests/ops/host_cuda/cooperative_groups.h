// No clusters on the host.
#pragma once
namespace cooperative_groups {
struct Cluster {
  void sync() const {}
  template <typename T>
  T* map_shared_rank(T* at, int) const {
    return at;
  }
};
inline Cluster this_cluster() { return {}; }
}  // namespace cooperative_groups
