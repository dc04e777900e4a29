// A few threads that work through one picture together. Started per picture and joined at its end: nothing survives a
// fork, so worker processes of a data loader can use it.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace rtv {

class Team {
public:
    explicit Team(int size) : size_(size) {}

    int size() const { return size_; }

    // Calls work(argument, member) for every member, on the calling thread for member 0.
    void run(void (*work)(void*, int), void* argument) {
        std::vector<std::thread> others;
        others.reserve(size_t(size_ - 1));
        for (int member = 1; member < size_; ++member) others.emplace_back(work, argument, member);
        work(argument, 0);
        for (auto& other : others) other.join();
    }

    void barrier() {
        if (size_ == 1) return;
        const int phase = phase_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            waiting_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            wait_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
        }
    }

    // Spins for a moment, then lets others run: the partner may have lost its core.
    template <class Condition>
    static void wait_until(Condition condition) {
        for (int spin = 0; !condition(); ++spin) {
            if (spin < 4096) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            } else {
                std::this_thread::yield();
            }
        }
    }

private:
    int size_;
    std::atomic<int> waiting_{0}, phase_{0};
};

// How far each band of a sweep has got. One cache line each.
struct alignas(64) Progress {
    std::atomic<long> steps{0};
};

}  // namespace rtv
