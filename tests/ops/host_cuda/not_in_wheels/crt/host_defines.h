// The marks on the declarations of CUDA's headers, which mean nothing to a C++ compiler but for the alignment. NVIDIA
// keeps the real file in a package that torch does not bring; where it is found, it comes first.
#pragma once
#define __host__
#define __device__
#define __global__
#define __device_builtin__
#define __cudart_builtin__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI
