// Products in bfloat16 by AVX-512's dot products of pairs (AVX512_BF16: AMD since 2022, Intel's Xeons since 2023).
// Behind pairs.h, included like it.

struct DotProducts : PairProducts {
    // As FloatProducts::product, whose `input` is read up to row n only.
    template <class Take>
    static void product(const float* input, long stride, long n, long inputs, const float* weight, long panels,
                        const Take& take) {
        const long pairs = (inputs + 1) / 2, all = packed(inputs);  // the rest of a panel's rows are zeros
        const float* pixels = rounded_rows(input, stride, n, inputs, all);
        for (long panel = 0; panel < panels; ++panel, weight += all * 2 * V)
            for (long first = 0; first < n; first += MR) {
                const float* from = pixels + first * all;
                __m512 sums[MR][2] = {};
                const float* w = weight;
                for (long i = 0; i < pairs; ++i, w += 2 * V) {
                    const __m512bh w0 = __m512bh(load(w)), w1 = __m512bh(load(w + V));
#pragma GCC unroll 8
                    for (int r = 0; r < MR; ++r) {
                        const __m512bh pair = __m512bh(_mm512_set1_ps(from[r * all + i]));
                        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, w0);
                        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, w1);
                    }
                }
                const long m = std::min<long>(MR, n - first);
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r)
                    if (r < m) take(first + r, panel, vec(sums[r][0]), vec(sums[r][1]));
            }
    }
};
