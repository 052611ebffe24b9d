// Products of matrices that both change from step to step: each number is one sum along the inner dimension, in its order.

#pragma once

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

// Copies columns `first` to `first` + PANEL - 1 of a matrix (K, N) as a panel; those beyond N are zeros.
inline void pack_panel(const Numbers2& numbers, int depth, int first, int num_columns, float* to) {
    const int width = std::min(PANEL, num_columns - first);
    if (width < PANEL) std::fill_n(to, size_t(depth) * PANEL, 0.0f);
    if (numbers.column == 1) {
        for (int k = 0; k < depth; k++) std::copy_n(numbers.at + k * numbers.row + first, width, to + size_t(k) * PANEL);
        return;
    }
    for (int n = 0; n < width; n++)
        for (int k = 0; k < depth; k++) to[size_t(k) * PANEL + n] = numbers(k, first + n);
}

// Copies a matrix (M, K) row by row.
inline void pack_rows(const Numbers2& numbers, int first, int last, int depth, float* to) {
    for (int m = first; m < last; m++) {
        float* row = to + size_t(m - first) * depth;
        if (numbers.column == 1) std::copy_n(numbers.at + m * numbers.row, depth, row);
        else for (int k = 0; k < depth; k++) row[k] = numbers(m, k);
    }
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

inline void store_some(float* to, F32 numbers, int count) {
    if (count == LANES) return store(to, numbers);
    for (int i = 0; i < count; i++) to[i] = numbers[i];
}

inline F32 load_some(const float* from, int count) {
    if (count == LANES) return load(from);
    F32 numbers = {};
    for (int i = 0; i < count; i++) numbers[i] = from[i];
    return numbers;
}

inline float sum_of_products(const float* x, const float* y, int count) {
    return sum_of(count, [&](int i) { return load(x + i) * load(y + i); }, [&](int i) { return x[i] * y[i]; });
}
