// Relative total variation smoothing (Xu et al., "Structure Extraction from Texture via Relative Total Variation",
// SIGGRAPH Asia 2012) of one picture. Equations and method: docs/rtv.md.
#pragma once

#include <vector>

#include "../isa.h"

namespace rtv {

enum class Mode { exact, matlab_pcg };
enum class Solver { mic, direct };

struct Parameters {
    double lam = 0.01;
    double sigma = 3.0;
    double sharpness = 0.02;
    int iterations = 4;
    Mode mode = Mode::exact;
    Solver solver = Solver::mic;
    double tol = 1e-5;
};

struct SolveReport {
    int iterations;   // of conjugate gradients; 0 for the direct solver
    double residual;  // at the end, relative to the right-hand side, in the preconditioner's norm
};

// `planes` is the picture and then the result: [channels][height][width], 1 or 3 channels. One report per solve.
// Throws std::bad_alloc, and std::runtime_error when a solve does not converge.
template <class Real>
std::vector<SolveReport> smooth(Real* planes, int height, int width, int channels, const Parameters& parameters,
                                Isa isa, int threads);

}  // namespace rtv
