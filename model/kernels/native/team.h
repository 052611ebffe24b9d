// The threads of a pass. They take the pieces of a phase one by one, because a core may have other work too, and wait
// for each other between phases.

#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

inline void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

class Team {
public:
    explicit Team(int num_threads) : num_threads(num_threads) {
        for (int i = 1; i < num_threads; i++) threads_.emplace_back([this] { work(); });
    }
    ~Team() {
        start(nullptr);
        for (auto& thread : threads_) thread.join();
    }

    // Runs `job` in all threads, of which the caller is one. It calls `share` at most `num_phases` times.
    void run(int num_phases, const std::function<void()>& job) {
        if (taken_.size() < size_t(num_phases)) taken_ = std::vector<std::atomic<int>>(num_phases);
        for (auto& taken : taken_) taken.store(0, std::memory_order_relaxed);
        start(&job);
        job();
    }

    // Does one phase of a job: all threads share piece(0) … piece(num_pieces - 1), and none leaves before all are done.
    template <class Piece>
    void share(int phase, int num_pieces, const Piece& piece) {
        for (int i; (i = taken_[phase].fetch_add(1, std::memory_order_relaxed)) < num_pieces;) piece(i);
        meet();
    }

    const int num_threads;

private:
    void start(const std::function<void()>* job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        job_ = job;
        jobs_started_++;
        wake_.notify_all();
    }

    void work() {
        for (uint64_t done = 0;; done++) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return jobs_started_ > done; });
            const auto* job = job_;
            lock.unlock();
            if (job == nullptr) return;
            (*job)();
        }
    }

    void meet() {
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
            if (spins < 4000) relax();
            else std::this_thread::yield();  // the thread that all wait for may need this core
        }
    }

    std::vector<std::thread> threads_;
    std::vector<std::atomic<int>> taken_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void()>* job_ = nullptr;
    uint64_t jobs_started_ = 0;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> round_{0};
};
