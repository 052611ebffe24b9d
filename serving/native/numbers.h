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
typedef int32_t I32Any __attribute__((vector_size(64), aligned(4), may_alias));
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
    return bits<F32>(bits<I32>(p) + (__builtin_convertvector(n, I32) << 23));
}

// How numbers are stored, and how sums of their products are formed: a lane holds GROUP of them, which follow each other
// along the summed dimension.

struct Fp32 {
    using Number = float;
    static constexpr int GROUP = 1;
    static Number from(float x) { return x; }
    static float value(Number x) { return x; }
    static F32 values(const Number* x) { return load(x); }
    static F32 multiply_add(F32 sums, I32 weights, int32_t input) {
        return sums + bits<F32>(weights) * bits<float>(input);
    }
};

struct Bf16 {
    using Number = uint16_t;
    static constexpr int GROUP = 2;
    static Number from(float x) {  // to nearest, ties to even
        const uint32_t u = bits<uint32_t>(x);
        return x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    }
    static float value(Number x) { return bits<float>(uint32_t(x) << 16); }
    static F32 values(const Number* x) {
#ifdef __AVX512F__
        const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return bits<F32>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
#else
        const U16 numbers = *reinterpret_cast<const U16Any*>(x);
        return bits<F32>(__builtin_convertvector(numbers, U32) << 16);
#endif
    }
    static F32 multiply_add(F32 sums, I32 weights, int32_t input) {
#ifdef __AVX512BF16__
        return bits<F32>(_mm512_dpbf16_ps(bits<__m512>(sums), bits<__m512bh>(weights),
                                          bits<__m512bh>(_mm512_set1_epi32(input))));
#else
        sums += bits<F32>(weights << 16) * bits<float>(input << 16);
        return sums + bits<F32>(weights & int32_t(0xffff0000)) * bits<float>(input & int32_t(0xffff0000));
#endif
    }
};
