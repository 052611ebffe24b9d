// What a decoder is, as native_runner.py says it in numbers: its sizes, and the ways in which architectures differ.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

// The numbers of both are those of native_runner.py.
enum Architecture : int32_t { GPT2, LLAMA };
enum Activation : int32_t { GELU, GELU_EXACT, RELU, SWIGLU };

struct Shape {
    int32_t layers, width, heads, kv_heads, ffn_width, vocabulary, positions;
    Architecture architecture;
    Activation activation;
    int32_t num_blocks;
    float epsilon;

    // The compiler asks for each architecture and activation by name, and an unknown number throws: none is computed as
    // another one.
    bool is_llama() const {
        switch (architecture) {
            case GPT2: return false;
            case LLAMA: return true;
        }
        throw std::invalid_argument("they know no architecture of number " + std::to_string(architecture));
    }
    bool is_gated() const {
        switch (activation) {
            case GELU: case GELU_EXACT: case RELU: return false;
            case SWIGLU: return true;
        }
        throw std::invalid_argument("they know no activation of number " + std::to_string(activation));
    }
    bool has_rotation() const { return is_llama(); }  // of queries and keys; GPT-2 adds its positions
    bool has_rms_norm() const { return is_llama(); }
    int head_width() const { return width / heads; }
    int kv_width() const { return kv_heads * head_width(); }
    int qkv_width() const { return width + 2 * kv_width(); }
    int ffn_in_width() const { return is_gated() ? 2 * ffn_width : ffn_width; }  // the gate comes before what it gates
};

}  // namespace
