// What makes PyTorch believe in one H100: answers of the CUDA runtime and of the driver. Loaded
// before PyTorch with its symbols global, so that they are found before the runtime's own, and
// named libcuda.so.1, so that whoever opens the driver gets this.
#include <cstddef>
#include <cstring>

#include <cuda.h>
#include <cuda_runtime_api.h>

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Choosing a convolution's backend asks for it. CUDA 12 exports the second name, CUDA 13 the first,
// and the fields up to "minor" lie at the same offsets in both; what comes after is left alone.
#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, offsetof(cudaDeviceProp, minor) + sizeof properties->minor);
  std::strcpy(properties->name, "NVIDIA H100 80GB HBM3");
  properties->major = 9;
  properties->minor = 0;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* properties, int device) {
  return cudaGetDeviceProperties(properties, device);
}

// Autograd's threads ask which devices have a context.
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned int* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

}  // extern "C"

// What PyTorch takes the address of when it opens the driver, and must not call.
#define REFUSE(name) \
  extern "C" CUresult refuse_##name() __asm__(#name); \
  CUresult refuse_##name() { return CUDA_ERROR_NOT_SUPPORTED; }

REFUSE(cuCtxGetCurrent)
REFUSE(cuCtxSetCurrent)
REFUSE(cuDeviceGet)
REFUSE(cuDeviceGetAttribute)
REFUSE(cuDevicePrimaryCtxRetain)
REFUSE(cuFuncGetAttribute)
REFUSE(cuFuncSetAttribute)
REFUSE(cuFuncSetCacheConfig)
REFUSE(cuGetErrorString)
REFUSE(cuLaunchCooperativeKernel)
REFUSE(cuLaunchKernel)
REFUSE(cuLinkAddData_v2)
REFUSE(cuLinkComplete)
REFUSE(cuLinkCreate_v2)
REFUSE(cuModuleGetFunction)
REFUSE(cuModuleLoad)
REFUSE(cuModuleLoadData)
REFUSE(cuModuleLoadDataEx)
REFUSE(cuModuleUnload)
REFUSE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSE(cuPointerGetAttribute)
REFUSE(cuTensorMapEncodeTiled)
