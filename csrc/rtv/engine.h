// The smoother for one instruction set: included once per set, with that set's target options on, inside a namespace
// of its own. It includes nothing itself.
//
// Layout. The triangular sweeps of MIC(0) run from corner to corner: a pixel needs its western and northern
// neighbours. So V rows share one vector, each row one column behind the row above it ("skewed"): lane j of step k is
// column k - j of row V*band + j. West is then the previous vector, north the previous vector moved by one lane, and a
// sweep is plain vector code of any width. Positions outside the picture have zero weights, and stay zero.
//
//     skewed field: [band][step][channel][lane]     bands = ceil(height / V), steps = width + V - 1

template <class Real, int V, int C>
class Engine {
    typedef Real vec __attribute__((vector_size(V * sizeof(Real)), may_alias));

public:
    Engine(Real* planes, int height, int width, const Parameters& parameters, Team& team)
        : planes(planes), H(height), W(width), bands((height + V - 1) / V), steps(width + V - 1), row(steps + 2 * V),
          options(parameters), team(team), progress(size_t(bands)), partial(size_t(bands) * 7 * C) {
        const size_t plane = (size_t(bands) * steps + 2) * V;  // a guard step on either side
        const size_t edges = (size_t(bands) + 2) * C * row;
        const size_t total = 6 * C * plane + 6 * plane + 3 * edges;
        memory.reset(static_cast<Real*>(std::aligned_alloc(64, (total * sizeof(Real) + 63) / 64 * 64)));
        if (!memory) throw std::bad_alloc();
        std::memset(static_cast<void*>(memory.get()), 0, total * sizeof(Real));
        Real* next = memory.get();
        for (Real** field : {&b, &x, &r, &p, &u, &w}) *field = next + C * V, next += C * plane;
        for (Real** field : {&e, &s, &es, &ss, &dm, &isq}) *field = next + V, next += plane;
        down = next, next += edges;
        down_b = next, next += edges;
        up = next;
    }

    std::vector<SolveReport> run() {
        team.run([](void* self, int member) { static_cast<Engine*>(self)->work(member); }, this);
        if (failed)
            throw std::runtime_error("rtv_smooth: a solve did not converge: the weights are out of range; lower lam, raise sharpness, or use float64");
        return reports;
    }

private:
    struct Free {
        void operator()(Real* pointer) const { std::free(pointer); }
    };

    Real* const planes;  // [C][H][W]
    const int H, W, bands, steps, row;
    const Parameters options;
    Team& team;
    std::unique_ptr<Real[], Free> memory;
    std::vector<Progress> progress;  // of the running sweep, per band
    std::vector<double> partial;
    std::vector<SolveReport> reports;
    bool failed = false;
    Real *b, *x;              // right-hand side and solution
    Real *r, *p, *u;          // conjugate gradients in Eisenstat's variables: residual, direction, sum of alpha p
    Real* w;                  // t = K^-T p after a backward sweep, q = K^-1 A K^-T p after a forward sweep
    Real *e, *s;              // weights of the edges to the east and to the south, times lambda/2
    Real *es, *ss, *dm;       // the same edges and the diagonal minus 2, scaled by MIC(0)'s pivots from both sides
    Real* isq;                // 1 / sqrt(pivot)
    Real *down, *down_b, *up;  // what a band hands to the one below or above: [band][channel][row]

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
    // The edge buffers, indexed by [-V, steps + V).
    Real* down_of(int band, int c) { return down + (size_t(band + 1) * C + c) * row + V; }
    Real* down_b_of(int band, int c) { return down_b + (size_t(band + 1) * C + c) * row + V; }
    Real* up_of(int band, int c) { return up + (size_t(band) * C + c) * row + V; }

    // ---- what each member of the team does -----------------------------------------------------------------------

    void work(int member) {
        const FlushDenormals flush;
        Member me{member, 0, {}};
        pack(me, planes, b);
        copy(me, b, x);
        double sigma = options.sigma;
        for (int iteration = 0; iteration < options.iterations; ++iteration) {
            weights(me, sigma);
            factor(me);
            if (options.solver == Solver::direct) solve_directly(me);
            else if (options.mode == Mode::matlab_pcg) solve_early_stopped(me);
            else solve(me);
            unpack(me);
            sigma = std::max(sigma / 2, 0.5);
        }
    }

    struct Member {
        int number;
        long epoch;       // progress counts on from sweep to sweep, so that nobody has to set it back
        Real shift[C]{};  // what the solution lacks on average
    };

    // Bands go round the members. A step needs the band before it (in the sweep's direction) done up to V - 1 steps
    // further, so a member follows the other a few chunks behind.
    static constexpr int chunk = 64;

    int begin_chunk(const Member& me, int source, int from) {
        const int to = std::min(from + chunk, steps);
        if (team.size() > 1 && source >= 0 && source < bands) {
            const long needed = me.epoch + std::min(to + V, steps);
            Team::wait_until([&] { return progress[source].steps.load(std::memory_order_acquire) >= needed; });
        }
        return to;
    }
    void end_chunk(const Member& me, int band, int done) {
        if (team.size() > 1) progress[band].steps.store(me.epoch + done, std::memory_order_release);
    }
    void end_sweep(Member& me) {
        me.epoch += steps;
        team.barrier();
    }

    // ---- from rows to skewed fields and back ----------------------------------------------------------------------

    void skew(int band, const Real* rows, Real* field, int channels, int c) {
        for (int lane = 0; lane < V && band * V + lane < H; ++lane) {
            const Real* from = rows + size_t(band * V + lane) * W;
            Real* to = field + (at(band, lane) * channels) + c * V + lane;
            for (int i = 0; i < W; ++i) to[size_t(i) * channels * V] = from[i];
        }
    }
    void pack(const Member& me, const Real* rows, Real* field) {
        for (int band = me.number; band < bands; band += team.size())
            for (int c = 0; c < C; ++c) skew(band, rows + size_t(c) * H * W, field, C, c);
        team.barrier();
    }
    void unpack(const Member& me) {
        for (int band = me.number; band < bands; band += team.size())
            for (int c = 0; c < C; ++c)
                for (int lane = 0; lane < V && band * V + lane < H; ++lane) {
                    Real* to = planes + (size_t(c) * H + band * V + lane) * W;
                    const Real* from = x + at(band, lane) * C + c * V + lane;
                    for (int i = 0; i < W; ++i) to[i] = from[size_t(i) * C * V] + me.shift[c];
                }
        team.barrier();
    }
    void copy(const Member& me, const Real* from, Real* to) {
        for (int band = me.number; band < bands; band += team.size())
            std::memcpy(static_cast<void*>(to + at(band, 0) * C), from + at(band, 0) * C, sizeof(Real) * steps * C * V);
        team.barrier();
    }

    // ---- the weights of one iteration -----------------------------------------------------------------------------

    // From x in `planes`: e and s, lambda/2 included. Blurred rows lie in p and u, which are free meanwhile.
    void weights(const Member& me, double sigma) {
        const int radius = (int(std::floor(5 * sigma + 0.5)) | 1) / 2;
        std::vector<Real> taps(2 * radius + 1);
        double sum = 0;
        for (int i = -radius; i <= radius; ++i) sum += std::exp(-0.5 * i * i / (sigma * sigma));
        for (int i = -radius; i <= radius; ++i)
            taps[i + radius] = Real(std::exp(-0.5 * i * i / (sigma * sigma)) / sum);

        Real* const across = p;
        Real* const blurred = u;
        for (int line = me.number; line < C * H; line += team.size()) {
            const Real* from = planes + size_t(line) * W;
            Real* to = across + size_t(line) * W;
            std::memset(static_cast<void*>(to), 0, sizeof(Real) * W);
            for (int i = -radius; i <= radius; ++i) {
                const Real tap = taps[i + radius];
                const int first = std::max(0, -i), last = std::min(W, W - i);
                for (int j = first; j < last; ++j) to[j] += tap * from[j + i];
            }
        }
        team.barrier();
        for (int line = me.number; line < C * H; line += team.size()) {
            const int h = line % H;
            Real* to = blurred + size_t(line) * W;
            std::memset(static_cast<void*>(to), 0, sizeof(Real) * W);
            for (int i = std::max(-radius, -h); i <= std::min(radius, H - 1 - h); ++i) {
                const Real tap = taps[i + radius];
                const Real* from = across + (size_t(line) + i) * W;
                for (int j = 0; j < W; ++j) to[j] += tap * from[j];
            }
        }
        team.barrier();

        const Real half_lam = Real(options.lam / 2), sharpness = Real(options.sharpness), floor = Real(1e-3);
        std::vector<Real> lines(3 * size_t(W));
        Real *texture = lines.data(), *east = texture + W, *south = east + W;
        for (int h = me.number * V; h < bands * V; h += (h + 1) % V ? 1 : (team.size() - 1) * V + 1) {
            if (h >= H) continue;
            const bool last = h == H - 1;
            for (int j = 0; j < W; ++j) texture[j] = east[j] = south[j] = 0;
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
            Real* to_e = e + at(h / V, h % V) + h % V;
            Real* to_s = s + at(h / V, h % V) + h % V;
            for (int j = 0; j < W; ++j) to_e[size_t(j) * V] = east[j], to_s[size_t(j) * V] = south[j];
        }
        team.barrier();
    }

    // ---- MIC(0) ---------------------------------------------------------------------------------------------------

    // Pivots of modified incomplete Cholesky with relaxation omega: dropped fill-in goes to the diagonal. Then the
    // matrix scaled to unit pivots from both sides, so that the sweeps need no division and fewer fields.
    void factor(Member& me) {
        const Real omega = options.mode == Mode::exact ? Real(0.99) : Real(1);
        for (int band = me.number; band < bands; band += team.size()) {
            vec from_west{}, e_west{}, s_last{}, g_last{};
            for (int from = 0; from < steps; from += chunk) {
                const int to = begin_chunk(me, band - 1, from);
                for (int k = from; k < to; ++k) {
                    const size_t i = at(band, k);
                    const vec east = load(e + i), south = load(s + i);
                    const vec s_north = from_north(s_last, all(down_of(band - 1, 0)[k + V - 1]));
                    const vec g_north = from_north(g_last, all(down_b_of(band - 1, 0)[k + V - 1]));
                    const vec pivot = Real(1) + (east + south + e_west + s_north) - from_west - g_north;
                    const vec inverse = Real(1) / pivot;
                    store(dm + i, (Real(1) + (east + south + e_west + s_north)) * inverse - Real(2));
                    store(isq + i, root(inverse));
                    from_west = east * (east + omega * south) * inverse;
                    g_last = south * (south + omega * east) * inverse;
                    e_west = east;
                    s_last = south;
                    down_of(band, 0)[k] = s_last[V - 1];
                    down_b_of(band, 0)[k] = g_last[V - 1];
                }
                end_chunk(me, band, to);
            }
        }
        end_sweep(me);
        for (int band = me.number; band < bands; band += team.size())
            for (int k = 0; k < steps; ++k) {
                const size_t i = at(band, k);
                const vec here = load(isq + i), next = k + 1 < steps ? load(isq + i + V) : vec{};
                const vec below = band + 1 < bands && k >= V - 1 ? load(isq + at(band + 1, k - (V - 1))) : vec{};
                store(es + i, load(e + i) * here * next);
                store(ss + i, load(s + i) * here * from_south(next, below));
            }
        team.barrier();
    }
    static vec root(vec v) {
        for (int i = 0; i < V; ++i) v[i] = std::sqrt(v[i]);
        return v;
    }

    // ---- conjugate gradients --------------------------------------------------------------------------------------

    static double lanes(vec v) {
        double sum = 0;
        for (int i = 0; i < V; ++i) sum += v[i];
        return sum;
    }
    // Every member adds the bands up in the same order, so results do not depend on their number.
    void total(int quantity, double* sums) {
        for (int c = 0; c < C; ++c) {
            sums[c] = 0;
            for (int band = 0; band < bands; ++band) sums[c] += partial[(size_t(quantity) * bands + band) * C + c];
        }
    }

    // Where a round of conjugate gradients stands.
    struct Step {
        int count = 0;         // iterations done
        double alpha[C]{};     // of the last one
        double beta[C]{};      // for the next one
        double gamma[C]{};     // alpha / beta of the one before the last while that is pending, else 0
        bool pending = false;  // `gamma` holds something
        bool summed = false;   // u holds something
    };

    // Rounds of conjugate gradients, each on the true residual of the last: float32 recurrences drift from it.
    void solve(Member& me) {
        constexpr int most_rounds = 12, most_iterations = 500;
        const double per_round = sizeof(Real) == 4 ? 1e-3 : 1e-7;
        int iterations = 0;
        double residual = 0;
        for (int round = 0;; ++round) {
            double rr[C], bb[C], ulps[C], goal[C];
            residuals(me);
            total(0, rr);
            total(1, bb);
            total(5, ulps);
            residual = 0;
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
                total(6, mean);
                for (int c = 0; c < C; ++c) me.shift[c] = Real(mean[c] / (double(H) * W));
                break;
            }
            const double worst = *std::max_element(rr, rr + C);  // not finite when float32 has broken down
            if (round == most_rounds || iterations >= most_iterations || !std::isfinite(worst)) {
                failed = true;
                break;
            }
            Step step;
            while (iterations < most_iterations && !std::equal(rr, rr + C, goal, std::less_equal<double>())) {
                iterate(me, step, rr);
                ++iterations;
            }
            correct(me, step);
        }
        if (me.number == 0) reports.push_back({iterations, residual});
        team.barrier();
    }

    // The authors' setting: from zero, each channel stopped as soon as |b - A x| <= 0.1 |b| (at most 100 iterations).
    void solve_early_stopped(Member& me) {
        constexpr double tol = 0.1;
        constexpr int most_iterations = 100;
        for (int band = me.number; band < bands; band += team.size())
            std::memset(static_cast<void*>(x + at(band, 0) * C), 0, sizeof(Real) * steps * C * V);
        team.barrier();
        residuals(me);
        double rr[C], bb[C], norm[C], relative[C] = {};
        bool done[C];
        Step step;
        total(0, rr);
        unpreconditioned(me, step, bb);
        for (int c = 0; c < C; ++c) done[c] = !(bb[c] > 0);
        while (step.count < most_iterations && !std::all_of(done, done + C, [](bool d) { return d; })) {
            iterate(me, step, rr);
            for (int c = 0; c < C; ++c)
                if (done[c]) step.alpha[c] = 0;
            unpreconditioned(me, step, norm);
            for (int c = 0; c < C; ++c) {
                if (done[c]) continue;
                relative[c] = std::sqrt(norm[c] / bb[c]);
                done[c] = !(relative[c] > tol);
            }
        }
        correct(me, step);
        if (me.number == 0) reports.push_back({step.count, *std::max_element(relative, relative + C)});
        team.barrier();
    }

    // |K (r - alpha q)|^2 = |b - A x|^2, which the preconditioned recurrences do not have.
    void unpreconditioned(Member& me, const Step& step, double* sums) {
        const auto value = [&](size_t i, int c) {
            const vec here = load(r + i * C + c * V);
            return step.count ? here - Real(step.alpha[c]) * load(w + i * C + c * V) : here;
        };
        for (int band = me.number; band < bands; band += team.size()) {
            vec last[C] = {}, es_west{}, ss_last{}, sum[C] = {};
            for (int k = 0; k < steps; ++k) {
                const size_t i = at(band, k);
                const bool has_north = band > 0 && k + V - 1 < steps;
                const size_t north = has_north ? at(band - 1, k + V - 1) : 0;
                const vec ss_north = from_north(ss_last, has_north ? load(ss + north) : vec{});
                const vec scale = load(isq + i);
                for (int c = 0; c < C; ++c) {
                    const vec here = value(i, c);
                    const vec above = from_north(last[c], has_north ? value(north, c) : vec{});
                    const vec residual = (here - es_west * last[c] - ss_north * above) / scale;
                    sum[c] += residual * residual;
                    last[c] = here;
                }
                es_west = load(es + i);
                ss_last = load(ss + i);
            }
            for (int c = 0; c < C; ++c) partial[(0 * size_t(bands) + band) * C + c] = lanes(sum[c]);
        }
        team.barrier();
        total(0, sums);
        team.barrier();
    }

    void solve_directly(Member& me) {
        if (me.number == 0) {
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
        }
        team.barrier();
        residuals(me);
        double rr[C], bb[C], residual = 0;
        total(0, rr);
        total(1, bb);
        for (int c = 0; c < C; ++c)
            if (rr[c] > 0) residual = std::max(residual, std::sqrt(rr[c] / bb[c]));
        if (me.number == 0) reports.push_back({0, residual});
        team.barrier();
    }

    // r = K^-1 (b - A x) with A x in edge differences, which keeps float32 exact where the weights are large. Sums its
    // square, that of K^-1 b, and the square of the residual that rounding x itself causes: no solver gets below it.
    // Sums b - A x as well.
    void residuals(Member& me) {
        constexpr Real few_ulps = 2 * std::numeric_limits<Real>::epsilon();
        for (int band = me.number; band < bands; band += team.size()) {
            vec z[C] = {}, zb[C] = {}, x_last[C], e_west{}, es_west{}, s_last{}, ss_last{}, rr[C] = {}, bb[C] = {}, ulps[C] = {},
                sum[C] = {};
            for (int c = 0; c < C; ++c) x_last[c] = vec{};
            for (int from = 0; from < steps; from += chunk) {
                const int to = begin_chunk(me, band - 1, from);
                for (int k = from; k < to; ++k) {
                    const size_t i = at(band, k);
                    const size_t north = band > 0 && k + V - 1 < steps ? at(band - 1, k + V - 1) : size_t(-1);
                    const size_t south = band + 1 < bands && k >= V - 1 ? at(band + 1, k - (V - 1)) : size_t(-1);
                    const vec s_north = from_north(s_last, north + 1 ? load(s + north) : vec{});
                    const vec ss_north = from_north(ss_last, north + 1 ? load(ss + north) : vec{});
                    const vec east = load(e + i), below = load(s + i), scale = load(isq + i);
                    for (int c = 0; c < C; ++c) {
                        const vec here = load(x + i * C + c * V), next = load(x + (i + V) * C + c * V);
                        const vec x_south = from_south(next, south + 1 ? load(x + south * C + c * V) : vec{});
                        const vec x_north = from_north(x_last[c], north + 1 ? load(x + north * C + c * V) : vec{});
                        const vec rhs = load(b + i * C + c * V);
                        const vec residual = (rhs - here) + east * (next - here) + e_west * (x_last[c] - here) +
                                             below * (x_south - here) + s_north * (x_north - here);
                        const vec z_north = from_north(z[c], all(down_of(band - 1, c)[k + V - 1]));
                        const vec zb_north = from_north(zb[c], all(down_b_of(band - 1, c)[k + V - 1]));
                        z[c] = scale * residual + es_west * z[c] + ss_north * z_north;
                        zb[c] = scale * rhs + es_west * zb[c] + ss_north * zb_north;
                        store(r + i * C + c * V, z[c]);
                        down_of(band, c)[k] = z[c][V - 1];
                        down_b_of(band, c)[k] = zb[c][V - 1];
                        rr[c] += z[c] * z[c];
                        bb[c] += zb[c] * zb[c];
                        sum[c] += residual;
                        ulps[c] += (few_ulps * here / scale) * (few_ulps * here / scale);
                        x_last[c] = here;
                    }
                    e_west = east;
                    s_last = below;
                    es_west = load(es + i);
                    ss_last = load(ss + i);
                }
                end_chunk(me, band, to);
            }
            for (int c = 0; c < C; ++c) {
                partial[(0 * size_t(bands) + band) * C + c] = lanes(rr[c]);
                partial[(1 * size_t(bands) + band) * C + c] = lanes(bb[c]);
                partial[(5 * size_t(bands) + band) * C + c] = lanes(ulps[c]);
                partial[(6 * size_t(bands) + band) * C + c] = lanes(sum[c]);
            }
        }
        end_sweep(me);
    }

    // x = x_0 + T^-1/2 K^-T u, u the sum of alpha p. It takes two directions at a time, every second iteration: the older
    // of them is (p - r) / beta, which costs no memory traffic. A tiny beta would lose it: then at once.
    static vec two_terms(vec p, vec r, vec alpha, vec gamma) { return alpha * p + gamma * (p - r); }

    // One iteration. `rr` goes from r.r to its foretold next value, which only beta uses: the next sweep sums the real
    // one for alpha, so rounding errors do not accumulate ("predict and recompute", Chen and Carson 2020).
    void iterate(Member& me, Step& step, double* rr) {
        const bool wait = !step.pending && std::all_of(step.beta, step.beta + C, [](double b) { return b > 1e-6; });
        if (step.count == 0) backward<Sum::none>(me, step);
        else if (wait) backward<Sum::wait>(me, step);
        else if (step.summed) backward<Sum::add>(me, step);
        else backward<Sum::begin>(me, step);
        total(2, rr);  // now, before a faster member overwrites it
        forward(me);
        double pq[C], qq[C];
        total(3, pq);
        total(4, qq);
        for (int c = 0; c < C; ++c) step.gamma[c] = step.count > 0 && wait ? step.alpha[c] / step.beta[c] : 0;
        step.pending = step.count > 0 && wait;
        step.summed = step.summed || (step.count > 0 && !wait);
        for (int c = 0; c < C; ++c) {
            step.alpha[c] = step.beta[c] = 0;
            if (!(rr[c] > 0) || !(pq[c] > 0)) {  // nothing left in this channel
                rr[c] = 0;
                continue;
            }
            step.alpha[c] = rr[c] / pq[c];
            const double next = std::max(0.0, step.alpha[c] * step.alpha[c] * qq[c] - rr[c]);
            step.beta[c] = next / rr[c];
            rr[c] = next;
        }
        ++step.count;
    }

    enum class Sum { none, wait, begin, add };  // the first sweep has none

    // r -= alpha q, p = r + beta p, t = K^-T p
    template <Sum sum>
    void backward(Member& me, const Step& step) {
        vec alpha[C], beta[C], gamma[C];
        for (int c = 0; c < C; ++c) {
            alpha[c] = all(Real(step.alpha[c]));
            beta[c] = all(Real(step.beta[c]));
            gamma[c] = all(Real(step.gamma[c]));
        }
        sweep_back(me, [&](size_t j, int c, vec& rr) {
            const vec r_old = load(r + j);
            if (sum == Sum::none) {
                store(p + j, r_old);
                rr += r_old * r_old;
                return r_old;
            }
            const vec p_old = load(p + j), r_new = r_old - alpha[c] * load(w + j);
            const vec p_new = r_new + beta[c] * p_old;
            if (sum == Sum::begin) store(u + j, two_terms(p_old, r_old, alpha[c], gamma[c]));
            if (sum == Sum::add) store(u + j, load(u + j) + two_terms(p_old, r_old, alpha[c], gamma[c]));
            store(r + j, r_new);
            store(p + j, p_new);
            rr += r_new * r_new;
            return p_new;
        }, [&](size_t j, size_t, vec t) { store(w + j, t); });
    }

    // x += T^-1/2 K^-T (u + what is pending).
    void correct(Member& me, const Step& step) {
        if (step.count == 0) return;
        sweep_back(me, [&](size_t j, int c, vec&) {
            const vec rest = two_terms(load(p + j), load(r + j), all(Real(step.alpha[c])), all(Real(step.gamma[c])));
            return step.summed ? load(u + j) + rest : rest;
        }, [&](size_t j, size_t i, vec t) { store(x + j, load(x + j) + load(isq + i) * t); });
    }

    // t = K^-T v from the last pixel to the first; v = source(index, channel, sum), take(index, pixel, t).
    template <class Source, class Take>
    void sweep_back(Member& me, Source source, Take take) {
        for (int number = me.number; number < bands; number += team.size()) {
            const int band = bands - 1 - number;
            vec t[C] = {}, sums[C] = {};
            for (int from = 0; from < steps; from += chunk) {
                const int to = begin_chunk(me, band + 1, from);
                for (int k = steps - 1 - from; k > steps - 1 - to; --k) {
                    const size_t i = at(band, k);
                    const vec east = load(es + i), below = load(ss + i);
                    for (int c = 0; c < C; ++c) {
                        const size_t j = i * C + c * V;
                        const vec t_south = from_south(t[c], all(up_of(band + 1, c)[k - (V - 1)]));
                        t[c] = source(j, c, sums[c]) + east * t[c] + below * t_south;
                        take(j, i, t[c]);
                        up_of(band, c)[k] = t[c][0];
                    }
                }
                end_chunk(me, band, to);
            }
            for (int c = 0; c < C; ++c) partial[(2 * size_t(bands) + band) * C + c] = lanes(sums[c]);
        }
        end_sweep(me);
    }

    // q = t + K^-1 (p + (D - 2) t), the scaled matrix times p, over t; and its products with p and itself.
    void forward(Member& me) {
        for (int band = me.number; band < bands; band += team.size()) {
            vec z[C] = {}, pq[C] = {}, qq[C] = {}, es_west{}, ss_last{};
            for (int from = 0; from < steps; from += chunk) {
                const int to = begin_chunk(me, band - 1, from);
                for (int k = from; k < to; ++k) {
                    const size_t i = at(band, k);
                    const bool has_north = band > 0 && k + V - 1 < steps;
                    const vec diagonal = load(dm + i);
                    const vec ss_north =
                        from_north(ss_last, all(has_north ? ss[at(band - 1, k + V - 1) + V - 1] : Real(0)));
                    for (int c = 0; c < C; ++c) {
                        const size_t j = i * C + c * V;
                        const vec p_here = load(p + j), t_here = load(w + j);
                        const vec z_north = from_north(z[c], all(down_of(band - 1, c)[k + V - 1]));
                        z[c] = p_here + diagonal * t_here + es_west * z[c] + ss_north * z_north;
                        const vec q_here = z[c] + t_here;
                        store(w + j, q_here);
                        down_of(band, c)[k] = z[c][V - 1];
                        pq[c] += p_here * q_here;
                        qq[c] += q_here * q_here;
                    }
                    es_west = load(es + i);
                    ss_last = load(ss + i);
                }
                end_chunk(me, band, to);
            }
            for (int c = 0; c < C; ++c) {
                partial[(3 * size_t(bands) + band) * C + c] = lanes(pq[c]);
                partial[(4 * size_t(bands) + band) * C + c] = lanes(qq[c]);
            }
        }
        end_sweep(me);
    }
};
