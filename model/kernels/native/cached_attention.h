// Attention of a pass's tokens over the KV cache.
//
// Cache blocks hold BLOCK positions of one sequence. Tokens of one block that follow each other are a stretch: they see the
// same blocks, so what is read for one of them serves all.
//
// Shapes: N tokens of a pass, H heads of width D (DP with padding), G heads of keys and values, each for H / G neighboring
// heads.

#pragma once

#include <algorithm>
#include <vector>

#include "elementary.h"
#include "matrix.h"
#include "shape.h"

constexpr int BLOCK = 16;  // positions of a KV cache block

namespace {

struct Pass {
    int num_tokens, table_width;
    const int32_t *token_ids, *positions, *rows;  // (N,); a row of `tables` for each token
    const int32_t* tables;  // (rows, table_width): the blocks of a sequence, in order
    float* hidden;  // (N, C)

    int block_at(int n, int index) const { return tables[size_t(rows[n]) * table_width + index]; }
};

// Tokens `first` to `last` - 1 of a pass.
struct Stretch {
    int first, last;
    int num_tokens() const { return last - first; }
};

// A piece of work: some heads of a stretch.
struct AttentionPart {
    Stretch tokens;
    int first_head, last_head;
};

template <class Cached>
class CachedAttention {
    using Number = typename Cached::Number;
    using Element = typename Cached::Element;
    static constexpr int GROUP = Cached::GROUP;
    static constexpr int QUERIES = REGISTERS == 32 ? 4 : 2;  // that share each load of a key or value

public:
    explicit CachedAttention(const Shape& shape)
        : s_(shape), head_width_(shape.head_width()), padded_((head_width_ + LANES - 1) / LANES * LANES),
          query_width_(padded_to_depth<Cached>(head_width_)) {
        const size_t cache = size_t(s_.layers) * s_.num_blocks * s_.kv_heads * BLOCK * padded_;
        keys_ = allocate<Number>(cache);
        values_ = allocate<Number>(cache);
    }

    void reserve(int num_rows) { queries_ = allocate<Element>(size_t(num_rows) * s_.heads * query_width_); }

    // Divides a pass into `stretches` and `parts`, a few parts for each thread.
    void divide(const Pass& pass, int num_threads) {
        stretches.clear();
        for (int n = 0; n < pass.num_tokens; n++) {
            const bool goes_on = n > 0 && pass.rows[n] == pass.rows[n - 1] && pass.positions[n] % BLOCK != 0 &&
                                 pass.positions[n] == pass.positions[n - 1] + 1;
            if (goes_on) stretches.back().last++;
            else stretches.push_back({n, n + 1});
        }
        // A single token reads the heads of a block one after the other, as they lie in the cache. Several tokens read
        // each head again and again.
        const int side_by_side = std::clamp(int(stretches.size()) * s_.heads / (4 * num_threads), 1, s_.heads);
        parts.clear();
        for (const Stretch& tokens : stretches)
            for (int head = 0, each = tokens.num_tokens() > 1 ? 1 : side_by_side; head < s_.heads; head += each)
                parts.push_back({tokens, head, std::min(head + each, s_.heads)});
    }

    // Stores the keys and values of a stretch in the cache, and its queries as `attend` reads them. `turned(n, x)` returns
    // the head x (D,) of token n, turned by the token's position.
    template <class Turned>
    void remember(int layer, const Pass& pass, const Stretch& stretch, const float* qkv, const Turned& turned) {
        const int C = s_.width, D = head_width_;
        const int block = pass.block_at(stretch.first, pass.positions[stretch.first] / BLOCK);
        for (int n = stretch.first; n < stretch.last; n++)
            for (int head = 0; head < s_.heads; head++)
                pack_row<Cached>(turned(n, qkv + size_t(n) * s_.qkv_width() + head * D), D, query(n, head));
        for (int head = 0; head < s_.kv_heads; head++)
            for (int n = stretch.first; n < stretch.last; n++) {
                const int lane = pass.positions[n] % BLOCK;
                const float* row = qkv + size_t(n) * s_.qkv_width() + C + head * D;
                const float *key = turned(n, row), *value = row + s_.kv_width();
                Number* keys = block_of(keys_, layer, block, head) + lane * GROUP;
                for (int d = 0; d < D; d += GROUP, keys += BLOCK * GROUP)
                    for (int i = 0; i < GROUP; i++) keys[i] = d + i < D ? Cached::from(key[d + i]) : Number();
                Number* values = block_of(values_, layer, block, head) + lane * padded_;
                for (int d = 0; d < D; d++) values[d] = Cached::from(value[d]);
            }
    }

    // Computes softmax(q k / sqrt(D)) v of each token and head of a part, over its sequence up to itself, and writes it to
    // the head's columns of `to` (N, C).
    void attend(int layer, const Pass& pass, const AttentionPart& part, float* to) const {
        const auto [tokens, first_head, last_head] = part;
        const int T = tokens.num_tokens(), each = s_.heads / s_.kv_heads;
        const int start = pass.positions[tokens.first], num_blocks = start / BLOCK + 1, row = num_blocks * BLOCK;
        const auto seen = [&](int t, int b) { return std::min(BLOCK, start + t + 1 - b * BLOCK); };
        thread_local std::vector<float> all_scores, all_mixed;
        all_scores.resize(size_t(last_head - first_head) * T * row);
        all_mixed.assign(size_t(last_head - first_head) * T * padded_, 0.0f);
        const auto scores = [&](int head, int t) { return &all_scores[(size_t(head - first_head) * T + t) * row]; };
        const auto mixed = [&](int head, int t) { return &all_mixed[(size_t(head - first_head) * T + t) * padded_]; };
        for (int b = 0; b < num_blocks; b++)
            for (int head = first_head; head < last_head; head++) {
                const Number* keys = block_of(keys_, layer, pass.block_at(tokens.first, b), head / each);
                int t = 0;
                for (; t + QUERIES <= T; t += QUERIES)
                    dot_products<QUERIES>(keys, query(tokens.first + t, head), scores(head, t) + b * BLOCK, row);
                for (; t < T; t++) dot_products<1>(keys, query(tokens.first + t, head), scores(head, t) + b * BLOCK, row);
            }
        for (int head = first_head; head < last_head; head++)
            for (int t = 0; t < T; t++) {
                std::fill(scores(head, t) + start + t + 1, scores(head, t) + row, -INFINITY);
                softmax(scores(head, t), row);
            }
        for (int b = 0; b < num_blocks; b++)
            for (int head = first_head; head < last_head; head++) {
                const Number* values = block_of(values_, layer, pass.block_at(tokens.first, b), head / each);
                int t = 0;
                for (; t + QUERIES <= T; t += QUERIES) {
                    const int all_see = seen(t, b);
                    mix<QUERIES>(values, scores(head, t) + b * BLOCK, row, all_see, mixed(head, t));
                    for (int later = t + 1; later < t + QUERIES; later++)
                        mix<1>(values + all_see * padded_, scores(head, later) + b * BLOCK + all_see, row,
                               seen(later, b) - all_see, mixed(head, later));
                }
                for (; t < T; t++) mix<1>(values, scores(head, t) + b * BLOCK, row, seen(t, b), mixed(head, t));
            }
        for (int head = first_head; head < last_head; head++)
            for (int t = 0; t < T; t++)
                std::copy_n(mixed(head, t), head_width_, to + size_t(tokens.first + t) * s_.width + head * head_width_);
    }

    std::vector<Stretch> stretches;
    std::vector<AttentionPart> parts;

private:
    // Keys of a block: [D / GROUP][position][GROUP]; values: [position][DP].
    Number* block_of(const Buffer<Number>& cache, int layer, int block, int head) const {
        return cache.get() + ((size_t(layer) * s_.num_blocks + block) * s_.kv_heads + head) * BLOCK * padded_;
    }

    Element* query(int n, int head) const { return queries_.get() + (size_t(n) * s_.heads + head) * query_width_; }

    // Multiplies the queries of a head, one for each token, with the keys of a block, and with 1 / sqrt(D). The products of a
    // query begin `stride` after the last one's.
    template <int queries>
    void dot_products(const Number* keys, const Element* query, float* to, int stride) const {
        constexpr int CHAINS = 4, PARTS = BLOCK / LANES;  // a single sum would wait for its own result
        const float scale = 1.0f / std::sqrt(float(head_width_));
        const size_t next_query = size_t(s_.heads) * query_width_;
        F32 sums[CHAINS][PARTS][queries] = {};
        const auto add = [&](F32 (*chain)[queries], int d) {
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; i++) {
                const auto key = Cached::weights(keys + d * BLOCK + i * LANES * GROUP);
#pragma GCC unroll 4
                for (int q = 0; q < queries; q++)
                    chain[i][q] = Cached::multiply_add(chain[i][q], key, read_as<uint32_t>(query + q * next_query + d));
            }
        };
        int d = 0;
        for (; d + CHAINS * GROUP <= head_width_; d += CHAINS * GROUP)
#pragma GCC unroll 4
            for (int i = 0; i < CHAINS; i++) add(sums[i], d + i * GROUP);
        for (; d < head_width_; d += GROUP) add(sums[0], d);
        for (int q = 0; q < queries; q++)
            for (int i = 0; i < PARTS; i++)
                store(to + q * stride + i * LANES,
                      ((sums[0][i][q] + sums[1][i][q]) + (sums[2][i][q] + sums[3][i][q])) * scale);
    }

    static void softmax(float* scores, int count) {
        F32 best = splat(-INFINITY), total[VECTORS_OF_COLUMNS] = {};
        for (int i = 0; i < count; i += LANES) {
            const F32 dots = load(scores + i);
            best = dots > best ? dots : best;
        }
        const F32 top = splat(highest(best));
        for (int i = 0; i < count; i += LANES) {
            const F32 dots = load(scores + i), weights = dots == -INFINITY ? F32{} : exponential(dots - top);
            store(scores + i, weights);
            total[i / LANES % VECTORS_OF_COLUMNS] += weights;
        }
        const float share = 1.0f / sum_of_columns(total);
        for (int i = 0; i < count; i += LANES) store(scores + i, load(scores + i) * share);
    }

    // Adds the values of a block, weighted, to `to` (queries, DP). The weights of a query begin `stride` after the last one's.
    template <int queries>
    void mix(const Number* values, const float* weights, int stride, int num_positions, float* to) const {
        int d = 0;
        if constexpr (queries == 1)
            for (; d + 8 * LANES <= padded_; d += 8 * LANES)
                mix_columns<queries, 8>(values + d, weights, stride, num_positions, to + d);
        for (; d + 4 * LANES <= padded_; d += 4 * LANES)
            mix_columns<queries, 4>(values + d, weights, stride, num_positions, to + d);
        for (; d < padded_; d += LANES) mix_columns<queries, 1>(values + d, weights, stride, num_positions, to + d);
    }

    template <int queries, int vectors>
    void mix_columns(const Number* values, const float* weights, int stride, int num_positions, float* to) const {
        F32 sums[queries][vectors];
        for (int q = 0; q < queries; q++)
            for (int v = 0; v < vectors; v++) sums[q][v] = load(to + q * padded_ + v * LANES);
        for (int p = 0; p < num_positions; p++, values += padded_)
            for (int v = 0; v < vectors; v++) {
                const F32 value = Cached::widened(values + v * LANES);
                for (int q = 0; q < queries; q++)
                    sums[q][v] = fused(splat(weights[q * stride + p]), value, sums[q][v]);
            }
        for (int q = 0; q < queries; q++)
            for (int v = 0; v < vectors; v++) store(to + q * padded_ + v * LANES, sums[q][v]);
    }

    const Shape s_;
    const int head_width_, padded_, query_width_;
    Buffer<Number> keys_, values_;  // [layer][block][head] blocks
    Buffer<Element> queries_;  // (N, H, D padded)
};

}  // namespace
