// Weights in panels of 48 output columns, in the order in which they are read; 8 rows of inputs share each load.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "numbers.h"
#include "tiles.h"

constexpr int PANEL = 3 * LANES;
constexpr int TILE = 8;  // 8 rows x 3 vectors of sums, 3 of weights, 1 of inputs: 28 of 32 registers
constexpr size_t HUGE_PAGE = 2 << 20;

template <class T>
T* allocate(size_t count, bool zeroed) {
    const size_t num_bytes = (count * sizeof(T) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* memory = std::aligned_alloc(HUGE_PAGE, num_bytes);
    if (memory == nullptr) std::abort();
    madvise(memory, num_bytes, MADV_HUGEPAGE);  // weights are read end to end for each token
    if (zeroed) std::memset(memory, 0, num_bytes);
    return static_cast<T*>(memory);
}

template <class T>
struct Buffer {
    T* data = nullptr;
    Buffer() = default;
    explicit Buffer(size_t count, bool zeroed = false) : data(allocate<T>(count, zeroed)) {}
    Buffer(Buffer&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data, other.data);
        return *this;
    }
    ~Buffer() { std::free(data); }
};

// A weight (K, N) in panels: [panel][K / GROUP][column][GROUP], padded with zeros.
template <class Kind>
struct Matrix {
    int num_in = 0, num_out = 0, groups = 0, panels = 0;
    Buffer<typename Kind::Number> numbers;
    std::vector<float> bias;  // (N padded)
    std::vector<float> unit, offset;  // (N padded), of quantized weights: see result()

    Matrix() = default;
    Matrix(int num_in, int num_out, const float* weight, size_t in_stride, size_t out_stride, const float* bias_values)
        : num_in(num_in), num_out(num_out), groups(groups_of<Kind>(num_in)),
          panels((num_out + PANEL - 1) / PANEL), numbers(size_t(panels) * groups * PANEL * Kind::GROUP, true),
          bias(size_t(panels) * PANEL, 0.0f) {
        std::vector<float> per_unit(num_out, 1.0f);
        if constexpr (Kind::QUANTIZED) {
            unit.assign(bias.size(), 0.0f);
            offset.assign(bias.size(), 0.0f);
            for (int n = 0; n < num_out; n++) {
                for (int k = 0; k < num_in; k++) unit[n] = std::max(unit[n], std::abs(weight[k * in_stride + n * out_stride]));
                unit[n] /= 127;
                per_unit[n] = unit[n] > 0 ? 1 / unit[n] : 0.0f;
            }
        }
        for (int first = 0; first < num_out; first += PANEL)
            for (int k = 0; k < num_in; k++)
                for (int n = first; n < std::min(first + PANEL, num_out); n++) {
                    const auto number = Kind::from(weight[k * in_stride + n * out_stride] * per_unit[n]);
                    numbers.data[index(k, n)] = number;
                    if constexpr (Kind::QUANTIZED) offset[n] += Kind::ZERO * float(number);
                }
        if (bias_values != nullptr) std::copy_n(bias_values, num_out, bias.begin());
    }

    size_t index(int k, int n) const {
        const size_t group = size_t(n / PANEL) * groups + k / Kind::GROUP;
        return (group * PANEL + n % PANEL) * Kind::GROUP + k % Kind::GROUP;
    }
    float at(int k, int n) const {
        const float value = Kind::value(numbers.data[index(k, n)]);
        return Kind::QUANTIZED ? value * unit[n] : value;
    }
    // Of the sums of 16 columns from n on, with inputs in units of `input_unit`.
    F32 result(typename Kind::Sums sums, int n, float input_unit) const {
        if constexpr (Kind::QUANTIZED)
            return (__builtin_convertvector(sums, F32) - load(&offset[n])) * (load(&unit[n]) * input_unit) + load(&bias[n]);
        else
            return sums + load(&bias[n]);
    }
    const I32* panel(int p) const {
        return reinterpret_cast<const I32*>(numbers.data) + size_t(p) * groups * (PANEL / LANES);
    }
};

// Calls done(row, sums) with the products of M rows of inputs (groups each) and a panel.
template <class Kind, int M, class Done>
inline void multiply_tile(const I32* panel, const int32_t* inputs, int groups, int row, const Done& done) {
    typename Kind::Sums sums[M][3] = {};
    for (int g = 0; g < groups; g++, panel += 3) {
        const I32 w0 = panel[0], w1 = panel[1], w2 = panel[2];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const int32_t input = inputs[size_t(m) * groups + g];
            sums[m][0] = Kind::multiply_add(sums[m][0], w0, input);
            sums[m][1] = Kind::multiply_add(sums[m][1], w1, input);
            sums[m][2] = Kind::multiply_add(sums[m][2], w2, input);
        }
    }
    for (int m = 0; m < M; m++) done(row + m, sums[m]);
}

template <class Kind, class Done>
void multiply(const I32* panel, const int32_t* inputs, int groups, int first, int last, const Done& done) {
#ifdef RAYMILL_TILES
    // Whole numbers have the same sums either way; those of bf16 do not, so that one way must do for all.
    if constexpr (uses_tiles<Kind>)
        if (has_tiles() && (!Kind::QUANTIZED || last - first > TILE))
            return multiply_by_tiles<Kind>(panel, inputs, groups, first, last, done);
#endif
    for (int row = first; row < last; row += TILE) {
        const int32_t* from = inputs + size_t(row) * groups;
        switch (std::min(TILE, last - row)) {
            case 1: multiply_tile<Kind, 1>(panel, from, groups, row, done); break;
            case 2: multiply_tile<Kind, 2>(panel, from, groups, row, done); break;
            case 3: multiply_tile<Kind, 3>(panel, from, groups, row, done); break;
            case 4: multiply_tile<Kind, 4>(panel, from, groups, row, done); break;
            case 5: multiply_tile<Kind, 5>(panel, from, groups, row, done); break;
            case 6: multiply_tile<Kind, 6>(panel, from, groups, row, done); break;
            case 7: multiply_tile<Kind, 7>(panel, from, groups, row, done); break;
            default: multiply_tile<Kind, 8>(panel, from, groups, row, done);
        }
    }
}
