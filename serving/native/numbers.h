// Vectors of 16 numbers, and how numbers are stored and multiplied. GCC's vectors: each compiles to what the processor has.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

constexpr int LANES = 16;

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef float F32Any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t U16Any __attribute__((vector_size(32), aligned(2), may_alias));

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline F32 load(const float* from) { return *reinterpret_cast<const F32Any*>(from); }
inline void store(float* to, F32 value) { *reinterpret_cast<F32Any*>(to) = value; }
inline F32 splat(float value) { return value - F32{}; }

constexpr I32 POSITIONS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};  // of a block

inline float sum(F32 v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// The sum over count terms, 16 at once and then the last ones.
template <class Many, class One>
inline float sum_of(int count, const Many& many, const One& one) {
    F32 sums = {};
    int i = 0;
    for (; i + LANES <= count; i += LANES) sums += many(i);
    float total = sum(sums);
    for (; i < count; i++) total += one(i);
    return total;
}

inline float highest(F32 v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = std::max(best, v[i]);
    return best;
}

struct Survey {
    int best;  // the first of the highest numbers
    bool finite;  // all of them
};

inline Survey survey_of(const float* numbers, int count) {
    F32 highest_yet = splat(-INFINITY), broken = {};  // NaN where a number is none, or infinite
    I32 where = POSITIONS, here = POSITIONS;
    int i = 0;
    for (; i + LANES <= count; i += LANES, here += LANES) {
        const F32 x = load(numbers + i);
        where = x > highest_yet ? here : where;
        highest_yet = x > highest_yet ? x : highest_yet;
        broken += x * 0.0f;
    }
    float top = highest(highest_yet), rest = sum(broken);
    int best = count;
    for (int lane = 0; lane < LANES; lane++)
        if (highest_yet[lane] == top) best = std::min(best, int(where[lane]));
    for (; i < count; i++) {
        if (numbers[i] > top) top = numbers[i], best = i;
        rest += numbers[i] * 0.0f;
    }
    return {best < count ? best : 0, rest == 0.0f};
}

// e^x to 2 ulp: 2^n times a polynomial of degree 6 (Cephes).
inline F32 exponential(F32 x) {
    x = x > 88.0f ? splat(88.0f) : x;
    x = x < -87.0f ? splat(-87.0f) : x;
    const F32 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const F32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    F32 p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    return F32(I32(p) + (__builtin_convertvector(n, I32) << 23));
}

// How numbers are stored, and how sums of their products are formed: a lane holds GROUP of them, which follow each other
// along the summed dimension, which is padded with zeros to a multiple of DEPTH.

struct Fp32 {
    using Number = float;
    using Sums = F32;
    using Cached = Fp32;  // keys and values
    static constexpr int GROUP = 1, DEPTH = 1;
    static constexpr bool QUANTIZED = false;
    static Number from(float x) { return x; }
    static float value(Number x) { return x; }
    static F32 values(const Number* x) { return load(x); }
    static F32 multiply_add(F32 sums, I32 weights, int32_t input) {
        return sums + F32(weights) * bits<float>(input);
    }
};

struct Bf16 {
    using Number = uint16_t;
    using Sums = F32;
    using Cached = Bf16;
    static constexpr int GROUP = 2, DEPTH = 32;
    static constexpr bool QUANTIZED = false;
    static Number from(float x) {  // to nearest, ties to even
        const uint32_t u = bits<uint32_t>(x);
        return x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    }
    static float value(Number x) { return bits<float>(uint32_t(x) << 16); }
    static F32 values(const Number* x) {
#ifdef __AVX512F__
        const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return F32(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
#else
        const U16 numbers = *reinterpret_cast<const U16Any*>(x);
        return F32(__builtin_convertvector(numbers, U32) << 16);
#endif
    }
    static F32 multiply_add(F32 sums, I32 weights, int32_t input) {
#ifdef __AVX512BF16__
        return F32(_mm512_dpbf16_ps(__m512(sums), __m512bh(weights), __m512bh(_mm512_set1_epi32(input))));
#else
        sums += F32(weights << 16) * bits<float>(input << 16);
        return sums + F32(weights & int32_t(0xffff0000)) * bits<float>(input & int32_t(0xffff0000));
#endif
    }
};

// Weights of -127 … 127 in units of their column's scale; inputs of 0 … 255 in units of their row's, where 128 is zero.
struct Int8 {
    using Number = int8_t;
    using Sums = I32;  // whole numbers, whose order does not matter
    using Cached = Bf16;
    static constexpr int GROUP = 4, DEPTH = 64;
    static constexpr bool QUANTIZED = true;
    static constexpr int ZERO = 128;
    static Number from(float x) { return Number(std::lrint(x)); }
    static float value(Number x) { return x; }
    static I32 multiply_add(I32 sums, I32 weights, int32_t input) {
#ifdef __AVX512VNNI__
        return I32(_mm512_dpbusd_epi32(__m512i(sums), _mm512_set1_epi32(input), __m512i(weights)));
#else
        for (int i = 0; i < 32; i += 8) sums += (weights << (24 - i) >> 24) * (input >> i & 255);
        return sums;
#endif
    }
};

// Lanes that `width` numbers along the summed dimension take.
template <class Kind>
constexpr int groups_of(int width) {
    return (width + Kind::DEPTH - 1) / Kind::DEPTH * (Kind::DEPTH / Kind::GROUP);
}

// Writes a row of inputs, padded with zeros; returns the unit that they are in.
template <class Kind>
float pack_row(const float* from, int width, int32_t* to) {
    const int padded = groups_of<Kind>(width) * Kind::GROUP;
    if constexpr (Kind::QUANTIZED) {
        F32 peaks = {}, broken = {};  // NaN when a value is no number, which rounding would hide
        int k = 0;
        for (; k + LANES <= width; k += LANES) {
            const F32 x = load(from + k), size = x < 0.0f ? -x : x;
            peaks = size > peaks ? size : peaks;
            broken += x * 0.0f;
        }
        for (; k < width; k++) {
            peaks[0] = std::max(peaks[0], std::abs(from[k]));
            broken[0] += from[k] * 0.0f;
        }
        const float peak = highest(peaks), unit = peak > 0 ? peak / 127 : 1.0f, per_unit = 1 / unit;
        auto* numbers = reinterpret_cast<uint8_t*>(to);
        for (k = 0; k < width; k++) numbers[k] = uint8_t(int(from[k] * per_unit + (Kind::ZERO + 0.5f)));  // all positive
        for (; k < padded; k++) numbers[k] = Kind::ZERO;
        return unit + sum(broken);
    } else {
        auto* numbers = reinterpret_cast<typename Kind::Number*>(to);
        for (int k = 0; k < width; k++) numbers[k] = Kind::from(from[k]);
        for (int k = width; k < padded; k++) numbers[k] = {};
        return 1.0f;
    }
}
