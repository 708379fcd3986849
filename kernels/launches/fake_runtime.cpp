// Stands in for the CUDA runtime: launches are recorded instead of run, so that what launchers choose can be looked at
// without a GPU. Static shared memory is read from the machine code in the program; a launch that asks for more than the
// limits allow, or for more than was set for its kernel, is an error that ends the program.

#include "fake_runtime.h"

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {

// What the system takes of a block on the architecture that the objects are for (90); its code counts it as static.
constexpr size_t RESERVED = 1024;

struct Kernel {
    std::string name;
    size_t fixed = 0;          // static shared memory, without what the system takes
    size_t dynamic = 48 << 10; // what may be asked for, the static part aside
};

std::map<const void*, Kernel>& kernels() {
    static std::map<const void*, Kernel> all;
    return all;
}

std::map<std::string, size_t>& fixed_shared() {
    static std::map<std::string, size_t> all;
    return all;
}

struct Pending {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};

std::vector<Pending> pending;
std::vector<Launch> launches;
cudaError_t last_error = cudaSuccess;
size_t block_limit = 0;

cudaError_t note(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

template <typename T> T read(const unsigned char* at) {
    T value;
    memcpy(&value, at, sizeof value);
    return value;
}

// The sizes of the sections .nv.shared.<kernel> of an ELF file.
void read_elf(const unsigned char* elf) {
    const auto offset = read<uint64_t>(elf + 40);
    const int count = read<uint16_t>(elf + 60), names = read<uint16_t>(elf + 62);
    const auto section = [&](int i) { return elf + offset + i * 64; };
    const char* strings = reinterpret_cast<const char*>(elf + read<uint64_t>(section(names) + 24));
    for (int i = 0; i < count; i++) {
        const std::string name = strings + read<uint32_t>(section(i));
        const std::string start = ".nv.shared.";
        if (name.compare(0, start.size(), start) != 0) continue;
        size_t& bytes = fixed_shared()[name.substr(start.size())];
        const size_t size = read<uint64_t>(section(i) + 32);
        if (size > bytes) bytes = size;
    }
}

void read_fatbin(const unsigned char* at) {
    const auto size = read<uint64_t>(at + 8);
    const unsigned char* end = at + 16 + size;
    for (at += 16; at < end;) {
        const auto kind = read<uint16_t>(at);
        const auto header = read<uint32_t>(at + 4);
        const auto bytes = read<uint64_t>(at + 8);
        if (kind == 2 && memcmp(at + header, "\177ELF", 4) == 0) read_elf(at + header);
        at += header + bytes;
    }
}

std::string demangled(const char* name) {
    int status = 0;
    char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    std::string found = status == 0 ? text : name;
    free(text);
    const std::string hidden = "(anonymous namespace)::";
    for (size_t i; (i = found.find(hidden)) != std::string::npos;) found.erase(i, hidden.size());
    // Without the arguments, which follow from the template's.
    int depth = 0;
    for (size_t i = 0; i < found.size(); i++) {
        depth += (found[i] == '<') - (found[i] == '>');
        if (depth == 0 && found[i] == '(') {
            found.resize(i);
            break;
        }
    }
    if (found.compare(0, 5, "void ") == 0) found.erase(0, 5);
    return found;
}

cudaError_t record(const void* function, dim3 grid, dim3 block, size_t shared, bool early) {
    const auto found = kernels().find(function);
    if (found == kernels().end()) abort();
    const Kernel& kernel = found->second;
    const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
    if (shared > kernel.dynamic || shared + kernel.fixed > block_limit || threads > 1024 || threads == 0 || grid.x == 0) {
        fprintf(stderr, "%s cannot be launched: %zu + %zu bytes of %zu, %zu threads\n", kernel.name.c_str(), shared,
                kernel.fixed, block_limit, threads);
        exit(1);
    }
    launches.push_back({kernel.name, grid, block, shared, kernel.fixed, early});
    return cudaSuccess;
}

}  // namespace

void set_block_limit(size_t bytes) { block_limit = bytes; }

std::vector<Launch> take_launches() { return std::move(launches); }

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
    read_fatbin(static_cast<const unsigned char*>(*reinterpret_cast<void**>(static_cast<char*>(wrapper) + 8)));
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    Kernel kernel;
    kernel.name = demangled(name);
    const auto found = fixed_shared().find(name);
    if (found != fixed_shared().end() && found->second > RESERVED) kernel.fixed = found->second - RESERVED;
    kernel.dynamic -= kernel.fixed;
    kernels()[host] = kernel;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pending.push_back({grid, block, shared, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    const Pending top = pending.back();
    pending.pop_back();
    *grid = top.grid, *block = top.block, *shared = top.shared;
    *static_cast<cudaStream_t*>(stream) = top.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
    return record(kernel, grid, block, shared, false);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    return record(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->numAttrs > 0);
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    // The one thing that a launcher may ask a device for: everything else is in the limits.
    if (attribute != cudaDevAttrReservedSharedMemoryPerBlock) return note(cudaErrorInvalidValue);
    *value = RESERVED;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    *attributes = {};
    attributes->sharedSizeBytes = kernels().at(function).fixed + RESERVED;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    Kernel& kernel = kernels().at(function);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return note(cudaErrorInvalidValue);
    if (value < 0 || value + kernel.fixed > block_limit) return note(cudaErrorInvalidValue);
    kernel.dynamic = value;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return note(cudaErrorNotSupported); }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return note(cudaErrorNotSupported); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) { return note(cudaErrorNotSupported); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return note(cudaErrorNotSupported); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
}
