// Products in bfloat16 by a CPU's tiles (Intel AMX). Behind pairs.h, included like it.
//
// Three times 16 pixels by 32 outputs are summed at once: tiles 0 to 5. The assembler's names are written out, because the
// compilers' functions for tiles differ in what memory they say they read.

struct TileProducts : PairProducts {
    // A thread's tiles, all of 16 rows of 64 bytes.
    struct Ready {
        Ready() {
            struct alignas(64) {
                unsigned char palette = 1, start_row = 0, reserved[14] = {};
                unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } shapes;
            asm volatile("ldtilecfg %0" ::"m"(shapes));
        }
        ~Ready() { asm volatile("tilerelease" ::: "memory"); }
        Ready(const Ready&) = delete;
        Ready& operator=(const Ready&) = delete;
    };

    static constexpr long ROWS = 16, NUMBERS = 32;  // a tile's; what it reads beyond the inputs has to be finite

    // As FloatProducts::product.
    template <class Take>
    static void product(const Input* input, long stride, long n, long inputs, const float* weight, long panels,
                        const Take& take) {
        const long pairs = packed(inputs);
        for (long panel = 0; panel < panels; ++panel, weight += pairs * 2 * V) {
            long first = 0;
            for (; n - first > 32; first += 48)
                tiles<3>(input + first * stride, stride, first, std::min(48L, n - first), pairs, weight, panel, take);
            if (n - first > 16)
                tiles<2>(input + first * stride, stride, first, n - first, pairs, weight, panel, take);
            else if (n > first)
                tiles<1>(input + first * stride, stride, first, n - first, pairs, weight, panel, take);
        }
    }

private:
    // 16 pixels `COUNT` times, of which n count.
    template <int COUNT, class Take>
    static void tiles(const Input* pixels, long row, long first, long n, long pairs, const float* weight, long panel,
                      const Take& take) {
        constexpr int INPUTS = 6, WEIGHTS = 7;
        zero<0>(), zero<1>();
        if constexpr (COUNT > 1) zero<2>(), zero<3>();
        if constexpr (COUNT > 2) zero<4>(), zero<5>();
        for (long i = 0; i < pairs; i += 16) {
            const Input* from = pixels + 2 * i;
            const float* w = weight + i * 2 * V;
            fill<WEIGHTS>(w, 8 * V);
            fill<INPUTS>(from, 2 * row);
            add<0, INPUTS, WEIGHTS>();
            if constexpr (COUNT > 1) fill<INPUTS>(from + 16 * row, 2 * row), add<2, INPUTS, WEIGHTS>();
            if constexpr (COUNT > 2) fill<INPUTS>(from + 32 * row, 2 * row), add<4, INPUTS, WEIGHTS>();
            fill<WEIGHTS>(w + V, 8 * V);
            if constexpr (COUNT > 2) add<5, INPUTS, WEIGHTS>(), fill<INPUTS>(from + 16 * row, 2 * row);
            if constexpr (COUNT > 1) add<3, INPUTS, WEIGHTS>(), fill<INPUTS>(from, 2 * row);
            add<1, INPUTS, WEIGHTS>();
        }
        alignas(64) float sums[COUNT * 16 * 2 * V];
        keep<0>(sums), keep<1>(sums + V);
        if constexpr (COUNT > 1) keep<2>(sums + 32 * V), keep<3>(sums + 33 * V);
        if constexpr (COUNT > 2) keep<4>(sums + 64 * V), keep<5>(sums + 65 * V);
        for (long p = 0; p < n; ++p) take(first + p, panel, load(sums + p * 2 * V), load(sums + p * 2 * V + V));
    }

    template <int TILE>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
    }

    template <int TILE>
    static void fill(const void* from, long bytes) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(TILE) : "memory");
    }

    template <int TILE>
    static void keep(float* to) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(2L * V * 4), "i"(TILE) : "memory");
    }

    template <int SUM, int INPUTS, int WEIGHTS>
    static void add() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(INPUTS), "i"(WEIGHTS));
    }
};
