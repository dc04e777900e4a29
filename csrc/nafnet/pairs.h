// Products of pixels and weights in bfloat16, summed in float32: what AVX-512's dot products and AMX's tiles have in
// common, which both take pairs of inputs. Behind products.h, included like it.

struct PairProducts : FloatProducts<16, 8> {
    typedef unsigned bits __attribute__((vector_size(V * 4)));

    static long packed(long inputs) { return (inputs + 31) / 32 * 16; }  // a tile takes 16 pairs of inputs

    static bool reserve(long pixels, long inputs) {  // rows of at most V floats more than they hold, tiles.h
        return rounded((pixels + 15) / 16 * 16 * (packed(inputs) + V));
    }

    static void scale(const float* weight, const float* by, long row, long inputs, float* to) {
        const float even = 2 * row < inputs ? by[2 * row] : 0, odd = 2 * row < inputs ? by[2 * row + 1] : 0;
        for (int i = 0; i < 2 * V; i += V) {
            const bits pair = bits(load(weight + i));
            store(to + i, vec(widened(vec(pair << 16) * even) | widened(vec(pair & 0xffff0000u) * odd) << 16));
        }
    }

protected:
    // n pixels in bfloat16, `row` floats apart; up to a multiple of 16 rows, behind n with what was there.
    static const float* rounded_rows(const float* input, long stride, long n, long inputs, long row) {
        float* pixels = rounded((n + 15) / 16 * 16 * row);
        for (long p = 0; p < n; ++p)
            for (long i = 0; i < inputs; i += 2 * V) {
                const float* from = input + p * stride + i;
                const __m512 second = i + V < inputs ? _mm512_loadu_ps(from + V) : _mm512_setzero_ps();
                const __m512bh both = _mm512_cvtne2ps_pbh(second, _mm512_loadu_ps(from));
                std::memcpy(pixels + p * row + i / 2, &both, sizeof both);
            }
        return pixels;
    }

private:
    static bits widened(vec values) {  // as bfloat16, in the lower half of 32 bits
        const __m256bh narrow = _mm512_cvtneps_pbh(__m512(values));
        typedef unsigned short halves __attribute__((vector_size(V * 2)));
        return __builtin_convertvector(halves(narrow), bits);
    }
};
