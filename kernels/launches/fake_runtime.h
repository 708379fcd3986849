// What fake_runtime.cpp recorded.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

struct Launch {
    std::string kernel;
    dim3 grid, block;
    size_t dynamic_shared, static_shared;
    bool early;
};

// Bytes of shared memory that a block may have from now on.
void set_block_limit(size_t bytes);

// The launches since the last call.
std::vector<Launch> take_launches();
