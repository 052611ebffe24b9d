// Elementary functions in operations that IEEE 754 rounds in one way, so that every processor and every C library has the
// same bits. (A libm's own differ from version to version, and between processors with and without fused operations.)

#pragma once

#include "vectors.h"

// Returns e^x to 2 ulp: 2^n times a polynomial of degree 6 (Cephes).
inline F32 exponential(F32 x) {
    x = x > 88.0f ? splat(88.0f) : x;
    x = x < -87.0f ? splat(-87.0f) : x;
    const F32 n = fused(x, splat(1.44269504f), splat(12582912.0f)) - 12582912.0f;  // to the nearest integer
    const F32 r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), x));
    F32 p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fused(p, r, splat(c));
    p = fused(p * r, r, r) + 1.0f;
    return F32(U32(p) + (U32(__builtin_convertvector(n, I32)) << 23));
}

// Returns the share of a normal distribution below x, (1 + erf(x / sqrt 2)) / 2, to 1e-6 of itself.
//
// erfc(z) = t exp(p(t) - z^2) with t = 1 / (1 + z / 2); p is the polynomial of degree 8 whose largest error for z in 0 … 5.2
// is the least, 5e-8 (a Chebyshev fit in 40 digits).
inline F32 normal_share(F32 x) {
    const F32 z = (x < 0.0f ? -x : x) * 0.70710678f;
    const F32 t = 1.0f / fused(z, splat(0.5f), splat(1.0f));
    F32 p = splat(0.154705598768f);
    for (float c : {-0.940352053193f, 2.30708999046f, -2.78119372595f, 1.58080405581f, -0.565343393622f, 0.529202210346f,
                    0.979416184279f, -1.2643288669f})
        p = fused(p, t, splat(c));
    const F32 beyond = 0.5f * t * exponential(fused(-z, z, p));
    return x > 0.0f ? 1.0f - beyond : beyond;
}

struct Turn {
    float cosine, sine;
};

// Returns the cosine and the sine of an angle below 2^20: Taylor series in double, of what is left of the nearest quarter
// turn. The first part of half pi has 33 bits, so that its products are exact.
inline Turn turn_of(float angle) {
    constexpr double NEAREST = 6755399441055744.0, HALF_PI = 1.5707963267341256, REST = 6.077100506506192e-11;
    const double quarters = (angle * 0.6366197723675814 + NEAREST) - NEAREST;
    const double r = (angle - quarters * HALF_PI) - quarters * REST, square = r * r;
    double cosine = 1, sine = 1;
    for (int k = 8; k > 0; k--) {
        cosine = 1 - cosine * square * (1.0 / (2 * k * (2 * k - 1)));
        sine = 1 - sine * square * (1.0 / (2 * k * (2 * k + 1)));
    }
    sine *= r;
    switch (int64_t(quarters) & 3) {
        case 0: return {float(cosine), float(sine)};
        case 1: return {float(-sine), float(cosine)};
        case 2: return {float(-cosine), float(-sine)};
        default: return {float(sine), float(-cosine)};
    }
}

// Returns the natural logarithm of a normal number above 0: 2 artanh((m - 1) / (m + 1)) for its fraction m in 0.7 … 1.4.
inline double logarithm(double x) {
    uint64_t u = bits<uint64_t>(x);
    int exponent = int(u >> 52) - 1023;
    double m = bits<double>((u & 0xfffffffffffffull) | 0x3ff0000000000000ull);
    if (m > 1.4142135623730951) m *= 0.5, exponent++;
    const double s = (m - 1) / (m + 1), square = s * s;
    double series = 0;
    for (int k = 23; k > 0; k -= 2) series = series * square + 1.0 / k;
    return exponent * 0.6931471805599453 + 2 * s * series;
}

inline void to_exponentials(float* numbers, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(numbers + i, exponential(load(numbers + i)));
    for (; i < count; i++) numbers[i] = exponential(splat(numbers[i]))[0];
}

// The logarithms of the softmax of some logits.
inline void find_log_probabilities(const float* logits, int count, float* to) {
    const float top = *std::max_element(logits, logits + count);
    const float total = sum_of(
        count, [&](int i) { return exponential(load(logits + i) - top); },
        [&](int i) { return exponential(splat(logits[i] - top))[0]; });
    const float rest = float(logarithm(total));
    for (int i = 0; i < count; i++) to[i] = (logits[i] - top) - rest;
}
