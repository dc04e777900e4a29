// A few threads that work through one picture together. Started per picture and joined at its end: nothing survives a
// fork, so worker processes of a data loader can use it.
//
// The calling thread owns the flow of control and hands out rounds of numbered items, which every thread claims in
// order. Nobody is ever waited for who has not claimed something: on a machine whose cores are taken the caller does all
// of it by itself. A wait that lasts longer than any item can take means that a thread lost its core in the middle of
// an item; the helpers then stay away for a while, longer each time.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace rtv {

class Team {
public:
    // Fewer than `size` where the system gives no more threads, or no memory for one.
    explicit Team(int size) : caller_(std::this_thread::get_id()) {
        helpers_.reserve(size_t(size - 1));
        try {
            for (int i = 1; i < size; ++i) helpers_.emplace_back([this] { help(); });
        } catch (const std::exception&) {
        }
    }
    ~Team() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            closed_.store(true, std::memory_order_relaxed);
        }
        waking_.notify_all();
        for (auto& helper : helpers_) helper.join();
    }

    bool alone() const { return helpers_.empty() || dismissed_.load(std::memory_order_relaxed); }
    bool is_caller() const { return std::this_thread::get_id() == caller_; }

    // Does a piece of work, one of many equal ones, with helpers or without: as was faster of the first ones, and so on
    // after every 64. Of two the second counts, because the first moves what is in the caches.
    template <class Work>
    void the_faster_way(const Work& work) {
        if (helpers_.empty()) return work();
        const unsigned nth = pieces_++ % 64;
        if (nth < 2 || (nth >= 4 && sharing_pays_)) call();
        else dismiss();
        const auto start = Clock::now();
        work();
        const auto taken = Clock::now() - start;
        if (nth == 1) shared_took_ = taken;
        if (nth == 3) sharing_pays_ = shared_took_ < taken;
    }

    // Calls work(item) for every item in [0, count) and returns when all are done. An item may wait for lower ones.
    // The first one is left to a helper for a moment unless `mine`. Throws what an item threw (memory can end in any
    // thread); the others' results are worth nothing then.
    template <class Work>
    void each(int count, bool mine, const Work& work) {
        if (alone()) {
            for (int item = 0; item < count; ++item) work(item);
            return;
        }
        call_ = [](const void* self, int item) { (*static_cast<const Work*>(self))(item); };
        work_ = &work;
        count_ = count;
        finished_.store(0, std::memory_order_relaxed);
        ticket_.store(std::uint64_t(++round_) << 32 | unsigned(count), std::memory_order_release);
        if (!mine) spin([&] { return unsigned(ticket_.load(std::memory_order_relaxed)) != unsigned(count); }, a_moment);
        while (claim()) {}
        wait([&] { return finished_.load(std::memory_order_acquire) == count; });
        if (failed_.load(std::memory_order_relaxed)) {
            failed_.store(false, std::memory_order_relaxed);
            std::rethrow_exception(std::exchange(error_, nullptr));
        }
    }

    // For conditions that another thread brings about in the midst of an item. Returns too when one has thrown.
    template <class Condition>
    void wait_until(Condition condition) {
        wait([&] { return condition() || failed_.load(std::memory_order_relaxed); });
    }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::microseconds patience{300}, a_moment{2};
    static constexpr std::chrono::milliseconds first_rest{10};

    const std::thread::id caller_;
    std::vector<std::thread> helpers_;
    std::atomic<std::uint64_t> ticket_{0};  // the round, and how many of its items nobody has claimed
    std::atomic<int> finished_{0};
    std::atomic<bool> stalled_{false}, closed_{false}, failed_{false}, dismissed_{false};
    std::exception_ptr error_;  // the first of a round; written under the mutex, before its item counts as finished
    void (*call_)(const void*, int) = nullptr;  // these three belong to a round, and change only between rounds
    const void* work_ = nullptr;
    int count_ = 0;
    std::uint32_t round_ = 0;
    unsigned pieces_ = 0;
    Clock::duration shared_took_{};
    bool sharing_pays_ = true;
    std::mutex mutex_;
    std::condition_variable waking_;

    // Between rounds: the helpers sleep until they are called.
    void dismiss() { dismissed_.store(true, std::memory_order_relaxed); }
    void call() {
        if (helpers_.empty() || !dismissed_.load(std::memory_order_relaxed)) return;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            dismissed_.store(false, std::memory_order_relaxed);
        }
        waking_.notify_all();
    }

    bool closing() const { return closed_.load(std::memory_order_relaxed); }

    // Does one item. False when none is left.
    bool claim() {
        std::uint64_t ticket = ticket_.load(std::memory_order_relaxed);
        do {
            if (unsigned(ticket) == 0) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire));
        try {
            call_(work_, count_ - int(unsigned(ticket)));
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
            failed_.store(true, std::memory_order_relaxed);
        }
        finished_.fetch_add(1, std::memory_order_release);
        return true;
    }

    void help() {
        std::chrono::milliseconds rest = first_rest;
        const auto something_to_do = [this] { return unsigned(ticket_.load(std::memory_order_relaxed)) != 0 || closing(); };
        while (!closing()) {
            if (dismissed_.load(std::memory_order_relaxed)) {
                std::unique_lock<std::mutex> lock(mutex_);
                waking_.wait(lock, [this] { return !dismissed_.load(std::memory_order_relaxed) || closing(); });
            } else if (stalled_.exchange(false, std::memory_order_relaxed)) {
                sleep(rest);
                rest *= 4;
            } else if (!claim() && !spin(something_to_do)) {
                sleep(std::chrono::microseconds(50));
            }
        }
    }

    template <class Condition>
    void wait(Condition condition) {
        if (spin(condition)) return;
        stalled_.store(true, std::memory_order_relaxed);
        while (!condition()) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }

    template <class Duration>
    void sleep(Duration duration) {
        std::unique_lock<std::mutex> lock(mutex_);
        waking_.wait_for(lock, duration, [this] { return closing(); });
    }

    // Whether the condition came true within this time, or else that which a working partner needs at most.
    template <class Condition>
    static bool spin(Condition condition, std::chrono::microseconds longest = patience) {
        const auto start = Clock::now();
        do {
            for (int i = 0; i < 64; ++i) {
                if (condition()) return true;
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
        } while (Clock::now() - start < longest);
        return false;
    }
};

// How far each band of a sweep has got. One cache line each.
struct alignas(64) Progress {
    std::atomic<long> steps{0};
};

}  // namespace rtv
