// The limits of the device that a launcher chooses its tiles by, as the caller knows them (DeviceLimits in Rust), and the
// dynamic shared memory that they allow. No launcher asks a device itself: what a card allows is said once.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <mutex>

extern "C" {
typedef struct {
    int32_t shared_per_block;            // bytes that a block may have, static and dynamic together
    int32_t shared_per_multiprocessor;   // bytes that its blocks share
    int32_t multiprocessors;
    int32_t bf16;                        // whether the tensor cores take it
    int32_t wgmma;                       // whether Hopper's instructions are there and compiled in
} QloraLimits;
}

// The shared memory that every device from sm_75 on allows a block: tiles of at most so many bytes need no
// smaller form.
constexpr int SMALLEST_SHARED = 64 * 1024;

// Allows a kernel its dynamic shared memory on the current device. cudaErrorLaunchOutOfResources where that is more than
// the limits allow: also where the device itself has more. No error is left for the next launch.
template <auto KERNEL> cudaError_t allow_shared(const QloraLimits& limits, size_t bytes) {
    constexpr int DEVICES = 64;
    static size_t own[DEVICES], allowed[DEVICES];   // static shared memory + 1; dynamic bytes so far
    static std::mutex lock;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    size_t fixed = 0;
    if (error == cudaSuccess) {
        const std::lock_guard<std::mutex> guard(lock);
        const bool kept = device >= 0 && device < DEVICES;
        if (!kept || own[device] == 0) {
            cudaFuncAttributes attributes{};
            int reserved = 0;
            error = cudaFuncGetAttributes(&attributes, KERNEL);
            if (error == cudaSuccess)
                error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
            // Code for Hopper counts what the system takes of every block; the limits do not.
            const size_t system = static_cast<size_t>(reserved);
            fixed = attributes.sharedSizeBytes >= system ? attributes.sharedSizeBytes - system : attributes.sharedSizeBytes;
            if (kept && error == cudaSuccess) own[device] = fixed + 1;
        } else {
            fixed = own[device] - 1;
        }
        if (error == cudaSuccess && fixed + bytes > static_cast<size_t>(limits.shared_per_block))
            return cudaErrorLaunchOutOfResources;
        if (error == cudaSuccess && (!kept || bytes > allowed[device])) {
            error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
            if (kept && error == cudaSuccess) allowed[device] = bytes;
        }
    }
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}
