// Runs the CUDA smoother's source (csrc/rtv/block_program.h) with a CPU thread for each GPU thread, on a picture from
// standard input, and writes the result and the reports to standard output: what can be tested of it without a GPU.
//     block_on_host HEIGHT WIDTH CHANNELS IMAGE_TYPE(f|d) LAM SIGMA SHARPNESS ITERATIONS TOL < planes > planes+reports
#include "../../csrc/rtv/block_program.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

class Barrier {
public:
    explicit Barrier(int size) : size_(size) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const long phase = phase_;
        if (++waiting_ == size_) {
            waiting_ = 0;
            ++phase_;
            all_here_.notify_all();
        } else {
            all_here_.wait(lock, [&] { return phase_ != phase; });
        }
    }

private:
    const int size_;
    int waiting_ = 0;
    long phase_ = 0;
    std::mutex mutex_;
    std::condition_variable all_here_;
};

struct HostBlock {
    int number;
    Barrier* barrier;
    int thread() const { return number; }
    void sync() const { barrier->wait(); }
};

template <class Real, int C>
int smooth(const rtv::BlockParameters& parameters) {
    const rtv::BlockLayout layout(parameters.height, parameters.width);
    const size_t count = size_t(C) * parameters.height * parameters.width;
    std::vector<Real> planes(count);
    if (std::fread(planes.data(), sizeof(Real), count, stdin) != count) return 1;
    std::vector<Real> workspace(layout.workspace(C), Real(7));  // the program has to clear it
    std::vector<rtv::BlockReport> reports(static_cast<size_t>(parameters.iterations));
    const auto shared = std::make_unique<rtv::Shared<Real, C>>();
    Barrier barrier(layout.threads);
    std::vector<std::thread> threads;
    for (int i = 0; i < layout.threads; ++i)
        threads.emplace_back([&, i] {
            rtv::BlockProgram<Real, C, HostBlock>({i, &barrier}, *shared, parameters, layout, planes.data(),
                                                  workspace.data(), reports.data())
                .run();
        });
    for (auto& thread : threads) thread.join();
    std::fwrite(planes.data(), sizeof(Real), planes.size(), stdout);
    std::fwrite(reports.data(), sizeof(rtv::BlockReport), reports.size(), stdout);
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 10) return 2;
    const auto number = [&](int i) { return std::atof(arguments[i]); };
    const rtv::BlockParameters parameters{int(number(1)), int(number(2)), int(number(8)), number(5),
                                          number(6),      number(7),      number(9)};
    const bool grey = number(3) == 1;
    if (arguments[4][0] == 'd') return grey ? smooth<double, 1>(parameters) : smooth<double, 3>(parameters);
    return grey ? smooth<float, 1>(parameters) : smooth<float, 3>(parameters);
}
