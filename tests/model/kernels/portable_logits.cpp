// Computes logits of a decoder whose weights are made of whole numbers, and prints a hash of their bits: one for each kind of
// numbers, architecture and activation. test_portable_kernels.py compiles it for several processors.
//
//     portable_logits THREADS

#include "decoder.cpp"

#include <cstdlib>

// Numbers that every machine makes alike: multiples of 2^-26 (Marsaglia's xorshift, 2003).
struct Numbers {
    uint64_t state = 88172645463325252ull;
    float next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return float(int64_t(state >> 40) - (1 << 23)) / float(1 << 26);
    }
    std::vector<float> some(size_t count, float scale, float offset = 0) {
        std::vector<float> numbers(count);
        for (float& number : numbers) number = next() * scale + offset;
        return numbers;
    }
};

// FNV-1a (Fowler, Noll and Vo) of the numbers' bits.
uint64_t hash_of(const std::vector<float>& numbers, uint64_t hash = 1469598103934665603ull) {
    for (float number : numbers)
        for (int shift = 0; shift < 32; shift += 8) hash = (hash ^ (bits<uint32_t>(number) >> shift & 255)) * 1099511628211ull;
    return hash;
}

uint64_t hash_of_logits(int kind, Architecture architecture, Activation activation, int num_threads) {
    constexpr int WIDTH = 200, LAYERS = 3, HEADS = 5, VOCABULARY = 531, NUM_TOKENS = 75, NUM_BLOCKS = 32;
    const bool is_llama = architecture == LLAMA;
    const Shape shape = {LAYERS, WIDTH, HEADS, is_llama ? 1 : HEADS, 4 * WIDTH + 3, VOCABULARY, 128,
                         architecture, activation, NUM_BLOCKS, 1e-5f};
    Numbers numbers;
    std::vector<float> positions = numbers.some(size_t(shape.positions) * WIDTH, 1);
    if (is_llama)
        for (int pair = 0; pair < shape.head_width() / 2; pair++) positions[pair] = 1.0f / float(1 + pair * pair);
    char refusal[200] = {};
    void* decoder = raymill_create(&shape, kind, num_threads, positions.data(), refusal, sizeof refusal);
    if (decoder == nullptr) std::fprintf(stderr, "refused: %s\n", refusal), std::exit(1);
    const auto set_matrix = [&](int layer, int which, int num_in, int num_out) {
        const auto weight = numbers.some(size_t(num_in) * num_out, 2), bias = numbers.some(num_out, 1);
        raymill_set_matrix(decoder, layer, which, num_in, num_out, weight.data(), num_out, 1, bias.data());
    };
    for (int layer = 0; layer <= LAYERS; layer++)
        for (int which = LN_1; which <= (layer < LAYERS ? LN_2 : LN_1); which++) {
            const auto weight = numbers.some(WIDTH, 1, 1), bias = numbers.some(WIDTH, 1);
            raymill_set_norm(decoder, layer, which, weight.data(), bias.data());
        }
    for (int layer = 0; layer < LAYERS; layer++) {
        set_matrix(layer, QKV, WIDTH, shape.qkv_width());
        set_matrix(layer, ATTENTION_OUT, WIDTH, WIDTH);
        set_matrix(layer, FFN_IN, WIDTH, shape.ffn_in_width());
        set_matrix(layer, FFN_OUT, shape.ffn_width, WIDTH);
    }
    const auto head = numbers.some(size_t(VOCABULARY) * WIDTH, 8);
    raymill_set_matrix(decoder, LAYERS, HEAD, WIDTH, VOCABULARY, head.data(), 1, WIDTH, nullptr);
    std::vector<int32_t> token_ids(NUM_TOKENS), at(NUM_TOKENS), rows(NUM_TOKENS), tables(2 * 8);
    for (int i = 0; i < 16; i++) tables[i] = i * 7 % NUM_BLOCKS;
    for (int i = 0; i < NUM_TOKENS; i++) token_ids[i] = i * 37 % VOCABULARY, rows[i] = i % 2, at[i] = i / 2;
    std::vector<float> hidden(size_t(NUM_TOKENS) * WIDTH), logits(size_t(NUM_TOKENS) * VOCABULARY), logs(logits.size());
    const Pass pass = {NUM_TOKENS, 8, token_ids.data(), at.data(), rows.data(), tables.data(), hidden.data()};
    raymill_forward(decoder, &pass);
    raymill_logits(decoder, NUM_TOKENS, hidden.data(), logits.data());
    raymill_log_probabilities(decoder, NUM_TOKENS, logits.data(), logs.data());
    const uint64_t hash = hash_of(logs, hash_of(logits));
    raymill_destroy(decoder);
    return hash;
}

int main(int, char** arguments) {
    const int num_threads = std::atoi(arguments[1]);
    const char* names[] = {"float32", "bfloat16", "int8"};
    for (int kind = 0; kind < 3; kind++) {
        if (!raymill_is_portable(kind)) continue;
        for (Activation activation : {GELU, GELU_EXACT, RELU, SWIGLU}) {
            const Architecture architecture = activation == SWIGLU ? LLAMA : GPT2;
            const uint64_t hash = hash_of_logits(kind, architecture, activation, num_threads);
            std::printf("%s %d %016llx\n", names[kind], activation, static_cast<unsigned long long>(hash));
        }
    }
}
