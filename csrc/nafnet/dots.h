// Products in bfloat16 by AVX-512's dot products of pairs (AVX512_BF16: AMD since 2022, Intel's Xeons since 2023).
// Behind pairs.h, included like it.

struct DotProducts : PairProducts {
    // As FloatProducts::product.
    template <class Take>
    static void product(const Input* input, long stride, long n, long inputs, const float* weight, long panels,
                        const Take& take) {
        const long pairs = (inputs + 1) / 2, all = packed(inputs);  // the rest of a panel's rows are zeros
        for (long panel = 0; panel < panels; ++panel, weight += all * 2 * V)
            for (long first = 0; first < n; first += MR) {
                const pair* from = reinterpret_cast<const pair*>(input + first * stride);
                __m512 sums[MR][2] = {};
                const float* w = weight;
                for (long i = 0; i < pairs; ++i, w += 2 * V) {
                    const __m512bh w0 = __m512bh(load(w)), w1 = __m512bh(load(w + V));
#pragma GCC unroll 8
                    for (int r = 0; r < MR; ++r) {
                        const __m512bh both = __m512bh(_mm512_set1_epi32(from[r * stride / 2 + i]));
                        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, w0);
                        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, w1);
                    }
                }
                const long m = std::min<long>(MR, n - first);
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r)
                    if (r < m) take(first + r, panel, vec(sums[r][0]), vec(sums[r][1]));
            }
    }

private:
    typedef int pair __attribute__((may_alias));
};
