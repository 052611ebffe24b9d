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
using Half = __m256i;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#define WIDE(operation) _mm256_##operation
using Wide = __m256i;
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

inline F32 load(const float* from) { return *reinterpret_cast<const F32Any*>(from); }
inline void store(float* to, F32 value) { *reinterpret_cast<F32Any*>(to) = value; }
inline F32 splat(float value) { return value - F32{}; }

inline float sum(F32 v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// Sums `count` terms, many at once and then the last ones.
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

// Returns e^x to 2 ulp: 2^n times a polynomial of degree 6 (Cephes).
inline F32 exponential(F32 x) {
    x = x > 88.0f ? splat(88.0f) : x;
    x = x < -87.0f ? splat(-87.0f) : x;
    const F32 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const F32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    F32 p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    return F32(U32(p) + (U32(__builtin_convertvector(n, I32)) << 23));
}
