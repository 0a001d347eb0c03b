/* Stands in for libcudart: "device memory" is host memory, and every call can be made to fail. */
#include <stdlib.h>
#include <string.h>
static int devices = 1, error = 0, held = 0;
void pretend(int count, int status) { devices = count; error = status; }
int blocks(void) { return held; }
const char *cudaGetErrorString(int status) { return status == 2 ? "out of memory" : "no CUDA-capable device is detected"; }
int cudaGetDeviceCount(int *count) { *count = devices; return error == 100 ? error : 0; }
int cudaMalloc(void **at, size_t size) { if (error) return error; *at = malloc(size); held++; return 0; }
int cudaFree(void *at) { free(at); held--; return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { if (kind != 1) return 1; memcpy(to, from, size); return 0; }
