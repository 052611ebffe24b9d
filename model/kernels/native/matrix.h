// Keeps weights in panels of output columns, in the order in which they are read. Rows of inputs share each load.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include <sys/mman.h>

#include "numbers.h"
#include "tiles.h"

// The rows, and the vectors of a panel's columns, whose sums are in registers at the same time, with the weights and an
// input: 8 x 3 + 3 + 1 of 32 registers, 6 x 2 + 2 + 1 of 16.
constexpr int TILE = REGISTERS == 32 ? 8 : 6, VECTORS = REGISTERS == 32 ? 3 : 2;
constexpr int PANEL = VECTORS * LANES;
constexpr int PREFETCH_BYTES = 4096;
constexpr size_t HUGE_PAGE = 2 << 20;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(size_t count, bool zeroed = false) {
    const size_t num_bytes = (count * sizeof(T) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* memory = std::aligned_alloc(HUGE_PAGE, num_bytes);
    if (memory == nullptr) throw std::bad_alloc();  // see raymill_create
    madvise(memory, num_bytes, MADV_HUGEPAGE);  // weights are read end to end for each token
    if (zeroed) std::memset(memory, 0, num_bytes);
    return Buffer<T>(static_cast<T*>(memory));
}

// A weight (K, N) in panels: [panel][K / GROUP][column][GROUP], padded with zeros.
template <class Kind>
struct Matrix {
    int num_in = 0, num_out = 0, depth = 0, panels = 0;
    Buffer<typename Kind::Number> numbers;
    std::vector<float> bias;  // (N padded)
    std::vector<float> unit, offset;  // (N padded), of quantized weights: see result()

    Matrix() = default;
    Matrix(int num_in, int num_out, const float* weight, size_t in_stride, size_t out_stride, const float* bias_values)
        : num_in(num_in), num_out(num_out), depth(padded_to_depth<Kind>(num_in)),
          panels((num_out + PANEL - 1) / PANEL), numbers(allocate<typename Kind::Number>(size_t(panels) * depth * PANEL, true)),
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
                    numbers[index(k, n)] = number;
                    if constexpr (Kind::QUANTIZED) offset[n] += Kind::ZERO * float(number);
                }
        if (bias_values != nullptr) std::copy_n(bias_values, num_out, bias.begin());
    }

    size_t index(int k, int n) const {
        const size_t group = size_t(n / PANEL) * (depth / Kind::GROUP) + k / Kind::GROUP;
        return (group * PANEL + n % PANEL) * Kind::GROUP + k % Kind::GROUP;
    }
    float at(int k, int n) const {
        const float value = Kind::value(numbers[index(k, n)]);
        return Kind::QUANTIZED ? value * unit[n] : value;
    }
    // Turns the sums of a vector of columns from n on into results; inputs are in units of `input_unit`.
    F32 result(typename Kind::Sums sums, int n, float input_unit) const {
        if constexpr (Kind::QUANTIZED)
            return (__builtin_convertvector(sums, F32) - load(&offset[n])) * (load(&unit[n]) * input_unit) + load(&bias[n]);
        else
            return sums + load(&bias[n]);
    }
    const typename Kind::Number* panel(int p) const { return numbers.get() + size_t(p) * depth * PANEL; }
};

// Multiplies M rows of inputs with a panel. A separate function, because GCC runs out of registers if it is inlined.
template <class Kind, int M>
__attribute__((noinline)) void multiply_tile(const typename Kind::Number* panel, const typename Kind::Element* inputs,
                                             int depth, typename Kind::Sums (*to)[VECTORS]) {
    constexpr int GROUP = Kind::GROUP;
    typename Kind::Sums sums[M][VECTORS] = {};
    for (int k = 0; k < depth; k += GROUP, panel += PANEL * GROUP) {
        // With AVX2 and 8 rows, weights come from memory 1.16 times as fast. One or two rows, and AVX-512, got slower.
        if (LANES == 8 && M > 2) __builtin_prefetch(reinterpret_cast<const char*>(panel) + PREFETCH_BYTES);
        decltype(Kind::weights(panel)) weights[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) weights[v] = Kind::weights(panel + v * LANES * GROUP);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const uint32_t input = read_as<uint32_t>(inputs + size_t(m) * depth + k);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[m][v] = Kind::multiply_add(sums[m][v], weights[v], input);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++) to[m][v] = sums[m][v];
}

// Does the same for `num_rows` rows, at most M.
template <class Kind, int M>
void multiply_rows(const typename Kind::Number* panel, const typename Kind::Element* inputs, int depth, int num_rows,
                   typename Kind::Sums (*to)[VECTORS]) {
    if constexpr (M > 1)
        if (num_rows < M) return multiply_rows<Kind, M - 1>(panel, inputs, depth, num_rows, to);
    multiply_tile<Kind, M>(panel, inputs, depth, to);
}

// Calls done(row, vector, sums) with the products of rows `first` to `last` - 1 and a panel.
template <class Kind, class Done>
void multiply(const typename Kind::Number* panel, const typename Kind::Element* inputs, int depth, int first, int last,
              const Done& done) {
#ifdef RAYMILL_TILES
    // Integers have the same sums either way. Those of bf16 do not, so all must be computed in one way.
    if constexpr (uses_tiles<Kind>)
        if (has_tiles() && (!Kind::QUANTIZED || last - first > TILE))
            return multiply_by_tiles<Kind>(panel, inputs, depth, first, last, done);
#endif
    typename Kind::Sums sums[TILE][VECTORS];
    for (int row = first, tiles = (last - first + TILE - 1) / TILE; tiles > 0; tiles--) {
        const int num_rows = (last - row + tiles - 1) / tiles;  // 4 and 4 rather than 6 and 2
        multiply_rows<Kind, TILE>(panel, inputs + size_t(row) * depth, depth, num_rows, sums);
        for (int m = 0; m < num_rows; m++)
            for (int v = 0; v < VECTORS; v++) done(row + m, v, sums[m][v]);
        row += num_rows;
    }
}
