/* A stand-in for libcuda.so.1 on machines without a GPU: "devices" are this process's memory. It lets the tests run the
   probe's own code, in its own process. STAND_IN picks what goes wrong: corrupt, hang, die, no_p2p, no_atomics,
   lost_atomics, no_memory, refuse. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is(const char *mode) {
  const char *given = getenv("STAND_IN");
  return given && !strcmp(given, mode);
}
static void *current;

int cuInit(unsigned flags) { return 0; }
int cuDeviceGetByPCIBusId(int *device, const char *bus) {
  unsigned domain, number;
  if (sscanf(bus, "%4x:%2x:00.0", &domain, &number) != 2 || number > 8) return 101;
  *device = (int)number;
  return 0;
}
int cuDeviceCanAccessPeer(int *answer, int device, int peer) {
  *answer = !is("no_p2p");
  return device == peer ? 101 : 0;
}
int cuDeviceGetP2PAttribute(int *answer, int attribute, int source, int target) {
  *answer = attribute == 3 && !is("no_p2p") && !is("no_atomics");
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(intptr_t)(device + 100), 0; }
int cuCtxSetCurrent(void *context) { return current = context, 0; }
int cuCtxEnablePeerAccess(void *peer, unsigned flags) {
  static void *seen[2][16];
  static int count;
  if (is("refuse")) return 217;
  for (int i = 0; i < count; i++)
    if (seen[0][i] == current && seen[1][i] == peer) return 704;
  seen[0][count] = current, seen[1][count++] = peer;
  return peer == current ? 101 : 0;
}
int cuCtxSynchronize(void) { return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t size) {
  static int left = 5;
  if (is("no_memory") && !left--) return 2;
  return *address = (uint64_t)malloc(size), *address ? 0 : 2;
}
int cuMemcpyHtoD_v2(uint64_t target, const void *source, size_t size) { return memcpy((void *)target, source, size), 0; }
int cuMemcpyDtoH_v2(void *target, uint64_t source, size_t size) { return memcpy(target, (void *)source, size), 0; }
int cuMemcpyPeer(uint64_t target, void *to, uint64_t source, void *from, size_t size) {
  if (to == from) return 101;
  if (is("hang")) for (;;) pause();
  if (is("die")) abort();
  memcpy((void *)target, (void *)source, size);
  if (is("corrupt")) ((char *)target)[size - 7] ^= 1;
  return 0;
}
int cuModuleLoadData(void **module, const char *image) { return *module = (void *)image, strstr(image, ".target") ? 0 : 218; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = strdup(name), 0; }
int cuLaunchKernel(const char *name, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  uint64_t first = *(uint64_t *)arguments[0];
  if (!strcmp(name, "copy_words")) {
    unsigned words = *(unsigned *)arguments[2];
    memcpy((void *)first, (void *)*(uint64_t *)arguments[1], 4ul * (words < gx * bx ? words : gx * bx));
    return 0;
  }
  *(unsigned *)first += gx * bx * *(unsigned *)arguments[1] - (is("lost_atomics") ? 3 : 0);
  return 0;
}
int cuGetErrorName(int status, const char **words) { return *words = "CUDA_ERROR_STAND_IN", 0; }
