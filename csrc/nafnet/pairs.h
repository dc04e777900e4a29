// Products of pixels and weights in bfloat16, summed in float32: what AVX-512's dot products and AMX's tiles have in
// common, which both take pairs of inputs. Behind products.h, included like it.

struct PairProducts : FloatProducts<16, 8> {
    typedef unsigned bits __attribute__((vector_size(V * 4)));
    typedef unsigned short halves __attribute__((vector_size(V * 2)));

    typedef unsigned short Input;  // in bfloat16
    static void put(Input* to, vec values) {
        const __m256bh narrow = _mm512_cvtneps_pbh(__m512(values));
        std::memcpy(to, &narrow, sizeof narrow);
    }
    static vec get(const Input* from) {
        halves narrow;
        std::memcpy(&narrow, from, sizeof narrow);
        return vec(__builtin_convertvector(narrow, bits) << 16);
    }

    static long packed(long inputs) { return (inputs + 31) / 32 * 16; }  // a tile takes 16 pairs of inputs

    static void scale(const float* weight, const float* by, long row, long inputs, float* to) {
        const float even = 2 * row < inputs ? by[2 * row] : 0, odd = 2 * row < inputs ? by[2 * row + 1] : 0;
        for (int i = 0; i < 2 * V; i += V) {
            const bits pair = bits(load(weight + i));
            store(to + i, vec(widened(vec(pair << 16) * even) | widened(vec(pair & 0xffff0000u) * odd) << 16));
        }
    }

private:
    static bits widened(vec values) {  // as bfloat16, in the lower half of 32 bits
        const __m256bh narrow = _mm512_cvtneps_pbh(__m512(values));
        return __builtin_convertvector(halves(narrow), bits);
    }
};
