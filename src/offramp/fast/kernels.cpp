// The kernels of the fast backbone: decoder layers of Llama-like models on a CPU, any rows of many
// texts at once. Plain C interface; knows nothing of Python or torch. weights.py mirrors the
// structures, pack.py the weight layouts.
//
// Weights lie in blocks of 16 outputs, so that one vector register holds one input's weights (or
// four inputs', as bytes) for 16 outputs: no sum ever runs across a register. Every matrix is read
// once for up to 8 rows, and from cache for more.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int GROUP = 32;    // inputs that share a scale
constexpr int CHUNK = 256;   // rows that go through the layers together: their states stay in cache
constexpr int TILE = 8;      // rows whose sums fit into registers

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(64), aligned(1), may_alias));

enum Format : int32_t { FP32, BF16, INT8, INT4 };
enum HeadNorm : int32_t { NO_NORM, PER_HEAD, WHOLE };
enum Activation : int32_t { SILU, GELU_TANH, GELU };

struct Matrix {
    const uint8_t *weights;
    const float *bias;  // or null
    int32_t format, outputs;
    int32_t inputs;  // a multiple of GROUP
    int32_t first;   // outputs before this one are not wanted by fill (qkv only)
    int64_t rows;    // multiplied so far: the meter's witness
};

struct Layer {
    Matrix qkv, output, gate_up, down;
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;  // gains, or null
    const float *query_norm, *key_norm;
    const float *cosines, *sines;  // [positions, rotary], or null: no rotation
    int32_t window;                // keys a row sees, itself included; 0: all
    int32_t head_norm;
};

struct Model {
    int32_t hidden, heads, kv_heads, head_size, inner, rotary, activation;
    float epsilon, scale, residual, softcap, logit_scale, logit_softcap;
    const float *norm;  // gains of the last norm
    Matrix head;
    Layer *layers;
};

// Keys and values of one text: keys [layer, head, capacity / 16, size, 16], values
// [layer, head, capacity, padded size].
struct Text {
    float *keys, *values;
    int64_t capacity;
};

struct Rows {
    const Text *texts;
    const int32_t *text;      // [N]: whose row this is
    const int32_t *position;  // [N]
    int32_t count;
};

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// ---------------------------------------------------------------- vectors

inline Floats load(const float *from) { return *reinterpret_cast<const Floats *>(from); }
inline void store(float *to, Floats value) { *reinterpret_cast<Floats *>(to) = value; }
inline Floats as_floats(Ints value) { return __builtin_convertvector(value, Floats); }
inline Floats bits(Ints value) { return (Floats)value; }
inline Floats splat(float value) { return Floats{} + value; }

inline float total(Floats value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}

inline float largest(Floats value) {
    float best = value[0];
    for (int lane = 1; lane < LANES; lane++) best = std::max(best, value[lane]);
    return best;
}

// e^x to about 1e-7: 2^n times a polynomial of the rest.
inline Floats exponential(Floats x) {
    x = x < -87.3f ? splat(-87.3f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const Floats magic = splat(12582912.0f);  // adding it rounds to a whole number
    Floats n = (x * 1.44269504f + magic) - magic;
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * bits(power);
}

inline Floats tangent(Floats x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

inline float half(uint16_t value) {
    uint32_t sign = (value & 0x8000u) << 16, rest = value & 0x7fffu;
    float out;
    uint32_t word = rest << 13;
    std::memcpy(&out, &word, 4);
    out *= 5.192296858534828e33f;  // 2^112: moves the exponent, subnormal numbers included
    std::memcpy(&word, &out, 4);
    word |= sign;
    std::memcpy(&out, &word, 4);
    return out;
}

inline Floats halves(const uint8_t *from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#else
    Floats out;
    for (int lane = 0; lane < LANES; lane++) {
        uint16_t value;
        std::memcpy(&value, from + 2 * lane, 2);
        out[lane] = half(value);
    }
    return out;
#endif
}

// sums[o] += four unsigned weights of output o times four signed codes.
inline Ints add_products(Ints sums, Bytes weights, const int8_t *codes) {
#if defined(__AVX512VNNI__)
    int32_t four;
    std::memcpy(&four, codes, 4);
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(four));
#else
    Ints words = (Ints)weights;
    for (int i = 0; i < 4; i++) sums += ((words >> (8 * i)) & 255) * int32_t(codes[i]);
    return sums;
#endif
}

// ---------------------------------------------------------------- activations

// What a matrix product reads: states as they are, and as bytes for quantised weights.
struct Inputs {
    float *states;  // [N, width]
    int8_t *codes;  // [N, width]
    float *steps;   // [N, width / GROUP]: the value of one code
    float *sums;    // [N, width / GROUP]: of the values, for the weights' minimum
    int width;
};

void quantise(const Inputs &x, int row, int inputs) {
    const int groups = x.width / GROUP;
    for (int group = 0; group < inputs / GROUP; group++) {
        const float *from = x.states + int64_t(row) * x.width + group * GROUP;
        int8_t *to = x.codes + int64_t(row) * x.width + group * GROUP;
        Floats low = load(from), high = load(from + LANES);
        Floats a = low < 0 ? -low : low, b = high < 0 ? -high : high;
        float best = largest(a > b ? a : b), inverse = best > 0 ? 127.0f / best : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) {
            int32_t code = int32_t(std::nearbyintf(from[i] * inverse));
            to[i] = int8_t(code);
            sum += code;
        }
        x.steps[int64_t(row) * groups + group] = best / 127.0f;
        x.sums[int64_t(row) * groups + group] = best / 127.0f * float(sum);
    }
}

// Makes row's states ready for a matrix: padded with zeros, and as bytes if it is quantised.
void ready(const Inputs &x, int row, const Matrix &matrix, int size) {
    float *states = x.states + int64_t(row) * x.width;
    std::fill(states + size, states + matrix.inputs, 0.0f);
    if (matrix.format >= INT8) quantise(x, row, matrix.inputs);
}

// ---------------------------------------------------------------- matrix products

// Each returns M rows x 16 outputs of one block of weights.
template <int M>
void block_fp32(const uint8_t *block, const Inputs &x, int row, int inputs, Floats *out) {
    constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums hide the latency
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
    const Ints *weights = reinterpret_cast<const Ints *>(block);  // two inputs per word
    const float *states = x.states + int64_t(row) * x.width;
    Floats even[M] = {}, odd[M] = {};
    for (int k = 0; k < inputs; k += 2) {
        Ints both = weights[k / 2];
        Floats first = bits(both << 16), second = bits(both & int32_t(0xffff0000));
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
        const int8_t *codes = x.codes + int64_t(row) * x.width + group * GROUP;
        Ints dots[M] = {};
        for (int part = 0; part < (F == INT4 ? 4 : 8); part++) {
            Bytes weights = *reinterpret_cast<const Bytes *>(block + 64 + 64 * part);
            if (F == INT8) {
                for (int r = 0; r < M; r++)
                    dots[r] = add_products(dots[r], weights, codes + r * int64_t(x.width) + 4 * part);
                continue;
            }
            Ints words = (Ints)weights;
            Ints low = words & 0x0f0f0f0f, high = (words >> 4) & 0x0f0f0f0f;
            for (int r = 0; r < M; r++) {
                const int8_t *eight = codes + r * int64_t(x.width) + 8 * part;
                dots[r] = add_products(dots[r], (Bytes)low, eight);
                dots[r] = add_products(dots[r], (Bytes)high, eight + 4);
            }
        }
        Floats step = halves(block), minimum = halves(block + 32);
        for (int r = 0; r < M; r++) {
            int64_t at = int64_t(row + r) * groups + group;
            out[r] += step * x.steps[at] * as_floats(dots[r]) + minimum * x.sums[at];
        }
    }
}

template <int M>
void block_any(const Matrix &m, const uint8_t *block, const Inputs &x, int row, Floats *out) {
    switch (m.format) {
        case FP32: return block_fp32<M>(block, x, row, m.inputs, out);
        case BF16: return block_bf16<M>(block, x, row, m.inputs, out);
        case INT8: return block_quantised<M, INT8>(block, x, row, m.inputs, out);
        default: return block_quantised<M, INT4>(block, x, row, m.inputs, out);
    }
}

int64_t block_bytes(const Matrix &m) {
    switch (m.format) {
        case FP32: return int64_t(m.inputs) * LANES * 4;
        case BF16: return int64_t(m.inputs) * LANES * 2;
        case INT8: return int64_t(m.inputs) / GROUP * 576;
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
    if (thread == 0) m.rows += rows;
}

// ---------------------------------------------------------------- norms, rotation, activation

void normalise(const float *from, const float *gains, int size, float epsilon, float *to) {
    Floats squares = {};
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

struct Place {  // where one layer's keys and values of one text lie
    float *keys, *values;
    int64_t capacity;
    int size, padded;
    float *key_block(int head, int position) const {
        return keys + (int64_t(head) * capacity + position / LANES * LANES) * size;
    }
    float *value(int head, int position) const {
        return values + (int64_t(head) * capacity + position) * padded;
    }
};

Place place(const Model &m, const Text &text, int layer) {
    const int padded = round_up(m.head_size, LANES);
    const int64_t before = int64_t(layer) * m.kv_heads * text.capacity;
    return {text.keys + before * m.head_size, text.values + before * padded, text.capacity,
            m.head_size, padded};
}

// scores[g][i]: G heads of one row against keys first..last (block-aligned); returns the largest.
template <int G>
void score(const Model &m, const float *query, const Place &at, int head, int first, int last,
           float *scores, int64_t stride, float *best) {
    Floats top[G];
    for (int g = 0; g < G; g++) top[g] = splat(-INFINITY);
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int start = first / LANES * LANES; start <= last; start += LANES) {
        const float *keys = at.key_block(head, start);
        Floats sums[G] = {};
        for (int i = 0; i < m.head_size; i++) {
            Floats key = load(keys + i * LANES);
            for (int g = 0; g < G; g++) sums[g] += key * query[g * m.head_size + i];
        }
        for (int g = 0; g < G; g++) {
            if (m.softcap > 0) sums[g] = m.softcap * tangent(sums[g] / m.softcap);
            Ints position = lanes + start;
            sums[g] = (position < first) | (position > last) ? splat(-INFINITY) : sums[g];
            top[g] = sums[g] > top[g] ? sums[g] : top[g];
            store(scores + g * stride + start - first / LANES * LANES, sums[g]);
        }
    }
    for (int g = 0; g < G; g++) best[g] = largest(top[g]);
}

template <int G, int C>
void mix(const Place &at, int head, int first, int last, int offset, const float *scores,
         int64_t stride, const float *inverse, float *out) {
    Floats sums[G][C] = {};
    for (int t = first; t <= last; t++) {
        const float *value = at.value(head, t) + offset;
        for (int c = 0; c < C; c++) {
            Floats part = load(value + c * LANES);
            for (int g = 0; g < G; g++)
                sums[g][c] += part * scores[g * stride + t - first / LANES * LANES];
        }
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) {
            Floats mixed = sums[g][c] * inverse[g];
            const int count = std::min(LANES, at.size - offset - c * LANES);
            std::memcpy(out + g * at.size + offset + c * LANES, &mixed, count * sizeof(float));
        }
}

template <int G>
void attend(const Model &m, const float *query, const Place &at, int head, int first, int last,
            float *scores, int64_t stride, float *out) {
    float best[G], inverse[G];
    score<G>(m, query, at, head, first, last, scores, stride, best);
    const int count = last / LANES * LANES + LANES - first / LANES * LANES;
    for (int g = 0; g < G; g++) {
        Floats sum = {};
        for (int i = 0; i < count; i += LANES) {
            Floats weight = exponential(load(scores + g * stride + i) - best[g]);
            store(scores + g * stride + i, weight);
            sum += weight;
        }
        inverse[g] = 1.0f / total(sum);
    }
    int offset = 0;
    for (; offset + 4 * LANES <= at.padded; offset += 4 * LANES)
        mix<G, 4>(at, head, first, last, offset, scores, stride, inverse, out);
    for (; offset < at.padded; offset += LANES)
        mix<G, 1>(at, head, first, last, offset, scores, stride, inverse, out);
}

// ---------------------------------------------------------------- the work of a call

struct Buffers {
    Inputs x;           // inputs of the next product
    float *wide;        // [N, wide_stride]: outputs of qkv and gate_up
    float *narrow;      // [N, narrow_stride]: outputs of output and down
    int64_t wide_stride, narrow_stride;
    float *scores;      // [threads, 4, longest]
    int64_t longest;
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

bool allocate(Buffers &b, int rows, int width, int64_t wide, int64_t narrow, int64_t longest,
              int threads) {
    b.x.width = round_up(width, GROUP);
    b.wide_stride = round_up(int(wide), LANES);
    b.narrow_stride = round_up(int(narrow), LANES);
    b.longest = (longest + LANES) / LANES * LANES + LANES;
    const size_t n = rows, groups = b.x.width / GROUP;
    const size_t sizes[] = {aligned(n * b.x.width * 4), aligned(n * b.x.width),
                            aligned(n * groups * 4),    aligned(n * groups * 4),
                            aligned(n * b.wide_stride * 4), aligned(n * b.narrow_stride * 4),
                            aligned(threads * 4 * b.longest * 4)};
    size_t all = 0;
    for (size_t size : sizes) all += size;
    arena.reserve(all);
    if (!arena.ok()) return false;
    char *at = arena.memory();
    auto take = [&](int i) { char *part = at; at += sizes[i]; return part; };
    b.x.states = reinterpret_cast<float *>(take(0));
    b.x.codes = reinterpret_cast<int8_t *>(take(1));
    b.x.steps = reinterpret_cast<float *>(take(2));
    b.x.sums = reinterpret_cast<float *>(take(3));
    b.wide = reinterpret_cast<float *>(take(4));
    b.narrow = reinterpret_cast<float *>(take(5));
    b.scores = reinterpret_cast<float *>(take(6));
    return true;
}

// The rows this thread takes in a phase that works row by row.
template <typename Work>
void each_row(int rows, Work work) {
    const int threads = omp_get_num_threads();
    for (int row = omp_get_thread_num(); row < rows; row += threads) work(row);
}

void barrier() {
#pragma omp barrier
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

void keep(const Model &m, const Layer &layer, float *keys, const Place &at, int position) {
    const float *values = keys + m.kv_heads * m.head_size;
    head_norms(m, layer, layer.key_norm, keys, m.kv_heads);
    rotate_all(m, layer, keys, m.kv_heads, position);
    for (int head = 0; head < m.kv_heads; head++) {
        float *block = at.key_block(head, position) + position % LANES;
        for (int i = 0; i < m.head_size; i++) block[i * LANES] = keys[head * m.head_size + i];
        float *value = at.value(head, position);
        std::memcpy(value, values + head * m.head_size, m.head_size * sizeof(float));
        std::fill(value + at.size, value + at.padded, 0.0f);
    }
}

void ask(const Model &m, const Layer &layer, float *queries, int position) {
    head_norms(m, layer, layer.query_norm, queries, m.heads);
    rotate_all(m, layer, queries, m.heads, position);
    for (int i = 0; i < m.heads * m.head_size; i++) queries[i] *= m.scale;
}

// Query heads begin..end of one row, as many at once as share keys.
void attend_heads(const Model &m, const Layer &layer, const Place &at, const float *queries,
                  int position, int begin, int end, float *scores, int64_t stride, float *out) {
    const int shared = m.heads / m.kv_heads;
    const int first = layer.window > 0 ? std::max(0, position - layer.window + 1) : 0;
    for (int head = begin; head < end;) {
        const int kv = head / shared;
        const int count = std::min({4, end - head, (kv + 1) * shared - head});
        const float *query = queries + head * m.head_size;
        float *to = out + head * m.head_size;
        switch (count) {
            case 4: attend<4>(m, query, at, kv, first, position, scores, stride, to); break;
            case 3: attend<3>(m, query, at, kv, first, position, scores, stride, to); break;
            case 2: attend<2>(m, query, at, kv, first, position, scores, stride, to); break;
            default: attend<1>(m, query, at, kv, first, position, scores, stride, to); break;
        }
        head += count;
    }
}

// Few rows are shared out by heads, many by rows (interleaved: later rows see more keys).
void attention(const Model &m, int index, const Rows &rows, const Buffers &b) {
    const Layer &layer = m.layers[index];
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    float *scores = b.scores + thread * 4 * b.longest;
    const bool whole = rows.count >= 2 * threads;
    for (int row = 0; row < rows.count; row++) {
        if (whole && row % threads != thread) continue;
        const int begin = whole ? 0 : m.heads * thread / threads;
        const int end = whole ? m.heads : m.heads * (thread + 1) / threads;
        attend_heads(m, layer, place(m, rows.texts[rows.text[row]], index),
                     b.wide + row * b.wide_stride, rows.position[row], begin, end, scores,
                     b.longest, b.x.states + int64_t(row) * b.x.width);
    }
}

void store_rows(const Model &m, int index, const Rows &rows, const Buffers &b, bool queries) {
    each_row(rows.count, [&](int row) {
        float *qkv = b.wide + row * b.wide_stride;
        const int position = rows.position[row];
        if (queries) ask(m, m.layers[index], qkv, position);
        keep(m, m.layers[index], qkv + m.heads * m.head_size,
             place(m, rows.texts[rows.text[row]], index), position);
    });
}

void gate(const Model &m, const float *both, float *out) {
    const int up = round_up(m.inner, LANES);  // gates and ups are padded apart
    for (int i = 0; i < up; i += LANES)
        store(out + i, activated(load(both + i), m.activation) * load(both + up + i));
}

// One layer for these rows; every thread of a region calls it. hidden [N, D] is changed in place.
// No barrier between layers: a row's states belong to one thread from the last product to the next.
void run_layer(const Model &m, int index, const Rows &rows, float *hidden, const Buffers &b) {
    Layer &layer = m.layers[index];
    const int n = rows.count, mixed = m.heads * m.head_size;
    each_row(n, [&](int row) {
        enter(m, layer.before_attention, hidden + int64_t(row) * m.hidden, b.x, row, layer.qkv);
    });
    barrier();
    multiply(layer.qkv, b.x, n, b.wide, b.wide_stride);
    barrier();
    store_rows(m, index, rows, b, true);
    barrier();
    attention(m, index, rows, b);
    barrier();
    each_row(n, [&](int row) { ready(b.x, row, layer.output, mixed); });
    barrier();
    multiply(layer.output, b.x, n, b.narrow, b.narrow_stride);
    barrier();
    each_row(n, [&](int row) {
        float *state = hidden + int64_t(row) * m.hidden;
        add_residual(m, layer.after_attention, b.narrow + row * b.narrow_stride, state);
        enter(m, layer.before_mlp, state, b.x, row, layer.gate_up);
    });
    barrier();
    multiply(layer.gate_up, b.x, n, b.wide, b.wide_stride);
    barrier();
    each_row(n, [&](int row) {
        gate(m, b.wide + row * b.wide_stride, b.x.states + int64_t(row) * b.x.width);
        ready(b.x, row, layer.down, m.inner);
    });
    barrier();
    multiply(layer.down, b.x, n, b.narrow, b.narrow_stride);
    barrier();
    each_row(n, [&](int row) {
        add_residual(m, layer.after_mlp, b.narrow + row * b.narrow_stride,
                     hidden + int64_t(row) * m.hidden);
    });
}

void fill_layer(const Model &m, int index, const Rows &rows, const float *hidden,
                const Buffers &b) {
    Layer &layer = m.layers[index];
    each_row(rows.count, [&](int row) {
        enter(m, layer.before_attention, hidden + int64_t(row) * m.hidden, b.x, row, layer.qkv);
    });
    barrier();
    multiply(layer.qkv, b.x, rows.count, b.wide, b.wide_stride, layer.qkv.first);
    barrier();
    store_rows(m, index, rows, b, false);
}

void scale_logits(const Model &m, float *logits, int64_t count) {
    if (m.logit_scale != 1.0f)
        for (int64_t i = 0; i < count; i++) logits[i] *= m.logit_scale;
    if (m.logit_softcap > 0)
        for (int64_t i = 0; i < count; i++)
            logits[i] = m.logit_softcap * std::tanh(logits[i] / m.logit_softcap);
}

int widest(const Model &m) {
    return std::max({m.hidden, m.heads * m.head_size, round_up(m.inner, LANES)}) + GROUP;
}

bool allocate_layers(const Model &m, const Rows &rows, int threads, Buffers &b) {
    int longest = 0;
    for (int row = 0; row < rows.count; row++) longest = std::max(longest, rows.position[row] + 1);
    const int wide = std::max((m.heads + 2 * m.kv_heads) * m.head_size,
                              2 * round_up(m.inner, LANES));
    return allocate(b, std::min(rows.count, CHUNK), widest(m), wide, m.hidden, longest, threads);
}

Rows part_of(const Rows &rows, int start) {
    return {rows.texts, rows.text + start, rows.position + start,
            std::min(CHUNK, rows.count - start)};
}

}  // namespace

extern "C" {

// Runs hidden [N, D] through the layers in order, in place. Returns 0, or 1: no memory.
int32_t offramp_run(const Model *m, const int32_t *layers, int32_t count, float *hidden,
                    const Rows *rows, int32_t threads) {
    Buffers b;
    if (!allocate_layers(*m, *rows, threads, b)) return 1;
#pragma omp parallel num_threads(threads)
    for (int start = 0; start < rows->count; start += CHUNK)
        for (int i = 0; i < count; i++)
            run_layer(*m, layers[i], part_of(*rows, start), hidden + int64_t(start) * m->hidden, b);
    return 0;
}

// Stores what the layers' keys and values would be if each one's input were hidden [N, D].
int32_t offramp_fill(const Model *m, const int32_t *layers, int32_t count, const float *hidden,
                     const Rows *rows, int32_t threads) {
    Buffers b;
    if (!allocate_layers(*m, *rows, threads, b)) return 1;
#pragma omp parallel num_threads(threads)
    for (int start = 0; start < rows->count; start += CHUNK)
        for (int i = 0; i < count; i++)
            fill_layer(*m, layers[i], part_of(*rows, start), hidden + int64_t(start) * m->hidden,
                       b);
    return 0;
}

// logits [N, outputs] of states hidden [N, D]: the last norm, then head; or, where down is not null,
// down and then head (a head of low rank).
int32_t offramp_readout(const Model *m, Matrix *down, Matrix *head, const float *hidden,
                        int32_t rows, float *logits, int32_t threads) {
    Buffers b;
    const int rank = down == nullptr ? 0 : down->outputs;
    if (!allocate(b, std::min(rows, int32_t(CHUNK)), std::max(m->hidden, rank) + GROUP, 1,
                  rank + LANES, 1, threads))
        return 1;
    const int64_t outputs = head->outputs;
    Matrix &first = down == nullptr ? *head : *down;
#pragma omp parallel num_threads(threads)
    for (int start = 0; start < rows; start += CHUNK) {
        const int n = std::min(CHUNK, rows - start);
        float *out = logits + start * outputs;
        each_row(n, [&](int row) {
            enter(*m, m->norm, hidden + int64_t(start + row) * m->hidden, b.x, row, first);
        });
        barrier();
        if (down != nullptr) {
            multiply(*down, b.x, n, b.narrow, b.narrow_stride);
            barrier();
            each_row(n, [&](int row) {
                std::memcpy(b.x.states + int64_t(row) * b.x.width, b.narrow + row * b.narrow_stride,
                            rank * sizeof(float));
                ready(b.x, row, *head, rank);
            });
            barrier();
        }
        multiply(*head, b.x, n, out, outputs);
        barrier();
        each_row(n, [&](int row) { scale_logits(*m, out + row * outputs, outputs); });
        barrier();
    }
    return 0;
}

// Sizes of Matrix, Layer and Model: the caller's mirrors must agree.
void offramp_sizes(int32_t *sizes) {
    sizes[0] = sizeof(Matrix);
    sizes[1] = sizeof(Layer);
    sizes[2] = sizeof(Model);
}
}
