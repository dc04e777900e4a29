// The smoother as the program of one thread block, for one picture: csrc/rtv_cuda.cu runs a block per picture on a GPU;
// tests/csrc/block_on_host.cpp runs the same source with a CPU thread per GPU thread.
//
// Method and variables are those of engine.h (read that first); the layout is its skewed one with a thread per lane.
// Bands follow each other without a gap: thread `lane` works on position k - lane at step k, and position n is column
// n mod `pitch` of the picture's row lane + T * (n div pitch). With pitch >= T every neighbour that a sweep needs is at
// least one step old: west is the thread's own last value, north the last value of the thread before it, through shared
// memory, and for thread 0 what the last thread left in `edge` some steps ago.
//
//     skewed field: [step][channel][lane]     steps = bands * pitch + T - 1, and a guard step on either side
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
constexpr int ahead = 8;          // steps that a sweep asks memory for what it will need

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
    int threads, bands, pitch, steps;

    RTV_BOTH BlockLayout(int height, int width) {
        threads = max_threads;
        while (threads > 32 && (threads > width || threads / 2 >= height)) threads /= 2;
        bands = (height + threads - 1) / threads;
        pitch = width > threads ? width : threads;
        steps = bands * pitch + threads - 1;
    }
    RTV_BOTH size_t plane() const { return (size_t(steps) + 2) * threads; }
    // Numbers that a picture's workspace holds, a multiple of 64.
    RTV_BOTH size_t workspace(int channels) const {
        return ((6 * channels + 6) * plane() + 4 * size_t(channels) * (steps + 2) + 63) / 64 * 64;
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
        Real** const wide[] = {&b, &x, &r, &p, &u, &w};
        for (Real** field : wide) *field = next + C * T, next += C * plane;
        Real** const narrow[] = {&e, &s, &es, &ss, &dm, &isq};
        for (Real** field : narrow) *field = next + T, next += plane;
        for (int i = 0; i < 4; ++i) edge[i] = next, next += C * (layout.steps + 2);
        // Everything outside the picture has to be zero.
        for (Real* at = workspace + lane; at < next; at += T) *at = 0;
        block.sync();
    }

    RTV_DEVICE void run() {
        for (int i = lane; i < H * W; i += T)
            for (int c = 0; c < C; ++c) b[skewed(i, c)] = x[skewed(i, c)] = planes[c * H * W + i];
        block.sync();
        Real sigma = Real(options.sigma);
        for (int iteration = 0; iteration < options.iterations; ++iteration) {
            weights(sigma);
            factor();
            solve(reports + iteration);
            for (int i = lane; i < H * W; i += T)
                for (int c = 0; c < C; ++c) planes[c * H * W + i] = x[skewed(i, c)] + shift[c];
            block.sync();
            sigma = sigma / 2 > Real(0.5) ? sigma / 2 : Real(0.5);
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
    Real *b, *x, *r, *p, *u, *w;
    Real *e, *s, *es, *ss, *dm, *isq;
    Real* edge[4];  // what the last lane (the first, backward) had at each step, for the other end
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

    // A value of the row above (below) of a field that the running sweep does not change.
    RTV_DEVICE Real north(const Real* field, int k, int n, int c) const {
        if (lane > 0) return field[((k - 1) * n + c) * T + lane - 1];
        return above(k) >= 0 ? field[(above(k) * n + c) * T + T - 1] : Real(0);
    }
    RTV_DEVICE Real south(const Real* field, int k, int n, int c) const {
        if (lane < T - 1) return field[((k + 1) * n + c) * T + lane + 1];
        return below(k) < layout.steps ? field[(below(k) * n + c) * T] : Real(0);
    }
    // The same of a value that it does change: slot i of `row`, written at the step before.
    RTV_DEVICE Real handed_down(int i, int k) const {
        if (lane > 0) return k > 0 ? shared.row[(k - 1) & 1][i][lane - 1] : Real(0);
        return above(k) >= 0 ? edge[i / C][(above(k)) * C + i % C] : Real(0);
    }
    RTV_DEVICE void hand_down(int i, int k, Real value) {
        shared.row[k & 1][i][lane] = value;
        if (lane == T - 1) edge[i / C][k * C + i % C] = value;
    }
    RTV_DEVICE Real handed_up(int i, int k) const {
        if (lane < T - 1) return k + 1 < layout.steps ? shared.row[(k + 1) & 1][i][lane + 1] : Real(0);
        return below(k) < layout.steps ? edge[2 + i / C][below(k) * C + i % C] : Real(0);
    }
    RTV_DEVICE void hand_up(int i, int k, Real value) {
        shared.row[k & 1][i][lane] = value;
        if (lane == 0) edge[2 + i / C][k * C + i % C] = value;
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

    RTV_DEVICE void weights(Real sigma) {
        const int radius = (int(floor(5 * double(sigma) + 0.5)) | 1) / 2, pixels = H * W;
        if (lane == 0) {
            double sum = 0;
            for (int i = -radius; i <= radius; ++i) sum += exp(-0.5 * i * i / (double(sigma) * sigma));
            for (int i = -radius; i <= radius; ++i)
                shared.taps[i + radius] = Real(exp(-0.5 * i * i / (double(sigma) * sigma)) / sum);
        }
        block.sync();
        Real *across = p, *blurred = u;  // free meanwhile
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

    RTV_DEVICE void factor() {
        const Real omega = Real(0.99);
        Real e_west = 0, from_west = 0;
        for (int k = 0; k < layout.steps; ++k) {
            const size_t i = size_t(k) * T + lane;
            const Real east = e[i], down = s[i];
            const Real diagonal = Real(1) + (east + down + e_west + north(s, k, 1, 0));
            const Real inverse = Real(1) / (diagonal - from_west - handed_down(0, k));
            dm[i] = diagonal * inverse - Real(2);
            isq[i] = sqrt(inverse);
            from_west = east * (east + omega * down) * inverse;
            e_west = east;
            hand_down(0, k, down * (down + omega * east) * inverse);
            block.sync();
        }
        for (int k = 0; k < layout.steps; ++k) {
            const size_t i = size_t(k) * T + lane;
            es[i] = e[i] * isq[i] * isq[i + T];
            ss[i] = s[i] * isq[i] * south(isq, k, 1, 0);
        }
        block.sync();
    }

    RTV_DEVICE void solve(BlockReport* report) {
        const double per_round = sizeof(Real) == 4 ? 1e-3 : 1e-7;
        int count = 0;
        for (int round = 0;; ++round) {
            double rr[C], goal[C], relative = 0;
            bool reached = true, finite = true;
            residuals(rr, goal, per_round, reached, finite, relative);
            const bool broken = round == 12 || count >= 500 || !finite;
            if (reached || broken) {
                if (lane == 0) *report = {reached ? count : -1, float(relative)};
                block.sync();
                return;
            }
            Real alpha[C]{}, beta[C]{};
            bool finished = false;
            for (int first = count; !finished && count < 500; ++count) {
                backward(alpha, beta, count == first, rr);
                double pq[C], qq[C];
                forward(pq, qq);
                finished = true;
                for (int c = 0; c < C; ++c) {
                    alpha[c] = beta[c] = 0;
                    if (rr[c] > 0 && pq[c] > 0) {
                        const double a = rr[c] / pq[c], ratio = a * a * qq[c] / rr[c] - 1;
                        alpha[c] = Real(a);
                        beta[c] = Real(ratio > 0 ? ratio : 0);
                        rr[c] *= double(beta[c]);
                    } else {
                        rr[c] = 0;
                    }
                    finished = finished && rr[c] <= goal[c];
                }
            }
            correct(alpha);
        }
    }

    RTV_DEVICE void residuals(double* rr, double* goal, double per_round, bool& reached, bool& finite,
                              double& relative) {
        const Real few_ulps = sizeof(Real) == 4 ? Real(2.4e-7) : Real(4.5e-16);
        Real z[C]{}, zb[C]{}, mine[4][C]{}, e_west = 0, es_west = 0;
        for (int k = 0; k < layout.steps; ++k) {
            const size_t i = size_t(k) * T + lane;
            const Real east = e[i], down = s[i], scale = isq[i];
            const Real s_north = north(s, k, 1, 0), ss_north = north(ss, k, 1, 0);
            for (int c = 0; c < C; ++c) {
                const size_t j = (size_t(k) * C + c) * T + lane;
                const Real here = x[j], rhs = b[j], x_west = x[j - C * T], x_east = x[j + C * T];
                const Real x_north = north(x, k, C, c), x_south = south(x, k, C, c);
                const Real residual = (rhs - here) + east * (x_east - here) + e_west * (x_west - here) +
                                      down * (x_south - here) + s_north * (x_north - here);
                z[c] = scale * residual + es_west * z[c] + ss_north * handed_down(c, k);
                zb[c] = scale * rhs + es_west * zb[c] + ss_north * handed_down(C + c, k);
                hand_down(c, k, z[c]);
                hand_down(C + c, k, zb[c]);
                r[j] = z[c];
                mine[0][c] += z[c] * z[c];
                mine[1][c] += zb[c] * zb[c];
                mine[2][c] += (few_ulps * here / scale) * (few_ulps * here / scale);
                mine[3][c] += residual;
            }
            e_west = east;
            es_west = es[i];
            block.sync();
        }
        for (int c = 0; c < C; ++c) {
            const double parts[4] = {double(mine[0][c]), double(mine[1][c]), double(mine[2][c]), double(mine[3][c])};
            double sums[4];
            total(parts, sums, 4);
            rr[c] = sums[0];
            const double cap = 1e-6 * sums[1], rounding = sums[2] < cap ? sums[2] : cap;
            const double wanted = options.tol * options.tol * sums[1];
            const double enough = wanted > rounding ? wanted : rounding, step = per_round * per_round * rr[c];
            goal[c] = enough > step ? enough : step;
            reached = reached && rr[c] <= enough;
            if (rr[c] > 0) relative = relative > sqrt(rr[c] / sums[1]) ? relative : sqrt(rr[c] / sums[1]);
            finite = finite && rr[c] < 1e300;
            shift[c] = Real(sums[3] / (double(H) * W));
        }
    }

    RTV_DEVICE void backward(const Real* alpha, const Real* beta, bool first, double* rr) {
        Real t[C]{}, sums[C]{};
        for (int k = layout.steps - 1; k >= 0; --k) {
            const size_t i = size_t(k) * T + lane;
            const Real east = es[i], down = ss[i];
            if (k >= ahead)
                for (int c = 0; c < C; ++c) {
                    const size_t j = (size_t(k - ahead) * C + c) * T + lane;
                    block.prefetch(r + j), block.prefetch(p + j), block.prefetch(u + j), block.prefetch(w + j);
                }
            for (int c = 0; c < C; ++c) {
                const size_t j = (size_t(k) * C + c) * T + lane;
                const Real r_old = r[j], p_old = first ? Real(0) : p[j];
                const Real r_new = first ? r_old : r_old - alpha[c] * w[j];
                const Real p_new = r_new + beta[c] * p_old;
                u[j] = first ? Real(0) : u[j] + alpha[c] * p_old;
                r[j] = r_new;
                p[j] = p_new;
                sums[c] += r_new * r_new;
                t[c] = p_new + east * t[c] + down * handed_up(c, k);
                hand_up(c, k, t[c]);
                w[j] = t[c];
            }
            block.sync();
        }
        for (int c = 0; c < C; ++c) {
            const double part = double(sums[c]);
            total(&part, rr + c, 1);
        }
    }

    RTV_DEVICE void forward(double* pq, double* qq) {
        Real z[C]{}, sums[2][C]{}, es_west = 0;
        for (int k = 0; k < layout.steps; ++k) {
            const size_t i = size_t(k) * T + lane;
            const Real diagonal = dm[i], ss_north = north(ss, k, 1, 0);
            if (k + ahead < layout.steps)
                for (int c = 0; c < C; ++c) {
                    const size_t j = (size_t(k + ahead) * C + c) * T + lane;
                    block.prefetch(p + j), block.prefetch(w + j);
                }
            for (int c = 0; c < C; ++c) {
                const size_t j = (size_t(k) * C + c) * T + lane;
                const Real p_here = p[j], t_here = w[j];
                z[c] = p_here + diagonal * t_here + es_west * z[c] + ss_north * handed_down(c, k);
                hand_down(c, k, z[c]);
                const Real q_here = z[c] + t_here;
                w[j] = q_here;
                sums[0][c] += p_here * q_here;
                sums[1][c] += q_here * q_here;
            }
            es_west = es[i];
            block.sync();
        }
        for (int c = 0; c < C; ++c) {
            const double parts[2] = {double(sums[0][c]), double(sums[1][c])};
            double both[2];
            total(parts, both, 2);
            pq[c] = both[0];
            qq[c] = both[1];
        }
    }

    RTV_DEVICE void correct(const Real* alpha) {
        Real t[C]{};
        for (int k = layout.steps - 1; k >= 0; --k) {
            const size_t i = size_t(k) * T + lane;
            for (int c = 0; c < C; ++c) {
                const size_t j = (size_t(k) * C + c) * T + lane;
                t[c] = u[j] + alpha[c] * p[j] + es[i] * t[c] + ss[i] * handed_up(c, k);
                hand_up(c, k, t[c]);
                x[j] += isq[i] * t[c];
            }
            block.sync();
        }
    }
};

}  // namespace rtv
