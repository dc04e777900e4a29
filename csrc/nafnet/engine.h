// The U-Net's parts for one instruction set: included once per set, with that set's target options on, inside a
// namespace of its own, behind the set's products (products.h, tiles.h). It includes nothing itself.

template <class Products>
class Engine : Products {
    using typename Products::vec, typename Products::Input;
    using Products::fetch, Products::get, Products::load, Products::packed, Products::product, Products::put, Products::store;
    static constexpr int V = Products::V, MR = Products::MR;
    static constexpr long ROWS = Products::ROWS, NUMBERS = Products::NUMBERS;
    static constexpr long PANEL = 48;  // pixels that go through all products of a block together, a multiple of ROWS
    static constexpr long PAD = 2 * V;  // keeps rows of 4096 bytes out of one cache set
    static constexpr bool FLOAT = std::is_same_v<Input, float>;  // else inputs are rounded where they are made

public:
    static void first_pass(const Shape& s, const float* x, Rows scale, Rows shift, const float* conv1,
                           const float* conv1_bias, const float* depthwise, const float* depthwise_bias, void* gated,
                           float* average, int threads) {
        const long C = s.channels, strip = strip_width(s), strips = (s.width + strip - 1) / strip;
        // Rows of conv1's output that are made together: several where the map is narrow, so that tiles are full.
        const long group = (2 * PANEL - 1) / std::min(s.width, strip) + 1;
        const long bands = std::min((s.height + group - 1) / group, bands_for(s, strips, threads));
        const long pixel = 2 * C + PAD, slots = group + 2, row_size = (std::min(strip, s.width) + 2) * pixel;
        const long tasks = s.samples * bands * strips;
        float* sums = shared(s.samples * s.height * strips * C);  // of each row and strip
        const auto work = [&](float* ring) {
            float* zeros = ring + slots * row_size;
            Input* normal = inputs_at(zeros + row_size);
            clear_behind(normal, C + PAD, C);
            std::fill(zeros, zeros + row_size, 0.0f);
#pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < tasks; ++task) {
                const long sample = task / (bands * strips), band = task / strips % bands, column = task % strips;
                const long top = s.height * band / bands, bottom = s.height * (band + 1) / bands;
                const long c0 = column * strip, c1 = std::min(s.width, c0 + strip);
                const long left = std::max(0L, c0 - 1), right = std::min(s.width, c1 + 1);
                const float* map = x + sample * s.height * s.width * C;
                for (long slot = 0; slot < slots; ++slot) {  // beyond the picture the convolution sees zeros
                    float* row = ring + slot * row_size;
                    if (c0 == 0) std::fill(row, row + pixel, 0.0f);
                    if (c1 == s.width) std::fill(row + (c1 - c0 + 1) * pixel, row + (c1 - c0 + 2) * pixel, 0.0f);
                }
                long made = std::max(0L, top - 1);  // first row that conv1 has not done
                for (long y0 = top; y0 < bottom; y0 += group) {
                    const long y1 = std::min(bottom, y0 + group), until = std::min(s.height, y1 + 1);
                    const long columns = right - left, pixels = (until - made) * columns;
                    const long panel_pixels = panel_for(pixels);
                    for (long first = 0; first < pixels; first += panel_pixels) {
                        const long n = std::min(panel_pixels, pixels - first);
                        const float* from[PANEL];
                        float* to[PANEL];
                        for (auto [p, at] = std::pair(0L, Position(first, left, right, made)); p < n; ++p, ++at) {
                            from[p] = map + (at.y * s.width + at.c) * C;
                            const bool follows = p > 0 && at.c > left;  // no division
                            to[p] = follows ? to[p - 1] + pixel : ring + at.y % slots * row_size + (at.c - c0 + 1) * pixel;
                        }
                        normalise(from, normal, n, C, scale.of(sample), shift.of(sample));
                        product(normal, C + PAD, n, C, conv1, C / V, [&](long p, long panel, vec a, vec b) {
                            if (panel * V % 16 == 0) fetch(from[p] + PANEL * C + panel * V);
                            float* out = to[p] + panel * 2 * V;
                            store(out, a + load(conv1_bias + panel * 2 * V));
                            store(out + V, b + load(conv1_bias + panel * 2 * V + V));
                        });
                    }
                    made = std::max(made, until);
                    for (long y = y0; y < y1; ++y) {
                        const float* rows[3];
                        for (long k = 0; k < 3; ++k) {
                            const long from = y + k - 1;
                            rows[k] = from < 0 || from >= s.height ? zeros : ring + from % slots * row_size;
                        }
                        const long at = sample * s.height + y;
                        depthwise_row(rows, pixel, C, c1 - c0, depthwise, depthwise_bias,
                                      static_cast<Input*>(gated) + (at * s.width + c0) * C, sums + (at * strips + column) * C);
                    }
                }
            }
        };
        in_threads(threads, (slots + 1) * row_size + PANEL * (C + PAD), work);
        for (long sample = 0; sample < s.samples; ++sample)
            for (long c = 0; c < C; ++c) {
                double total = 0;
                for (long i = 0; i < s.height * strips; ++i) total += sums[(sample * s.height * strips + i) * C + c];
                average[sample * C + c] = float(total / double(s.height * s.width));
            }
    }

    static void second_pass(const Shape& s, float* x, const void* gated, const float* average, const float* attention,
                            const float* attention_bias, const float* conv3, const float* conv3_bias, Rows scale,
                            Rows shift, const float* conv4, const float* conv4_bias, const float* conv5,
                            const float* conv5_bias, const void* condition, const float* adapter, long rank,
                            int threads) {
        const long C = s.channels, pixels = s.height * s.width, panels = (C + 2 * V - 1) / (2 * V);
        const long chunk = chunk_for(pixels, s.samples, threads), chunks = (pixels + chunk - 1) / chunk;
        // A pixel of the last product's input: what the adapter holds of y and the condition, the gated map, y.
        const long wide = rank + 2 * C + PAD, at_gate = rank, at_y = rank + C;
        const long rows = panels * packed(C), size = rows * 2 * V;  // of conv3
        const long inputs = condition && !adapter ? rank + 2 * C : rank + C;
        float* attended = shared(s.samples * (size + C));  // conv3 with the sample's channel attention in its columns
        float* by = attended + s.samples * size;
        const auto work = [&](float* memory) {
            Input* input_row = inputs_at(memory + PANEL * (C + PAD));
            Input* normal = input_row + PANEL * wide;
            Input* copy = normal + PANEL * (C + PAD);
            clear_behind(input_row, wide, rank + 2 * C);
            clear_behind(normal, C + PAD, C);
            clear_behind(copy, C + PAD, C);
            // y in float32, for what is added to it: among the inputs, where these are float32 as well.
            float* ys = memory;
            long y_pixel = C + PAD;
            if constexpr (FLOAT) ys = input_row + at_y, y_pixel = wide;
            const auto set_y = [&](long p, long c, vec y) {
                store(ys + p * y_pixel + c, y);
                if constexpr (!FLOAT) put(input_row + p * wide + at_y + c, y);
            };
#pragma omp for schedule(static)
            for (long first = 0; first < s.samples * C; first += V) {
                const float* w = attention + first % C * C;
                const float* mean = average + first / C * C;
                vec part[V] = {};
                for (long c = 0; c < C; c += V)
                    for (int i = 0; i < V; ++i) part[i] += load(w + i * C + c) * load(mean + c);
                store(by + first, sums_of(part) + load(attention_bias + first % C));
            }
#pragma omp for schedule(static)
            for (long row = 0; row < s.samples * rows; ++row)
                Products::scale(conv3 + row % rows * 2 * V, by + row / rows * C, row % packed(C), C,
                                attended + row * 2 * V);
#pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < s.samples * chunks; ++task) {
                const long sample = task / chunks, start = task % chunks * chunk;
                const long stop = std::min(pixels, start + chunk);
                for (long first = start; first < stop; first += PANEL) {
                    const long n = std::min(PANEL, stop - first), at = (sample * pixels + first) * C;
                    const Input* gates = static_cast<const Input*>(gated) + at;
                    const auto [input, stride] = inputs_of(gates, n, C, copy);
                    product(input, stride, n, C, attended + sample * size, panels,
                            [&](long p, long panel, vec a, vec b) {
                                const long c = panel * 2 * V;
                                const float* before = x + at + p * C + c;
                                fetch(gates + (PANEL + p) * C + c);
                                // x last: one rounding of x's size.
                                set_y(p, c, a + load(conv3_bias + c) + load(before));
                                if (c + V < C) set_y(p, c + V, b + load(conv3_bias + c + V) + load(before + V));
                            });
                    const float* from[PANEL];
                    for (long p = 0; p < n; ++p) from[p] = ys + p * y_pixel;
                    normalise(from, normal, n, C, scale.of(sample), shift.of(sample));
                    product(normal, C + PAD, n, C, conv4, C / V, [&](long p, long panel, vec a, vec b) {
                        const float* bias = conv4_bias + panel * 2 * V;
                        put(input_row + p * wide + at_gate + panel * V, (a + load(bias)) * (b + load(bias + V)));
                    });
                    const Input* thin = static_cast<const Input*>(condition) + (sample * pixels + first) * rank;
                    if (adapter)
                        product(input_row + at_y, wide, n, C, adapter, rank / (2 * V),
                                [&](long p, long panel, vec a, vec b) {
                                    const long c = panel * 2 * V;
                                    fetch(thin + (PANEL + p) * rank + c);
                                    put(input_row + p * wide + c, a + get(thin + p * rank + c));
                                    put(input_row + p * wide + c + V, b + get(thin + p * rank + c + V));
                                });
                    else
                        for (long p = 0; p < n; ++p) std::copy_n(thin + p * rank, rank, input_row + p * wide);
                    product(input_row, wide, n, inputs, conv5, panels,
                            [&](long p, long panel, vec a, vec b) {
                                const long c = panel * 2 * V;
                                const float* y = ys + p * y_pixel + c;
                                float* out = x + at + p * C + c;
                                fetch(out + PANEL * C);
                                store(out, a + load(conv5_bias + c) + load(y));
                                if (c + V < C) store(out + V, b + load(conv5_bias + c + V) + load(y + V));
                            });
                }
            }
        };
        in_threads(threads, PANEL * (wide + 3 * (C + PAD)), work);
    }

    static void down(const Shape& s, const float* x, const float* weight, const float* bias, float* out, int threads) {
        const long C = s.channels, width = s.width / 2, pixels = s.height / 2 * width, stride = 4 * C + PAD;
        const long chunk = chunk_for(pixels, s.samples, threads), chunks = (pixels + chunk - 1) / chunk;
        // A panel of 4C inputs has to fit into the cache of a core beside the weights.
        const long panel_pixels = C > 128 ? PANEL / 2 : PANEL;
        const auto work = [&](float* memory) {
            Input* input = inputs_at(memory);
#pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < s.samples * chunks; ++task) {
                const long sample = task / chunks, start = task % chunks * chunk;
                const long stop = std::min(pixels, start + chunk);
                for (long first = start; first < stop; first += panel_pixels) {
                    const long n = std::min(panel_pixels, stop - first);
                    for (auto [p, at] = std::pair(0L, Position(first, 0, width)); p < n; ++p, ++at) {
                        const float* from = x + ((sample * s.height + 2 * at.y) * s.width + 2 * at.c) * C;
                        put_all(input + p * stride, from, 2 * C);
                        put_all(input + p * stride + 2 * C, from + s.width * C, 2 * C);
                    }
                    float* to = out + (sample * pixels + first) * 2 * C;
                    product(input, stride, n, 4 * C, weight, C / V, [&](long p, long panel, vec a, vec b) {
                        float* at = to + p * 2 * C + panel * 2 * V;
                        store(at, a + load(bias + panel * 2 * V));
                        store(at + V, b + load(bias + panel * 2 * V + V));
                    });
                }
            }
        };
        in_threads(threads, PANEL * stride, work);
    }

    static void up(const Shape& s, const float* x, const float* weight, float* skip, int threads) {
        const long C = s.channels, half = C / 2, pixels = s.height * s.width;
        const long chunk = chunk_for(pixels, s.samples, threads), chunks = (pixels + chunk - 1) / chunk;
        const auto work = [&](float* memory) {
            Input* input = inputs_at(memory);
#pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < s.samples * chunks; ++task) {
                const long sample = task / chunks, start = task % chunks * chunk;
                const long stop = std::min(pixels, start + chunk);
                for (long first = start; first < stop; first += PANEL) {
                    const long n = std::min(PANEL, stop - first);
                    float* to[PANEL];
                    for (auto [p, at] = std::pair(0L, Position(first, 0, s.width)); p < n; ++p, ++at) {
                        put_all(input + p * (C + PAD), x + (sample * pixels + first + p) * C, C);
                        to[p] = skip + ((sample * s.height + at.y) * 4 * s.width + 2 * at.c) * half;
                    }
                    product(input, C + PAD, n, C, weight, C / V, [&](long p, long panel, vec a, vec b) {
                        for (long k = 0; k < 2; ++k) {
                            const long j = panel * 2 * V + k * V, corner = j / half;  // corner = 2 row + column
                            float* at = to[p] + (corner / 2 * 2 * s.width + corner % 2) * half + j % half;
                            fetch(at + 2 * PANEL * half);
                            store(at, load(at) + (k ? b : a));
                        }
                    });
                }
            }
        };
        in_threads(threads, PANEL * (C + PAD), work);
    }

    static void intro(const Shape& s, const float* picture, const float* weight, const float* addend,
                      long addend_pixel, void* out, bool inputs, int threads) {
        const long C = s.channels, pixels = s.height * s.width;
        const long length = s.width + 2 + MR;  // zeros at both ends, because a tile reads MR pixels
        const auto work = [&](float* lines) {  // the rows above, here and below, of each colour
#pragma omp for schedule(static)
            for (long row = 0; row < s.samples * s.height; ++row) {
                const long sample = row / s.height, y = row % s.height;
                std::fill(lines, lines + 9 * length, 0.0f);
                for (long i = 0; i < 9; ++i) {
                    const long from_y = y + i / 3 - 1;
                    if (from_y < 0 || from_y >= s.height) continue;
                    std::copy_n(picture + (sample * 3 + i % 3) * pixels + from_y * s.width, s.width,
                                lines + i * length + 1);
                }
                for (long first = 0; first < s.width; first += MR)
                    for (long c = 0; c < C; c += 2 * V) {
                        const auto part = C - c > V ? neighbourhoods<2> : neighbourhoods<1>;
                        const long n = std::min<long>(MR, s.width - first), at = row * s.width + first;
                        part(lines + first, length, n, C, weight + 27 * c, addend + at * addend_pixel + c, addend_pixel,
                             at * C + c, out, inputs);
                    }
            }
        };
        in_threads(threads, 9 * length, work);
    }

    static void ending(const Shape& s, const float* x, const float* weight, const float* bias, float* picture,
                       int threads) {
        constexpr int N = 4;  // pixels that share a weight in a register
        const long C = s.channels, pixels = s.height * s.width;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long row = 0; row < s.samples * s.height; ++row) {
            const long sample = row / s.height, y = row % s.height;
            const float* rows[3];  // null beyond the picture
            for (long k = 0; k < 3; ++k) {
                const long from_y = y + k - 1;
                rows[k] = from_y < 0 || from_y >= s.height ? nullptr : x + (sample * pixels + from_y * s.width) * C;
            }
            float* to = picture + sample * 3 * pixels + y * s.width;
            for (long c = 0; c < s.width;) {
                if (c > 0 && c + N < s.width) {
                    colours<N>(rows, c, 0, 3, C, weight, bias, to + c, pixels);
                    c += N;
                } else {
                    colours<1>(rows, c, c == 0, c == s.width - 1 ? 2 : 3, C, weight, bias, to + c, pixels);
                    c += 1;
                }
            }
        }
    }

private:
    // Row and column of pixel `number` of a map's columns [left, right), counted from row `top` on.
    struct Position {
        const long left, right;
        long y, c;
        Position(long number, long left_, long right_, long top = 0)
            : left(left_), right(right_), y(top + number / (right_ - left_)), c(left_ + number % (right_ - left_)) {}
        void operator++() {
            if (++c == right) c = left, ++y;
        }
    };

    static Input* inputs_at(float* memory) { return reinterpret_cast<Input*>(memory); }

    static void put_all(Input* to, const float* values, long count) {
        for (long i = 0; i < count; i += V) put(to + i, load(values + i));
    }

    // n pixels of a map of inputs, and how far they are apart: where they are, or, where a product would read beyond the
    // map, a copy.
    static std::pair<const Input*, long> inputs_of(const Input* map, long n, long C, Input* copy) {
        if (n % ROWS == 0 && C % NUMBERS == 0) return {map, C};
        for (long p = 0; p < n; ++p) std::copy_n(map + p * C, C, copy + p * (C + PAD));
        return {copy, C + PAD};
    }

    // Zeros behind the inputs of a panel's pixels. AMX's tiles take whole twos of vectors; a weight of zero does not
    // undo what is not finite.
    static void clear_behind(Input* rows, long pixel, long inputs) {
        for (long p = 0; p < PANEL; ++p) put(rows + p * pixel + inputs, vec{});
    }

    // work(memory) in every thread, with so many floats of its own. Nothing may be thrown among threads: where the system
    // has no memory for one of them, none begins and the caller gets the error.
    template <class Work>
    static void in_threads(int threads, long floats, const Work& work) {
        std::atomic<bool> enough{true};
#pragma omp parallel num_threads(threads)
        {
            float* memory = scratch(floats);
            if (!memory) enough = false;
#pragma omp barrier
            if (enough) {
                [[maybe_unused]] const typename Products::Ready ready;
                work(memory);
            }
        }
        if (!enough) throw std::bad_alloc();
    }

    // Lane p becomes the sum over the lanes of part[p]: V vectors are added up by halves, in the same order each.
    template <int WIDTH = V / 2>
    static vec sums_of(vec (&part)[V]) {
        for (int i = 0; i < WIDTH; ++i)
            part[i] = add_halves<WIDTH>(part[i], part[i + WIDTH], std::make_integer_sequence<int, V>());
        if constexpr (WIDTH > 1) sums_of<WIDTH / 2>(part);
        return part[0];
    }

    // In every stretch of 2 WIDTH lanes: the sum of a's two halves there, and behind it that of b's.
    template <int WIDTH, int... LANE>
    static vec add_halves(vec a, vec b, std::integer_sequence<int, LANE...>) {
        constexpr int STRETCH = 2 * WIDTH;
        return __builtin_shufflevector(
                   a, b, (LANE / STRETCH * STRETCH + LANE % WIDTH + (LANE % STRETCH < WIDTH ? 0 : V))...) +
               __builtin_shufflevector(
                   a, b, (LANE / STRETCH * STRETCH + LANE % WIDTH + WIDTH + (LANE % STRETCH < WIDTH ? 0 : V))...);
    }

    // n pixels: (LN(x) over its C channels) * scale + shift, to rows C + PAD apart. V pixels at a time, which share the
    // sums over lanes, the square root and the division.
    static void normalise(const float* const* x, Input* to, long n, long C, const float* scale, const float* shift) {
        for (long first = 0; first < n; first += V) {
            const float* from[V];
            vec part[V];
            float mean[V], inverse[V];
            for (int p = 0; p < V; ++p) {
                from[p] = x[std::min(first + p, n - 1)];
                part[p] = load(from[p]);
                for (long c = V; c < C; c += V) part[p] += load(from[p] + c);
            }
            store(mean, sums_of(part) / float(C));
            for (int p = 0; p < V; ++p) {
                vec squares = {};
                for (long c = 0; c < C; c += V) {
                    const vec centred = load(from[p] + c) - mean[p];
                    squares += centred * centred;
                }
                part[p] = squares;
            }
            store(inverse, sums_of(part) / float(C) + 1e-6f);
            for (int p = 0; p < V; ++p) inverse[p] = 1 / std::sqrt(inverse[p]);
            const int count = int(std::min<long>(V, n - first));
            for (int p = 0; p < count; ++p) {
                Input* out = to + (first + p) * (C + PAD);
                for (long c = 0; c < C; c += V)
                    put(out + c, (load(from[p] + c) - mean[p]) * inverse[p] * load(scale + c) + load(shift + c));
            }
        }
    }

    // Depth-wise 3x3, gate and sums of one row of `columns` pixels. rows: those above, here and below, of which pixel 0
    // is the left neighbour of the first column.
    static void depthwise_row(const float* const* rows, long pixel, long C, long columns, const float* weight,
                              const float* bias, Input* gated, float* sums) {
        constexpr long BLOCK = 4;  // vectors whose weights stay in the first cache
        std::fill(sums, sums + C, 0.0f);
        for (long first = 0; first < C / V; first += BLOCK)
            for (long c = 0; c < columns;) {
                const long last = std::min(C / V, first + BLOCK);
                const long n = c + 8 <= columns ? 8 : c + 4 <= columns ? 4 : 1;
                for (long q = first; q < last; ++q) {
                    if (n == 8)
                        depthwise_columns<8>(rows, c, q, pixel, C, weight, bias, gated, sums);
                    else if (n == 4)
                        depthwise_columns<4>(rows, c, q, pixel, C, weight, bias, gated, sums);
                    else
                        depthwise_columns<1>(rows, c, q, pixel, C, weight, bias, gated, sums);
                }
                c += n;
            }
    }

    template <int N>
    static void depthwise_columns(const float* const* rows, long c, long q, long pixel, long C, const float* weight,
                                  const float* bias, Input* gated, float* sums) {
        const long at = q * 2 * V;
        vec a[N], b[N];
        convolve<N>(rows, c * pixel + at, pixel, weight + q * 9 * 2 * V, load(bias + at), a);
        convolve<N>(rows, c * pixel + at + V, pixel, weight + q * 9 * 2 * V + V, load(bias + at + V), b);
        vec total = load(sums + q * V);
        for (int n = 0; n < N; ++n) {
            const vec product = a[n] * b[n];
            put(gated + (c + n) * C + q * V, product);
            fetch(gated + (c + n + PANEL / 2) * C + q * V);
            total += product;
        }
        store(sums + q * V, total);
    }

    // V channels of N neighbouring pixels: their sums and a row of weights stay in registers.
    template <int N>
    static void convolve(const float* const* rows, long offset, long pixel, const float* weight, vec bias, vec (&out)[N]) {
        for (int n = 0; n < N; ++n) out[n] = bias;
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            const float* from = rows[k] + offset;
            const vec w[3] = {load(weight + k * 6 * V), load(weight + k * 6 * V + 2 * V),
                              load(weight + k * 6 * V + 4 * V)};
#pragma GCC unroll 16
            for (int j = 0; j < N + 2; ++j) {
                const vec value = load(from + j * pixel);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
                    if (j - n >= 0 && j - n < 3) out[n] += value * w[j - n];
            }
        }
    }

    // VECTORS vectors of the channels of n neighbouring pixels, up to MR, from three rows of each colour; what is added,
    // and where they go, by the distance from the beginning of `out`, which takes products' inputs or float32.
    template <int VECTORS>
    static void neighbourhoods(const float* lines, long length, long n, long C, const float* weight,
                               const float* addend, long addend_pixel, long at, void* out, bool inputs) {
        vec sums[MR][VECTORS] = {};
        const float* w = weight;
        for (long dy = 0; dy < 3; ++dy)
            for (long dx = 0; dx < 3; ++dx)
                for (long colour = 0; colour < 3; ++colour, w += 2 * V) {
                    const float* from = lines + (dy * 3 + colour) * length + dx;
#pragma GCC unroll 8
                    for (int r = 0; r < MR; ++r)
                        for (int k = 0; k < VECTORS; ++k) sums[r][k] += from[r] * load(w + k * V);
                }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            if (r >= n) break;
            fetch(addend + (r + PANEL) * addend_pixel);
            for (int k = 0; k < VECTORS; ++k) {
                const vec value = sums[r][k] + load(addend + r * addend_pixel + k * V);
                const long to = at + r * C + k * V;
                if (inputs)
                    put(static_cast<Input*>(out) + to, value);
                else
                    store(static_cast<float*>(out) + to, value);
            }
            fetch(inputs ? static_cast<void*>(static_cast<Input*>(out) + at + (r + PANEL) * C)
                         : static_cast<void*>(static_cast<float*>(out) + at + (r + PANEL) * C));
        }
    }

    // The three colours of N neighbouring pixels from column c on, by the columns [dx0, dx1) of the 3x3 weights.
    template <int N>
    static void colours(const float* const* rows, long c, long dx0, long dx1, long C, const float* weight,
                        const float* bias, float* to, long pixels) {
        vec sums[N * 3] = {};
        for (long dy = 0; dy < 3; ++dy) {
            if (!rows[dy]) continue;
            for (long dx = dx0; dx < dx1; ++dx) {
                const float* from = rows[dy] + (c + dx - 1) * C;
                const float* w = weight + (dy * 3 + dx) * C;
                for (long i = 0; i < C; i += V) {
                    const vec w0 = load(w + i), w1 = load(w + 9 * C + i), w2 = load(w + 18 * C + i);
#pragma GCC unroll 8
                    for (int n = 0; n < N; ++n) {
                        const vec value = load(from + n * C + i);
                        sums[n * 3] += value * w0;
                        sums[n * 3 + 1] += value * w1;
                        sums[n * 3 + 2] += value * w2;
                    }
                }
            }
        }
        constexpr int GROUPS = (N * 3 + V - 1) / V;
        float lanes[GROUPS * V];
        for (int group = 0; group < GROUPS; ++group) {
            vec part[V] = {};
            for (int i = 0; i < V && group * V + i < N * 3; ++i) part[i] = sums[group * V + i];
            store(lanes + group * V, sums_of(part));
        }
        for (int n = 0; n < N; ++n)
            for (int k = 0; k < 3; ++k) to[k * pixels + n] = lanes[n * 3 + k] + bias[k];
    }

    // Bands of rows: each costs two rows more of conv1, so not many.
    static long bands_for(const Shape& s, long strips, int threads) {
        const long wanted = (threads + s.samples * strips - 1) / (s.samples * strips);
        return std::max(1L, std::min(s.height, s.height >= 64 * wanted ? 2 * wanted : wanted));
    }

    // Pixels that go through a product together: whole tiles, and no small remainder, which would read all weights too.
    static long panel_for(long pixels) {
        const long panels = std::max(1L, (pixels + PANEL - 1) / PANEL);
        return ((pixels + panels - 1) / panels + ROWS - 1) / ROWS * ROWS;
    }

    // Pixels of a work item: whole tiles, about equally many for all threads.
    static long chunk_for(long pixels, long samples, int threads) {
        const long parts = (threads + samples - 1) / samples;
        const long rounds = (pixels + parts * 4 * PANEL - 1) / (parts * 4 * PANEL);
        const long each = (pixels + parts * rounds - 1) / (parts * rounds);
        return (each + ROWS - 1) / ROWS * ROWS;
    }
};
