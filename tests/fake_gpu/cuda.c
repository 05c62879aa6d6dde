/* The functions of libcuda and libcudart that Inferpool calls, with a host's memory for two cards.

   Signatures are those of cuda.h and cuda_runtime_api.h. FAKE_CUINIT is what cuInit returns. */

#include <stdlib.h>
#include <string.h>

int cuInit(unsigned flags) {
    const char *status = getenv("FAKE_CUINIT");
    return flags ? 1 : status ? atoi(status) : 0;
}
int cuDriverGetVersion(int *version) { return *version = 13020, 0; }
int cuDeviceGetCount(int *count) { return *count = 2, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 70 + ordinal, 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 70 ? "NVIDIA First" : "NVIDIA Second", length);
    return 0;
}
int cuDeviceGetUuid_v2(unsigned char uuid[16], int device) {
    for (int place = 0; place < 16; place++) uuid[place] = (unsigned char)(device - 70 + 16 * place);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = (size_t)(device - 69) << 37, 0; }
int cuGetErrorString(int error, const char **text) {
    *text = "system has unsupported display driver / cuda driver combination";
    return error != 803;
}

static size_t left = 1 << 20;
static int device = -1, allocated, streams, pending;
static struct { void *to; const void *from; size_t bytes; } copies[64];

int cudaSetDevice(int number) { return device = number, 0; }
const char *cudaGetErrorString(int error) { return error == 2 ? "out of memory" : "unspecified"; }
int cudaGetLastError(void) { return 0; }
int fakeFaults, fakeSticky; /* the errors that the next calls report, and the one that every call reports */
int cudaMemGetInfo(size_t *free, size_t *total) {
    *free = *total = 1 << 30;
    return fakeFaults ? fakeFaults--, 1 : fakeSticky;
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    return *stream = malloc(1), streams++, flags == 1 ? 0 : 1;
}
int cudaStreamDestroy(void *stream) { return free(stream), streams--, 0; }
/* Every block has its size before it, in as many bytes as keep it aligned. */
static int take(void **address, size_t bytes) {
    if (device != 3 || bytes > left) return 2;
    left -= bytes;
    allocated++;
    size_t *block = malloc(64 + bytes);
    *block = bytes;
    *address = (char *)block + 64;
    return 0;
}
static int give_back(void *address) {
    size_t *block = (size_t *)((char *)address - 64);
    left += *block;
    allocated--;
    return free(block), 0;
}
void fakeRoom(size_t bytes) { left = bytes; }
int cudaHostAlloc(void **address, size_t bytes, unsigned flags) { return flags == 1 ? take(address, bytes) : 1; }
int cudaMalloc(void **address, size_t bytes) { return take(address, bytes); }
int cudaFreeHost(void *address) { return give_back(address); }
int cudaFree(void *address) { return give_back(address); }
/* Copies happen when they are waited for, so that whoever does not wait is found out. */
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    if (!stream || (kind != 1 && kind != 2) || pending == 64) return 1;
    copies[pending].to = to;
    copies[pending].from = from;
    copies[pending++].bytes = bytes;
    return 0;
}
int cudaMemsetAsync(void *to, int byte, size_t bytes, void *stream) {
    return byte ? 1 : cudaMemcpyAsync(to, NULL, bytes, 1, stream);
}
int cudaStreamSynchronize(void *stream) {
    for (int number = 0; number < pending; number++)
        if (copies[number].from)
            memcpy(copies[number].to, copies[number].from, copies[number].bytes);
        else
            memset(copies[number].to, 0, copies[number].bytes);
    pending = 0;
    return stream ? 0 : 1;
}

/* A capture is begun by fakeCapture, as ONNX Runtime begins one, and ended on the thread that began it. */
static __thread int mode, capturing;
static int graphs;
int cudaThreadExchangeStreamCaptureMode(int *new) {
    int old = mode;
    return mode = *new, *new = old, 0;
}
void fakeCapture(void) { capturing = 1; }
int fakeMode(void) { return mode; }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 2 * capturing, stream ? 0 : 1; }
int cudaStreamEndCapture(void *stream, void **graph) {
    capturing = 0;
    *graph = malloc(1);
    graphs++;
    return 901;
}
int cudaGraphDestroy(void *graph) { return free(graph), graphs--, 0; }
int fakeLeft(void) { return allocated + streams + graphs + capturing; }
