// Products of matrices that both change from step to step: each number is one sum along the inner dimension, in its order.

#pragma once

#include <utility>

#include "matrix.h"
#include "team.h"

// A matrix in memory: number (i, j) lies at i * row + j * column.
struct Numbers2 {
    const float* at;
    size_t row, column;
    float operator()(size_t i, size_t j) const { return at[i * row + j * column]; }
    Numbers2 from_row(size_t i) const { return {at + i * row, row, column}; }
    Numbers2 transposed() const { return {at, column, row}; }
};

// Mixes two vectors number by number: their first halves, or from LANES / 2 on their second ones.
template <int FROM, int... i>
inline F32 mixed(F32 a, F32 b, std::integer_sequence<int, i...>) {
    return __builtin_shuffle(a, b, I32{(FROM + i / 2 + i % 2 * LANES)...});
}

// Makes columns of rows: each round moves one bit of a number's row into its column, and one of its column into its row.
inline void transpose(F32 (&rows)[LANES]) {
    constexpr std::make_integer_sequence<int, LANES> lanes;
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        F32 next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = mixed<0>(rows[i], rows[i + LANES / 2], lanes);
            next[2 * i + 1] = mixed<LANES / 2>(rows[i], rows[i + LANES / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

// Copies columns `first` to `first` + WIDTH - 1 of a matrix (K, N), row behind row; those beyond N are zeros.
template <int WIDTH>
void pack(const Numbers2& numbers, int depth, int first, int num_columns, float* to) {
    const int width = std::min(WIDTH, num_columns - first);
    if (width < WIDTH) std::fill_n(to, size_t(depth) * WIDTH, 0.0f);
    const Numbers2 from = {numbers.at + first * numbers.column, numbers.row, numbers.column};
    int k = 0;
    if (from.column == 1 && width == WIDTH) {
        for (; k < depth; k++) std::memcpy(to + size_t(k) * WIDTH, from.at + k * from.row, WIDTH * sizeof(float));
    } else if (from.row == 1) {  // number by number, this took as long as a tenth of the product
        for (; k + LANES <= depth; k += LANES) {
#pragma GCC unroll 4
            for (int n = 0; n < WIDTH; n += LANES) {
                F32 some[LANES] = {};
                for (int i = 0; i < std::min(LANES, WIDTH - n); i++)
                    if (n + i < width) some[i] = load(from.at + k + (n + i) * from.column);
                transpose(some);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    std::memcpy(to + size_t(k + i) * WIDTH + n, &some[i], std::min(LANES, WIDTH - n) * sizeof(float));
            }
        }
    }
    for (; k < depth; k++)
        for (int n = 0; n < width; n++) to[size_t(k) * WIDTH + n] = from(k, n);
}

// Continues the sums of the rows of a tile and the columns of a panel, along `depth` numbers more of each.
__attribute__((noinline)) inline void continue_sums(const float* panel, const float* tile, int depth, bool begins,
                                                    float* to) {
    F32 sums[TILE][VECTORS] = {};
    if (!begins)
        for (int m = 0; m < TILE; m++)
            for (int v = 0; v < VECTORS; v++) sums[m][v] = load(to + (m * VECTORS + v) * LANES);
    for (int k = 0; k < depth; k++, panel += PANEL, tile += TILE) {
        F32 weights[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) weights[v] = load(panel + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < TILE; m++) {
            const F32 input = splat(tile[m]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[m][v] = fused(weights[v], input, sums[m][v]);
        }
    }
    for (int m = 0; m < TILE; m++)
        for (int v = 0; v < VECTORS; v++) store(to + (m * VECTORS + v) * LANES, sums[m][v]);
}

// Copies a matrix (M, K) row by row.
inline void pack_rows(const Numbers2& numbers, int first, int last, int depth, float* to) {
    for (int m = first; m < last; m++) {
        float* row = to + size_t(m - first) * depth;
        if (numbers.column == 1) std::copy_n(numbers.at + m * numbers.row, depth, row);
        else for (int k = 0; k < depth; k++) row[k] = numbers(m, k);
    }
}

inline void pack_panel(const Numbers2& numbers, int depth, int first, int num_columns, float* to) {
    pack<PANEL>(numbers, depth, first, num_columns, to);
}

// Calls done(row, column, sums, valid) with the vectors of rows (num_rows, K) times a panel whose first column is `first`.
template <class Done>
void multiply_panel(const float* panel, const float* rows, int depth, int num_rows, int first, int num_columns,
                    const Done& done) {
    multiply<Fp32>(panel, rows, depth, 0, num_rows, [&](int row, int vector, F32 sums) {
        const int column = first + vector * LANES, valid = num_columns - column;
        if (valid > 0) done(row, column, sums, std::min(valid, LANES));
    });
}

inline float sum_of_products(const float* x, const float* y, int count) {
    return sum_of(count, [&](int i) { return load(x + i) * load(y + i); }, [&](int i) { return x[i] * y[i]; });
}
