// Trains one block of Llama's kind and one of GPT-2's kind for a few steps, with the kernels alone, and prints a hash of the
// weights' bits after each. test_portable_kernels.py compiles it for several processors.
//
//     portable_steps THREADS

#include "training.cpp"

#include <cstdio>
#include <cstdlib>

constexpr int B = 2, T = 61, N = B * T, HEADS = 4, GROUPS = 2, D = 18, C = HEADS * D, F = 131, V = 307, STEPS = 3;

using Values = std::vector<float>;

struct Parameter {
    Values values, gradient, means, squares;
    Parameter(size_t count, uint64_t seed, float deviation, float offset = 0) : values(count), gradient(count), means(count), squares(count) {
        raymill_normals(1, count, seed, values.data());
        for (float& value : values) value = value * deviation + offset;
    }
};

struct Network {
    int threads;
    Parameter tokens{size_t(V) * C, 1, 0.05f}, norm{size_t(C), 2, 0.1f, 1}, bias{size_t(C), 3, 0.1f},
        queries{size_t(C) * C, 4, 0.1f}, keys{size_t(C) * GROUPS * D, 5, 0.1f}, values{size_t(C) * GROUPS * D, 6, 0.1f},
        gate{size_t(C) * F, 7, 0.1f}, up{size_t(C) * F, 8, 0.1f}, down{size_t(F) * C, 9, 0.1f};

    Values times(const Values& x, int width, const Parameter& weight, int columns) const {
        Values y(size_t(N) * columns);
        raymill_product(threads, N, width, columns, x.data(), width, 1, weight.values.data(), columns, 1, nullptr, false, y.data());
        return y;
    }
    // Puts the gradient of the weight in its place, and adds that of x.
    void back(const Values& x, int width, Parameter& weight, int columns, const Values& outer, Values& of_x) const {
        raymill_product(threads, width, N, columns, x.data(), 1, width, outer.data(), columns, 1, nullptr, false, weight.gradient.data());
        raymill_product(threads, N, columns, width, outer.data(), columns, 1, weight.values.data(), 1, columns, nullptr, true, of_x.data());
    }

    void step(int number, Activation activation) {
        std::vector<int64_t> ids(N), labels(N), places(N);
        std::vector<int32_t> starts(N);
        for (int n = 0; n < N; n++) {
            ids[n] = (n * 37 + number) % V, labels[n] = n % 7 ? (n * 41 + number) % V : -1, places[n] = n % T;
            starts[n] = n % T > 20 ? 21 : 0;
        }
        Values x(size_t(N) * C), normed(x.size()), means(N), scales(N), frequencies(D / 2), cosines(size_t(N) * D / 2), sines(cosines.size());
        for (int n = 0; n < N; n++) std::copy_n(&tokens.values[ids[n] * C], C, &x[size_t(n) * C]);
        raymill_norm(threads, N, C, 1e-5f, x.data(), norm.values.data(), bias.values.data(), normed.data(), means.data(), scales.data());
        const Values q = times(normed, C, queries, C), k = times(normed, C, keys, GROUPS * D), v = times(normed, C, values, GROUPS * D);
        for (int i = 0; i < D / 2; i++) frequencies[i] = 1.0f / float(1 + i * i);
        raymill_turns(threads, N, D / 2, places.data(), frequencies.data(), cosines.data(), sines.data());
        Values turned_q(q.size()), turned_k(k.size()), seen(x.size());
        raymill_rotate(threads, N, HEADS, D, q.data(), cosines.data(), sines.data(), false, turned_q.data());
        raymill_rotate(threads, N, GROUPS, D, k.data(), cosines.data(), sines.data(), false, turned_k.data());
        const size_t strides[] = {size_t(C), size_t(GROUPS * D), size_t(GROUPS * D)};
        raymill_attention(threads, B, T, HEADS, GROUPS, D, turned_q.data(), turned_k.data(), v.data(), strides, starts.data(), seen.data());
        const Values g = times(seen, C, gate, F), u = times(seen, C, up, F);
        Values middle(g.size());
        if (activation == SWIGLU) raymill_gated(threads, g.size(), g.data(), u.data(), middle.data());
        else raymill_activation(threads, g.size(), activation, g.data(), middle.data());
        const Values out = times(middle, F, down, C);
        Values scores(size_t(N) * V), losses(N);
        raymill_product(threads, N, C, V, out.data(), C, 1, tokens.values.data(), 1, C, nullptr, false, scores.data());
        raymill_losses(threads, N, V, labels.data(), 1.0f / N, scores.data(), losses.data());

        Values of_out(out.size()), of_middle(middle.size()), of_g(g.size()), of_u(g.size()), of_seen(x.size()), of_normed(x.size());
        raymill_product(threads, N, V, C, scores.data(), V, 1, tokens.values.data(), C, 1, nullptr, false, of_out.data());
        raymill_product(threads, V, N, C, scores.data(), 1, V, out.data(), C, 1, nullptr, false, tokens.gradient.data());
        back(middle, F, down, C, of_out, of_middle);
        if (activation == SWIGLU) {
            raymill_gated_backward(threads, g.size(), of_middle.data(), g.data(), u.data(), of_g.data(), of_u.data());
            back(seen, C, up, F, of_u, of_seen);
        } else {
            raymill_activation_backward(threads, g.size(), activation, of_middle.data(), g.data(), of_g.data());
        }
        back(seen, C, gate, F, of_g, of_seen);
        Values of_q(q.size()), of_k(k.size()), of_v(v.size()), back_q(q.size()), back_k(k.size()), of_x(x.size());
        raymill_attention_backward(threads, B, T, HEADS, GROUPS, D, of_seen.data(), seen.data(), turned_q.data(), turned_k.data(), v.data(),
                                   strides, starts.data(), of_q.data(), of_k.data(), of_v.data());
        raymill_rotate(threads, N, HEADS, D, of_q.data(), cosines.data(), sines.data(), true, back_q.data());
        raymill_rotate(threads, N, GROUPS, D, of_k.data(), cosines.data(), sines.data(), true, back_k.data());
        back(normed, C, queries, C, back_q, of_normed);
        back(normed, C, keys, GROUPS * D, back_k, of_normed);
        back(normed, C, values, GROUPS * D, of_v, of_normed);
        raymill_norm_backward(threads, N, C, of_normed.data(), x.data(), norm.values.data(), means.data(), scales.data(), of_x.data(),
                              norm.gradient.data(), bias.gradient.data());
        raymill_add_rows(threads, N, C, ids.data(), of_x.data(), tokens.gradient.data());
        for (Parameter* p : {&tokens, &norm, &bias, &queries, &keys, &values, &gate, &up, &down})
            raymill_update_by_adamw(threads, p->values.size(), p->values.data(), p->gradient.data(), p->means.data(), p->squares.data(), 0.999f, 0.01f,
                          0.9f, 0.95f, 0.3f, 1e-8f);
    }

    // FNV-1a (Fowler, Noll and Vo) of the bits of the weights and of their gradient's norm.
    unsigned long long hash() const {
        uint64_t found = 1469598103934665603ull;
        for (const Parameter* p : {&tokens, &norm, &bias, &queries, &keys, &values, &gate, &up, &down}) {
            double square;
            raymill_square_sums(threads, p->gradient.size(), p->gradient.size(), p->gradient.data(), &square);
            const auto add = [&](uint64_t u, int num_bits) {
                for (int shift = 0; shift < num_bits; shift += 8) found = (found ^ (u >> shift & 255)) * 1099511628211ull;
            };
            for (float value : p->values) add(bits<uint32_t>(value), 32);
            add(bits<uint64_t>(square), 64);
        }
        return found;
    }
};

int main(int, char** arguments) {
    const int threads = std::atoi(arguments[1]);
    for (Activation activation : {SWIGLU, GELU, GELU_EXACT}) {
        Network network{threads};
        for (int number = 1; number <= STEPS; number++) {
            network.step(number, activation);
            std::printf("%d %d %016llx\n", activation, number, network.hash());
        }
    }
}
