// Computes the decoder's forward pass on CPU cores, for many sequences at once: each token of a pass names its position
// and the KV cache blocks of its sequence. Prompts and single tokens are treated the same.
//
// A token's result has the same bits whatever else is in its pass and however its prompt is cut into passes: every sum
// runs over its own numbers in an order that depends on nothing else.
//
// Shapes: N tokens of a pass, C width, heads of width D, F feed-forward width, V vocabulary.

#include <cstdio>

#include "cached_attention.h"
#include "elementary.h"
#include "matrix.h"
#include "numbers.h"
#include "shape.h"
#include "team.h"

namespace {

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

// Rows `first` to `last` - 1 of a pass.
struct Rows {
    int first, last;
};

enum { LN_1, LN_2 };  // the norms of a layer; layer L has the final one
enum { QKV, ATTENTION_OUT, FFN_IN, FFN_OUT };  // the matrices of a layer; layer L has these two:
enum { HEAD, TOKENS };

template <class Kind>
class DecoderOf : public Decoder {
    using Element = typename Kind::Element;
    // Rows of a piece of work: their inputs and a panel fit into a core's cache. Tiles are as fast as memory gives weights.
    // Blocks of rows begin at multiples of UNIT.
    static constexpr int ROWS = uses_tiles<Kind> ? 256 : 8 * TILE, UNIT = uses_tiles<Kind> ? 32 : TILE;

public:
    DecoderOf(const Shape& shape, int num_threads, const float* positions)
        : s_(shape), head_width_(shape.head_width()),
          positions_(positions,
                     positions + (shape.has_rotation() ? head_width_ / 2 : size_t(shape.positions) * shape.width)),
          norms_(2 * shape.layers + 1), matrices_(4 * shape.layers + 2), attention_(shape), team_(num_threads) {}

    void set_norm(int layer, int which, const float* weight, const float* bias) override {
        norms_[2 * layer + which] = {{weight, weight + s_.width}, {bias, bias + s_.width}};
    }

    void set_matrix(int layer, int which, int num_in, int num_out, const float* weight, int in_stride, int out_stride,
                    const float* bias) override {
        matrices_[4 * layer + which] = Matrix<Kind>(num_in, num_out, weight, in_stride, out_stride, bias);
    }

    void forward(const Pass& pass) override {
        const int N = pass.num_tokens, C = s_.width;
        reserve(N);
        float* x = pass.hidden;
        attention_.divide(pass, team_.num_threads);
        team_.run(12 * s_.layers + 2, [&] {
            int phase = 0;
            const auto together = [&](int num_pieces, const auto& piece) { team_.share(phase++, num_pieces, piece); };
            together(N, [&](int n) {
                embed(pass.token_ids[n], pass.positions[n], x + size_t(n) * C);
                if (s_.has_rotation()) find_rotation(pass.positions[n], rotations_.get() + size_t(n) * head_width_);
            });
            for (int layer = 0; layer < s_.layers; layer++) {
                in_blocks(N, together, [&](Rows rows, const auto& each) { find_qkv(layer, x, rows, each); });
                together(int(attention_.stretches.size()),
                         [&](int i) { remember(layer, pass, attention_.stretches[i]); });
                together(int(attention_.parts.size()),
                         [&](int i) { attention_.attend(layer, pass, attention_.parts[i], attended_.get()); });
                in_blocks(N, together, [&](Rows rows, const auto& each) { finish_layer(layer, x, rows, each); });
            }
            together(N, [&](int n) { normalize(x + size_t(n) * C, norms_.back(), x + size_t(n) * C); });
        });
    }

    void logits(int num_rows, const float* hidden, float* logits) override {
        reserve(num_rows);
        team_.run(2, [&] {
            team_.share(0, num_rows, [&](int n) { pack(hidden + size_t(n) * s_.width, n, s_.width, packed_); });
            project({0, num_rows}, [&](int num_pieces, const auto& piece) { team_.share(1, num_pieces, piece); }, packed_,
                    matrix(s_.layers, HEAD), into(logits, s_.vocabulary));
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

    void reserve(int num_rows) {
        if (num_rows <= capacity_) return;
        capacity_ = (num_rows + ROWS - 1) / ROWS * ROWS;
        packed_ = allocate<Element>(size_t(capacity_) * padded_to_depth<Kind>(s_.width));
        middle_ = allocate<Element>(size_t(capacity_) * padded_to_depth<Kind>(s_.ffn_width), true);
        units_.resize(capacity_);
        qkv_ = allocate<float>(size_t(capacity_) * s_.qkv_width() + LANES);
        rotations_ = allocate<float>(size_t(capacity_) * head_width_);
        attended_ = allocate<float>(size_t(capacity_) * s_.width + LANES);
        if (!packs_middle()) ffn_ = allocate<float>(size_t(capacity_) * s_.ffn_in_width() + LANES);
        attention_.reserve(capacity_);
    }

    // Calls work(rows, each) for all rows of a pass, where each(count, piece) does piece(0) … piece(count - 1). Threads share
    // the pieces of few rows. Of many rows each thread takes blocks of its own: what it writes is still in its cache when
    // it reads it, and a pass of 16 prompts of 128 tokens took a tenth less time.
    template <class Together, class Work>
    void in_blocks(int num_rows, const Together& together, const Work& work) {
        const int num_blocks = num_blocks_of(num_rows), units = (num_rows + UNIT - 1) / UNIT;
        if (num_blocks < 2 * team_.num_threads) return work(Rows{0, num_rows}, together);
        together(num_blocks, [&](int b) {
            const int first = b * units / num_blocks * UNIT, last = std::min((b + 1) * units / num_blocks * UNIT, num_rows);
            work(Rows{first, last}, [](int num_pieces, const auto& piece) {
                for (int i = 0; i < num_pieces; i++) piece(i);
            });
        });
    }

    // As many for each thread.
    int num_blocks_of(int num_rows) const {
        const int rows_of_all = ROWS * team_.num_threads;
        return (num_rows + rows_of_all - 1) / rows_of_all * team_.num_threads;
    }

    // Calls finish(n, column, y, valid) with the vectors y of each packed row n times the matrix, plus its bias: of the first
    // `valid` lanes.
    template <class Each, class Finish>
    void project(Rows of, const Each& each, const Buffer<Element>& rows, const Matrix<Kind>& weights, const Finish& finish) {
        const int row_blocks = (of.last - of.first + ROWS - 1) / ROWS;
        each(row_blocks * weights.panels, [&](int piece) {
            const int first = of.first + piece / weights.panels * ROWS, p = piece % weights.panels;
            multiply<Kind>(weights.panel(p), rows.get(), weights.depth, first, std::min(first + ROWS, of.last),
                           [&](int row, int vector, typename Kind::Sums sums) {
                               const int column = p * PANEL + vector * LANES, valid = weights.num_out - column;
                               const F32 y = weights.result(sums, column, units_[row]);
                               // Where all lanes are valid the compiler knows it: without, this took a third longer.
                               if (valid >= LANES) finish(row, column, y, LANES);
                               else if (valid > 0) finish(row, column, y, valid);
                           });
        });
    }

    // Returns what stores the results of `project` in rows of `to`.
    static auto into(float* to, int stride) {
        return [=](int n, int column, F32 y, int valid) { store_some(to + size_t(n) * stride + column, y, valid); };
    }

    // Computes the queries, keys and values of rows.
    template <class Each>
    void find_qkv(int layer, const float* x, Rows rows, const Each& each) {
        each(rows.last - rows.first, [&](int i) { pack_normed(x, rows.first + i, norms_[2 * layer + LN_1]); });
        project(rows, each, packed_, matrix(layer, QKV), into(qkv_.get(), s_.qkv_width()));
    }

    // Takes rows from what they attended to to the layer's end.
    template <class Each>
    void finish_layer(int layer, float* x, Rows rows, const Each& each) {
        const int C = s_.width, num_rows = rows.last - rows.first;
        const auto add = [&](int n, int column, F32 y, int valid) {
            float* at = x + size_t(n) * C + column;
            store_some(at, load_some(at, valid) + y, valid);
        };
        each(num_rows, [&](int i) { pack(attended_.get() + size_t(rows.first + i) * C, rows.first + i, C, packed_); });
        project(rows, each, packed_, matrix(layer, ATTENTION_OUT), add);
        each(num_rows, [&](int i) { pack_normed(x, rows.first + i, norms_[2 * layer + LN_2]); });
        find_middle(rows, each, matrix(layer, FFN_IN));
        project(rows, each, middle_, matrix(layer, FFN_OUT), add);
    }

    // Whether each number of the feed-forward layer's middle is packed by itself.
    bool packs_middle() const { return !Kind::QUANTIZED && !s_.is_gated(); }

    // Computes the feed-forward layer's middle, packed.
    template <class Each>
    void find_middle(Rows rows, const Each& each, const Matrix<Kind>& weights) {
        const int F = s_.ffn_width, stride = padded_to_depth<Kind>(F), num_rows = rows.last - rows.first;
        if constexpr (!Kind::QUANTIZED)
            if (packs_middle())
                return project(rows, each, packed_, weights, [&](int n, int column, F32 y, int valid) {
                    Element *to = middle_.get() + size_t(n) * stride + column, some[LANES];
                    Kind::pack(activate(y, s_.activation), valid == LANES ? to : some);
                    if (valid < LANES) std::copy_n(some, valid, to);
                });
        // Without an activation in its way, not even one that is looked for in vain: with it Llama's pass took 1.16 times as
        // long.
        if (s_.is_gated()) {
            project(rows, each, packed_, weights, into(ffn_.get(), 2 * F));
            each(num_rows, [&](int i) { pack_gated(rows.first + i); });
        } else {
            project(rows, each, packed_, weights, [&](int n, int column, F32 y, int valid) {
                store_some(ffn_.get() + size_t(n) * F + column, activate(y, s_.activation), valid);
            });
            each(num_rows, [&](int i) {
                const int n = rows.first + i;
                pack(ffn_.get() + size_t(n) * F, n, F, middle_);
            });
        }
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
        pack(normed.data(), n, s_.width, packed_);
    }

    // Packs what becomes row n of inputs.
    void pack(const float* from, int n, int width, const Buffer<Element>& to) {
        units_[n] = pack_row<Kind>(from, width, to.get() + size_t(n) * padded_to_depth<Kind>(width));
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
        pack(gated.data(), n, F, middle_);
    }

    void remember(int layer, const Pass& pass, const Stretch& stretch) {
        thread_local std::vector<float> turned;
        turned.resize(head_width_);
        attention_.remember(layer, pass, stretch, qkv_.get(), [&](int n, const float* x) {
            if (!s_.has_rotation()) return x;
            rotate(x, rotations_.get() + size_t(n) * head_width_, turned.data());
            return static_cast<const float*>(turned.data());
        });
    }

    const Shape s_;
    const int head_width_;
    std::vector<float> positions_;  // (n_positions, C), or with rotation the angles of the pairs for one position (D / 2,)
    std::vector<Norm> norms_;
    std::vector<Matrix<Kind>> matrices_;
    CachedAttention<typename Kind::Cached> attention_;
    Buffer<Element> packed_, middle_;
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
