/* What lets torch's CUDA build believe in a card where there is none: for tensors without memory, of which it asks no
   more than which device it is on. Both libraries are made of this file; see fake_step.py. */

#ifdef DRIVER

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }

#else

#include <cuda_runtime_api.h>
#include <string.h>
#undef cudaGetDeviceProperties

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = *most = 0; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

/* An RTX 4090, by which attention chooses its kernel. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "stand-in");
    of->major = 8;
    of->minor = 9;
    of->multiProcessorCount = 128;
    of->maxThreadsPerMultiProcessor = 1536;
    of->sharedMemPerBlockOptin = 101376;
    of->totalGlobalMem = (size_t)24 << 30;
    of->warpSize = 32;
    return cudaSuccess;
}

#endif
