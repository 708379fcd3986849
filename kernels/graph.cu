// Launches recorded as a CUDA graph (cuda/graph.rs), through the runtime library, as all launches here.

#include <cuda_runtime.h>

// From here on launches on `stream` are recorded instead of run.
extern "C" int qlora_graph_begin(cudaStream_t stream) {
    return static_cast<int>(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
}

// Ends the recording. `exec` becomes what was recorded, or null if `keep` is 0 or something could not be recorded.
extern "C" int qlora_graph_end(cudaStream_t stream, int keep, cudaGraphExec_t* exec) {
    *exec = nullptr;
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamEndCapture(stream, &graph);
    if (error == cudaSuccess && graph && keep) {
        // cudaGraphInstantiate has other arguments before CUDA 12.
        error = cudaGraphInstantiateWithFlags(exec, graph, 0);
        if (error != cudaSuccess) *exec = nullptr;
    }
    if (graph) cudaGraphDestroy(graph);
    // The next launch must not find this error; what a recording cannot hold is no failure of the device.
    if (error != cudaSuccess) cudaGetLastError();
    return static_cast<int>(cudaSuccess);
}

extern "C" int qlora_graph_launch(cudaGraphExec_t exec, cudaStream_t stream) {
    return static_cast<int>(cudaGraphLaunch(exec, stream));
}

// The driver keeps what a launch in flight needs.
extern "C" int qlora_graph_destroy(cudaGraphExec_t exec) { return static_cast<int>(cudaGraphExecDestroy(exec)); }
