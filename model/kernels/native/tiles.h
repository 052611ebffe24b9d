// Multiplies with a processor's matrix unit (AMX): 16 rows of inputs by 16 columns of weights, 64 bytes deep, at once.
//
// The sum of a row and a column has the same order whatever the tile's other rows hold, so rows without input are
// multiplied like the others and dropped.

#pragma once

#include "numbers.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define RAYMILL_TILES
#endif

// Whether the unit multiplies this kind of numbers.
template <class Kind>
#ifdef RAYMILL_TILES
constexpr bool uses_tiles = Kind::GROUP > 1;
#else
constexpr bool uses_tiles = false;
#endif

#ifdef RAYMILL_TILES

#include <sys/syscall.h>
#include <unistd.h>

constexpr int TILE_ROWS = 16;
constexpr int TILE_GROUPS = 16;  // of inputs, one under the other in a tile of weights

// Whether Linux lets this process use the unit. It must ask once, because each thread's state grows by 8 KiB.
inline bool has_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

// Configures eight full tiles for the calling thread, once.
inline void shape_tiles() {
    struct Shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    static thread_local const bool done = [] {
        Shapes shapes;
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = TILE_ROWS;
        _tile_loadconfig(&shapes);
        return true;
    }();
    (void)done;
}

// Adds the products of tile 6, inputs, and tile 7, weights. A macro, because the intrinsics need literal tile numbers.
#define ADD_PRODUCTS(sums)                                   \
    if constexpr (Kind::QUANTIZED) _tile_dpbusd(sums, 6, 7); \
    else _tile_dpbf16ps(sums, 6, 7)

// Calls done(row, vector, sums) for `num_rows` rows, at most 32, with their products with a panel of 48 columns. Tiles 0
// to 2 are the sums of the first 16 rows and 3 to 5 those of the others, 6 inputs, 7 weights.
template <class Kind, bool two, class Done>
void multiply_tile_rows(const typename Kind::Number* panel, const typename Kind::Element* inputs, int depth, int row,
                        int num_rows, const Done& done) {
    constexpr int VECTOR = LANES * Kind::GROUP, PANEL_BYTES = 3 * VECTOR_BYTES, TILE_DEPTH = TILE_GROUPS * Kind::GROUP;
    const size_t input_bytes = size_t(depth) * sizeof *inputs;
    const auto* more_inputs = inputs + size_t(TILE_ROWS) * depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    if constexpr (two) {
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
    }
    for (int k = 0; k < depth; k += TILE_DEPTH, panel += 3 * LANES * TILE_DEPTH) {
        _tile_loadd(6, inputs + k, input_bytes);
        _tile_loadd(7, panel, PANEL_BYTES);
        ADD_PRODUCTS(0);
        _tile_loadd(7, panel + VECTOR, PANEL_BYTES);
        ADD_PRODUCTS(1);
        _tile_loadd(7, panel + 2 * VECTOR, PANEL_BYTES);
        ADD_PRODUCTS(2);
        if constexpr (two) {
            _tile_loadd(6, more_inputs + k, input_bytes);
            ADD_PRODUCTS(5);
            _tile_loadd(7, panel + VECTOR, PANEL_BYTES);
            ADD_PRODUCTS(4);
            _tile_loadd(7, panel, PANEL_BYTES);
            ADD_PRODUCTS(3);
        }
    }
    alignas(64) typename Kind::Sums sums[(two ? 2 : 1) * TILE_ROWS][3];
    constexpr int SUM_BYTES = sizeof sums[0];
    _tile_stored(0, &sums[0][0], SUM_BYTES);
    _tile_stored(1, &sums[0][1], SUM_BYTES);
    _tile_stored(2, &sums[0][2], SUM_BYTES);
    if constexpr (two) {
        _tile_stored(3, &sums[TILE_ROWS][0], SUM_BYTES);
        _tile_stored(4, &sums[TILE_ROWS][1], SUM_BYTES);
        _tile_stored(5, &sums[TILE_ROWS][2], SUM_BYTES);
    }
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < 3; v++) done(row + m, v, sums[m][v]);
}

template <class Kind, class Done>
void multiply_by_tiles(const typename Kind::Number* panel, const typename Kind::Element* inputs, int depth, int first,
                       int last, const Done& done) {
    shape_tiles();
    for (int row = first; row < last; row += 2 * TILE_ROWS) {
        const auto* from = inputs + size_t(row) * depth;
        const int num_rows = std::min(2 * TILE_ROWS, last - row);
        if (num_rows > TILE_ROWS) multiply_tile_rows<Kind, true>(panel, from, depth, row, num_rows, done);
        else multiply_tile_rows<Kind, false>(panel, from, depth, row, num_rows, done);
    }
}

#endif
