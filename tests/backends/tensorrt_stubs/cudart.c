/* Stands in for libcudart: "device memory" is host memory, streams run at once, every call can be made to fail, and what is not given
 * back can be counted. Events hold the time of the host's clock. */
#include <stdlib.h>
#include <string.h>
#include <time.h>
static int devices = 1, error = 0, held = 0, handles = 0;
void pretend(int count, int status) { devices = count; error = status; }
int blocks(void) { return held; }
int open_handles(void) { return handles; }
const char *cudaGetErrorString(int status) { return status == 2 ? "out of memory" : "no CUDA-capable device is detected"; }
int cudaGetDeviceCount(int *count) {
  *count = getenv("PRETEND_DEVICES") ? atoi(getenv("PRETEND_DEVICES")) : devices;
  return error == 100 ? error : 0;
}
int cudaGetDevice(int *index) { *index = 0; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int index) {
  (void)index;
  const char *given = getenv("PRETEND_CAPABILITY");
  int capability = given ? atoi(given) : 87;
  if (attribute == 75) *value = capability / 10; else if (attribute == 76) *value = capability % 10; else return 1;
  return 0;
}
int cudaGetDeviceProperties(void *properties, int index) {
  (void)index;
  const char *name = getenv("PRETEND_GPU");
  memset(properties, 0, 1032);
  strcpy(properties, name ? name : "Pretended GPU");
  return 0;
}
int cudaRuntimeGetVersion(int *version) { *version = 12060; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13010; return 0; }
int cudaMemGetInfo(size_t *left, size_t *all) { *left = 3000000000u; *all = 4000000000u; return 0; }
int cudaMalloc(void **at, size_t size) { if (error) return error; *at = malloc(size); held++; return 0; }
int cudaFree(void *at) { free(at); held--; return 0; }
int cudaHostAlloc(void **at, size_t size, unsigned flags) { if (error || flags) return error ? error : 1; *at = malloc(size); held++; return 0; }
int cudaFreeHost(void *at) { free(at); held--; return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { if (kind != 1 && kind != 2) return 1; memcpy(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return stream ? cudaMemcpy(to, from, size, kind) : 1; }
int cudaStreamCreate(void **stream) { *stream = malloc(1); handles++; return 0; }
int cudaStreamDestroy(void *stream) { free(stream); handles--; return 0; }
int cudaStreamSynchronize(void *stream) { return stream ? 0 : 1; }
int cudaEventCreate(void **event) { *event = malloc(sizeof(struct timespec)); handles++; return 0; }
int cudaEventDestroy(void *event) { free(event); handles--; return 0; }
int cudaEventRecord(void *event, void *stream) { return stream && !clock_gettime(CLOCK_MONOTONIC, event) ? 0 : 1; }
int cudaEventSynchronize(void *event) { return event ? 0 : 1; }
int cudaEventElapsedTime(float *ms, void *start, void *end) {
  const struct timespec *a = start, *b = end;
  *ms = (float)((b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6);
  return 0;
}
