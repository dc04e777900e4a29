// The smoother for one instruction set: included once per set, with that set's target options on, inside a namespace
// of its own. It includes nothing itself.
//
// Method. The matrix A = I + (lambda/2) L_w is solved by conjugate gradients, preconditioned by MIC(0): M = (D + N) D^-1
// (D + N)^T, D the pivots, N what A has below its diagonal. Residuals are kept behind the first of the two triangular
// solves, z = (D + N)^-1 (b - A x), so that one iteration is two sweeps over the picture:
//
//     backward   s = z - D^-1 N^T s             the preconditioned residual
//                d = s + beta d                 the direction;  d.A d is summed here, as squares of differences
//     forward    y = (D + N)^-1 A d             A d as differences across edges, on the way
//                x += alpha d    z -= alpha y   z.D z is summed here
//
// Layout. The triangular sweeps run from corner to corner: a pixel needs its western and northern neighbours. So V rows
// share one vector, each row one column behind the row above it ("skewed"): lane j of step k is column k - j of row
// V*band + j. West is then the previous vector, north the previous vector moved by one lane, and a sweep is plain vector
// code of any width. Positions outside the picture have zero weights, and stay zero.
//
//     skewed field: [band][step][channel][lane]     bands = ceil(height / V), steps = width + V - 1

template <class Real, int V, int C>
class Engine {
    typedef Real vec __attribute__((vector_size(V * sizeof(Real)), may_alias));
    typedef Real anywhere __attribute__((vector_size(V * sizeof(Real)), may_alias, aligned(sizeof(Real))));

public:
    Engine(Real* planes, int height, int width, const Parameters& parameters, Team& team)
        : planes(planes), H(height), W(width), bands((height + V - 1) / V), steps(width + V - 1), row(steps + 2 * V),
          options(parameters), team(team), progress(size_t(bands)), by_caller(size_t(bands)), partial(4 * size_t(bands) * C) {
        const size_t plane = (size_t(bands) * steps + 2) * V;  // a guard step on either side
        const size_t total = 4 * C * plane + 3 * plane + (6 + size_t(bands)) * C * row;
        memory.reset(static_cast<Real*>(allocate(total * sizeof(Real))));
        std::memset(static_cast<void*>(memory.get()), 0, total * sizeof(Real));
        Real* next = memory.get();
        for (Real** field : {&b, &x, &z, &d}) *field = next + C * V, next += C * plane;
        for (Real** field : {&e, &s, &inverse}) *field = next + V, next += plane;
        edges = next;
    }

    // A sweep has no more bands in progress at a time: each follows the one before at this distance.
    static int most_threads(int height, int width) {
        return std::min((height + V - 1) / V, 1 + (width + V - 1) / (chunk + V));
    }

    std::vector<SolveReport> run() {
        each_band([&](int band) {
            for (int c = 0; c < C; ++c) skew(band, planes + size_t(c) * H * W, b, c);
            std::memcpy(static_cast<void*>(x + at(band, 0) * C), b + at(band, 0) * C, sizeof(Real) * steps * C * V);
        });
        std::vector<SolveReport> reports;
        double sigma = options.sigma;
        for (int iteration = 0; iteration < options.iterations; ++iteration) {
            weights(sigma);
            factor();
            reports.push_back(options.solver == Solver::direct     ? solve_directly()
                              : options.mode == Mode::matlab_pcg ? solve_early_stopped()
                                                                 : solve());
            unpack();
            sigma = std::max(sigma / 2, 0.5);
        }
        return reports;
    }

private:
    static constexpr int chunk = 64;  // steps after which a band says how far it is

    struct Free {
        void operator()(Real* pointer) const { std::free(pointer); }
    };

    Real* const planes;  // [C][H][W]
    const int H, W, bands, steps, row;
    const Parameters options;
    Team& team;
    std::unique_ptr<Real[], Free> memory;
    std::vector<Progress> progress;  // of the running sweep, per band
    long epoch = 0;                  // progress counts on from sweep to sweep, so that nobody has to set it back
    std::vector<char> by_caller;     // whether the calling thread did the band in the last sweep
    std::vector<double> partial;
    Real *b, *x;         // right-hand side and solution
    Real *z, *d;         // conjugate gradients: residual behind the first triangular solve, direction
    Real *e, *s;         // weights of the edges to the east and to the south, times lambda/2
    Real* inverse;       // 1 / pivot
    Real* edges;         // what a band hands to the next one of a sweep; then what `below` finds
    Real shift[C]{};     // what the solution lacks on average

    static vec load(const Real* from) { return *reinterpret_cast<const vec*>(from); }
    static void store(Real* to, vec value) { *reinterpret_cast<vec*>(to) = value; }
    static vec all(Real value) { return value - vec{}; }

    template <int... I>
    static vec shift_up(vec v, vec before, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(before, v, (V - 1 + I)...);
    }
    template <int... I>
    static vec shift_down(vec v, vec after, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(v, after, (1 + I)...);
    }
    // Lane j gets lane j-1 of v, lane 0 the last lane of `before`: the row above.
    static vec from_north(vec v, vec before) { return shift_up(v, before, std::make_integer_sequence<int, V>()); }
    // Lane j gets lane j+1 of v, the last lane gets lane 0 of `after`: the row below.
    static vec from_south(vec v, vec after) { return shift_down(v, after, std::make_integer_sequence<int, V>()); }

    size_t at(int band, int step) const { return (size_t(band) * steps + step) * V; }

    // Where the row below the last lane is found, from a step of this band. Where there is none its weight is zero, and
    // any value of the field will do.
    size_t to_south(int band) const { return band + 1 < bands ? size_t(steps - (V - 1)) * V : 0; }

    // What band n hands on, [step][channel], steps from -V to steps + V. The next band follows, and nobody else reads it:
    // two places are enough, and a third for the band before the first, which is zero.
    Real* handed(int which, int band) {
        const int place = band < 0 || band >= bands ? 0 : 2 * (band % 2) + 1 + which;
        return edges + (size_t(place) * row + V) * C;
    }

    // What `forward` finds below a band's last lane: the first lane of d in the next one, [step][channel], written by
    // `backward`. Reading the next band of d itself would bring all of it into this core's cache, to be taken back by
    // the core that writes it next.
    Real* below(int band) { return edges + (size_t(6 + band) * row + V) * C; }

    // ---- bands, in parallel ---------------------------------------------------------------------------------------

    template <class Work>
    void each_band(const Work& work) {
        team.each(bands, true, work);
    }

    // A sweep, band by band. A step needs the band before it done up to V - 1 steps further.
    enum class Order { down, up };
    // start(band) makes what a band carries from step to step, step(band, k, state) does a step, end(band, state).
    template <Order order, class Body>
    void sweep(const Body& body) {
        // The first band goes to whoever did it in the last sweep and has it in its cache; the others follow from that.
        team.each(bands, by_caller[order == Order::down ? 0 : bands - 1], [&](int number) {
            const int band = order == Order::down ? number : bands - 1 - number;
            const int source = order == Order::down ? band - 1 : band + 1;
            by_caller[size_t(band)] = team.is_caller();
            body(band, [&](auto step) {
                for (int from = 0; from < steps; from += chunk) {
                    const int to = std::min(from + chunk, steps);
                    if (!team.alone() && number > 0) {
                        const long needed = epoch + std::min(to + V, steps);
                        team.wait_until([&] { return progress[source].steps.load(std::memory_order_acquire) >= needed; });
                    }
                    for (int k = from; k < to; ++k) step(order == Order::down ? k : steps - 1 - k);
                    if (!team.alone()) progress[band].steps.store(epoch + to, std::memory_order_release);
                }
            });
        });
        epoch += steps;
    }

    static double lanes(vec v) {
        double sum = 0;
        for (int i = 0; i < V; ++i) sum += v[i];
        return sum;
    }
    void keep(int quantity, int band, const vec* sums) {
        for (int c = 0; c < C; ++c) partial[(size_t(quantity) * bands + band) * C + c] = lanes(sums[c]);
    }
    // The bands are added up in a fixed order, so results do not depend on the number of threads.
    void total(int quantity, double* sums) const {
        for (int c = 0; c < C; ++c) {
            sums[c] = 0;
            for (int band = 0; band < bands; ++band) sums[c] += partial[(size_t(quantity) * bands + band) * C + c];
        }
    }

    // ---- from rows to skewed fields and back ----------------------------------------------------------------------

    void skew(int band, const Real* rows, Real* field, int c) {
        for (int lane = 0; lane < V && band * V + lane < H; ++lane) {
            const Real* from = rows + size_t(band * V + lane) * W;
            Real* to = field + at(band, lane) * C + c * V + lane;
            for (int i = 0; i < W; ++i) to[size_t(i) * C * V] = from[i];
        }
    }
    void unpack() {
        each_band([&](int band) {
            for (int c = 0; c < C; ++c)
                for (int lane = 0; lane < V && band * V + lane < H; ++lane) {
                    Real* to = planes + (size_t(c) * H + band * V + lane) * W;
                    const Real* from = x + at(band, lane) * C + c * V + lane;
                    for (int i = 0; i < W; ++i) to[i] = from[size_t(i) * C * V] + shift[c];
                }
        });
    }

    // ---- the weights of one iteration -----------------------------------------------------------------------------

    // to[j] = sum_i taps[i] * from[i][j]
    static void weighted_sum(const Real* const* from, const Real* taps, int count, Real* to, int width) {
        int j = 0;
        for (; j + 4 * V <= width; j += 4 * V) {
            vec sum[4] = {};
            for (int i = 0; i < count; ++i)
                for (int n = 0; n < 4; ++n) sum[n] += taps[i] * *reinterpret_cast<const anywhere*>(from[i] + j + n * V);
            for (int n = 0; n < 4; ++n) *reinterpret_cast<anywhere*>(to + j + n * V) = sum[n];
        }
        for (; j < width; ++j) {
            Real sum = 0;
            for (int i = 0; i < count; ++i) sum += taps[i] * from[i][j];
            to[j] = sum;
        }
    }

    // From x in `planes`: e and s, lambda/2 included. Blurred rows lie in z and d, which are free meanwhile.
    void weights(double sigma) {
        const int radius = (int(std::floor(5 * sigma + 0.5)) | 1) / 2;
        std::vector<Real> taps(2 * size_t(radius) + 1);
        double sum = 0;
        for (int i = -radius; i <= radius; ++i) sum += std::exp(-0.5 * (i / sigma) * (i / sigma));
        for (int i = -radius; i <= radius; ++i)
            taps[size_t(i + radius)] = Real(std::exp(-0.5 * (i / sigma) * (i / sigma)) / sum);

        Real* const across = z;
        Real* const blurred = d;
        const auto rows_of = [&](int band, const auto& work) {
            for (int c = 0; c < C; ++c)
                for (int h = band * V; h < std::min(H, (band + 1) * V); ++h) work(size_t(c) * H + h, h);
        };
        each_band([&](int band) {
            std::vector<Real> padded(size_t(W) + 2 * size_t(radius));
            std::vector<const Real*> from(taps.size());
            for (size_t i = 0; i < taps.size(); ++i) from[i] = padded.data() + i;
            rows_of(band, [&](size_t line, int) {
                std::copy(planes + line * W, planes + (line + 1) * W, padded.begin() + radius);
                weighted_sum(from.data(), taps.data(), int(taps.size()), across + line * W, W);
            });
        });
        each_band([&](int band) {
            std::vector<const Real*> from(taps.size());
            rows_of(band, [&](size_t line, int h) {
                const int first = std::max(-radius, -h), last = std::min(radius, H - 1 - h);
                for (int i = first; i <= last; ++i) from[size_t(i - first)] = across + size_t(long(line) + i) * W;
                weighted_sum(from.data(), taps.data() + first + radius, last - first + 1, blurred + line * W, W);
            });
        });
        each_band([&](int band) {
            const Real half_lam = Real(options.lam / 2), sharpness = Real(options.sharpness), floor = Real(1e-3);
            std::vector<Real> lines(3 * size_t(W));
            Real *texture = lines.data(), *east = texture + W, *south = east + W;
            for (int h = band * V; h < std::min(H, (band + 1) * V); ++h) {
                const bool last = h == H - 1;
                std::fill(lines.begin(), lines.end(), Real(0));
                for (int c = 0; c < C; ++c) {
                    const Real* here = planes + (size_t(c) * H + h) * W;
                    const Real* below = last ? here : here + W;
                    for (int j = 0; j < W - 1; ++j) {
                        const Real dx = here[j + 1] - here[j], dy = below[j] - here[j];
                        texture[j] += std::sqrt(dx * dx + dy * dy);
                    }
                    texture[W - 1] += std::abs(below[W - 1] - here[W - 1]);
                    const Real* here_b = blurred + (size_t(c) * H + h) * W;
                    const Real* below_b = last ? here_b : here_b + W;
                    for (int j = 0; j < W - 1; ++j) east[j] += std::abs(here_b[j + 1] - here_b[j]);
                    for (int j = 0; j < W; ++j) south[j] += std::abs(below_b[j] - here_b[j]);
                }
                for (int j = 0; j < W; ++j) {
                    const Real w = half_lam / std::max(texture[j] / C, sharpness);
                    east[j] = w / std::max(east[j] / C, floor);
                    south[j] = last ? Real(0) : w / std::max(south[j] / C, floor);
                }
                east[W - 1] = 0;
                Real* to_e = e + at(band, h % V) + h % V;
                Real* to_s = s + at(band, h % V) + h % V;
                for (int j = 0; j < W; ++j) to_e[size_t(j) * V] = east[j], to_s[size_t(j) * V] = south[j];
            }
        });
    }

    // ---- MIC(0) ---------------------------------------------------------------------------------------------------

    // Pivots of modified incomplete Cholesky with relaxation omega: dropped fill-in goes to the diagonal.
    void factor() {
        const Real omega = options.mode == Mode::exact ? Real(0.99) : Real(1);
        sweep<Order::down>([&](int band, const auto& each_step) {
            vec from_west{}, e_west{}, s_last{}, g_last{};
            const Real *s_from = handed(0, band - 1), *g_from = handed(1, band - 1);
            Real *s_to = handed(0, band), *g_to = handed(1, band);
            each_step([&](int k) {
                const size_t i = at(band, k);
                const vec east = load(e + i), south = load(s + i);
                const vec s_north = from_north(s_last, all(s_from[(k + V - 1) * C]));
                const vec g_north = from_north(g_last, all(g_from[(k + V - 1) * C]));
                const vec value = Real(1) / (Real(1) + (east + south + e_west + s_north) - from_west - g_north);
                store(inverse + i, value);
                from_west = east * (east + omega * south) * value;
                g_last = south * (south + omega * east) * value;
                e_west = east;
                s_last = south;
                s_to[k * C] = s_last[V - 1];
                g_to[k * C] = g_last[V - 1];
            });
        });
    }

    // ---- conjugate gradients --------------------------------------------------------------------------------------

    // Rounds of conjugate gradients, each on the true residual of the last: float32 recurrences drift from it.
    SolveReport solve() {
        constexpr int most_rounds = 12, most_iterations = 500;
        const double per_round = sizeof(Real) == 4 ? 1e-3 : 1e-7;
        int iterations = 0;
        double bb[C];
        for (int round = 0;; ++round) {
            double rr[C], ulps[C], goal[C], residual = 0;
            if (round == 0) residuals<true>(bb);
            else residuals<false>(bb);
            total(0, rr);
            total(2, ulps);
            bool reached = true;
            for (int c = 0; c < C; ++c) {
                const double enough = std::max(options.tol * options.tol * bb[c], std::min(ulps[c], 1e-6 * bb[c]));
                goal[c] = std::max(enough, per_round * per_round * rr[c]);
                reached = reached && rr[c] <= enough;
                if (rr[c] > 0) residual = std::max(residual, std::sqrt(rr[c] / bb[c]));
            }
            if (reached) {
                // Rows of A sum to 1, so the mean of the error is the mean of the residual: take it away for nothing.
                double mean[C];
                total(3, mean);
                for (int c = 0; c < C; ++c) shift[c] = Real(mean[c] / (double(H) * W));
                return {iterations, residual};
            }
            const double worst = *std::max_element(rr, rr + C);  // not finite when float32 has broken down
            if (round == most_rounds || iterations >= most_iterations || !std::isfinite(worst))
                throw std::runtime_error("rtv_smooth: a solve did not converge: the weights are out of range; lower lam, "
                                         "raise sharpness, or use float64");
            Step step;
            while (iterations < most_iterations && !std::equal(rr, rr + C, goal, std::less_equal<double>())) {
                team.the_faster_way([&] { iterate(step, rr); });
                ++iterations;
            }
        }
    }

    // The authors' setting: from zero, each channel stopped as soon as |b - A x| <= 0.1 |b| (at most 100 iterations).
    SolveReport solve_early_stopped() {
        constexpr double tol = 0.1;
        constexpr int most_iterations = 100;
        each_band([&](int band) {
            std::memset(static_cast<void*>(x + at(band, 0) * C), 0, sizeof(Real) * steps * C * V);
        });
        double rr[C], bb[C], norm[C], relative[C] = {};
        residuals<true>(bb);
        total(0, rr);
        unpreconditioned(bb);
        Step step;
        for (int c = 0; c < C; ++c) step.frozen[c] = !(bb[c] > 0);
        while (step.count < most_iterations && !std::all_of(step.frozen, step.frozen + C, [](bool f) { return f; })) {
            team.the_faster_way([&] { iterate(step, rr); });
            unpreconditioned(norm);
            for (int c = 0; c < C; ++c) {
                if (step.frozen[c]) continue;
                relative[c] = std::sqrt(norm[c] / bb[c]);
                step.frozen[c] = !(relative[c] > tol);
            }
        }
        return {step.count, *std::max_element(relative, relative + C)};
    }

    // |(D + N) z|^2 = |b - A x|^2, which the preconditioned recurrences do not have.
    void unpreconditioned(double* sums) {
        each_band([&](int band) {
            vec last[C] = {}, e_west{}, s_last{}, sum[C] = {};
            for (int k = 0; k < steps; ++k) {
                const size_t i = at(band, k);
                const bool has_north = band > 0 && k + V - 1 < steps;
                const size_t north = has_north ? at(band - 1, k + V - 1) : 0;
                const vec s_north = from_north(s_last, has_north ? load(s + north) : vec{});
                const vec pivot = Real(1) / load(inverse + i);
                for (int c = 0; c < C; ++c) {
                    const vec here = load(z + i * C + c * V);
                    const vec above = from_north(last[c], has_north ? load(z + north * C + c * V) : vec{});
                    const vec residual = here * pivot - e_west * last[c] - s_north * above;
                    sum[c] += residual * residual;
                    last[c] = here;
                }
                e_west = load(e + i);
                s_last = load(s + i);
            }
            keep(0, band, sum);
        });
        total(0, sums);
    }

    SolveReport solve_directly() {
        const size_t count = size_t(H) * W;
        std::vector<double> east(count), south(count), values(count * C);
        for (int h = 0; h < H; ++h)
            for (int w = 0; w < W; ++w) {
                const size_t pixel = size_t(h) * W + w, i = at(h / V, w + h % V);
                east[pixel] = e[i + h % V];
                south[pixel] = s[i + h % V];
                for (int c = 0; c < C; ++c) values[c * count + pixel] = b[i * C + c * V + h % V];
            }
        solve_direct(east, south, H, W, C, values);
        for (int h = 0; h < H; ++h)
            for (int w = 0; w < W; ++w)
                for (int c = 0; c < C; ++c)
                    x[at(h / V, w + h % V) * C + c * V + h % V] = Real(values[c * count + size_t(h) * W + w]);
        double rr[C], bb[C], residual = 0;
        residuals<true>(bb);
        total(0, rr);
        for (int c = 0; c < C; ++c)
            if (rr[c] > 0) residual = std::max(residual, std::sqrt(rr[c] / bb[c]));
        return {0, residual};
    }

    // z = (D + N)^-1 (b - A x), A x in differences across edges, which keeps float32 exact where the weights are large.
    // Sums z.D z, the same of the residual that rounding x itself causes (no solver gets below it), and b - A x, whose
    // fluxes cancel. With `with_rhs` also what z.D z is for x = 0, into bb.
    template <bool with_rhs>
    void residuals(double* bb) {
        constexpr Real few_ulps = 2 * std::numeric_limits<Real>::epsilon();
        sweep<Order::down>([&](int band, const auto& each_step) {
            vec here[C], west[C] = {}, north[C] = {}, rhs_west[C] = {}, rhs_north[C] = {};
            vec sums[C] = {}, rhs_sums[C] = {}, ulps[C] = {}, missing[C] = {};
            for (int c = 0; c < C; ++c) here[c] = load(x + at(band, 0) * C + c * V);
            const size_t first = at(band, 0), below = to_south(band) * C;
            const Real *const e = this->e + first, *const s = this->s + first, *const inverse = this->inverse + first;
            const Real *const b = this->b + first * C, *const x = this->x + first * C;
            Real* const z = this->z + first * C;
            const Real *const from = handed(0, band - 1), *const rhs_from = handed(1, band - 1);
            Real *const to = handed(0, band), *const rhs_to = handed(1, band);
            each_step([&](long k) {
                const vec east = load(e + k * V), south = load(s + k * V), scale = load(inverse + k * V);
                const vec pivot = Real(1) / scale;
                for (int c = 0; c < C; ++c) {
                    const long j = (k * C + c) * V, n = k * C + c;
                    const vec next = load(x + j + C * V), rhs = load(b + j), apart = rhs - here[c];
                    const vec over_east = here[c] - next, over_south = here[c] - from_south(next, load(x + j + below));
                    const vec value = scale * (apart - east * over_east - south * over_south + west[c] +
                                               from_north(north[c], all(from[n + (V - 1) * C])));
                    store(z + j, value);
                    west[c] = east * (value + over_east);
                    north[c] = south * (value + over_south);
                    to[n] = north[c][V - 1];
                    const vec rounding = few_ulps * here[c];
                    sums[c] += value * value * pivot;
                    ulps[c] += rounding * rounding * pivot;
                    missing[c] += apart;
                    if (with_rhs) {
                        const vec whole = scale * (rhs + rhs_west[c] + from_north(rhs_north[c], all(rhs_from[n + (V - 1) * C])));
                        rhs_west[c] = east * whole;
                        rhs_north[c] = south * whole;
                        rhs_to[n] = rhs_north[c][V - 1];
                        rhs_sums[c] += whole * whole * pivot;
                    }
                    here[c] = next;
                }
            });
            keep(0, band, sums), keep(1, band, rhs_sums), keep(2, band, ulps), keep(3, band, missing);
        });
        if (with_rhs) total(1, bb);
    }

    struct Step {
        int count = 0;      // iterations done
        double beta[C]{};   // for the next one
        bool frozen[C]{};   // channels that are left as they are
    };

    // One iteration; `zz` goes from z.D z to its next value.
    void iterate(Step& step, double* zz) {
        if (step.count++ == 0) backward<true>(step.beta);
        else backward<false>(step.beta);
        double energy[C], alpha[C], before[C];
        total(1, energy);
        for (int c = 0; c < C; ++c) {
            before[c] = zz[c];
            alpha[c] = zz[c] > 0 && energy[c] > 0 && !step.frozen[c] ? zz[c] / energy[c] : 0;
        }
        forward(alpha);
        total(0, zz);
        for (int c = 0; c < C; ++c) {
            if (alpha[c] == 0) zz[c] = 0;  // nothing left in this channel
            step.beta[c] = zz[c] > 0 ? zz[c] / before[c] : 0;
        }
    }

    // s = z - D^-1 N^T s, d = s + beta d, and d.A d = sum d^2 + sum over edges of weight (difference of d)^2.
    template <bool first>
    void backward(const double* factors) {
        vec beta[C];
        for (int c = 0; c < C; ++c) beta[c] = all(Real(factors[c]));
        sweep<Order::up>([&](int band, const auto& each_step) {
            vec s_east[C] = {}, d_east[C] = {}, energy[C] = {};
            const size_t first_step = at(band, 0);
            const Real *const e = this->e + first_step, *const s = this->s + first_step;
            const Real *const inverse = this->inverse + first_step, *const z = this->z + first_step * C;
            Real* const d = this->d + first_step * C;
            const Real *const s_from = handed(0, band + 1), *const d_from = below(band);
            Real *const s_to = handed(0, band), *const d_to = below(band - 1);
            each_step([&](long k) {
                const vec east = load(e + k * V), south = load(s + k * V), scale = load(inverse + k * V);
                const vec scaled_east = east * scale, scaled_south = south * scale;
                for (int c = 0; c < C; ++c) {
                    const long j = (k * C + c) * V, n = k * C + c;
                    s_east[c] = load(z + j) + scaled_east * s_east[c] +
                                scaled_south * from_south(s_east[c], all(s_from[n - (V - 1) * C]));
                    const vec value = first ? s_east[c] : s_east[c] + beta[c] * load(d + j);
                    const vec over_east = value - d_east[c];
                    const vec over_south = value - from_south(d_east[c], all(d_from[n - (V - 1) * C]));
                    store(d + j, value);
                    d_east[c] = value;
                    s_to[n] = s_east[c][0];
                    d_to[n] = value[0];
                    energy[c] += value * value + east * over_east * over_east + south * over_south * over_south;
                }
            });
            keep(1, band, energy);
        });
    }

    // y = (D + N)^-1 A d, x += alpha d, z -= alpha y, and the sum of z.D z.
    void forward(const double* factors) {
        vec alpha[C];
        for (int c = 0; c < C; ++c) alpha[c] = all(Real(factors[c]));
        sweep<Order::down>([&](int band, const auto& each_step) {
            vec here[C], west[C] = {}, north[C] = {}, sums[C] = {};
            for (int c = 0; c < C; ++c) here[c] = load(d + at(band, 0) * C + c * V);
            const size_t first = at(band, 0);
            const Real *const e = this->e + first, *const s = this->s + first, *const inverse = this->inverse + first;
            const Real* const d = this->d + first * C;
            Real *const x = this->x + first * C, *const z = this->z + first * C;
            const Real *const from = handed(0, band - 1), *const d_below = below(band);
            Real* const to = handed(0, band);
            each_step([&](long k) {
                const vec east = load(e + k * V), south = load(s + k * V), scale = load(inverse + k * V);
                const vec pivot = Real(1) / scale;
                for (int c = 0; c < C; ++c) {
                    const long j = (k * C + c) * V, n = k * C + c;
                    const vec next = load(d + j + C * V);
                    const vec over_east = here[c] - next, over_south = here[c] - from_south(next, all(d_below[n - (V - 1) * C]));
                    const vec y = scale * (here[c] + east * over_east + south * over_south + west[c] +
                                           from_north(north[c], all(from[n + (V - 1) * C])));
                    west[c] = east * (y - over_east);
                    north[c] = south * (y - over_south);
                    to[n] = north[c][V - 1];
                    const vec value = load(z + j) - alpha[c] * y;
                    store(z + j, value);
                    store(x + j, load(x + j) + alpha[c] * here[c]);
                    sums[c] += value * value * pivot;
                    here[c] = next;
                }
            });
            keep(0, band, sums);
        });
    }
};
