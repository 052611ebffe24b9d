// The operations of training, forward and backward, in fp32: the same bits on every processor, with any number of threads.
//
// Each number that is a sum is added up in an order that depends on nothing but the shapes: a product's along the inner
// dimension, a weight's gradient along the tokens, a norm's in 16 columns. Threads share numbers, and never a sum.
//
// Shapes: N tokens, C width, H heads of width D, G heads of keys and values, each for H / G neighboring heads, F feed-forward
// width, V vocabulary.

#include <cstdint>
#include <vector>

#include "attention.h"
#include "elementary.h"
#include "products.h"
#include "shape.h"
#include "threads.h"

namespace {

constexpr int COLUMN_PIECE = 64;  // columns whose sums along the tokens one thread makes

// Memory of the calling thread that it keeps for the next product: getting it anew would cost a small one more than itself.
float* kept(int use, size_t count) {
    thread_local Buffer<float> memory[3];
    thread_local size_t counts[3] = {};
    if (counts[use] < count) {
        memory[use].reset();
        memory[use] = allocate<float>(count);
        counts[use] = count;
    }
    return memory[use].get();
}

// A piece of a product: so many rows, columns, and numbers along the inner dimension that the rows and a panel stay in the
// processor's second cache while they are used. Sums go on from one depth to the next, so no bit depends on these.
constexpr int PIECE_ROWS = 512, PIECE_COLUMNS = 768, PIECE_DEPTH = 256;

struct Part {
    int first, count;
};

// Calls done(row, column, sums, valid) for a part of the rows of A (M, K) times a part of the columns of B (K, N).
template <class Done>
void multiply_part(int K, Part rows, Part columns, const Numbers2& a, const Numbers2& b, const Done& done) {
    const int tiles = (rows.count + TILE - 1) / TILE, panels = (columns.count + PANEL - 1) / PANEL;
    const int blocks = (K + PIECE_DEPTH - 1) / PIECE_DEPTH, most = (K + blocks - 1) / blocks;
    float *packed = kept(0, size_t(tiles) * TILE * most), *panel = kept(1, size_t(most) * PANEL);
    float* sums = kept(2, size_t(tiles) * panels * TILE * PANEL);
    for (int k = 0; k < K; k += most) {
        const int depth = std::min(most, K - k);
        const Numbers2 a_t = Numbers2{a.at + k * a.column + rows.first * a.row, a.column, a.row}, some = b.from_row(k);
        for (int t = 0; t < tiles; t++) pack<TILE>(a_t, depth, t * TILE, rows.count, packed + size_t(t) * TILE * depth);
        for (int p = 0; p < panels; p++) {
            pack<PANEL>(some, depth, columns.first + p * PANEL, columns.first + columns.count, panel);
            for (int t = 0; t < tiles; t++) {
                float* at = sums + (size_t(p) * tiles + t) * TILE * PANEL;
                continue_sums(panel, packed + size_t(t) * TILE * depth, depth, k == 0, at);
                if (k + depth < K) continue;
                for (int m = 0; m < std::min(TILE, rows.count - t * TILE); m++)
                    for (int n = 0; n < std::min(PANEL, columns.count - p * PANEL); n += LANES)
                        done(rows.first + t * TILE + m, columns.first + p * PANEL + n, load(at + m * PANEL + n),
                             std::min(LANES, columns.count - p * PANEL - n));
            }
        }
    }
}

// Calls done(row, column, sums, valid) for all of A (M, K) times B (K, N).
template <class Done>
void product(int num_threads, int M, int K, int N, const Numbers2& a, const Numbers2& b, const Done& done) {
    int tiles = PIECE_ROWS / TILE, panels = PIECE_COLUMNS / PANEL;  // of a piece
    const auto strips = [&] { return (M + tiles * TILE - 1) / (tiles * TILE); };
    const auto across = [&] { return (N + panels * PANEL - 1) / (panels * PANEL); };
    // Smaller ones where there would be too few for the threads
    while (num_threads > 1 && strips() * across() < 4 * num_threads && (tiles > 8 || panels > 4))
        (tiles * TILE > panels * PANEL ? tiles : panels) /= 2;
    Threads::share(num_threads, strips() * across(), [&](int i) {
        const int row = i % strips() * tiles * TILE, column = i / strips() * panels * PANEL;
        const Part rows = {row, std::min(tiles * TILE, M - row)}, columns = {column, std::min(panels * PANEL, N - column)};
        multiply_part(K, rows, columns, a, b, done);
    });
}

struct Slope {
    F32 value, slope;
};

// An activation and its derivative.
Slope activation_of(F32 x, Activation activation) {
    switch (activation) {
        case GELU: {
            const F32 square = x * x;
            const F32 share = 1.0f / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * square)));
            return {x * share, share + x * share * (1.0f - share) * (1.5957691216f * (1.0f + 0.134145f * square))};
        }
        case GELU_EXACT: {
            const F32 share = normal_share(x);
            return {x * share, share + x * (0.3989422804f * exponential(-0.5f * x * x))};
        }
        case RELU: return {x > 0.0f || x != x ? x : F32{}, x > 0.0f ? splat(1.0f) : F32{}};
        case SWIGLU: break;
    }
    return {x, splat(1.0f)};
}

// Calls each(i, count) for the vectors of `count` numbers, some to a piece.
template <class Each>
void for_vectors(int num_threads, size_t count, const Each& each) {
    constexpr size_t PIECE = 1 << 14;
    Threads::share(num_threads, int((count + PIECE - 1) / PIECE), [&](int piece) {
        const size_t last = std::min(count, (piece + 1) * PIECE);
        for (size_t i = piece * PIECE; i < last; i += LANES) each(i, int(std::min(size_t(LANES), last - i)));
    });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// C (M, N) = A (M, K) B (K, N) + bias (N,), which may be null; or, with `adds`, adds the product to C.
void raymill_product(int threads, int M, int K, int N, const float* a, size_t a_row, size_t a_column, const float* b,
                     size_t b_row, size_t b_column, const float* bias, bool adds, float* c) {
    product(threads, M, K, N, {a, a_row, a_column}, {b, b_row, b_column}, [&](int row, int column, F32 sums, int valid) {
        float* at = c + size_t(row) * N + column;
        if (adds) sums = load_some(at, valid) + sums;
        if (bias != nullptr) sums = sums + load_some(bias + column, valid);
        store_some(at, sums, valid);
    });
}

// The sums (C,) of x (N, C) along the tokens.
void raymill_column_sums(int threads, int N, int C, const float* x, float* to) {
    Threads::share(threads, (C + COLUMN_PIECE - 1) / COLUMN_PIECE, [&](int piece) {
        const int first = piece * COLUMN_PIECE, last = std::min(C, first + COLUMN_PIECE);
        std::fill(to + first, to + last, 0.0f);
        for (int n = 0; n < N; n++)
            for (int c = first; c < last; c++) to[c] += x[size_t(n) * C + c];
    });
}

// LayerNorm, or RMSNorm with a null bias: y (N, C), and the mean and the scale of each token (N,).
void raymill_norm(int threads, int N, int C, float epsilon, const float* x, const float* weight, const float* bias, float* y,
                  float* means, float* scales) {
    Threads::share(threads, N, [&](int n) {
        const float* row = x + size_t(n) * C;
        const float mean =
            bias == nullptr ? 0.0f : sum_of(C, [&](int c) { return load(row + c); }, [&](int c) { return row[c]; }) / C;
        const float variance = sum_of(
            C, [&](int c) { const F32 off = load(row + c) - mean; return off * off; },
            [&](int c) { return (row[c] - mean) * (row[c] - mean); }) / C;
        const float scale = 1.0f / std::sqrt(variance + epsilon);
        means[n] = mean, scales[n] = scale;
        for (int c = 0; c < C; c++)
            y[size_t(n) * C + c] = (row[c] - mean) * scale * weight[c] + (bias == nullptr ? 0.0f : bias[c]);
    });
}

// Its gradients: of x (N, C), of the weight (C,), and of the bias (C,), which may be null.
void raymill_norm_backward(int threads, int N, int C, const float* gradient, const float* x, const float* weight,
                           const float* means, const float* scales, float* of_x, float* of_weight, float* of_bias) {
    Threads::share(threads, N, [&](int n) {
        float *normed = scratch(0, C), *inner = scratch(1, C);
        const float *row = x + size_t(n) * C, *outer = gradient + size_t(n) * C;
        for (int c = 0; c < C; c++) {
            normed[c] = (row[c] - means[n]) * scales[n];
            inner[c] = outer[c] * weight[c];
        }
        const float along = sum_of_products(inner, normed, C) / C;
        const float mean =
            of_bias == nullptr ? 0.0f : sum_of(C, [&](int c) { return load(inner + c); }, [&](int c) { return inner[c]; }) / C;
        for (int c = 0; c < C; c++) of_x[size_t(n) * C + c] = scales[n] * ((inner[c] - mean) - normed[c] * along);
    });
    Threads::share(threads, (C + COLUMN_PIECE - 1) / COLUMN_PIECE, [&](int piece) {
        const int first = piece * COLUMN_PIECE, last = std::min(C, first + COLUMN_PIECE);
        std::fill(of_weight + first, of_weight + last, 0.0f);
        if (of_bias != nullptr) std::fill(of_bias + first, of_bias + last, 0.0f);
        for (int n = 0; n < N; n++) {
            const float *row = x + size_t(n) * C, *outer = gradient + size_t(n) * C, mean = means[n], scale = scales[n];
            for (int c = first; c < last; c++) of_weight[c] += outer[c] * ((row[c] - mean) * scale);
            if (of_bias != nullptr)
                for (int c = first; c < last; c++) of_bias[c] += outer[c];
        }
    });
}

// y = activation(x), n numbers; and its gradient.
void raymill_activation(int threads, size_t n, int activation, const float* x, float* y) {
    for_vectors(threads, n, [&](size_t i, int count) {
        store_some(y + i, activation_of(load_some(x + i, count), Activation(activation)).value, count);
    });
}
void raymill_activation_backward(int threads, size_t n, int activation, const float* gradient, const float* x, float* of_x) {
    for_vectors(threads, n, [&](size_t i, int count) {
        const F32 slope = activation_of(load_some(x + i, count), Activation(activation)).slope;
        store_some(of_x + i, load_some(gradient + i, count) * slope, count);
    });
}

// y = gate / (1 + exp(-gate)) * up, n numbers; and its gradients.
void raymill_gated(int threads, size_t n, const float* gate, const float* up, float* y) {
    for_vectors(threads, n, [&](size_t i, int count) {
        const F32 g = load_some(gate + i, count);
        store_some(y + i, g / (1.0f + exponential(-g)) * load_some(up + i, count), count);
    });
}
void raymill_gated_backward(int threads, size_t n, const float* gradient, const float* gate, const float* up, float* of_gate,
                            float* of_up) {
    for_vectors(threads, n, [&](size_t i, int count) {
        const F32 g = load_some(gate + i, count), outer = load_some(gradient + i, count);
        const F32 share = 1.0f / (1.0f + exponential(-g));
        store_some(of_up + i, outer * (g * share), count);
        store_some(of_gate + i, outer * load_some(up + i, count) * (share + g * share * (1.0f - share)), count);
    });
}

// The cosines and sines (N, D / 2) of positions (N,) times frequencies (D / 2,).
void raymill_turns(int threads, int N, int half, const int64_t* positions, const float* frequencies, float* cosines,
                   float* sines) {
    Threads::share(threads, N, [&](int n) {
        for (int i = 0; i < half; i++) {
            const Turn turn = turn_of(float(positions[n]) * frequencies[i]);
            cosines[size_t(n) * half + i] = turn.cosine;
            sines[size_t(n) * half + i] = turn.sine;
        }
    });
}

// Turns the pairs of heads x (N, H, D), or turns them back.
void raymill_rotate(int threads, int N, int H, int D, const float* x, const float* cosines, const float* sines, bool back,
                    float* to) {
    const int half = D / 2;
    Threads::share(threads, N, [&](int n) {
        for (int h = 0; h < H; h++) {
            const size_t place = (size_t(n) * H + h) * D;
            for (int i = 0; i < half; i++) {
                const float cosine = cosines[size_t(n) * half + i], turned = sines[size_t(n) * half + i];
                const float sine = back ? -turned : turned, first = x[place + i], second = x[place + half + i];
                to[place + i] = first * cosine - second * sine;
                to[place + half + i] = second * cosine + first * sine;
            }
        }
    });
}

// Attention: y (B, T, H, D) of q (B, T, H, D), k and v (B, T, G, D), whose tokens lie `strides` (of q, k, v) apart, where token i of a
// row sees tokens starts (B, T)[i] … i.
void raymill_attention(int threads, int B, int T, int H, int G, int D, const float* q, const float* k, const float* v,
                       const size_t* strides, const int32_t* starts, float* y) {
    const int each = H / G;
    Threads::share(threads, B * H, [&](int piece) {
        const int b = piece / H, h = piece % H, g = h / each;
        const Head head = {T, D, starts + size_t(b) * T, 1.0f / std::sqrt(float(D))};
        float *keys = scratch(0, size_t(T) * D), *values = scratch(1, size_t(T) * D), *queries = scratch(2, size_t(T) * D);
        gather_head(q + b * T * strides[0] + h * D, strides[0], T, D, queries);
        gather_head(k + b * T * strides[1] + g * D, strides[1], T, D, keys);
        gather_head(v + b * T * strides[2] + g * D, strides[2], T, D, values);
        float *packed = scratch(3, panels_of(T) * D * PANEL), *shares = scratch(4, size_t(ROWS) * T);
        float *panel = scratch(5, size_t(T) * PANEL), *rows = scratch(6, size_t(ROWS) * T), *sums = scratch(7, size_t(ROWS) * D);
        pack_transposed(keys, T, D, packed);
        for (int first = 0; first < T; first += ROWS) {
            const int last = std::min(T, first + ROWS);
            head.shares(queries + size_t(first) * D, packed, first, last, shares);
            std::fill_n(sums, size_t(last - first) * D, 0.0f);
            add_product(last - first, last, D, {shares, size_t(last), 1}, values, panel, rows, sums);
            for (int i = first; i < last; i++)
                std::copy_n(sums + size_t(i - first) * D, D, y + ((size_t(b) * T + i) * H + h) * D);
        }
    });
}

// Its gradients, as q, k, v lie without gaps: (B, T, H, D) and twice (B, T, G, D). One thread makes those of a head of keys.
void raymill_attention_backward(int threads, int B, int T, int H, int G, int D, const float* gradient, const float* y,
                                const float* q, const float* k, const float* v, const size_t* strides,
                                const int32_t* starts, float* of_q, float* of_k, float* of_v) {
    const int each = H / G;
    Threads::share(threads, B * G, [&](int piece) {
        const int b = piece / G, g = piece % G;
        const Head head = {T, D, starts + size_t(b) * T, 1.0f / std::sqrt(float(D))};
        const size_t numbers = size_t(T) * D;
        std::vector<float> keys(numbers), values(numbers), sums_k(numbers), sums_v(numbers), queries(numbers), outer(numbers);
        gather_head(k + b * T * strides[1] + g * D, strides[1], T, D, keys.data());
        gather_head(v + b * T * strides[2] + g * D, strides[2], T, D, values.data());
        std::vector<float> packed_k(panels_of(T) * D * PANEL), packed_v(packed_k.size());
        pack_transposed(keys.data(), T, D, packed_k.data());
        pack_transposed(values.data(), T, D, packed_v.data());
        std::vector<float> shares(size_t(ROWS) * T), slopes(shares.size()), rows(size_t(T) * ROWS), panel(size_t(T) * PANEL),
            of_rows(size_t(ROWS) * D);
        for (int h = g * each; h < (g + 1) * each; h++) {
            gather_head(q + b * T * strides[0] + h * D, strides[0], T, D, queries.data());
            gather_head(gradient + (size_t(b) * T * H + h) * D, size_t(H) * D, T, D, outer.data());
            for (int first = 0; first < T; first += ROWS) {
                const int last = std::min(T, first + ROWS), count = last - first;
                const float *own_queries = &queries[size_t(first) * D], *own_outer = &outer[size_t(first) * D];
                head.shares(own_queries, packed_k.data(), first, last, shares.data());
                head.scores(own_outer, packed_v.data(), first, last, slopes.data());
                for (int i = first; i < last; i++) {
                    const size_t row = size_t(i - first) * last;
                    const float along = sum_of_products(own_outer + size_t(i - first) * D, y + ((size_t(b) * T + i) * H + h) * D, D);
                    for (int j = 0; j < last; j++) slopes[row + j] = shares[row + j] * (slopes[row + j] - along) * head.scale;
                }
                const Numbers2 by_query = {shares.data(), size_t(last), 1}, slope_by_query = {slopes.data(), size_t(last), 1};
                add_product(last, count, D, by_query.transposed(), own_outer, panel.data(), rows.data(), sums_v.data());
                add_product(last, count, D, slope_by_query.transposed(), own_queries, panel.data(), rows.data(), sums_k.data());
                std::fill_n(of_rows.data(), size_t(count) * D, 0.0f);
                add_product(count, last, D, slope_by_query, keys.data(), panel.data(), rows.data(), of_rows.data());
                for (int i = first; i < last; i++)
                    std::copy_n(&of_rows[size_t(i - first) * D], D, of_q + ((size_t(b) * T + i) * H + h) * D);
            }
        }
        for (int i = 0; i < T; i++) {
            std::copy_n(&sums_k[size_t(i) * D], D, of_k + ((size_t(b) * T + i) * G + g) * D);
            std::copy_n(&sums_v[size_t(i) * D], D, of_v + ((size_t(b) * T + i) * G + g) * D);
        }
    });
}

// Adds the rows of a gradient (N, C), in order, to the rows of a weight's (V, C) that the ids (N,) name.
void raymill_add_rows(int threads, int N, int C, const int64_t* ids, const float* gradient, float* of_weight) {
    Threads::share(threads, (C + COLUMN_PIECE - 1) / COLUMN_PIECE, [&](int piece) {
        const int first = piece * COLUMN_PIECE, last = std::min(C, first + COLUMN_PIECE);
        for (int n = 0; n < N; n++) {
            const float* from = gradient + size_t(n) * C;
            float* to = of_weight + size_t(ids[n]) * C;
            for (int c = first; c < last; c++) to[c] += from[c];
        }
    });
}

// The losses (K,) of scores (K, V) and labels (K,), of which those below 0 count as none; the scores become their gradients,
// times `factor`.
void raymill_losses(int threads, int K, int V, const int64_t* labels, float factor, float* scores, float* losses) {
    Threads::share(threads, K, [&](int n) {
        float* row = scores + size_t(n) * V;
        if (labels[n] < 0) {
            losses[n] = 0.0f;
            std::fill_n(row, V, 0.0f);
            return;
        }
        const float top = *std::max_element(row, row + V), of_label = row[labels[n]] - top;
        for (int i = 0; i < V; i++) row[i] -= top;
        to_exponentials(row, V);
        const float total = sum_of(V, [&](int i) { return load(row + i); }, [&](int i) { return row[i]; });
        losses[n] = float(logarithm(total)) - of_label;
        const float share = factor / total;
        const float label_gradient = (row[labels[n]] - total) * share;
        for (int i = 0; i < V; i++) row[i] *= share;
        row[labels[n]] = label_gradient;
    });
}

// AdamW's update of n values by their gradient: times `kept`, minus `step` times mean / (root of square / `root_of_second` + epsilon).
void raymill_update_by_adamw(int threads, size_t n, float* values, const float* gradient, float* means, float* squares, float kept,
                   float step, float beta1, float beta2, float root_of_second, float epsilon) {
    for_vectors(threads, n, [&](size_t i, int count) {
        const F32 g = load_some(gradient + i, count);
        const F32 mean = load_some(means + i, count) * beta1 + g * (1.0f - beta1);
        const F32 square = load_some(squares + i, count) * beta2 + g * g * (1.0f - beta2);
        const F32 change = mean / (square_root(square) / root_of_second + epsilon);
        store_some(means + i, mean, count);
        store_some(squares + i, square, count);
        store_some(values + i, load_some(values + i, count) * kept - change * step, count);
    });
}

// The sums of squares of each `block` of n values; the last may be short.
void raymill_square_sums(int threads, size_t n, size_t block, const float* values, double* sums) {
    Threads::share(threads, int((n + block - 1) / block), [&](int piece) {
        const size_t first = piece * block, count = std::min(block, n - first);
        sums[piece] = sum_of_products(values + first, values + first, int(count));
    });
}

// Numbers (n,) of the standard normal distribution, by their places and a seed (Box and Muller, 1958; SplitMix64: Steele,
// Lea and Flood, 2014).
void raymill_normals(int threads, size_t n, uint64_t seed, float* to) {
    constexpr size_t PIECE = 1 << 14;
    Threads::share(threads, int((n + PIECE - 1) / PIECE), [&](int piece) {
        for (size_t i = piece * PIECE; i < std::min(n, (piece + 1) * PIECE); i++) {
            double uniform[2];
            for (uint64_t j = 0; j < 2; j++) {
                uint64_t z = seed + (2 * i + j + 1) * 0x9e3779b97f4a7c15ull;
                z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
                z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
                uniform[j] = (double((z ^ (z >> 31)) >> 11) + 0.5) / 9007199254740992.0;  // 2^53
            }
            to[i] = float(std::sqrt(-2 * logarithm(uniform[0]))) * turn_of(float(6.283185307179586 * uniform[1])).cosine;
        }
    });
}
}
#pragma GCC visibility pop
