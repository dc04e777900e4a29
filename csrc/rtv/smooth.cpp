#include "rtv.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include "direct.h"
#include "team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rtv {
namespace {

// Float32 values of 1e-38 and below cost a hundred cycles each and mean nothing here.
class FlushDenormals {
public:
#if defined(__x86_64__)
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#else
    FlushDenormals() {}
#endif
};

// For std::free. Large memory in huge pages where Linux gives them: a sweep over a photo goes through all of it.
void* allocate(size_t bytes) {
    constexpr size_t huge = size_t(2) << 20;
    const size_t unit = bytes < 4 * huge ? 64 : huge;
    void* const memory = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == huge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

namespace portable {
#include "engine.h"
}

#if defined(__x86_64__)
#include "../target/avx2.h"
namespace avx2 {
#include "engine.h"
}
#include "../target/end.h"
#include "../target/avx512.h"
namespace avx512 {
#include "engine.h"
}
#include "../target/end.h"
#endif

template <template <class, int, int> class Engine, class Real, int V>
std::vector<SolveReport> run(Real* planes, int height, int width, int channels, const Parameters& parameters,
                             int threads) {
    const FlushDenormals flush;  // before the team, whose threads inherit it
    Team team(std::max(1, std::min(threads, Engine<Real, V, 1>::most_threads(height, width))));
    if (channels == 1) return Engine<Real, V, 1>(planes, height, width, parameters, team).run();
    return Engine<Real, V, 3>(planes, height, width, parameters, team).run();
}

}  // namespace

template <class Real>
std::vector<SolveReport> smooth(Real* planes, int height, int width, int channels, const Parameters& parameters,
                                Isa isa, int threads) {
    constexpr int per16 = 16 / sizeof(Real);  // values in 16 bytes
#if defined(__x86_64__)
    if (isa == Isa::avx512)
        return run<avx512::Engine, Real, 4 * per16>(planes, height, width, channels, parameters, threads);
    if (isa == Isa::avx2)
        return run<avx2::Engine, Real, 2 * per16>(planes, height, width, channels, parameters, threads);
#endif
    return run<portable::Engine, Real, per16>(planes, height, width, channels, parameters, threads);
}

template std::vector<SolveReport> smooth(float*, int, int, int, const Parameters&, Isa, int);
template std::vector<SolveReport> smooth(double*, int, int, int, const Parameters&, Isa, int);

}  // namespace rtv
