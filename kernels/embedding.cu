// Token embedding: row ids[i] of a frozen table [vocabulary, width] becomes row i of out [tokens, width], converted to
// its type. The table may lie in pinned host memory: its rows then cross the bus in 16-byte reads, each once.
//
// Floor: memory, one read and one write per element. The caller has checked the ids.

#include "common.cuh"

namespace {

template <typename From, typename To, int N> struct Gather {
    const From* table;
    const uint32_t* ids;
    To* out;
    int64_t ldo, width;

    __device__ void operator()(int64_t row, int64_t col) const {
        float values[N];
        load_floats(table + static_cast<int64_t>(ids[row]) * width + col, values);
        store_floats(out + row * ldo + col, values);
    }
};

}  // namespace

extern "C" int qlora_embedding(int table_dtype, const void* table, const uint32_t* ids, int out_dtype, void* out,
                               int64_t ldo, int64_t tokens, int64_t width, cudaStream_t stream) {
    return with_dtype(table_dtype, [&](auto from) {
        return with_dtype(out_dtype, [&](auto to) {
            using From = decltype(from);
            using To = decltype(to);
            const From* rows = static_cast<const From*>(table);
            To* o = static_cast<To*>(out);
            constexpr int N = 8;
            if (allows_vectors(rows, width, width, N) && allows_vectors(o, ldo, width, N)) {
                return for_each_pack<N>(tokens, width, Gather<From, To, N>{rows, ids, o, ldo, width}, stream);
            }
            return for_each_pack<1>(tokens, width, Gather<From, To, 1>{rows, ids, o, ldo, width}, stream);
        });
    });
}
