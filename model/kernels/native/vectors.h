// Vectors of 32-bit numbers, as wide as the processor's registers. For wider ones GCC keeps sums in memory: with 64 bytes
// on AVX2 a matrix product ran at 6 GFLOP/s, with 32 at 95.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
constexpr int LANES = 16, REGISTERS = 32;
#define WIDE(operation) _mm512_##operation  // the intrinsic of that name for these vectors
using Wide = __m512i;
using FloatWide = __m512;
using Half = __m256i;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#define WIDE(operation) _mm256_##operation
using Wide = __m256i;
using FloatWide = __m256;
using Half = __m128i;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

constexpr int VECTOR_BYTES = 4 * LANES;
typedef float F32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(VECTOR_BYTES)));
typedef float F32Any __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

// Reads what lies at any address.
template <class To>
inline To read_as(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return read_as<To>(&from);
}

inline F32 splat(float value) { return value - F32{}; }

// Returns a * b + c, rounded once. It is asked for by name, and the compiler may not fuse by itself (-ffp-contract=off):
// else each processor would round in other places.
inline F32 fused(F32 a, F32 b, F32 c) {
#if defined(WIDE) && defined(__FMA__)
    return F32(WIDE(fmadd_ps)(FloatWide(a), FloatWide(b), FloatWide(c)));
#elif defined(__aarch64__)
    return F32(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
    for (int i = 0; i < LANES; i++) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
#endif
}

inline F32 square_root(F32 x) {
#if defined(WIDE)
    return F32(WIDE(sqrt_ps)(FloatWide(x)));
#elif defined(__aarch64__)
    return F32(vsqrtq_f32(float32x4_t(x)));
#else
    for (int i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

inline F32 load(const float* from) { return *reinterpret_cast<const F32Any*>(from); }
inline void store(float* to, F32 value) { *reinterpret_cast<F32Any*>(to) = value; }

inline void store_some(float* to, F32 numbers, int count) {
    if (count == LANES) return store(to, numbers);
    std::memcpy(to, &numbers, count * sizeof *to);
}

inline F32 load_some(const float* from, int count) {
    if (count == LANES) return load(from);
    F32 numbers = {};
    std::memcpy(&numbers, from, count * sizeof *from);
    return numbers;
}

inline float sum(F32 v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// Sums are kept in this many columns, whatever the processor's width, and the columns are added up in order.
constexpr int COLUMNS = 16, VECTORS_OF_COLUMNS = COLUMNS / LANES;

inline float sum_of_columns(const F32* sums) {
    float total = 0;
    for (int v = 0; v < VECTORS_OF_COLUMNS; v++)
        for (int i = 0; i < LANES; i++) total += sums[v][i];
    return total;
}

// Sums `count` terms, many at once and then the last ones.
template <class Many, class One>
inline float sum_of(int count, const Many& many, const One& one) {
    F32 sums[VECTORS_OF_COLUMNS] = {};
    int i = 0;
    for (; i + COLUMNS <= count; i += COLUMNS)
        for (int v = 0; v < VECTORS_OF_COLUMNS; v++) sums[v] += many(i + v * LANES);
    float total = sum_of_columns(sums);
    for (; i < count; i++) total += one(i);
    return total;
}

inline float highest(F32 v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = std::max(best, v[i]);
    return best;
}

struct Survey {
    int best;  // the index of the first of the highest numbers
    bool finite;  // whether all are finite
};

inline Survey survey_of(const float* numbers, int count) {
    F32 highest_yet = splat(-INFINITY), broken = {};  // NaN if a number is NaN or infinite
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const F32 x = load(numbers + i);
        highest_yet = x > highest_yet ? x : highest_yet;
        broken += x * 0.0f;
    }
    float top = highest(highest_yet), rest = sum(broken);
    for (; i < count; i++) {
        top = std::max(top, numbers[i]);
        rest += numbers[i] * 0.0f;
    }
    const int best = int(std::find(numbers, numbers + count, top) - numbers);
    return {best < count ? best : 0, rest == 0.0f};
}
