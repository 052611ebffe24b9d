// Attention of one head over one row of tokens.

#pragma once

#include <algorithm>
#include <cstdint>

#include "elementary.h"
#include "products.h"

constexpr int ROWS = 48;  // of a piece of work, a multiple of both tiles: the same number on every processor

// Attention of one row of T tokens in one head, over what each token may see: tokens starts[i] … i of its row.
struct Head {
    int num_tokens, width;
    const int32_t* starts;  // (T,)
    float scale;

    // The scores of tokens `first` to `last` - 1 with all up to them become shares, in `to` (rows, last), of a packed
    // K^T (D, last).
    void shares(const float* queries, const float* keys_transposed, int first, int last, float* to) const {
        scores(queries, keys_transposed, first, last, to);
        for (int i = first; i < last; i++) {
            float* row = to + size_t(i - first) * last;
            const int start = starts[i];
            for (int j = 0; j < last; j++) row[j] = j < start || j > i ? 0.0f : row[j] * scale;
            const float top = *std::max_element(row + start, row + i + 1);
            const int count = i + 1 - start;
            float* seen = row + start;
            for (int j = 0; j < count; j++) seen[j] -= top;
            to_exponentials(seen, count);
            const float total = sum_of(count, [&](int j) { return load(seen + j); }, [&](int j) { return seen[j]; });
            for (int j = 0; j < count; j++) seen[j] /= total;
        }
    }

    // Rows (last - first, D) times a packed matrix (D, last).
    void scores(const float* rows, const float* packed, int first, int last, float* to) const {
        for (int p = 0; p * PANEL < last; p++)
            multiply_panel(packed + size_t(p) * width * PANEL, rows, width, last - first, p * PANEL, last,
                           [&](int row, int column, F32 sums, int valid) {
                               store_some(to + size_t(row) * last + column, sums, valid);
                           });
    }
};

// Copies a head's numbers (T, D) out of rows with a stride.
inline void gather_head(const float* from, size_t stride, int num_tokens, int width, float* to) {
    for (int i = 0; i < num_tokens; i++) std::copy_n(from + i * stride, width, to + size_t(i) * width);
}

// Packs X (T, D), transposed, as panels of (D, T).
inline void pack_transposed(const float* x, int num_tokens, int width, float* to) {
    const Numbers2 transposed = {x, 1, size_t(width)};
    for (int p = 0; p * PANEL < num_tokens; p++) pack_panel(transposed, width, p * PANEL, num_tokens, to + size_t(p) * width * PANEL);
}

inline size_t panels_of(int num_columns) { return (num_columns + PANEL - 1) / PANEL; }

// Adds A (M, K) times X (K, D), of which rows lie behind each other, to sums (M, D).
inline void add_product(int M, int K, int width, const Numbers2& a, const float* x, float* packed, float* rows, float* to) {
    pack_rows(a, 0, M, K, rows);
    for (int first = 0; first < width; first += PANEL) {
        pack_panel({x, size_t(width), 1}, K, first, width, packed);
        multiply_panel(packed, rows, K, M, first, width, [&](int row, int column, F32 sums, int valid) {
            float* at = to + size_t(row) * width + column;
            store_some(at, load_some(at, valid) + sums, valid);
        });
    }
}
