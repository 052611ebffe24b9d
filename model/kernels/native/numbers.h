// Defines how numbers are stored and how their products are summed.
//
// A lane of weights holds GROUP numbers that follow each other along the summed dimension, which is padded with zeros to
// a multiple of DEPTH. Inputs are Elements in a row; a group of them has 4 bytes. PORTABLE kinds have the same bits on every
// processor.

#pragma once

#include "vectors.h"

struct Fp32 {
    using Number = float;
    using Element = float;
    using Sums = F32;
    using Cached = Fp32;  // keys and values
    static constexpr int GROUP = 1, DEPTH = 1;
    static constexpr bool QUANTIZED = false, PORTABLE = true;
    static Number from(float x) { return x; }
    static float value(Number x) { return x; }
    static Element element(float x) { return x; }
    static void pack(F32 x, Element* to) { store(to, x); }
    static F32 widened(const Number* from) { return load(from); }
    static F32 weights(const Number* from) { return load(from); }
    static F32 multiply_add(F32 sums, F32 weights, uint32_t input) {
        return fused(weights, splat(bits<float>(input)), sums);
    }
};

// bf16 numbers, whose products are fp32: the same bits on every processor.
struct Bf16InFp32 {
    using Number = uint16_t;
    using Element = float;
    using Sums = F32;
    using Cached = Bf16InFp32;
    static constexpr int GROUP = 1, DEPTH = 32;
    static constexpr bool QUANTIZED = false, PORTABLE = true;
    static Number from(float x) { return x != x ? 0x7fc0 : rounded(bits<uint32_t>(x)) >> 16; }
    static float value(Number x) { return bits<float>(uint32_t(x) << 16); }
    static Element element(float x) { return x != x ? x : bits<float>(rounded(bits<uint32_t>(x)) & 0xffff0000u); }
    static void pack(F32 x, Element* to) {
        store(to, x != x ? x : F32(rounded(U32(x)) & 0xffff0000u));
    }
    static F32 widened(const Number* from) {
#if defined(WIDE)
        return F32(WIDE(slli_epi32)(WIDE(cvtepu16_epi32)(read_as<Half>(from)), 16));
#elif defined(__aarch64__)
        return F32(vshll_n_u16(vld1_u16(from), 16));
#else
        F32 numbers;
        for (int i = 0; i < LANES; i++) numbers[i] = value(from[i]);
        return numbers;
#endif
    }
    static F32 weights(const Number* from) { return widened(from); }
    static F32 multiply_add(F32 sums, F32 weights, uint32_t input) {
        return fused(weights, splat(bits<float>(input)), sums);
    }

protected:
    // Rounds the bits of numbers to nearest, ties to even, in their upper halves.
    template <class Bits>
    static Bits rounded(Bits u) {
        return u + 0x7fff + ((u >> 16) & 1);
    }
};

#ifdef __AVX512BF16__
// Pairs of products by the processor's own instruction, which rounds otherwise than fp32 does.
struct Bf16 : Bf16InFp32 {
    using Element = Number;
    using Cached = Bf16;
    static constexpr int GROUP = 2;
    static constexpr bool PORTABLE = false;
    static Element element(float x) { return from(x); }
    static void pack(F32 x, Element* to) {
        const U32 numbers = x != x ? U32{} + 0x7fc0 : rounded(U32(x)) >> 16;
        const __m256i halves = _mm512_cvtepi32_epi16(__m512i(numbers));
        std::memcpy(to, &halves, sizeof halves);
    }
    static U32 weights(const Number* from) { return read_as<U32>(from); }
    static F32 multiply_add(F32 sums, U32 weights, uint32_t input) {
        return F32(_mm512_dpbf16_ps(__m512(sums), __m512bh(weights), __m512bh(_mm512_set1_epi32(input))));
    }
};
#else
using Bf16 = Bf16InFp32;
#endif

// Weights are -127 … 127 in units of their column; inputs are 0 … 255 in units of their row, and 128 is zero.
struct Int8 {
    using Number = int8_t;
    using Sums = I32;  // integers, whose order does not matter
    using Cached = Bf16InFp32;
    static constexpr int DEPTH = 64;
    static constexpr bool QUANTIZED = true, PORTABLE = true;
    static constexpr int ZERO = 128;
    static Number from(float x) { return Number(std::lrint(x)); }
    static float value(Number x) { return x; }
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512BW__))
    using Element = uint8_t;
    static constexpr int GROUP = 4;
    static U32 weights(const Number* from) { return read_as<U32>(from); }
    static I32 multiply_add(I32 sums, U32 weights, uint32_t input) {
        return I32(WIDE(dpbusd_epi32)(Wide(sums), WIDE(set1_epi32)(input), Wide(weights)));
    }
#elif defined(WIDE)
    using Element = int16_t;  // the pairs of products that vpmaddubsw adds would not fit into 16 bits
    static constexpr int GROUP = 2;
    static U32 weights(const Number* from) { return U32(WIDE(cvtepi8_epi16)(read_as<Half>(from))); }
    static I32 multiply_add(I32 sums, U32 weights, uint32_t input) {
        return sums + I32(WIDE(madd_epi16)(Wide(weights), WIDE(set1_epi32)(input)));
    }
#else
    using Element = int32_t;
    static constexpr int GROUP = 1;
    static I32 weights(const Number* from) {
        I32 numbers;
#if defined(__aarch64__)
        int32_t four;
        std::memcpy(&four, from, sizeof four);
        numbers = I32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#else
        for (int i = 0; i < LANES; i++) numbers[i] = from[i];
#endif
        return numbers;
    }
    static I32 multiply_add(I32 sums, I32 weights, uint32_t input) { return sums + weights * int32_t(input); }
#endif
};

// Returns how many numbers `width` of them are with padding along the summed dimension.
template <class Kind>
constexpr int padded_to_depth(int width) {
    return (width + Kind::DEPTH - 1) / Kind::DEPTH * Kind::DEPTH;
}

// Writes a row of inputs, padded with zeros, and returns their unit.
template <class Kind>
float pack_row(const float* from, int width, typename Kind::Element* to) {
    using Element = typename Kind::Element;
    const int padded = padded_to_depth<Kind>(width);
    if constexpr (Kind::QUANTIZED) {
        F32 peaks = {}, broken = {};  // NaN if a value is not finite, which rounding would hide
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
        for (k = 0; k < width; k++) to[k] = Element(int(from[k] * per_unit + (Kind::ZERO + 0.5f)));  // all positive
        for (; k < padded; k++) to[k] = Kind::ZERO;
        return unit + sum(broken);
    } else {
        for (int k = 0; k < width; k++) to[k] = Kind::element(from[k]);
        for (int k = width; k < padded; k++) to[k] = {};
        return 1.0f;
    }
}
