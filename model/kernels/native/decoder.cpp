// Computes the decoder's forward pass on CPU cores, for many sequences at once: each token of a pass names its position
// and the KV cache blocks of its sequence. Prompts and single tokens are treated the same.
//
// A token's result has the same bits whatever else is in its pass and however its prompt is cut into passes: every sum
// runs over its own numbers in an order that depends on nothing else.
//
// Shapes: N tokens of a pass, C width, H heads of width D (DP with padding), G heads of keys and values, each for H / G
// neighboring heads, F feed-forward width, V vocabulary.

#include <cstdio>

#include "elementary.h"
#include "matrix.h"
#include "numbers.h"
#include "shape.h"
#include "team.h"

namespace {

constexpr int BLOCK = 16;  // positions of a KV cache block

F32 activate(F32 x, Activation activation) {
    switch (activation) {
        case GELU: return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));  // tanh as a sigmoid
        case RELU: return x > 0.0f || x != x ? x : F32{};
        case GELU_EXACT: return x * normal_share(x);
        case SWIGLU: break;  // takes two values: `pack_gated`
    }
    return x;
}

struct Norm {
    std::vector<float> weight, bias;
};

struct Pass {
    int num_tokens, table_width;
    const int32_t *token_ids, *positions, *rows;  // (N,); a row of `tables` for each token
    const int32_t* tables;  // (rows, table_width): the blocks of a sequence, in order
    float* hidden;  // (N, C)
};

class Decoder {
public:
    virtual ~Decoder() = default;
    virtual void set_norm(int layer, int which, const float* weight, const float* bias) = 0;
    virtual void set_matrix(int layer, int which, int num_in, int num_out, const float* weight, int in_stride,
                            int out_stride, const float* bias) = 0;
    virtual void forward(const Pass& pass) = 0;
    virtual void logits(int num_rows, const float* hidden, float* logits) = 0;
    virtual void survey(int num_rows, const float* logits, int64_t* best, bool* finite) = 0;
    virtual void exponentials(int num_rows, float* numbers) = 0;
    virtual void log_probabilities(int num_rows, const float* logits, float* to) = 0;
};

enum { LN_1, LN_2 };  // the norms of a layer; layer L has the final one
enum { QKV, ATTENTION_OUT, FFN_IN, FFN_OUT };  // the matrices of a layer; layer L has these two:
enum { HEAD, TOKENS };

template <class Kind>
class DecoderOf : public Decoder {
    using Cached = typename Kind::Cached;
    using Number = typename Cached::Number;
    using Element = typename Kind::Element;
    using CachedElement = typename Cached::Element;
    static constexpr int GROUP = Cached::GROUP;
    // Rows of a piece of work: their inputs and a panel fit into a core's cache. Tiles are as fast as memory gives weights.
    static constexpr int ROWS = uses_tiles<Kind> ? 192 : 8 * TILE;

public:
    DecoderOf(const Shape& shape, int num_threads, const float* positions)
        : s_(shape), head_width_(shape.head_width()), padded_((head_width_ + LANES - 1) / LANES * LANES),
          positions_(positions,
                     positions + (shape.has_rotation() ? head_width_ / 2 : size_t(shape.positions) * shape.width)),
          norms_(2 * shape.layers + 1), matrices_(4 * shape.layers + 2), team_(num_threads) {
        const size_t cache = size_t(s_.layers) * s_.num_blocks * s_.kv_heads * BLOCK * padded_;
        keys_ = allocate<Number>(cache);
        values_ = allocate<Number>(cache);
    }

    void set_norm(int layer, int which, const float* weight, const float* bias) override {
        norms_[2 * layer + which] = {{weight, weight + s_.width}, {bias, bias + s_.width}};
    }

    void set_matrix(int layer, int which, int num_in, int num_out, const float* weight, int in_stride, int out_stride,
                    const float* bias) override {
        matrices_[4 * layer + which] = Matrix<Kind>(num_in, num_out, weight, in_stride, out_stride, bias);
    }

    void forward(const Pass& pass) override {
        const int N = pass.num_tokens, C = s_.width, F = s_.ffn_width;
        reserve(N);
        float* x = pass.hidden;
        // A few pieces for each thread; the heads of a piece lie side by side in the cache.
        const int heads_each = std::clamp(N * s_.heads / (4 * team_.num_threads), 1, s_.heads);
        const int head_groups = (s_.heads + heads_each - 1) / heads_each;
        team_.run(12 * s_.layers + 2, [&] {
            int phase = 0;
            team_.share(phase++, N, [&](int n) {
                embed(pass.token_ids[n], pass.positions[n], x + size_t(n) * C);
                if (s_.has_rotation()) find_rotation(pass.positions[n], rotations_.get() + size_t(n) * head_width_);
            });
            for (int layer = 0; layer < s_.layers; layer++) {
                team_.share(phase++, N, [&](int n) { pack_normed(x, n, norms_[2 * layer + LN_1]); });
                project(phase++, N, matrix(layer, QKV), [&](float* to, F32 y) { store(to, y); }, qkv_.get(),
                        s_.qkv_width());
                team_.share(phase++, s_.kv_heads, [&](int head) { remember(layer, pass, head); });
                team_.share(phase++, N * head_groups, [&](int i) {
                    const int first = i % head_groups * heads_each;
                    attend(layer, pass, i / head_groups, first, std::min(first + heads_each, s_.heads));
                });
                team_.share(phase++, N, [&](int n) { pack(attended_.get(), n, C); });
                project(phase++, N, matrix(layer, ATTENTION_OUT), add, x, C);
                team_.share(phase++, N, [&](int n) { pack_normed(x, n, norms_[2 * layer + LN_2]); });
                project(phase++, N, matrix(layer, FFN_IN),
                        [&](float* to, F32 y) { store(to, activate(y, s_.activation)); }, ffn_.get(),
                        s_.ffn_in_width());
                team_.share(phase++, N, [&](int n) { s_.is_gated() ? pack_gated(n) : pack(ffn_.get(), n, F); });
                project(phase++, N, matrix(layer, FFN_OUT), add, x, C);
            }
            team_.share(phase++, N, [&](int n) { normalize(x + size_t(n) * C, norms_.back(), x + size_t(n) * C); });
        });
    }

    void logits(int num_rows, const float* hidden, float* logits) override {
        reserve(num_rows);
        team_.run(2, [&] {
            team_.share(0, num_rows, [&](int n) { pack(hidden, n, s_.width); });
            project(1, num_rows, matrix(s_.layers, HEAD), [](float* to, F32 y) { store(to, y); }, logits, s_.vocabulary);
        });
    }

    void survey(int num_rows, const float* logits, int64_t* best, bool* finite) override {
        team_.run(1, [&] {
            team_.share(0, num_rows, [&](int n) {
                const Survey found = survey_of(logits + size_t(n) * s_.vocabulary, s_.vocabulary);
                best[n] = found.best;
                finite[n] = found.finite;
            });
        });
    }

    void exponentials(int num_rows, float* numbers) override {
        team_.run(1, [&] {
            team_.share(0, num_rows, [&](int n) { to_exponentials(numbers + size_t(n) * s_.vocabulary, s_.vocabulary); });
        });
    }

    void log_probabilities(int num_rows, const float* logits, float* to) override {
        team_.run(1, [&] {
            team_.share(0, num_rows, [&](int n) {
                const size_t row = size_t(n) * s_.vocabulary;
                find_log_probabilities(logits + row, s_.vocabulary, to + row);
            });
        });
    }

private:
    const Matrix<Kind>& matrix(int layer, int which) const { return matrices_[4 * layer + which]; }

    static void add(float* to, F32 y) { store(to, load(to) + y); }

    void reserve(int num_rows) {
        if (num_rows <= capacity_) return;
        capacity_ = (num_rows + ROWS - 1) / ROWS * ROWS;
        packed_ = allocate<Element>(size_t(capacity_) * padded_to_depth<Kind>(std::max(s_.width, s_.ffn_width)));
        units_.resize(capacity_);
        qkv_ = allocate<float>(size_t(capacity_) * s_.qkv_width() + LANES);
        rotations_ = allocate<float>(size_t(capacity_) * head_width_);
        attended_ = allocate<float>(size_t(capacity_) * (s_.width + padded_));
        ffn_ = allocate<float>(size_t(capacity_) * s_.ffn_in_width() + LANES);
        queries_ = allocate<CachedElement>(size_t(capacity_) * s_.heads * query_width());
    }

    // Calls finish(to(n, :), packed row n times the matrix, plus its bias).
    template <class Finish>
    void project(int phase, int num_rows, const Matrix<Kind>& weights, const Finish& finish, float* to, int stride) {
        const int row_blocks = (num_rows + ROWS - 1) / ROWS;
        team_.share(phase, row_blocks * weights.panels, [&](int piece) {
            const int first = piece / weights.panels * ROWS, p = piece % weights.panels;
            multiply<Kind>(weights.panel(p), packed_.get(), weights.depth, first, std::min(first + ROWS, num_rows),
                           [&](int row, int vector, typename Kind::Sums sums) {
                               const int column = p * PANEL + vector * LANES, valid = weights.num_out - column;
                               const F32 y = weights.result(sums, column, units_[row]);
                               float* at = to + size_t(row) * stride + column;
                               if (valid >= LANES) {
                                   finish(at, y);
                               } else if (valid > 0) {
                                   float last[LANES] = {};
                                   std::copy_n(at, valid, last);
                                   finish(last, y);
                                   std::copy_n(last, valid, at);
                               }
                           });
        });
    }

    void embed(int token_id, int position, float* to) const {
        const int C = s_.width;
        const Matrix<Kind>& own = matrix(s_.layers, TOKENS);
        const Matrix<Kind>& tokens = own.num_out > 0 ? own : matrix(s_.layers, HEAD);
        for (int c = 0; c < C; c++) to[c] = tokens.at(c, token_id);
        if (s_.has_rotation()) return;
        for (int c = 0; c < C; c++) to[c] += positions_[size_t(position) * C + c];
    }

    // The cosines of the pairs' angles at a position, then their sines.
    void find_rotation(int position, float* to) const {
        const int half = head_width_ / 2;
        for (int i = 0; i < half; i++) {
            const Turn turn = turn_of(float(position) * positions_[i]);
            to[i] = turn.cosine;
            to[half + i] = turn.sine;
        }
    }

    void rotate(const float* x, const float* rotation, float* to) const {
        const int half = head_width_ / 2;
        for (int i = 0; i < half; i++) {
            const float first = x[i], second = x[half + i], cosine = rotation[i], sine = rotation[half + i];
            to[i] = first * cosine - second * sine;
            to[half + i] = second * cosine + first * sine;
        }
    }

    // LayerNorm, or RMSNorm: the same with a mean of 0 and no bias.
    void normalize(const float* x, const Norm& norm, float* to) const {
        const int C = s_.width;
        const float mean =
            s_.has_rms_norm() ? 0.0f : sum_of(C, [&](int c) { return load(x + c); }, [&](int c) { return x[c]; }) / C;
        const float variance = sum_of(
            C, [&](int c) { const F32 off = load(x + c) - mean; return off * off; },
            [&](int c) { return (x[c] - mean) * (x[c] - mean); }) / C;
        const float scale = 1.0f / std::sqrt(variance + s_.epsilon);
        for (int c = 0; c < C; c++) to[c] = (x[c] - mean) * scale * norm.weight[c] + norm.bias[c];
    }

    void pack_normed(const float* x, int n, const Norm& norm) {
        std::vector<float> normed(s_.width);
        normalize(x + size_t(n) * s_.width, norm, normed.data());
        units_[n] = pack_row<Kind>(normed.data(), s_.width, packed_.get() + size_t(n) * matrix(0, QKV).depth);
    }

    void pack(const float* from, int n, int width) {
        units_[n] = pack_row<Kind>(from + size_t(n) * width, width, packed_.get() + size_t(n) * padded_to_depth<Kind>(width));
    }

    // The feed-forward layer's middle, SwiGLU: gate / (1 + exp(-gate)) times what it gates.
    void pack_gated(int n) {
        const int F = s_.ffn_width;
        std::vector<float> gated(F + LANES);
        const float *gate = ffn_.get() + size_t(n) * 2 * F, *up = gate + F;
        for (int f = 0; f < F; f += LANES) {
            const F32 g = load(gate + f);
            store(&gated[f], g / (1.0f + exponential(-g)) * load(up + f));
        }
        units_[n] = pack_row<Kind>(gated.data(), F, packed_.get() + size_t(n) * padded_to_depth<Kind>(F));
    }

    // Keys of a block: [D / GROUP][position][GROUP]; values: [position][DP].
    Number* block_of(const Buffer<Number>& cache, int layer, int block, int head) const {
        return cache.get() + ((size_t(layer) * s_.num_blocks + block) * s_.kv_heads + head) * BLOCK * padded_;
    }

    int query_width() const { return padded_to_depth<Cached>(head_width_); }

    int block_at(const Pass& pass, int n, int index) const {
        return pass.tables[size_t(pass.rows[n]) * pass.table_width + index];
    }

    // Stores the keys and values of one of the G heads in the cache, and the queries of its heads as attention reads them.
    // Successive tokens share cache lines of keys, so one thread does a whole head.
    void remember(int layer, const Pass& pass, int head) {
        const int C = s_.width, D = head_width_, each = s_.heads / s_.kv_heads;
        std::vector<float> turned(D);
        for (int n = 0; n < pass.num_tokens; n++) {
            const float *row = qkv_.get() + size_t(n) * s_.qkv_width(), *rotation = rotations_.get() + size_t(n) * D;
            const auto in_place = [&](const float* x) {
                if (!s_.has_rotation()) return x;
                rotate(x, rotation, turned.data());
                return static_cast<const float*>(turned.data());
            };
            const int block = block_at(pass, n, pass.positions[n] / BLOCK), lane = pass.positions[n] % BLOCK;
            for (int h = head * each; h < (head + 1) * each; h++)
                pack_row<Cached>(in_place(row + h * D), D, queries_.get() + (size_t(n) * s_.heads + h) * query_width());
            const float *key = in_place(row + C + head * D), *value = row + C + s_.kv_width() + head * D;
            Number* keys = block_of(keys_, layer, block, head) + lane * GROUP;
            for (int d = 0; d < D; d += GROUP, keys += BLOCK * GROUP)
                for (int i = 0; i < GROUP; i++) keys[i] = d + i < D ? Cached::from(key[d + i]) : Number();
            Number* values = block_of(values_, layer, block, head) + lane * padded_;
            for (int d = 0; d < D; d++) values[d] = Cached::from(value[d]);
        }
    }

    // Computes softmax(q k / sqrt(D)) v of a token and some heads, over its sequence up to itself.
    void attend(int layer, const Pass& pass, int n, int first_head, int last_head) {
        const int num_positions = pass.positions[n] + 1, num_blocks = (num_positions + BLOCK - 1) / BLOCK;
        const int row = num_blocks * BLOCK;
        const float scale = 1.0f / std::sqrt(float(head_width_));
        const int each = s_.heads / s_.kv_heads;
        thread_local std::vector<float> scores, mixed;
        scores.resize(size_t(last_head - first_head) * row);
        mixed.assign(size_t(last_head - first_head) * padded_, 0.0f);
        for (int b = 0; b < num_blocks; b++) {
            const Number* keys = block_of(keys_, layer, block_at(pass, n, b), 0);
            for (int head = first_head; head < last_head; head++) {
                const auto* query = queries_.get() + (size_t(n) * s_.heads + head) * query_width();
                dot_products(keys + size_t(head / each) * BLOCK * padded_, query, scale, &scores[(head - first_head) * row + b * BLOCK]);
            }
        }
        for (int head = first_head; head < last_head; head++) {
            float* dots = &scores[(head - first_head) * row];
            std::fill(dots + num_positions, dots + row, -INFINITY);
            softmax(dots, row);
        }
        for (int b = 0; b < num_blocks; b++) {
            const int here = std::min(BLOCK, num_positions - b * BLOCK);
            const Number* all = block_of(values_, layer, block_at(pass, n, b), 0);
            for (int head = first_head; head < last_head; head++) {
                const Number* values = all + size_t(head / each) * BLOCK * padded_;
                const float* weights = &scores[(head - first_head) * row + b * BLOCK];
                float* to = &mixed[(head - first_head) * padded_];
                int d = 0;
                for (; d + 8 * LANES <= padded_; d += 8 * LANES) mix<8>(values + d, weights, here, to + d);
                for (; d + 4 * LANES <= padded_; d += 4 * LANES) mix<4>(values + d, weights, here, to + d);
                for (; d < padded_; d += LANES) mix<1>(values + d, weights, here, to + d);
            }
        }
        for (int head = first_head; head < last_head; head++)
            std::copy_n(&mixed[(head - first_head) * padded_], head_width_,
                        attended_.get() + size_t(n) * s_.width + head * head_width_);
    }

    // Multiplies the query with the keys of a block.
    void dot_products(const Number* keys, const CachedElement* query, float scale, float* to) const {
        constexpr int CHAINS = 4, PARTS = BLOCK / LANES;  // a single sum would wait for its own result
        F32 sums[CHAINS][PARTS] = {};
        const auto add = [&](F32* chain, int d) {
            const uint32_t input = read_as<uint32_t>(query + d);
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; i++)
                chain[i] = Cached::multiply_add(chain[i], Cached::weights(keys + d * BLOCK + i * LANES * GROUP), input);
        };
        int d = 0;
        for (; d + CHAINS * GROUP <= head_width_; d += CHAINS * GROUP)
#pragma GCC unroll 4
            for (int i = 0; i < CHAINS; i++) add(sums[i], d + i * GROUP);
        for (; d < head_width_; d += GROUP) add(sums[0], d);
        for (int i = 0; i < PARTS; i++)
            store(to + i * LANES, ((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i])) * scale);
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

    // Adds the values of a block, weighted, to `vectors` vectors of columns.
    template <int vectors>
    void mix(const Number* values, const float* weights, int num_positions, float* to) const {
        F32 sums[vectors];
        for (int v = 0; v < vectors; v++) sums[v] = load(to + v * LANES);
        for (int p = 0; p < num_positions; p++, values += padded_)
            for (int v = 0; v < vectors; v++) sums[v] = fused(splat(weights[p]), Cached::widened(values + v * LANES), sums[v]);
        for (int v = 0; v < vectors; v++) store(to + v * LANES, sums[v]);
    }

    const Shape s_;
    const int head_width_, padded_;
    std::vector<float> positions_;  // (n_positions, C), or with rotation the angles of the pairs for one position (D / 2,)
    std::vector<Norm> norms_;
    std::vector<Matrix<Kind>> matrices_;
    Buffer<Number> keys_, values_;  // [layer][block][head] blocks
    Buffer<Element> packed_;
    Buffer<CachedElement> queries_;
    std::vector<float> units_;  // of packed rows
    Buffer<float> qkv_, attended_, ffn_, rotations_;
    int capacity_ = 0;
    Team team_;
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// `kind`: 0 is fp32, 1 bf16, 2 int8.
// Null without the memory for its cache; and null with the reason in `refusal` (size,), in words, where it would compute
// something else than what the numbers mean.
void* raymill_create(const Shape* shape, int kind, int num_threads, const float* positions, char* refusal, int size) {
    try {
        shape->is_llama(), shape->is_gated();  // throw
        switch (kind) {
            case 0: return static_cast<Decoder*>(new DecoderOf<Fp32>(*shape, num_threads, positions));
            case 1: return static_cast<Decoder*>(new DecoderOf<Bf16>(*shape, num_threads, positions));
            case 2: return static_cast<Decoder*>(new DecoderOf<Int8>(*shape, num_threads, positions));
            default: throw std::invalid_argument("they know no type of number " + std::to_string(kind));
        }
    } catch (const std::invalid_argument& error) {
        std::snprintf(refusal, size, "%s", error.what());
        return nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void raymill_set_norm(void* d, int layer, int which, const float* weight, const float* bias) {
    static_cast<Decoder*>(d)->set_norm(layer, which, weight, bias);
}
// False without the memory for it.
bool raymill_set_matrix(void* d, int layer, int which, int num_in, int num_out, const float* weight, int in_stride,
                        int out_stride, const float* bias) {
    try {
        static_cast<Decoder*>(d)->set_matrix(layer, which, num_in, num_out, weight, in_stride, out_stride, bias);
        return true;
    } catch (const std::bad_alloc&) {
        return false;
    }
}
void raymill_forward(void* d, const Pass* pass) { static_cast<Decoder*>(d)->forward(*pass); }
void raymill_logits(void* d, int num_rows, const float* hidden, float* logits) {
    static_cast<Decoder*>(d)->logits(num_rows, hidden, logits);
}
// best (M,): the index of the first of the highest logits; finite (M,): whether all logits of the row are finite.
void raymill_survey(void* d, int num_rows, const float* logits, int64_t* best, bool* finite) {
    static_cast<Decoder*>(d)->survey(num_rows, logits, best, finite);
}
// Each of numbers (M, V) becomes its exponential.
void raymill_exponentials(void* d, int num_rows, float* numbers) { static_cast<Decoder*>(d)->exponentials(num_rows, numbers); }
// The logarithms (M, V) of the softmax of each row of logits.
void raymill_log_probabilities(void* d, int num_rows, const float* logits, float* to) {
    static_cast<Decoder*>(d)->log_probabilities(num_rows, logits, to);
}
// Whether a kind of numbers has the same bits on every processor.
bool raymill_is_portable(int kind) { return kind == 1 ? Bf16::PORTABLE : kind == 0 ? Fp32::PORTABLE : Int8::PORTABLE; }
void raymill_destroy(void* d) { delete static_cast<Decoder*>(d); }
}
#pragma GCC visibility pop
