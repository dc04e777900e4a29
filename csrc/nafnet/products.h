// Products of pixels and weights in float32, for one instruction set: included once per set, like engine.h.
//
// V floats make a vector; a tile of a product is MR pixels by 2V outputs, whose sums stay in registers.

template <int LANES, int TILE>
struct FloatProducts {
    static constexpr int V = LANES, MR = TILE;
    typedef float vec __attribute__((vector_size(V * sizeof(float)), aligned(4), may_alias));

    struct Ready {};  // what a thread holds while it calls `product`

    static vec load(const float* from) { return *reinterpret_cast<const vec*>(from); }
    static void store(float* to, vec value) { *reinterpret_cast<vec*>(to) = value; }

    typedef float Input;  // of a product
    static void put(Input* to, vec values) { store(to, values); }
    static vec get(const Input* from) { return load(from); }

    // A product may read its input up to a multiple of so many rows, and of so many numbers of a row.
    static constexpr long ROWS = MR, NUMBERS = 1;

    // What the next panel reads or writes, into the second cache: maps larger than it come more slowly than they are used.
    static void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }
    static void fetch(void* to) { __builtin_prefetch(to, 1, 2); }

    // Rows of 2V floats in a panel of packed weights.
    static long packed(long inputs) { return inputs; }

    // Row `row` of a panel, its inputs multiplied by their numbers in `by`.
    static void scale(const float* weight, const float* by, long row, long /* inputs */, float* to) {
        store(to, load(weight) * by[row]);
        store(to + V, load(weight + V) * by[row]);
    }

    // take(pixel, panel, first V outputs, next V outputs) for all n pixels of `input` (rows `stride` apart, readable up
    // to ROWS and NUMBERS) and all panels of weights.
    template <class Take>
    static void product(const Input* input, long stride, long n, long inputs, const float* weight, long panels,
                        const Take& take) {
        for (long panel = 0; panel < panels; ++panel, weight += inputs * 2 * V)
            for (long first = 0; first < n; first += MR) {
                const float* row[MR];
                for (int r = 0; r < MR; ++r) row[r] = input + (first + r) * stride;
                vec sums[MR][2] = {};
                accumulate(row, weight, 0, std::min(inputs, BLOCK), sums);
                for (long i = BLOCK; i < inputs; i += BLOCK) {
                    vec part[MR][2] = {};
                    accumulate(row, weight, i, std::min(inputs, i + BLOCK), part);
                    for (int r = 0; r < MR; ++r) sums[r][0] += part[r][0], sums[r][1] += part[r][1];
                }
                const long m = std::min<long>(MR, n - first);
                if (m == MR) {
#pragma GCC unroll 8
                    for (int r = 0; r < MR; ++r) take(first + r, panel, sums[r][0], sums[r][1]);
                } else {
#pragma GCC unroll 8
                    for (int r = 0; r < MR; ++r)
                        if (r < m) take(first + r, panel, sums[r][0], sums[r][1]);
                }
            }
    }

private:
    static constexpr long BLOCK = 64;  // inputs that are summed at a stretch: the error of longer sums grows with them

    // sums += a tile's products over inputs [first, last).
    __attribute__((always_inline)) static inline void accumulate(const float* const (&row)[MR], const float* weight,
                                                                 long first, long last, vec (&sums)[MR][2]) {
        const float* w = weight + first * 2 * V;
        for (long i = first; i < last; ++i, w += 2 * V) {
            const vec w0 = load(w), w1 = load(w + V);
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) {
                sums[r][0] += row[r][i] * w0;
                sums[r][1] += row[r][i] * w1;
            }
        }
    }
};
