// The smoother as the program of one thread block, for one picture: csrc/rtv_cuda.cu runs a block per picture on a GPU;
// tests/csrc/block_on_host.cpp runs the same source with a CPU thread per GPU thread.
//
// Method and variables are those of engine.h (read that first); the layout is its skewed one with a thread per lane.
// Bands follow each other without a gap: thread `lane` works on position k - lane at step k, and position n is column
// n mod `pitch` of the picture's row lane + T * (n div pitch). Every neighbour that a sweep needs is at least one step
// old: west is the thread's own last value, north the last value of the thread before it, through shared memory, and for
// thread 0 what the last thread left in `edge` more than `ahead` steps ago.
//
// A sweep runs at the latency of one step, so nothing that a step needs may come from far away: each thread keeps the
// next `ahead` steps' values of its own position in registers. A sweep changes only values at the position where it is,
// so reading ahead is safe.
//
//     skewed field: [step][channel][lane]     and a guard step on either side
#pragma once

#if defined(__CUDACC__)
#define RTV_DEVICE __device__ __forceinline__
#define RTV_BOTH __host__ __device__
#else
#define RTV_DEVICE inline
#define RTV_BOTH
#endif

#include <cmath>
#include <cstddef>

namespace rtv {

constexpr int max_threads = 256;  // of a block
constexpr int max_taps = 129;     // sigma <= 25
constexpr int ahead = 6;          // steps that a sweep reads ahead at most

struct BlockParameters {
    int height, width, iterations;
    double lam, sigma, sharpness, tol;
};

struct BlockReport {
    int iterations;  // -1: did not converge
    float residual;
};

// Sizes that host and device agree on.
struct BlockLayout {
    int threads, bands, pitch, positions, steps;

    RTV_BOTH BlockLayout(int height, int width) {
        threads = max_threads;
        while (threads > 32 && (threads > width || threads / 2 >= height)) threads /= 2;
        bands = (height + threads - 1) / threads;
        pitch = width > threads + ahead ? width : threads + ahead;  // so that `edge` can be read ahead as well
        positions = (bands - 1) * pitch + width;
        steps = (positions + threads - 1 + ahead - 1) / ahead * ahead;
    }
    RTV_BOTH size_t plane() const { return (size_t(steps) + 2) * threads; }
    // Numbers that a picture's workspace holds, a multiple of 64.
    RTV_BOTH size_t workspace(int channels) const {
        return ((4 * channels + 3) * plane() + 2 * size_t(channels) * steps + 63) / 64 * 64;
    }
};

// What the threads of a block share in fast memory.
template <class Real, int C>
struct Shared {
    Real row[2][2 * C][max_threads];  // the last step's values, twice: one is read while the other is written
    double sums[5][max_threads];
    Real taps[max_taps];
};

template <class Real, int C, class Block>
class BlockProgram {
public:
    RTV_DEVICE BlockProgram(Block block_, Shared<Real, C>& shared_, const BlockParameters& parameters_,
                            const BlockLayout& layout_, Real* planes_, Real* workspace, BlockReport* reports_)
        : block(block_), shared(shared_), options(parameters_), layout(layout_), planes(planes_), reports(reports_),
          lane(block_.thread()), T(layout_.threads), H(parameters_.height), W(parameters_.width) {
        const size_t plane = layout.plane();
        Real* next = workspace;
        Real** const wide[] = {&b, &x, &z, &d};
        for (Real** field : wide) *field = next + C * T, next += C * plane;
        Real** const narrow[] = {&e, &s, &inverse};
        for (Real** field : narrow) *field = next + T, next += plane;
        for (int i = 0; i < 2; ++i) edge[i] = next, next += C * layout.steps;
        // Everything outside the picture has to be zero.
        for (Real* at = workspace + lane; at < next; at += T) *at = 0;
        block.sync();
    }

    RTV_DEVICE void run() {
        for (int i = lane; i < H * W; i += T)
            for (int c = 0; c < C; ++c) b[skewed(i, c)] = x[skewed(i, c)] = planes[c * H * W + i];
        block.sync();
        double sigma = options.sigma;  // in float32 a radius can come out one smaller than the CPU's
        for (int iteration = 0; iteration < options.iterations; ++iteration) {
            weights(sigma);
            factor();
            solve(reports + iteration);
            for (int i = lane; i < H * W; i += T)
                for (int c = 0; c < C; ++c) planes[c * H * W + i] = x[skewed(i, c)] + shift[c];
            block.sync();
            sigma = sigma / 2 > 0.5 ? sigma / 2 : 0.5;
        }
    }

private:
    Block block;
    Shared<Real, C>& shared;
    const BlockParameters options;
    const BlockLayout layout;
    Real* const planes;  // [C][H][W]
    BlockReport* const reports;
    const int lane, T, H, W;
    Real *b, *x, *z, *d, *e, *s, *inverse;
    Real* edge[2];  // what the last lane (the first, backward) handed on at each step, for the other end: [step][channel]
    Real shift[C]{};

    static RTV_DEVICE Real larger(Real a, Real c) { return a > c ? a : c; }
    static RTV_DEVICE Real magnitude(Real a) { return a < 0 ? -a : a; }

    RTV_DEVICE size_t step_of(int pixel) const {
        const int row = pixel / W, column = pixel % W;
        return size_t(row / T) * layout.pitch + column + row % T;
    }
    RTV_DEVICE size_t skewed(int pixel, int c) const { return (step_of(pixel) * C + c) * T + pixel / W % T; }
    // Where the neighbour above lane 0 is, and the one below the last lane; outside the picture these have weight 0.
    RTV_DEVICE int above(int k) const { return k - layout.pitch + T - 1; }
    RTV_DEVICE int below(int k) const { return k + layout.pitch - T + 1; }
    RTV_DEVICE bool active(int k) const { return k >= lane && k - lane < layout.positions; }

    // All steps, downward from the first or upward from the last: load(k) reads what step(k, it) works on.
    template <class Values, bool down, int depth, class Load, class Step>
    RTV_DEVICE void sweep(const Load& load, const Step& step) {
        static_assert(ahead % depth == 0, "steps are a multiple of it");
        Values ring[depth];
        const int last = layout.steps - 1;
#pragma unroll
        for (int i = 0; i < depth; ++i) ring[i] = load(down ? i : last - i);
        for (int from = 0; from < layout.steps; from += depth) {
#pragma unroll
            for (int i = 0; i < depth; ++i) {
                const int k = from + i;
                const Values now = ring[i];
                if (k + depth < layout.steps) ring[i] = load(down ? k + depth : last - k - depth);
                step(down ? k : last - k, now);
                block.sync();
            }
        }
    }

    // What comes from the row above (below): from the thread before at the step before, for thread 0 (the last) out of
    // `edge`, read ahead. Of slot i: two sets of C values.
    RTV_DEVICE Real edge_above(int i, int c, int k) const {
        return lane == 0 && above(k) >= 0 ? edge[i][above(k) * C + c] : Real(0);
    }
    RTV_DEVICE Real edge_below(int i, int c, int k) const {
        return lane == T - 1 && below(k) < layout.steps ? edge[i][below(k) * C + c] : Real(0);
    }
    RTV_DEVICE Real handed_down(int i, int c, int k, Real from_edge) const {
        return lane == 0 ? from_edge : k > 0 ? shared.row[(k - 1) & 1][i * C + c][lane - 1] : Real(0);
    }
    RTV_DEVICE Real handed_up(int i, int c, int k, Real from_edge) const {
        return lane == T - 1 ? from_edge : k + 1 < layout.steps ? shared.row[(k + 1) & 1][i * C + c][lane + 1] : Real(0);
    }
    RTV_DEVICE void hand_down(int i, int c, int k, Real value) {
        shared.row[k & 1][i * C + c][lane] = value;
        if (lane == T - 1) edge[i][k * C + c] = value;
    }
    RTV_DEVICE void hand_up(int i, int c, int k, Real value) {
        shared.row[k & 1][i * C + c][lane] = value;
        if (lane == 0) edge[i][k * C + c] = value;
    }
    // Where the neighbour to the south is in a field of n channels, from a step on; outside the picture any place will do.
    RTV_DEVICE int south_of(int k, int n, int c) const {
        if (lane < T - 1) return ((k + 1) * n + c) * T + lane + 1;
        return ((below(k) < layout.steps ? below(k) : k) * n + c) * T;
    }

    // Sums over the block, of `count` <= 5 quantities, the same in every thread.
    RTV_DEVICE void total(const double* mine, double* sums, int count) {
        for (int i = 0; i < count; ++i) shared.sums[i][lane] = mine[i];
        block.sync();
        for (int half = T / 2; half > 0; half /= 2) {
            if (lane < half)
                for (int i = 0; i < count; ++i) shared.sums[i][lane] += shared.sums[i][lane + half];
            block.sync();
        }
        for (int i = 0; i < count; ++i) sums[i] = shared.sums[i][0];
        block.sync();
    }

    RTV_DEVICE void weights(double sigma) {
        const int radius = (int(floor(5 * sigma + 0.5)) | 1) / 2, pixels = H * W;
        if (lane == 0) {
            double sum = 0;
            for (int i = -radius; i <= radius; ++i) sum += exp(-0.5 * (i / sigma) * (i / sigma));
            for (int i = -radius; i <= radius; ++i)
                shared.taps[i + radius] = Real(exp(-0.5 * (i / sigma) * (i / sigma)) / sum);
        }
        block.sync();
        Real *across = z, *blurred = d;  // free meanwhile
        for (int i = lane; i < C * pixels; i += T) {
            const int column = i % W;
            Real sum = 0;
            for (int j = -radius; j <= radius; ++j)
                if (column + j >= 0 && column + j < W) sum += shared.taps[j + radius] * planes[i + j];
            across[i] = sum;
        }
        block.sync();
        for (int i = lane; i < C * pixels; i += T) {
            const int row = i % pixels / W;
            Real sum = 0;
            for (int j = -radius; j <= radius; ++j)
                if (row + j >= 0 && row + j < H) sum += shared.taps[j + radius] * across[i + j * W];
            blurred[i] = sum;
        }
        block.sync();
        for (int i = lane; i < pixels; i += T) {
            const bool right = i % W == W - 1, bottom = i / W == H - 1;
            Real texture = 0, along_x = 0, along_y = 0;
            for (int c = 0; c < C; ++c) {
                const Real* here = planes + c * pixels + i;
                const Real* here_b = blurred + c * pixels + i;
                const Real dx = right ? Real(0) : here[1] - here[0], dy = bottom ? Real(0) : here[W] - here[0];
                texture += sqrt(dx * dx + dy * dy);
                along_x += right ? Real(0) : magnitude(here_b[1] - here_b[0]);
                along_y += bottom ? Real(0) : magnitude(here_b[W] - here_b[0]);
            }
            const Real weight = Real(options.lam / 2) / larger(texture / C, Real(options.sharpness));
            const size_t j = step_of(i) * T + i / W % T;
            e[j] = right ? Real(0) : weight / larger(along_x / C, Real(1e-3));
            s[j] = bottom ? Real(0) : weight / larger(along_y / C, Real(1e-3));
        }
        block.sync();
    }

    struct Weights {
        Real east, south, edge[2];
    };

    RTV_DEVICE void factor() {
        const Real omega = Real(0.99);
        Real e_west = 0, from_west = 0;
        sweep<Weights, true, 2>(
            [&](int k) {
                const int i = k * T + lane;
                const bool in = active(k);
                return Weights{in ? e[i] : Real(0), in ? s[i] : Real(0), {edge_above(0, 0, k), edge_above(1, 0, k)}};
            },
            [&](int k, const Weights& at) {
                const Real s_north = handed_down(0, 0, k, at.edge[0]), g_north = handed_down(1, 0, k, at.edge[1]);
                const Real value = Real(1) / (Real(1) + (at.east + at.south + e_west + s_north) - from_west - g_north);
                if (active(k)) inverse[k * T + lane] = value;
                from_west = at.east * (at.east + omega * at.south) * value;
                e_west = at.east;
                hand_down(0, 0, k, at.south);
                hand_down(1, 0, k, at.south * (at.south + omega * at.east) * value);
            });
    }

    RTV_DEVICE void solve(BlockReport* report) {
        const double per_round = sizeof(Real) == 4 ? 1e-3 : 1e-7;
        int count = 0;
        double bb[C];
        for (int round = 0;; ++round) {
            double zz[C], goal[C], relative = 0;
            bool reached = true, finite = true;
            if (round == 0) residuals<true>(zz, bb, goal, per_round, reached, finite, relative);
            else residuals<false>(zz, bb, goal, per_round, reached, finite, relative);
            const bool broken = round == 12 || count >= 500 || !finite;
            if (reached || broken) {
                if (lane == 0) *report = {reached ? count : -1, float(relative)};
                block.sync();
                return;
            }
            Real beta[C]{};
            bool finished = false;
            for (int first = count; !finished && count < 500; ++count) {
                double energy[C], before[C];
                Real alpha[C];
                backward(beta, count == first, energy);
                for (int c = 0; c < C; ++c) {
                    before[c] = zz[c];
                    alpha[c] = zz[c] > 0 && energy[c] > 0 ? Real(zz[c] / energy[c]) : Real(0);
                }
                forward(alpha, zz);
                finished = true;
                for (int c = 0; c < C; ++c) {
                    if (alpha[c] == 0) zz[c] = 0;  // nothing left in this channel
                    beta[c] = zz[c] > 0 ? Real(zz[c] / before[c]) : Real(0);
                    finished = finished && zz[c] <= goal[c];
                }
            }
        }
    }

    struct Place {
        Real east, south, inverse, next[C], below[C], mine[C], solution[C], edge[2 * C];
    };
    RTV_DEVICE void load_weights(Place& at, int k, bool in) const {
        const int i = k * T + lane;
        at.east = in ? e[i] : Real(0);
        at.south = in ? s[i] : Real(0);
        at.inverse = in ? inverse[i] : Real(1);
    }

    static constexpr int deep = sizeof(Real) == 4 ? 3 : 2;  // what fits into registers

    template <bool with_rhs>
    RTV_DEVICE void residuals(double* zz, double* bb, double* goal, double per_round, bool& reached, bool& finite,
                              double& relative) {
        const Real few_ulps = sizeof(Real) == 4 ? Real(2.4e-7) : Real(4.5e-16);
        Real here[C], west[C]{}, rhs_west[C]{}, sums[4][C]{};
        for (int c = 0; c < C; ++c) here[c] = active(0) ? x[c * T + lane] : Real(0);
        sweep<Place, true, 2>(
            [&](int k) {
                Place at;
                const bool in = active(k);
                load_weights(at, k, in);
                for (int c = 0; c < C; ++c) {
                    const int j = (k * C + c) * T + lane;
                    at.next[c] = active(k + 1) ? x[j + C * T] : Real(0);
                    at.below[c] = in ? x[south_of(k, C, c)] : Real(0);
                    at.mine[c] = in ? b[j] : Real(0);
                    at.edge[c] = edge_above(0, c, k);
                    if (with_rhs) at.edge[C + c] = edge_above(1, c, k);
                }
                return at;
            },
            [&](int k, const Place& at) {
                const Real pivot = 1 / at.inverse;
                for (int c = 0; c < C; ++c) {
                    const Real rhs = at.mine[c], apart = rhs - here[c], over_east = here[c] - at.next[c],
                               over_south = here[c] - at.below[c];
                    const Real value = at.inverse * (apart - at.east * over_east - at.south * over_south + west[c] +
                                                     handed_down(0, c, k, at.edge[c]));
                    if (active(k)) z[(k * C + c) * T + lane] = value;
                    west[c] = at.east * (value + over_east);
                    hand_down(0, c, k, at.south * (value + over_south));
                    sums[0][c] += value * value * pivot;
                    sums[2][c] += (few_ulps * here[c]) * (few_ulps * here[c]) * pivot;
                    sums[3][c] += apart;
                    if (with_rhs) {
                        const Real whole =
                            at.inverse * (rhs + rhs_west[c] + handed_down(1, c, k, at.edge[C + c]));
                        rhs_west[c] = at.east * whole;
                        hand_down(1, c, k, at.south * whole);
                        sums[1][c] += whole * whole * pivot;
                    }
                    here[c] = at.next[c];
                }
            });
        for (int c = 0; c < C; ++c) {
            const double parts[4] = {double(sums[0][c]), double(sums[1][c]), double(sums[2][c]), double(sums[3][c])};
            double all[4];
            total(parts, all, 4);
            zz[c] = all[0];
            if (with_rhs) bb[c] = all[1];
            const double cap = 1e-6 * bb[c], rounding = all[2] < cap ? all[2] : cap, wanted = options.tol * options.tol * bb[c];
            const double enough = wanted > rounding ? wanted : rounding, step = per_round * per_round * zz[c];
            goal[c] = enough > step ? enough : step;
            reached = reached && zz[c] <= enough;
            if (zz[c] > 0) relative = relative > sqrt(zz[c] / bb[c]) ? relative : sqrt(zz[c] / bb[c]);
            finite = finite && zz[c] < 1e300;
            shift[c] = Real(all[3] / (double(H) * W));
        }
    }

    RTV_DEVICE void backward(const Real* beta, bool first, double* energy) {
        Real s_east[C]{}, d_east[C]{}, sums[C]{};
        sweep<Place, false, deep>(
            [&](int k) {
                Place at;
                const bool in = active(k);
                load_weights(at, k, in);
                for (int c = 0; c < C; ++c) {
                    const int j = (k * C + c) * T + lane;
                    at.mine[c] = in ? z[j] : Real(0);
                    at.next[c] = in && !first ? d[j] : Real(0);
                    at.edge[c] = edge_below(0, c, k);
                    at.edge[C + c] = edge_below(1, c, k);
                }
                return at;
            },
            [&](int k, const Place& at) {
                for (int c = 0; c < C; ++c) {
                    s_east[c] = at.mine[c] + at.inverse * (at.east * s_east[c] +
                                                           at.south * handed_up(0, c, k, at.edge[c]));
                    const Real value = s_east[c] + beta[c] * at.next[c], over_east = value - d_east[c],
                               over_south = value - handed_up(1, c, k, at.edge[C + c]);
                    if (active(k)) d[(k * C + c) * T + lane] = value;
                    d_east[c] = value;
                    hand_up(0, c, k, s_east[c]);
                    hand_up(1, c, k, value);
                    sums[c] += value * value + at.east * over_east * over_east + at.south * over_south * over_south;
                }
            });
        for (int c = 0; c < C; ++c) {
            const double part = double(sums[c]);
            total(&part, energy + c, 1);
        }
    }

    RTV_DEVICE void forward(const Real* alpha, double* zz) {
        Real here[C], west[C]{}, sums[C]{};
        for (int c = 0; c < C; ++c) here[c] = active(0) ? d[c * T + lane] : Real(0);
        sweep<Place, true, deep>(
            [&](int k) {
                Place at;
                const bool in = active(k);
                load_weights(at, k, in);
                for (int c = 0; c < C; ++c) {
                    const int j = (k * C + c) * T + lane;
                    at.next[c] = active(k + 1) ? d[j + C * T] : Real(0);
                    at.below[c] = in ? d[south_of(k, C, c)] : Real(0);
                    at.mine[c] = in ? z[j] : Real(0);
                    at.edge[c] = edge_above(0, c, k);
                    at.solution[c] = in ? x[j] : Real(0);
                }
                return at;
            },
            [&](int k, const Place& at) {
                const Real pivot = 1 / at.inverse;
                for (int c = 0; c < C; ++c) {
                    const int j = (k * C + c) * T + lane;
                    const Real over_east = here[c] - at.next[c], over_south = here[c] - at.below[c];
                    const Real y = at.inverse * (here[c] + at.east * over_east + at.south * over_south + west[c] +
                                                 handed_down(0, c, k, at.edge[c]));
                    west[c] = at.east * (y - over_east);
                    hand_down(0, c, k, at.south * (y - over_south));
                    const Real value = at.mine[c] - alpha[c] * y;
                    if (active(k)) z[j] = value, x[j] = at.solution[c] + alpha[c] * here[c];
                    sums[c] += value * value * pivot;
                    here[c] = at.next[c];
                }
            });
        for (int c = 0; c < C; ++c) {
            const double part = double(sums[c]);
            total(&part, zz + c, 1);
        }
    }
};

}  // namespace rtv
