// Functions that the kernels of CPU and CUDA share.
#pragma once

#ifdef __CUDACC__
#define FASTLIP_EITHER __host__ __device__ __forceinline__
#else
#define FASTLIP_EITHER inline
#endif
