// What every launcher that looks at the device's limits launches, for many shapes, on the host alone (fake_runtime.cpp):
// kernel, grid, block and shared memory, one line a launch.
//
//     launches ARCHITECTURE MULTIPROCESSORS       such as 90 132, 86 28, 75 40
//
// It ends with an error if a launch asks for more than the architecture has, or if a launcher that must take a shape
// refuses it. For an H200 the lines are kept (h200.txt): scripts/check-launches.sh compares them.

#include "fake_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "api.h"

namespace {

QloraLimits limits;
bool has_bf16, early_launches;
int refused = 0, launched = 0;

// An address that nobody reads.
template <typename T = void> T* at(int64_t number) { return reinterpret_cast<T*>((int64_t{1} << 40) + (number << 32)); }

// Prints the launches of a call. `must`: the launcher has to take it; others say so, and their callers go another way.
void show(const std::string& call, int status, bool must) {
    const auto all = take_launches();
    if (status != 0 && (must || (status != cudaErrorInvalidValue && status != cudaErrorLaunchOutOfResources))) {
        fprintf(stderr, "%s: error %d\n", call.c_str(), status);
        exit(1);
    }
    if (status == 0 && all.empty()) {
        fprintf(stderr, "%s launched nothing\n", call.c_str());
        exit(1);
    }
    if (cudaGetLastError() != cudaSuccess) {
        fprintf(stderr, "%s left an error for the next launch\n", call.c_str());
        exit(1);
    }
    if (status != 0) {
        refused++;
        printf("%s: not taken\n", call.c_str());
    }
    for (const Launch& l : all) {
        launched++;
        printf("%s: %s grid %u,%u,%u block %u,%u,%u shared %zu%s\n", call.c_str(), l.kernel.c_str(), l.grid.x, l.grid.y,
               l.grid.z, l.block.x, l.block.y, l.block.z, l.dynamic_shared, l.early ? " early" : "");
    }
}

std::string words(const char* name, std::initializer_list<int64_t> numbers) {
    std::string text = name;
    for (const int64_t number : numbers) text += " " + std::to_string(number);
    return text;
}

void attention() {
    struct Batch {
        int64_t sequences, longest, tokens, window;
    };
    const Batch batches[] = {{4, 2048, 8192, 0}, {1, 130, 130, 0}, {3, 700, 1500, 256}, {1, 16384, 16384, 0}};
    for (const int dtype : {1, 2}) {
        if (dtype == 1 && !has_bf16) continue;
        for (const int64_t d : {64, 96, 128})
            for (const auto& [heads, kv_heads] : {std::pair{32, 8}, std::pair{9, 3}})
                for (const Batch& b : batches) {
                    const int64_t ld = heads * d;
                    const int forward = qlora_attention_forward(
                        dtype, at(1), ld, at(2), ld, at(3), ld, at(4), ld, at<float>(5), at<int32_t>(6), at<int32_t>(6),
                        b.sequences, b.longest, b.tokens, heads, kv_heads, d, 0.1f, b.window, &limits, nullptr);
                    show(words("attention_forward", {dtype, d, heads, b.sequences, b.longest, b.tokens}), forward, true);
                    for (const int deterministic : {0, 1}) {
                        const int backward = qlora_attention_backward(
                            dtype, at(1), ld, at(2), ld, at(3), ld, at(4), ld, at<float>(5), at(6), ld, at(7), ld, at(8),
                            ld, at(9), ld, at(10), at<int32_t>(11), b.sequences, b.longest, b.tokens, heads, kv_heads, d,
                            0.1f, b.window, deterministic, &limits, nullptr);
                        show(words("attention_backward", {dtype, d, heads, b.sequences, b.longest, b.tokens, deterministic}),
                             backward, true);
                    }
                }
    }
}

void cross_entropy() {
    for (const int dtype : {0, 1, 2})
        for (const int64_t vocab : {1000, 16384, 32000, 49152, 57344, 65536, 128256, 151936, 262144})
            for (const int write : {0, 1})
                show(words("cross_entropy", {dtype, vocab, write}),
                     qlora_cross_entropy(dtype, at(1), vocab, at<int64_t>(2), at<float>(3), 64, vocab, 1.0f, nullptr, write, &limits,
                                         nullptr),
                     true);
}

void lora() {
    for (const int dtype : {1, 2}) {
        if (dtype == 1 && !has_bf16) continue;
        for (const int64_t rp : {16, 32, 48, 64})
            for (const int64_t n : {576, 1024, 4096, 6144, 28672})
                for (const int64_t tokens : {1, 100, 2048, 8192, 16384}) {
                    const std::string call = words("lora_ds_db", {dtype, rp, n, tokens});
                    printf("%s: workspace %ld\n", call.c_str(), qlora_lora_ds_db_workspace(tokens, n, rp, &limits));
                    show(call,
                         qlora_lora_ds_db(dtype, at(1), n, at(2), rp, at(3), rp, at(4), rp, at<float>(5), at<float>(6),
                                          tokens, n, rp, &limits, nullptr),
                         true);
                }
    }
}

// Weights that share an input of k: nested scales.
QloraFewWeights weights(int64_t k, std::initializer_list<int64_t> rows, int rank) {
    QloraFewWeights w{};
    w.k = k, w.blocksize = 64, w.nested_blocksize = 256;
    int r0 = 0;
    for (const int64_t n : rows) {
        QloraFewMember& m = w.m[w.count++];
        const int base = 10 * w.count;
        m.codes = at<uint8_t>(base), m.absmax_codes = at<uint8_t>(base + 1), m.nested_map = at<float>(base + 2);
        m.nested_absmax = at<float>(base + 3), m.lora_b = rank > 0 ? at<float>(base + 4) : nullptr;
        m.rows = n, m.scale = 2.0f, m.rank = rank, m.r0 = r0;
        r0 += rank;
    }
    return w;
}

void few_tokens() {
    printf("few_tokens_most: %ld\n", qlora_few_tokens_most(&limits));
    const std::vector<std::pair<int64_t, std::vector<int64_t>>> groups = {
        {4096, {4096, 1024, 1024}}, {4096, {14336, 14336}}, {14336, {4096}}, {576, {576, 192, 192}},
        {576, {1536, 1536}},        {1536, {576}},          {8192, {28672, 28672}}};
    for (const auto& [k, rows] : groups)
        for (const int rank : {0, 4, 8, 16, 32, 64, 128, 256})
            for (const int64_t tokens : {1, 2, 8, 9, 16, 17, 32, 33, 64, 100, 128})
                for (const int dtype : {1, 2}) {
                    if (dtype == 1 && !has_bf16) continue;
                    QloraFewWeights w{};
                    if (rows.size() == 1) w = weights(k, {rows[0]}, rank);
                    if (rows.size() == 2) w = weights(k, {rows[0], rows[1]}, rank);
                    if (rows.size() == 3) w = weights(k, {rows[0], rows[1], rows[2]}, rank);
                    int64_t all = 0;
                    for (const int64_t n : rows) all += n;
                    const int swiglu = rows.size() == 2;
                    const float* s = rank > 0 ? at<float>(1) : nullptr;
                    const int64_t lds = rank * static_cast<int64_t>(rows.size());
                    const auto call = [&](const char* name) { return words(name, {dtype, k, all, rank, tokens}); };
                    const auto run = [&](decltype(&qlora_nf4_gemv) kernel) {
                        return kernel(dtype, w, at(2), k, s, lds, nullptr, 0, at(3), all, tokens, swiglu, early_launches,
                                      at(4), &limits, nullptr);
                    };
                    if (tokens > 8 && tokens <= 16) show(call("nf4_gemv16"), run(qlora_nf4_gemv16), false);
                    if (tokens <= 16) {
                        printf("%s: workspace %ld\n", call("nf4_gemv").c_str(),
                               qlora_nf4_gemv_workspace(all, k, tokens, &limits));
                        show(call("nf4_gemv"), run(qlora_nf4_gemv), false);
                    }
                    // The last resort before a dequantized copy: it takes everything.
                    printf("%s: workspace %ld\n", call("nf4_small_gemm").c_str(),
                           qlora_nf4_small_gemm_workspace(w, tokens, swiglu, &limits));
                    show(call("nf4_small_gemm"), run(qlora_nf4_small_gemm), true);
                }
    for (const int dtype : {1, 2}) {
        if (dtype == 1 && !has_bf16) continue;
        for (const int64_t k : {576, 1536, 2048, 4096, 5120, 8192})
            for (const int64_t tokens : {1, 8, 9, 16})
                for (const int y : {0, dtype})
                    show(words("bf16_gemv", {dtype, k, tokens, y}),
                         qlora_bf16_gemv(dtype, at(1), k, at(2), k, y, at(3), 128256, tokens, 128256, k, early_launches,
                                         &limits, nullptr),
                         false);
    }
}

void decode() {
    for (const int dtype : {1, 2}) {
        if (dtype == 1 && !has_bf16) continue;
        for (const int64_t d : {64, 96, 128})
            for (const int64_t sequences : {1, 4, 16, 64})
                for (const int64_t capacity : {100, 2048, 32768}) {
                    const std::string call = words("decode_attention", {dtype, d, sequences, capacity});
                    printf("%s: workspace %ld\n", call.c_str(),
                           qlora_decode_attention_workspace(sequences, 1, 32, 8, d, capacity, &limits));
                    show(call,
                         qlora_decode_attention(dtype, at(1), 32 * d, at<const void*>(2), at<const void*>(3), 8 * d,
                                                at<uint32_t>(4), at(5), 32 * d, sequences, 1, 32, 8, d, capacity, 0.1f, 0,
                                                early_launches, at(6), &limits, nullptr),
                         true);
                }
    }
}

void early() {
    for (const int dtype : {0, 1, 2}) {
        for (const int64_t rows : {1, 16, 64, 65, 4096})
            for (const int64_t width : {576, 4096, 8192})
                show(words("rms_norm_forward", {dtype, rows, width}),
                     qlora_rms_norm_forward(dtype, at(1), width, nullptr, 0, at<float>(2), 1e-5f, at(3), width,
                                            at<float>(4), rows, width, 1, early_launches, nullptr),
                     true);
        show(words("dequantize_4bit", {dtype}),
             qlora_dequantize_4bit(dtype, at<uint8_t>(1), nullptr, at<uint8_t>(2), at<float>(3), at<float>(4), 0.5f, 0, 64,
                                   256, at(5), 4096, 0, 4096, 4096, early_launches, nullptr),
             true);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const int architecture = atoi(argv[1]), multiprocessors = atoi(argv[2]);
    // As DeviceLimits::of_architecture has them.
    int block = 0, all = 0;
    switch (architecture) {
        case 75: block = all = 64; break;
        case 80: block = 163, all = 164; break;
        case 86:
        case 89:
        case 120: block = 99, all = 100; break;
        case 90:
        case 100: block = 227, all = 228; break;
        default: return 2;
    }
    has_bf16 = architecture >= 80, early_launches = architecture >= 90;
    limits = {block * 1024, all * 1024, multiprocessors, has_bf16, architecture == 90};
    set_block_limit(static_cast<size_t>(block) * 1024);
    attention();
    cross_entropy();
    lora();
    few_tokens();
    decode();
    early();
    fprintf(stderr, "%d.%d: %d launches, %d calls left to another way\n", architecture / 10, architecture % 10, launched,
            refused);
}
