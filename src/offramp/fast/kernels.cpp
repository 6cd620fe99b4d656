// The kernels of the fast backbone: decoder layers of Llama-like models on a CPU, any rows of many
// texts at once. Plain C interface; knows nothing of Python or torch. weights.py mirrors the
// structures, pack.py the weight layouts.
//
// Weights lie in blocks of 16 outputs, so that one vector register holds one input's weights (or
// four inputs', as bytes) for 16 outputs: no sum ever runs across a register. Every matrix is read
// once for up to 8 rows, and from cache for more.

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int GROUP = 32;    // inputs that share a scale
constexpr int CHUNK = 256;   // rows that go through the layers together: their states stay in cache
constexpr int TILE = 8;       // rows whose sums fit into registers
constexpr int SHARED_ROWS = 4;  // rows per thread from which on threads take whole rows
constexpr int SHARE = 1024;  // keys that are attended to at a time
constexpr int AHEAD = 4096;  // bytes that are fetched before they are needed

// INT8_FINE: weights as in INT8, read by states of 16 bits in place of 8.
enum Format : int32_t { FP32, BF16, INT8, INT4, INT8_FINE };
enum HeadNorm : int32_t { NO_NORM, PER_HEAD, WHOLE };
enum Activation : int32_t { SILU, GELU_TANH, GELU };

struct Matrix {
    const uint8_t *weights;
    const float *bias;  // or null
    int32_t format, outputs;
    int32_t inputs;  // a multiple of GROUP
    int32_t first;   // outputs before this one are not wanted by fill (qkv only)
    int64_t rows, calls;  // multiplied so far: the meter's witness
};

struct Layer {
    Matrix qkv, output, gate_up, down;
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;  // gains, or null
    const float *query_norm, *key_norm;
    const float *cosines, *sines;  // [positions, rotary], or null: no rotation
    int32_t window;                // keys a row sees, itself included; 0: all
    int32_t head_norm;
};

// What settles the largest logits of a head whose weights are held as codes.
struct Exact {
    const float *rows;    // [outputs, hidden], as they are
    const float *errors;  // [outputs]: how far a logit may be off, for a state of norm 1
};

struct Model {
    int32_t hidden, heads, kv_heads, head_size, inner, rotary, activation;
    int32_t kv_format;  // of keys and values: FP32 or INT8
    float epsilon, scale, residual, softcap, logit_scale, logit_softcap;
    const float *norm;  // gains of the last norm
    Matrix head;
    Layer *layers;
};

// Keys and values of one text; the padded size is a multiple of GROUP. In fp32, keys
// [layer, head, capacity / 16, padded, 16] and values [layer, head, capacity, padded]. In int8, keys
// [layer, head, capacity / 16, padded / 4, 16, 4] as code + 128 with steps
// [layer, head, capacity / 16, padded / GROUP, 16], and values [layer, head, capacity / 4, padded, 4]
// with steps [layer, head, capacity].
struct Text {
    void *keys, *values;
    float *key_steps, *value_steps;  // int8 only
    int64_t capacity;                // a multiple of GROUP
};

struct Rows {
    const Text *const *texts;
    const int32_t *text;      // [N]: whose row this is
    const int32_t *position;  // [N]
    int32_t count;
};

// Marks on a layer's index, as in offramp.paths: only this half of it runs.
constexpr int32_t ATTENTION = 1 << 20, MLP = 1 << 21;

enum Signal : int32_t { MAX_PROB, MARGIN, GATE };

// What an exit within a run looks at, and which rows it is certain of: they stay.
struct Watch {
    Matrix *down, *head;      // as offramp_readout reads out; not for GATE
    const Exact *exact;       // likewise
    const float *bars;        // [exits]: a row below it stays
    const float *gates;       // [exits, hidden + 1], for GATE: weights, bias
    const int32_t *blocks;    // [exits]: the layer that the exit owns, or -1
    const int32_t *order;     // [rows]: the rows of the run, those that ask before the others
    const Rows *asks, *rest;  // those that ask, and the others, in that order
    float *made;              // [rows, hidden]: states behind the last exit's own layer
    float *seen;              // [asks, outputs]: logits of the last exit looked at
    float *scores;            // [asks]
    int32_t signal;
};

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// ---------------------------------------------------------------- codes

// Codes of GROUP values as signed bytes; returns the value of one code.
inline float quantise_group(const float *from, int8_t *to, int32_t &sum) {
    const Floats low = load(from), high = load(from + LANES);
    const float best = largest(larger(absolute(low), absolute(high)));
    const float inverse = best > 0 ? 127.0f / best : 0.0f;
    const Ints first = rounded(low * inverse), second = rounded(high * inverse);
    store_codes(to, first);
    store_codes(to + LANES, second);
    sum = total(first + second);
    return best / 127.0f;
}

constexpr float FINE = 254.0f;  // steps of the rest in one step of a code

// What codes of this step leave over, as signed bytes of step / FINE; sum as before, of the rest.
inline void quantise_rest(const float *from, float step, const int8_t *codes, int8_t *to,
                          int32_t &sum) {
    const float inverse = step > 0 ? 1.0f / step : 0.0f;
    const Floats low = load(from) * inverse - load_codes(codes);
    const Floats high = load(from + LANES) * inverse - load_codes(codes + LANES);
    const Ints first = rounded(low * FINE), second = rounded(high * FINE);
    store_codes(to, first);
    store_codes(to + LANES, second);
    sum = total(first + second);
}

// ---------------------------------------------------------------- activations

// What a matrix product reads: states as they are, and as bytes for quantised weights.
struct Inputs {
    float *states;  // [N, width]
    int8_t *codes;  // [N, width]
    int8_t *rest;   // [N, width]: what the codes leave over, for INT8_FINE
    float *steps;   // [N, width / GROUP]: the value of one code
    float *sums;    // [N, width / GROUP]: of the values, for the weights' minimum
    int width;
};

void quantise(const Inputs &x, int row, int inputs, bool fine) {
    const int groups = x.width / GROUP;
    for (int group = 0; group < inputs / GROUP; group++) {
        const int64_t at = int64_t(row) * x.width + group * GROUP;
        int32_t sum, rest = 0;
        const float step = quantise_group(x.states + at, x.codes + at, sum);
        if (fine) quantise_rest(x.states + at, step, x.codes + at, x.rest + at, rest);
        x.steps[int64_t(row) * groups + group] = step;
        x.sums[int64_t(row) * groups + group] = step * (float(sum) + float(rest) / FINE);
    }
}

// Makes row's states ready for a matrix: padded with zeros, and as bytes if it is quantised.
void ready(const Inputs &x, int row, const Matrix &matrix, int size) {
    float *states = x.states + int64_t(row) * x.width;
    std::fill(states + size, states + matrix.inputs, 0.0f);
    if (matrix.format >= INT8) quantise(x, row, matrix.inputs, matrix.format == INT8_FINE);
}

// ---------------------------------------------------------------- matrix products

// Each returns M rows x 16 outputs of one block of weights.
template <int M>
void block_fp32(const uint8_t *block, const Inputs &x, int row, int inputs, Floats *out) {
    // Independent sums hide the latency; as many for any M, so that a row's company changes nothing.
    constexpr int CHAINS = 2;
    const float *weights = reinterpret_cast<const float *>(block);
    const float *states = x.states + int64_t(row) * x.width;
    Floats sums[M][CHAINS] = {};
    for (int k = 0; k < inputs; k += CHAINS)
        for (int c = 0; c < CHAINS; c++) {
            Floats weight = load(weights + (k + c) * LANES);
            for (int r = 0; r < M; r++) sums[r][c] += weight * states[r * int64_t(x.width) + k + c];
        }
    for (int r = 0; r < M; r++)
        for (int c = 0; c < CHAINS; c++) out[r] += sums[r][c];
}

template <int M>
void block_bf16(const uint8_t *block, const Inputs &x, int row, int inputs, Floats *out) {
    const float *states = x.states + int64_t(row) * x.width;
    Floats even[M] = {}, odd[M] = {};
    for (int k = 0; k < inputs; k += 2) {
        const Ints both = load_lanes<int32_t>(block + k * 2 * LANES);  // two inputs per word
        const Floats first = as<Floats>(both << 16), second = as<Floats>(both & int32_t(0xffff0000));
        for (int r = 0; r < M; r++) {
            even[r] += first * states[r * int64_t(x.width) + k];
            odd[r] += second * states[r * int64_t(x.width) + k + 1];
        }
    }
    for (int r = 0; r < M; r++) out[r] += even[r] + odd[r];
}

// Weight = step * code + minimum, both per output and group. A group is 16 steps, 16 minima (fp16)
// and its codes: 8 x 64 bytes of four inputs each, or 4 x 64 bytes of four inputs in the low half
// and the next four in the high half.
template <int M, Format F>
void block_quantised(const uint8_t *block, const Inputs &x, int row, int inputs, Floats *out) {
    constexpr int STRIDE = F == INT4 ? 320 : 576;
    const int groups = x.width / GROUP;
    for (int group = 0; group < inputs / GROUP; group++, block += STRIDE) {
        const int64_t at = int64_t(row) * x.width + group * GROUP;
        Ints dots[M] = {}, rest[M] = {};
        if (M > 3)  // with so much to do per line the processor alone sees too few of them coming
            for (int line = 0; line < STRIDE; line += 64) __builtin_prefetch(block + AHEAD + line);
        for (int part = 0; part < (F == INT4 ? 4 : 8); part++) {
            const Bytes weights = load_lanes<uint8_t>(block + 64 + 64 * part);
            if (F != INT4) {
                for (int r = 0; r < M; r++) {
                    const int64_t four = at + r * int64_t(x.width) + 4 * part;
                    dots[r] = add_products(dots[r], weights, x.codes + four);
                    if (F == INT8_FINE) rest[r] = add_products(rest[r], weights, x.rest + four);
                }
                continue;
            }
            const Ints words = as<Ints>(weights);
            const Ints low = words & 0x0f0f0f0f, high = (words >> 4) & 0x0f0f0f0f;
            for (int r = 0; r < M; r++) {
                const int8_t *eight = x.codes + at + r * int64_t(x.width) + 8 * part;
                dots[r] = add_products<true>(dots[r], as<Bytes>(low), eight);
                dots[r] = add_products<true>(dots[r], as<Bytes>(high), eight + 4);
            }
        }
        const Floats step = halves(block), minimum = halves(block + 32);
        for (int r = 0; r < M; r++) {
            const int64_t one = int64_t(row + r) * groups + group;
            Floats dot = as_floats(dots[r]);
            if (F == INT8_FINE) dot += as_floats(rest[r]) * (1.0f / FINE);
            out[r] += step * x.steps[one] * dot + minimum * x.sums[one];
        }
    }
}

template <int M>
void block_any(const Matrix &m, const uint8_t *block, const Inputs &x, int row, Floats *out) {
    switch (m.format) {
        case FP32: return block_fp32<M>(block, x, row, m.inputs, out);
        case BF16: return block_bf16<M>(block, x, row, m.inputs, out);
        case INT8: return block_quantised<M, INT8>(block, x, row, m.inputs, out);
        case INT8_FINE: return block_quantised<M, INT8_FINE>(block, x, row, m.inputs, out);
        default: return block_quantised<M, INT4>(block, x, row, m.inputs, out);
    }
}

int64_t block_bytes(const Matrix &m) {
    switch (m.format) {
        case FP32: return int64_t(m.inputs) * LANES * 4;
        case BF16: return int64_t(m.inputs) * LANES * 2;
        case INT8:
        case INT8_FINE: return int64_t(m.inputs) / GROUP * 576;
        default: return int64_t(m.inputs) / GROUP * 320;
    }
}

template <int M>
void product(const Matrix &m, int block, const Inputs &x, int row, float *out, int64_t stride) {
    Floats sums[M] = {};
    block_any<M>(m, m.weights + block * block_bytes(m), x, row, sums);
    const int first = block * LANES, count = std::min(LANES, m.outputs - first);
    for (int r = 0; r < M; r++) {
        float *to = out + (row + r) * stride + first;
        if (m.bias != nullptr) sums[r] += load(m.bias + first);
        if (count == LANES) {
            store(to, sums[r]);
        } else {
            std::memcpy(to, &sums[r], count * sizeof(float));
        }
    }
}

// out [N, stride] = x times the matrix; each thread takes its share of the blocks.
void multiply(Matrix &m, const Inputs &x, int rows, float *out, int64_t stride, int first = 0) {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int begin = first / LANES, blocks = round_up(m.outputs, LANES) / LANES - begin;
    const int from = begin + int64_t(blocks) * thread / threads;
    const int to = begin + int64_t(blocks) * (thread + 1) / threads;
    for (int block = from; block < to; block++) {
        int row = 0;
        for (; row + TILE <= rows; row += TILE) product<TILE>(m, block, x, row, out, stride);
        switch (rows - row) {
            case 7: product<7>(m, block, x, row, out, stride); break;
            case 6: product<6>(m, block, x, row, out, stride); break;
            case 5: product<5>(m, block, x, row, out, stride); break;
            case 4: product<4>(m, block, x, row, out, stride); break;
            case 3: product<3>(m, block, x, row, out, stride); break;
            case 2: product<2>(m, block, x, row, out, stride); break;
            case 1: product<1>(m, block, x, row, out, stride); break;
        }
    }
    if (thread == 0) {
        m.rows += rows;
        m.calls++;
    }
}

// ---------------------------------------------------------------- norms, rotation, activation

void normalise(const float *from, const float *gains, int size, float epsilon, float *to) {
    Floats squares;
    float rest = 0;
    int i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(from + i) * load(from + i);
    for (; i < size; i++) rest += from[i] * from[i];
    const float scale = 1.0f / std::sqrt((total(squares) + rest) / float(size) + epsilon);
    for (i = 0; i < size; i++) to[i] = from[i] * scale * gains[i];
}

void rotate(float *head, const float *cosines, const float *sines, int rotary) {
    const int middle = rotary / 2;
    for (int i = 0; i < middle; i++) {
        const float a = head[i], b = head[i + middle];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + middle] = b * cosines[i + middle] + a * sines[i + middle];
    }
}

inline Floats activated(Floats x, int activation) {
    if (activation == SILU) return x / (1.0f + exponential(-x));
    if (activation == GELU_TANH)
        return 0.5f * x * (1.0f + tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
    Floats out;
    for (int lane = 0; lane < LANES; lane++)
        out[lane] = 0.5f * x[lane] * (1.0f + std::erf(x[lane] * 0.70710678f));
    return out;
}

// ---------------------------------------------------------------- attention

constexpr int MOST_HEADS = 4;  // query heads that share a pass over keys and values

struct Place {  // where one layer's keys and values of one text lie
    const Text *text;
    int64_t before;  // heads before the layer's first
    int size, padded;

    int64_t row(int head, int position) const {
        return (before + head) * text->capacity + position;
    }
    // The first of the 16 keys that position lies among.
    int64_t block(int head, int position) const { return row(head, position / LANES * LANES); }
    float *key_floats(int head, int position) const {
        return static_cast<float *>(text->keys) + block(head, position) * padded;
    }
    uint8_t *key_codes(int head, int position) const {
        return static_cast<uint8_t *>(text->keys) + block(head, position) * padded;
    }
    float *key_steps(int head, int position) const {
        return text->key_steps + block(head, position) * (padded / GROUP);
    }
    float *value_floats(int head, int position) const {
        return static_cast<float *>(text->values) + row(head, position) * padded;
    }
    int8_t *value_codes(int head, int position) const {  // of the four that position lies among
        return static_cast<int8_t *>(text->values) + row(head, position / 4 * 4) * padded;
    }
    float *value_steps(int head, int position) const {
        return text->value_steps + row(head, position);
    }
};

Place place(const Model &m, const Text &text, int layer) {
    return {&text, int64_t(layer) * m.kv_heads, m.head_size, round_up(m.head_size, GROUP)};
}

// What attends: up to four query heads of one row that share keys, [heads, padded] each.
struct Queries {
    const float *states;
    const int8_t *codes;
    const float *steps;     // [heads, padded / GROUP]
    const int32_t *zeros;   // [heads, padded / GROUP]: what a key's + 128 adds
};

// The largest score of some keys, and the sum of their weights relative to it.
struct Weight {
    float best, sum;
};

// Room for one thread's attention.
struct Scratch {
    float *states;   // [MOST_HEADS, padded]
    int8_t *codes;   // [MOST_HEADS, padded]
    float *steps;    // [MOST_HEADS, padded / GROUP]
    int32_t *zeros;  // [MOST_HEADS, padded / GROUP]
    float *scores;   // [MOST_HEADS, longest]
    int64_t longest;
};

// sums[g] = products of G queries with 16 keys, one key per lane.
template <int G>
void products_fp32(const Queries &q, const Place &at, int head, int start, Floats *sums) {
    const float *keys = at.key_floats(head, start);
    for (int i = 0; i < at.padded; i++) {
        const Floats key = load(keys + i * LANES);
        for (int g = 0; g < G; g++) sums[g] += key * q.states[g * at.padded + i];
    }
}

template <int G>
void products_int8(const Queries &q, const Place &at, int head, int start, Floats *sums) {
    const int groups = at.padded / GROUP;
    const uint8_t *keys = at.key_codes(head, start);
    const float *steps = at.key_steps(head, start);
    for (int group = 0; group < groups; group++) {
        Ints dots[G];
        for (int g = 0; g < G; g++) dots[g] = -q.zeros[g * groups + group];
        for (int part = 0; part < GROUP / 4; part++) {
            const Bytes key = load_lanes<uint8_t>(keys + 64 * part);
            __builtin_prefetch(keys + 64 * part + AHEAD);
            for (int g = 0; g < G; g++)
                dots[g] = add_products(dots[g], key,
                                       q.codes + g * at.padded + group * GROUP + 4 * part);
        }
        const Floats step = load(steps + group * LANES);
        for (int g = 0; g < G; g++)
            sums[g] += step * q.steps[g * groups + group] * as_floats(dots[g]);
        keys += 64 * (GROUP / 4);
    }
}

// Scores become weights, e^(score - best), of keys begin up to last, 0 outside first..last.
template <int G, Format F>
void weigh(const Model &m, const Queries &q, const Place &at, int head, int begin, int first,
           int last, const Scratch &s, Weight *found) {
    Floats top[G];
    for (int g = 0; g < G; g++) top[g] = -INFINITY;
    for (int start = begin; start <= last; start += LANES) {
        Floats sums[G] = {};
        if (F == FP32) {
            products_fp32<G>(q, at, head, start, sums);
        } else {
            products_int8<G>(q, at, head, start, sums);
        }
        const Ints position = lane_numbers() + start;
        for (int g = 0; g < G; g++) {
            if (m.softcap > 0) sums[g] = m.softcap * tangent(sums[g] / m.softcap);
            const Ints outside = less<int32_t>(position, first) | less<int32_t>(last, position);
            sums[g] = select<float>(outside, -INFINITY, sums[g]);
            top[g] = larger(sums[g], top[g]);
            store(s.scores + g * s.longest + start - begin, sums[g]);
        }
    }
    for (int g = 0; g < G; g++) {
        const float best = largest(top[g]);
        Floats sum;
        for (int start = begin; start <= last; start += LANES) {
            float *score = s.scores + g * s.longest + start - begin;
            const Floats weight = exponential(load(score) - best);
            store(score, weight);
            sum += weight;
        }
        found[g] = {best, total(sum)};
    }
}

// out [G, size]: the values of keys begin..last by their weights, C vectors of them from offset.
template <int G, int C>
void mix_fp32(const Place &at, int head, int begin, int last, int offset, const Scratch &s,
              Floats (&sums)[G][C]) {
    for (int t = begin; t <= last; t++) {
        const float *value = at.value_floats(head, t) + offset;
        for (int c = 0; c < C; c++) {
            const Floats part = load(value + c * LANES);
            for (int g = 0; g < G; g++) sums[g][c] += part * s.scores[g * s.longest + t - begin];
        }
    }
}

// Weights become bytes, GROUP keys at a time with a scale of their own: one key that takes nearly
// everything does not round the keys of other groups away.
template <int G, int C>
void mix_int8(const Place &at, int head, int begin, int last, int offset, const Scratch &s,
              Floats (&sums)[G][C]) {
    for (int start = begin; start <= last; start += GROUP) {
        alignas(64) uint8_t codes[G][GROUP];
        float scale[G];
        const float *steps = at.value_steps(head, start);
        for (int g = 0; g < G; g++) {
            const float *weights = s.scores + g * s.longest + start - begin;
            const bool both = start + LANES <= last;  // the second half may never have been weighed
            const Floats low = load(weights) * load(steps);
            const Floats high = both ? load(weights + LANES) * load(steps + LANES) : Floats();
            const float best = largest(larger(low, high));
            const Floats to_code = best > 0 ? 255.0f / best : 0.0f;
            store_codes(codes[g], rounded(low * to_code));
            store_codes(codes[g] + LANES, rounded(high * to_code));
            scale[g] = best / 255.0f;
        }
        Ints dots[G][C] = {};
        const int8_t *values = at.value_codes(head, start) + offset * 4;
        const int fours = std::min(GROUP, last + 1 - start + 3) / 4;
        for (int four = 0; four < fours; four++, values += at.padded * 4)
            for (int c = 0; c < C; c++) {
                const Bytes part = load_lanes<uint8_t>(values + c * LANES * 4);
                __builtin_prefetch(values + c * LANES * 4 + AHEAD);
                for (int g = 0; g < G; g++)
                    dots[g][c] = add_scaled(dots[g][c], codes[g] + 4 * four, part);
            }
        for (int g = 0; g < G; g++)
            for (int c = 0; c < C; c++) sums[g][c] += scale[g] * as_floats(dots[g][c]);
    }
}

template <int G, int C, Format F>
void mix(const Place &at, int head, int begin, int last, int offset, const Scratch &s,
         const Weight *found, float *out) {
    Floats sums[G][C] = {};
    if (F == FP32) {
        mix_fp32<G, C>(at, head, begin, last, offset, s, sums);
    } else {
        mix_int8<G, C>(at, head, begin, last, offset, s, sums);
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) {
            const Floats mixed = sums[g][c] / found[g].sum;
            const int count = std::clamp(at.size - offset - c * LANES, 0, LANES);
            std::memcpy(out + g * at.size + offset + c * LANES, &mixed, count * sizeof(float));
        }
}

template <int G, Format F>
void attend(const Model &m, const Queries &q, const Place &at, int head, int first, int last,
            const Scratch &s, float *out, Weight *found) {
    const int begin = first / GROUP * GROUP;
    weigh<G, F>(m, q, at, head, begin, first, last, s, found);
    int offset = 0;
    for (; offset + 4 * LANES <= at.padded; offset += 4 * LANES)
        mix<G, 4, F>(at, head, begin, last, offset, s, found, out);
    for (; offset < at.padded; offset += 2 * LANES)
        mix<G, 2, F>(at, head, begin, last, offset, s, found, out);
}

template <Format F>
void attend_any(int count, const Model &m, const Queries &q, const Place &at, int head, int first,
                int last, const Scratch &s, float *out, Weight *found) {
    switch (count) {
        case 4: return attend<4, F>(m, q, at, head, first, last, s, out, found);
        case 3: return attend<3, F>(m, q, at, head, first, last, s, out, found);
        case 2: return attend<2, F>(m, q, at, head, first, last, s, out, found);
        default: return attend<1, F>(m, q, at, head, first, last, s, out, found);
    }
}

// ---------------------------------------------------------------- the work of a call

// Meets the other threads of a call. Phases are microseconds long, so it spins; it gives the core
// away after a while, for beside other work the thread waited for may not be running at all.
class Barrier {
  public:
    void wait() {
        const int threads = omp_get_num_threads();
        if (threads == 1) return;
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
            if (spins > MOST_SPINS) sched_yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }

  private:
    static constexpr int MOST_SPINS = 5000;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

struct Buffers {
    Inputs x;           // inputs of the next product
    float *wide;        // [N, wide_stride]: outputs of qkv and gate_up
    float *narrow;      // [N, narrow_stride]: outputs of output and down
    int64_t wide_stride, narrow_stride;
    char *scratch;      // [threads, scratch_size]
    size_t scratch_size;
    int64_t longest;    // keys a row may see, rounded up
    int padded;         // head size, rounded up
    char *parts;        // [rows or threads, key heads, shares]: attention not yet merged
    int shares;         // most shares that a row attends to
    Barrier *barrier;

    Scratch mine() const;
};

// One block of memory per calling thread, grown when a call needs more.
class Arena {
  public:
    ~Arena() { std::free(memory_); }
    void reserve(size_t size) {
        if (size <= size_) return;
        std::free(memory_);
        memory_ = static_cast<char *>(std::aligned_alloc(64, size));
        size_ = memory_ == nullptr ? 0 : size;
    }
    bool ok() const { return memory_ != nullptr; }
    char *memory() const { return memory_; }

  private:
    char *memory_ = nullptr;
    size_t size_ = 0;
};

thread_local Arena arena;

size_t aligned(size_t size) { return (size + 127) / 64 * 64; }

// This thread's part of the scratch memory.
Scratch Buffers::mine() const {
    char *at = scratch + omp_get_thread_num() * scratch_size;
    auto take = [&](size_t size) { char *part = at; at += aligned(size); return part; };
    const size_t states = MOST_HEADS * padded, groups = states / GROUP;
    Scratch s;
    s.states = reinterpret_cast<float *>(take(states * 4));
    s.codes = reinterpret_cast<int8_t *>(take(states));
    s.steps = reinterpret_cast<float *>(take(groups * 4));
    s.zeros = reinterpret_cast<int32_t *>(take(groups * 4));
    s.scores = reinterpret_cast<float *>(take(MOST_HEADS * longest * 4));
    s.longest = longest;
    return s;
}

// What the attention of the heads that share keys takes, for one share of the keys.
size_t part_size(const Model &m) {
    return aligned(m.heads / m.kv_heads * (m.head_size * 4 + sizeof(Weight)));
}

// Makes room for rows of a product's inputs and outputs, and for attention to longest keys.
bool allocate(const Model &m, Buffers &b, int rows, int width, int64_t wide, int64_t narrow,
              int64_t longest, int threads) {
    b.x.width = round_up(width, GROUP);
    b.wide_stride = round_up(int(wide), LANES);
    b.narrow_stride = round_up(int(narrow), LANES);
    b.longest = (longest + GROUP) / GROUP * GROUP + GROUP;
    b.padded = round_up(m.head_size, GROUP);
    b.shares = int(longest / SHARE) + 2;
    b.scratch_size = aligned(MOST_HEADS * b.padded * 4) + aligned(MOST_HEADS * b.padded) +
                     2 * aligned(MOST_HEADS * b.padded / GROUP * 4) +
                     aligned(MOST_HEADS * b.longest * 4);
    const size_t n = rows, groups = b.x.width / GROUP;
    const size_t parts = size_t(SHARED_ROWS) * threads * m.kv_heads * b.shares * part_size(m);
    const size_t sizes[] = {aligned(n * b.x.width * 4), 2 * aligned(n * b.x.width),
                            aligned(n * groups * 4),    aligned(n * groups * 4),
                            aligned(n * b.wide_stride * 4), aligned(n * b.narrow_stride * 4),
                            threads * b.scratch_size,   parts};
    size_t all = 0;
    for (size_t size : sizes) all += size;
    arena.reserve(all);
    if (!arena.ok()) return false;
    char *at = arena.memory();
    auto take = [&](int i) { char *part = at; at += sizes[i]; return part; };
    b.x.states = reinterpret_cast<float *>(take(0));
    b.x.codes = reinterpret_cast<int8_t *>(take(1));
    b.x.rest = b.x.codes + aligned(n * b.x.width);
    b.x.steps = reinterpret_cast<float *>(take(2));
    b.x.sums = reinterpret_cast<float *>(take(3));
    b.wide = reinterpret_cast<float *>(take(4));
    b.narrow = reinterpret_cast<float *>(take(5));
    b.scratch = take(6);
    b.parts = take(7);
    return true;
}

// The rows this thread takes in a phase that works row by row.
template <typename Work>
void each_row(int rows, Work work) {
    const int threads = omp_get_num_threads();
    for (int row = omp_get_thread_num(); row < rows; row += threads) work(row);
}

void enter(const Model &m, const float *gains, const float *hidden, const Inputs &x, int row,
           const Matrix &next) {
    float *states = x.states + int64_t(row) * x.width;
    if (gains != nullptr) {
        normalise(hidden, gains, m.hidden, m.epsilon, states);
    } else {
        std::memcpy(states, hidden, m.hidden * sizeof(float));
    }
    ready(x, row, next, m.hidden);
}

void add_residual(const Model &m, const float *gains, float *update, float *hidden) {
    if (gains != nullptr) normalise(update, gains, m.hidden, m.epsilon, update);
    for (int i = 0; i < m.hidden; i++) hidden[i] += m.residual * update[i];
}

void head_norms(const Model &m, const Layer &layer, const float *gains, float *heads, int count) {
    if (layer.head_norm == WHOLE)
        normalise(heads, gains, count * m.head_size, m.epsilon, heads);
    if (layer.head_norm == PER_HEAD)
        for (int head = 0; head < count; head++) {
            float *one = heads + head * m.head_size;
            normalise(one, gains, m.head_size, m.epsilon, one);
        }
}

void rotate_all(const Model &m, const Layer &layer, float *heads, int count, int position) {
    if (layer.cosines == nullptr) return;
    const int64_t at = int64_t(position) * m.rotary;
    for (int head = 0; head < count; head++)
        rotate(heads + head * m.head_size, layer.cosines + at, layer.sines + at, m.rotary);
}

void keep_fp32(const float *keys, const float *values, const Place &at, int head, int position) {
    float *block = at.key_floats(head, position) + position % LANES;
    for (int i = 0; i < at.size; i++) block[i * LANES] = keys[i];
    for (int i = at.size; i < at.padded; i++) block[i * LANES] = 0.0f;
    float *value = at.value_floats(head, position);
    std::memcpy(value, values, at.size * sizeof(float));
    std::fill(value + at.size, value + at.padded, 0.0f);
}

void keep_int8(const float *keys, const float *values, const Place &at, int head, int position,
               const Scratch &s) {
    int32_t sum;
    std::fill(s.states + at.size, s.states + at.padded, 0.0f);
    std::memcpy(s.states, keys, at.size * sizeof(float));
    uint8_t *block = at.key_codes(head, position) + position % LANES * 4;
    for (int group = 0; group < at.padded / GROUP; group++) {
        at.key_steps(head, position)[group * LANES + position % LANES] =
            quantise_group(s.states + group * GROUP, s.codes, sum);
        for (int i = 0; i < GROUP; i++)
            block[(group * GROUP + i) / 4 * 64 + i % 4] = uint8_t(s.codes[i] + 128);
    }
    float best = 0;
    for (int i = 0; i < at.size; i++) best = std::max(best, std::fabs(values[i]));
    *at.value_steps(head, position) = best / 127.0f;
    const float inverse = best > 0 ? 127.0f / best : 0.0f;
    int8_t *four = at.value_codes(head, position) + position % 4;
    for (int i = 0; i < at.size; i++) four[i * 4] = int8_t(std::nearbyintf(values[i] * inverse));
    for (int i = at.size; i < at.padded; i++) four[i * 4] = 0;
}

void keep(const Model &m, const Layer &layer, float *keys, const Place &at, int position,
          const Scratch &s) {
    const float *values = keys + m.kv_heads * m.head_size;
    head_norms(m, layer, layer.key_norm, keys, m.kv_heads);
    rotate_all(m, layer, keys, m.kv_heads, position);
    for (int head = 0; head < m.kv_heads; head++) {
        const float *key = keys + head * m.head_size, *value = values + head * m.head_size;
        if (m.kv_format == FP32) {
            keep_fp32(key, value, at, head, position);
        } else {
            keep_int8(key, value, at, head, position, s);
        }
    }
}

void ask(const Model &m, const Layer &layer, float *queries, int position) {
    head_norms(m, layer, layer.query_norm, queries, m.heads);
    rotate_all(m, layer, queries, m.heads, position);
    for (int i = 0; i < m.heads * m.head_size; i++) queries[i] *= m.scale;
}

// Lays count heads [count, size] out for attention, padded and, for int8 keys, as bytes.
Queries laid_out(const Model &m, const float *heads, int count, const Place &at, const Scratch &s) {
    for (int g = 0; g < count; g++) {
        float *states = s.states + g * at.padded;
        std::memcpy(states, heads + g * at.size, at.size * sizeof(float));
        std::fill(states + at.size, states + at.padded, 0.0f);
    }
    if (m.kv_format == INT8)
        for (int group = 0; group < count * at.padded / GROUP; group++) {
            int32_t sum;
            s.steps[group] = quantise_group(s.states + group * GROUP, s.codes + group * GROUP, sum);
            s.zeros[group] = 128 * sum;
        }
    return {s.states, s.codes, s.steps, s.zeros};
}

// A row's keys are taken SHARE at a time, from position 0 on, and the shares merged in order: so
// what a row gets does not depend on how many rows or threads there are.
struct Part {
    float *mixed;   // [heads that share the keys, size]
    Weight *found;  // [heads that share the keys]
};

struct Reach {  // the shares that a row attends to
    int first, position, begin, end;
};

Reach reach(const Layer &layer, int position) {
    const int first = layer.window > 0 ? std::max(0, position - layer.window + 1) : 0;
    return {first, position, first / SHARE, position / SHARE + 1};
}

Part part_of(const Model &m, const Buffers &b, int place, int kv, int share) {
    char *at = b.parts + ((int64_t(place) * m.kv_heads + kv) * b.shares + share) * part_size(m);
    return {reinterpret_cast<float *>(at),
            reinterpret_cast<Weight *>(at + m.heads / m.kv_heads * m.head_size * 4)};
}

// Count query heads that share the keys of kv, from the own-th on, over one share of the keys.
void attend_share(const Model &m, const Place &at, const Reach &r, const float *queries, int kv,
                  int own, int count, int share, const Part &part, const Scratch &s) {
    const int head = kv * (m.heads / m.kv_heads) + own;
    const int first = std::max(r.first, share * SHARE);
    const int last = std::min(r.position, share * SHARE + SHARE - 1);
    const Queries q = laid_out(m, queries + head * m.head_size, count, at, s);
    float *out = part.mixed + own * m.head_size;
    if (m.kv_format == FP32) {
        attend_any<FP32>(count, m, q, at, kv, first, last, s, out, part.found + own);
    } else {
        attend_any<INT8>(count, m, q, at, kv, first, last, s, out, part.found + own);
    }
}

// Where a thread begins among a row's (key head, share, query head): each reads as many keys.
int beginning(const Model &m, const Reach &r, int thread, int threads) {
    const int64_t shared = m.heads / m.kv_heads, shares = r.end - r.begin;
    const int64_t keys = r.position + 1 - int64_t(r.begin) * SHARE;
    const int64_t passed = m.kv_heads * shared * keys * thread / threads;
    const int64_t kv = passed / (shared * keys), rest = passed % (shared * keys);
    const int64_t share = rest / (shared * SHARE);
    const int64_t size = std::min<int64_t>(SHARE, keys - share * SHARE);
    const int64_t own = (rest % (shared * SHARE) + size / 2) / size;
    return int((kv * shares + share) * shared + own);
}

// The from-th to the to-th of a row's (key head, share, query head), as many at once as share keys.
void attend_row(const Model &m, int index, const Rows &rows, const Buffers &b, int row, int from,
                int to, int place_of_row, const Scratch &s) {
    const Reach r = reach(m.layers[index], rows.position[row]);
    const Place at = place(m, *rows.texts[rows.text[row]], index);
    const int shared = m.heads / m.kv_heads, shares = r.end - r.begin;
    for (int i = from; i < to;) {
        const int own = i % shared, share = i / shared % shares, kv = i / shared / shares;
        const int count = std::min({MOST_HEADS, shared - own, to - i});
        attend_share(m, at, r, b.wide + row * b.wide_stride, kv, own, count, r.begin + share,
                     part_of(m, b, place_of_row, kv, share), s);
        i += count;
    }
}

// Joins the shares of some heads of one row, each by its weight.
void merge(const Model &m, int index, const Rows &rows, const Buffers &b, int row, int place_of_row,
           int begin, int end) {
    const Reach r = reach(m.layers[index], rows.position[row]);
    const int shared = m.heads / m.kv_heads, size = m.head_size, shares = r.end - r.begin;
    float *out = b.x.states + int64_t(row) * b.x.width + begin * size;
    for (int head = begin; head < end; head++, out += size) {
        const int kv = head / shared, own = head % shared;
        float best = -INFINITY, sum = 0;
        for (int share = 0; share < shares; share++)
            best = std::max(best, part_of(m, b, place_of_row, kv, share).found[own].best);
        std::fill(out, out + size, 0.0f);
        for (int share = 0; share < shares; share++) {
            const Part part = part_of(m, b, place_of_row, kv, share);
            const float weight = part.found[own].sum * std::exp(part.found[own].best - best);
            for (int i = 0; i < size; i++) out[i] += weight * part.mixed[own * size + i];
            sum += weight;
        }
        for (int i = 0; i < size; i++) out[i] /= sum;
    }
}

// Whether threads take whole rows; otherwise they divide the keys of each.
bool whole_rows(int rows, int threads) { return rows >= SHARED_ROWS * threads || threads == 1; }

void attention(const Model &m, int index, const Rows &rows, const Buffers &b) {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Scratch s = b.mine();
    const bool whole = whole_rows(rows.count, threads);
    // Later rows see more keys, so whole rows are dealt out in turn. Of a single row each thread
    // takes consecutive keys: memory is fetched ahead.
    for (int row = whole ? thread : 0; row < rows.count; row += whole ? threads : 1) {
        const Reach r = reach(m.layers[index], rows.position[row]);
        const int first = whole ? 0 : beginning(m, r, thread, threads);
        const int last = whole ? m.heads * (r.end - r.begin) : beginning(m, r, thread + 1, threads);
        attend_row(m, index, rows, b, row, first, last, whole ? thread : row, s);
        if (whole) merge(m, index, rows, b, row, thread, 0, m.heads);
    }
    if (whole) return;
    b.barrier->wait();
    for (int row = 0; row < rows.count; row++)
        merge(m, index, rows, b, row, row, m.heads * thread / threads,
              m.heads * (thread + 1) / threads);
}

void store_rows(const Model &m, int index, const Rows &rows, const Buffers &b, bool queries) {
    const Scratch s = b.mine();
    each_row(rows.count, [&](int row) {
        float *qkv = b.wide + row * b.wide_stride;
        const int position = rows.position[row];
        if (queries) ask(m, m.layers[index], qkv, position);
        keep(m, m.layers[index], qkv + m.heads * m.head_size,
             place(m, *rows.texts[rows.text[row]], index), position, s);
    });
}

void gate(const Model &m, const float *both, float *out) {
    const int up = round_up(m.inner, LANES);  // gates and ups are padded apart
    for (int i = 0; i < up; i += LANES)
        store(out + i, activated(load(both + i), m.activation) * load(both + up + i));
}

void run_attention(const Model &m, int index, const Rows &rows, float *hidden, const Buffers &b) {
    Layer &layer = m.layers[index];
    const int n = rows.count, mixed = m.heads * m.head_size;
    each_row(n, [&](int row) {
        enter(m, layer.before_attention, hidden + int64_t(row) * m.hidden, b.x, row, layer.qkv);
    });
    b.barrier->wait();
    multiply(layer.qkv, b.x, n, b.wide, b.wide_stride);
    b.barrier->wait();
    store_rows(m, index, rows, b, true);
    b.barrier->wait();
    attention(m, index, rows, b);
    b.barrier->wait();
    each_row(n, [&](int row) { ready(b.x, row, layer.output, mixed); });
    b.barrier->wait();
    multiply(layer.output, b.x, n, b.narrow, b.narrow_stride);
    b.barrier->wait();
    each_row(n, [&](int row) {
        add_residual(m, layer.after_attention, b.narrow + row * b.narrow_stride,
                     hidden + int64_t(row) * m.hidden);
    });
}

void run_mlp(const Model &m, int index, const Rows &rows, float *hidden, const Buffers &b) {
    Layer &layer = m.layers[index];
    const int n = rows.count;
    each_row(n, [&](int row) {
        enter(m, layer.before_mlp, hidden + int64_t(row) * m.hidden, b.x, row, layer.gate_up);
    });
    b.barrier->wait();
    multiply(layer.gate_up, b.x, n, b.wide, b.wide_stride);
    b.barrier->wait();
    each_row(n, [&](int row) {
        gate(m, b.wide + row * b.wide_stride, b.x.states + int64_t(row) * b.x.width);
        ready(b.x, row, layer.down, m.inner);
    });
    b.barrier->wait();
    multiply(layer.down, b.x, n, b.narrow, b.narrow_stride);
    b.barrier->wait();
    each_row(n, [&](int row) {
        add_residual(m, layer.after_mlp, b.narrow + row * b.narrow_stride,
                     hidden + int64_t(row) * m.hidden);
    });
}

// One part of a path for these rows: a layer, or the half of it that is marked. Every thread of a
// region calls it; hidden [N, D] is changed in place. No barrier between layers nor between halves:
// a row's states belong to one thread from the last product to the next.
void run_layer(const Model &m, int part, const Rows &rows, float *hidden, const Buffers &b) {
    const int index = part & (ATTENTION - 1);
    if (!(part & MLP)) run_attention(m, index, rows, hidden, b);
    if (!(part & ATTENTION)) run_mlp(m, index, rows, hidden, b);
}

// The inputs of a product from this row on.
Inputs from_row(const Inputs &x, int64_t row) {
    const int64_t groups = x.width / GROUP;
    return {x.states + row * x.width, x.codes + row * x.width, x.rest + row * x.width,
            x.steps + row * groups,   x.sums + row * groups,   x.width};
}

// Keys and values of several layers whose inputs are all the same rows: the products of all layers
// follow each other as one, with two meetings for the lot.
void fill_layers(const Model &m, const int32_t *layers, int count, const Rows &rows,
                 const float *hidden, const Buffers &b) {
    const int n = rows.count;
    each_row(count * n, [&](int i) {
        Layer &layer = m.layers[layers[i / n]];
        enter(m, layer.before_attention, hidden + int64_t(i % n) * m.hidden, b.x, i, layer.qkv);
    });
    b.barrier->wait();
    for (int i = 0; i < count; i++) {
        Matrix &qkv = m.layers[layers[i]].qkv;
        multiply(qkv, from_row(b.x, i * n), n, b.wide + i * n * b.wide_stride, b.wide_stride,
                 qkv.first);
    }
    b.barrier->wait();
    for (int i = 0; i < count; i++) {
        Buffers own = b;
        own.wide += i * n * b.wide_stride;
        store_rows(m, layers[i], rows, own, false);
    }
    b.barrier->wait();
}

// How certain logits are, as offramp.signals says: nearly 1 for max_prob, and for margin.
float certainty(const float *logits, int64_t count, int signal) {
    Floats top = -INFINITY, next = top, sum;
    const int64_t whole = count / LANES * LANES;
    Floats rest = -INFINITY;
    for (int64_t i = whole; i < count; i++) rest[i - whole] = logits[i];
    auto each = [&](auto use) {
        for (int64_t i = 0; i < whole; i += LANES) use(load(logits + i));
        use(rest);
    };
    each([&](Floats value) {
        next = larger(smaller(value, top), next);
        top = larger(value, top);
    });
    const float best = largest(top);
    each([&](Floats value) { sum += exponential(value - best); });
    if (signal == MAX_PROB) return 1.0f / total(sum);
    int at = 0;
    while (at < LANES - 1 && top[at] != best) at++;
    top[at] = next[at];
    return (1.0f - std::exp(largest(top) - best)) / total(sum);
}

// The probability that a gate gives a state: logistic, of its widths at root mean square 1.
float opening(const float *gate, const float *state, int size) {
    Floats squares, dots;
    float square = 0, dot = 0;
    int i = 0;
    for (; i + LANES <= size; i += LANES) {
        squares += load(state + i) * load(state + i);
        dots += load(state + i) * load(gate + i);
    }
    for (; i < size; i++) {
        square += state[i] * state[i];
        dot += state[i] * gate[i];
    }
    const float scale = 1.0f / std::sqrt((total(squares) + square) / size + 1e-6f);
    return 1.0f / (1.0f + std::exp(-(total(dots) + dot) * scale - gate[size]));
}

void scale_logits(const Model &m, float *logits, int64_t count) {
    if (m.logit_scale != 1.0f)
        for (int64_t i = 0; i < count; i++) logits[i] *= m.logit_scale;
    if (m.logit_softcap > 0)
        for (int64_t i = 0; i < count; i++)
            logits[i] = m.logit_softcap * std::tanh(logits[i] / m.logit_softcap);
}

inline Floats dots(const float *a, const float *b, int size) {
    Floats sums;
    for (int i = 0; i + LANES <= size; i += LANES) sums += load(a + i) * load(b + i);
    return sums;
}

float dot(const float *a, const float *b, int size) {
    float sum = total(dots(a, b, size));
    for (int i = size / LANES * LANES; i < size; i++) sum += a[i] * b[i];
    return sum;
}

// Computes again, exactly, every logit that may be the largest: its upper end is not below the
// highest lower end. (Not below: so is what is no number.)
void settle(const Exact &exact, const float *bias, const float *state, int size, float *logits,
            int64_t outputs) {
    constexpr int64_t STRIDE = 4 * LANES;  // looked at together: few are near the top
    const float norm = std::sqrt(dot(state, state, size));
    const int64_t whole = outputs / STRIDE * STRIDE;
    Floats ends = -INFINITY;
    for (int64_t i = 0; i < whole; i += LANES)
        ends = larger(load(logits + i) - norm * load(exact.errors + i), ends);
    float highest = largest(ends);
    for (int64_t i = whole; i < outputs; i++)
        highest = std::max(highest, logits[i] - norm * exact.errors[i]);
    auto below = [&](int64_t i) {
        return less(load(logits + i) + norm * load(exact.errors + i), Floats(highest));
    };
    auto again = [&](int64_t i) {
        if (!(logits[i] + norm * exact.errors[i] < highest))
            logits[i] = dot(state, exact.rows + i * size, size) + (bias == nullptr ? 0 : bias[i]);
    };
    for (int64_t i = 0; i < whole; i += STRIDE) {
        const Ints found = below(i) + below(i + LANES) + below(i + 2 * LANES) + below(i + 3 * LANES);
        if (total(found) > -STRIDE)  // a lane that is below counts -1
            for (int64_t one = i; one < i + STRIDE; one++) again(one);
    }
    for (int64_t i = whole; i < outputs; i++) again(i);
}

// logits [n, outputs] of n states, state(i) each: the last norm, then head; or, where down is not
// null, down and then head (a head of low rank). A row's logits belong to the thread of its row.
template <typename State>
void read_out(const Model &m, Matrix *down, Matrix &head, const Exact *exact, int n, State state,
              float *logits, const Buffers &b) {
    const int64_t outputs = head.outputs;
    Matrix &first = down == nullptr ? head : *down;
    each_row(n, [&](int row) { enter(m, m.norm, state(row), b.x, row, first); });
    b.barrier->wait();
    if (down != nullptr) {
        multiply(*down, b.x, n, b.narrow, b.narrow_stride);
        b.barrier->wait();
        each_row(n, [&](int row) {
            std::memcpy(b.x.states + int64_t(row) * b.x.width, b.narrow + row * b.narrow_stride,
                        down->outputs * sizeof(float));
            ready(b.x, row, head, down->outputs);
        });
        b.barrier->wait();
    }
    multiply(head, b.x, n, logits, outputs);
    b.barrier->wait();
    each_row(n, [&](int row) {
        if (exact != nullptr)
            settle(*exact, head.bias, b.x.states + int64_t(row) * b.x.width, m.hidden,
                   logits + row * outputs, outputs);
        scale_logits(m, logits + row * outputs, outputs);
    });
}

// Runs the rows that ask through the layer that an exit owns; the others leave their keys and values.
void run_own(const Model &m, int index, const Watch &w, const float *hidden, const Buffers &b) {
    const int asks = w.asks->count;
    float *rest = w.made + int64_t(asks) * m.hidden;
    auto copy = [&](int from, float *to) {
        std::memcpy(to, hidden + int64_t(w.order[from]) * m.hidden, m.hidden * sizeof(float));
    };
    // Whoever copies a row is the thread whose row it is in what follows.
    each_row(asks, [&](int i) { copy(i, w.made + int64_t(i) * m.hidden); });
    each_row(w.rest->count, [&](int i) { copy(asks + i, rest + int64_t(i) * m.hidden); });
    if (w.rest->count > 0) fill_layers(m, &index, 1, *w.rest, rest, b);
    run_layer(m, index, *w.asks, w.made, b);
}

// Whether some asking row may leave at this exit; all threads agree.
bool may_leave(const Model &m, const Watch &w, int exit, const float *hidden, const Buffers &b) {
    const bool owns = w.blocks[exit] >= 0;
    const int asks = w.asks->count;
    auto state = [&](int row) {
        return owns ? w.made + int64_t(row) * m.hidden : hidden + int64_t(w.order[row]) * m.hidden;
    };
    b.barrier->wait();  // a row's state is another thread's
    if (owns) run_own(m, w.blocks[exit], w, hidden, b);
    if (w.signal != GATE) read_out(m, w.down, *w.head, w.exact, asks, state, w.seen, b);
    each_row(asks, [&](int row) {
        w.scores[row] =
            w.signal == GATE
                ? opening(w.gates + int64_t(exit) * (m.hidden + 1), state(row), m.hidden)
                : certainty(w.seen + int64_t(row) * w.head->outputs, w.head->outputs, w.signal);
    });
    b.barrier->wait();
    // What is no number is not below: the policy shall see it.
    return std::any_of(w.scores, w.scores + asks,
                       [&](float score) { return !(score < w.bars[exit]); });
}

int widest(const Model &m) {
    return std::max({m.hidden, m.heads * m.head_size, round_up(m.inner, LANES)}) + GROUP;
}

bool allocate_layers(const Model &m, const Rows &rows, int most, int threads, Buffers &b) {
    int longest = 0;
    for (int row = 0; row < rows.count; row++) longest = std::max(longest, rows.position[row] + 1);
    const int wide = std::max((m.heads + 2 * m.kv_heads) * m.head_size,
                              2 * round_up(m.inner, LANES));
    return allocate(m, b, most, widest(m), wide, m.hidden, longest, threads);
}

Rows rows_from(const Rows &rows, int start) {
    return {rows.texts, rows.text + start, rows.position + start,
            std::min(CHUNK, rows.count - start)};
}

}  // namespace

extern "C" {

// Runs hidden [N, D] through the layers in order, in place: segments, each up to its stop. Between
// two it goes on only where no asking row can leave (one segment needs no watch, and more need the
// rows to fit into a chunk). Returns how many segments ran, or 0: no memory.
int32_t offramp_run(const Model *m, const int32_t *layers, const int32_t *stops, int32_t segments,
                    float *hidden, const Rows *rows, const Watch *watch, int32_t threads) {
    Barrier meeting;
    Buffers b;
    b.barrier = &meeting;
    if (!allocate_layers(*m, *rows, std::min(rows->count, CHUNK), threads, b)) return 0;
    int ran = 0;
#pragma omp parallel num_threads(threads)
    for (int start = 0; start < rows->count; start += CHUNK) {
        float *states = hidden + int64_t(start) * m->hidden;
        int done = 0;
        for (int i = 0; done < segments; done++) {
            if (done > 0 && may_leave(*m, *watch, done - 1, states, b)) break;
            for (; i < stops[done]; i++) run_layer(*m, layers[i], rows_from(*rows, start), states, b);
        }
        if (omp_get_thread_num() == 0) ran = done;
    }
    return ran;
}

// Stores what the layers' keys and values would be if each one's input were hidden [N, D].
int32_t offramp_fill(const Model *m, const int32_t *layers, int32_t count, const float *hidden,
                     const Rows *rows, int32_t threads) {
    Barrier meeting;
    Buffers b;
    b.barrier = &meeting;
    const int most = std::max(std::min(rows->count * count, CHUNK), std::min(rows->count, CHUNK));
    if (!allocate_layers(*m, *rows, most, threads, b)) return 1;
#pragma omp parallel num_threads(threads)
    for (int start = 0; start < rows->count; start += CHUNK) {
        const Rows part = rows_from(*rows, start);
        const int together = std::max(CHUNK / part.count, 1);  // layers
        for (int i = 0; i < count; i += together)
            fill_layers(*m, layers + i, std::min(together, count - i), part,
                        hidden + int64_t(start) * m->hidden, b);
    }
    return 0;
}

// logits [N, outputs] of states hidden [N, D]. Returns 0, or 1: no memory.
int32_t offramp_readout(const Model *m, Matrix *down, Matrix *head, const Exact *exact,
                        const float *hidden, int32_t rows, float *logits, int32_t threads) {
    Barrier meeting;
    Buffers b;
    b.barrier = &meeting;
    const int rank = down == nullptr ? 0 : down->outputs;
    if (!allocate(*m, b, std::min(rows, int32_t(CHUNK)), std::max(m->hidden, rank) + GROUP, 1,
                  rank + LANES, 1, threads))
        return 1;
#pragma omp parallel num_threads(threads)
    for (int start = 0; start < rows; start += CHUNK)
        read_out(
            *m, down, *head, exact, std::min(CHUNK, rows - start),
            [&](int row) { return hidden + int64_t(start + row) * m->hidden; },
            logits + int64_t(start) * head->outputs, b);
    return 0;
}

// Sizes of Matrix, Layer, Model, Text, Watch and Exact, and the rows of a chunk: the caller's mirrors
// must agree.
void offramp_sizes(int32_t *sizes) {
    sizes[0] = sizeof(Matrix);
    sizes[1] = sizeof(Layer);
    sizes[2] = sizeof(Model);
    sizes[3] = sizeof(Text);
    sizes[4] = sizeof(Watch);
    sizes[5] = sizeof(Exact);
    sizes[6] = CHUNK;
}
}
