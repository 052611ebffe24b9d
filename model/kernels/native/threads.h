// Shares work among threads, for functions that are called one after the other.

#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "team.h"

// Does piece(0) … piece(num_pieces - 1) on some threads, which wait for the next work between calls.
class Threads {
public:
    template <class Piece>
    static void share(int num_threads, int num_pieces, const Piece& piece) {
        if (num_threads == 1 || num_pieces == 1) {
            for (int i = 0; i < num_pieces; i++) piece(i);
            return;
        }
        const std::lock_guard<std::mutex> lock(one_at_a_time());
        Team& team = team_of(num_threads);
        team.run(1, [&] { team.share(0, num_pieces, piece); });
    }

private:
    static std::mutex& one_at_a_time() {
        static std::mutex mutex;
        return mutex;
    }
    static Team& team_of(int num_threads) {
        static std::map<int, std::unique_ptr<Team>> teams;
        auto& team = teams[num_threads];
        if (team == nullptr) team = std::make_unique<Team>(num_threads);
        return *team;
    }
};

// Scratch memory of a thread, by its use.
inline float* scratch(int use, size_t count) {
    thread_local std::vector<float> memory[8];
    if (memory[use].size() < count) memory[use].resize(count);
    return memory[use].data();
}
