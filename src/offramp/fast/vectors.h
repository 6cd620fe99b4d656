// Vectors of 16 lanes, as many registers as the processor needs for them: one with AVX-512, two with
// AVX, four elsewhere (SSE, NEON). A vector wider than a register, left to the compiler, lives in
// memory; a struct of registers does not.

#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int PARTS = 1;
#elif defined(__AVX__)
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif
constexpr int PART = LANES / PARTS;  // lanes of a register

#define EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; p++)

// 64 bytes of T. Operators work lane by lane; a number stands for a vector of it.
template <typename T>
struct Lanes {
    typedef T Part __attribute__((vector_size(64 / PARTS), aligned(alignof(T)), may_alias));
    Part part[PARTS];

    Lanes() : part{} {}
    Lanes(T value) {
        EACH_PART part[p] = Part{} + value;
    }
    T &operator[](int lane) { return reinterpret_cast<T *>(part)[lane]; }

#define LANE_BY_LANE(OP)                       \
    friend Lanes operator OP(Lanes a, Lanes b) { \
        EACH_PART a.part[p] = a.part[p] OP b.part[p]; \
        return a;                              \
    }
    LANE_BY_LANE(+)
    LANE_BY_LANE(-)
    LANE_BY_LANE(*)
    LANE_BY_LANE(/)
#undef LANE_BY_LANE
    friend Lanes operator-(Lanes a) { return Lanes() - a; }
    Lanes &operator+=(Lanes other) { return *this = *this + other; }
};

typedef Lanes<float> Floats;
typedef Lanes<int32_t> Ints;
typedef Lanes<uint8_t> Bytes;  // four per lane

#define INTS(OP)                                 \
    inline Ints operator OP(Ints a, int32_t b) { \
        EACH_PART a.part[p] = a.part[p] OP b;    \
        return a;                                \
    }
INTS(<<)
INTS(>>)
INTS(&)
#undef INTS
inline Ints operator|(Ints a, Ints b) {
    EACH_PART a.part[p] |= b.part[p];
    return a;
}

// Comparisons give all bits of a lane, or none.
template <typename T>
inline Ints less(Lanes<T> a, Lanes<T> b) {
    Ints out;
    EACH_PART out.part[p] = a.part[p] < b.part[p];
    return out;
}
template <typename T>
inline Lanes<T> select(Ints where, Lanes<T> a, Lanes<T> b) {
    EACH_PART a.part[p] = where.part[p] ? a.part[p] : b.part[p];
    return a;
}
inline Floats larger(Floats a, Floats b) {
    EACH_PART a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return a;
}
inline Floats smaller(Floats a, Floats b) {
    EACH_PART a.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
    return a;
}
inline Floats absolute(Floats a) { return larger(a, -a); }

// ---------------------------------------------------------------- memory, other types

template <typename T>
inline Lanes<T> load_lanes(const void *from) {
    Lanes<T> out;
    EACH_PART out.part[p] = static_cast<const typename Lanes<T>::Part *>(from)[p];
    return out;
}
inline Floats load(const float *from) { return load_lanes<float>(from); }
inline void store(float *to, Floats value) {
    EACH_PART reinterpret_cast<Floats::Part *>(to)[p] = value.part[p];
}

// The same bits as another type.
template <typename To, typename From>
inline To as(From value) {
    To out;
    EACH_PART out.part[p] = (decltype(out.part[0] + out.part[0]))value.part[p];
    return out;
}
inline Floats as_floats(Ints value) {
    Floats out;
    EACH_PART out.part[p] = __builtin_convertvector(value.part[p], Floats::Part);
    return out;
}
inline Ints as_ints(Floats value) {  // towards zero
    Ints out;
    EACH_PART out.part[p] = __builtin_convertvector(value.part[p], Ints::Part);
    return out;
}

typedef int8_t Codes __attribute__((vector_size(PART), aligned(1), may_alias));

// Bytes that hold small numbers, signed or not: the low ones of each lane.
inline void store_codes(void *to, Ints values) {
    EACH_PART static_cast<Codes *>(to)[p] = __builtin_convertvector(values.part[p], Codes);
}
inline Floats load_codes(const int8_t *from) {
    Floats out;
    EACH_PART out.part[p] =
        __builtin_convertvector(reinterpret_cast<const Codes *>(from)[p], Floats::Part);
    return out;
}

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
    Floats out;
#if defined(__AVX512F__)
    out.part[0] = (Floats::Part)_mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(__F16C__)
    EACH_PART out.part[p] = (Floats::Part)_mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(from) + p));
#else
    for (int lane = 0; lane < LANES; lane++) {
        uint16_t value;
        std::memcpy(&value, from + 2 * lane, 2);
        out[lane] = half(value);
    }
#endif
    return out;
}

// ---------------------------------------------------------------- sums of products of bytes

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Signed bytes 0 and 2, or 1 and 3, of each four, as pairs of 16 bits.
inline __m256i even(__m256i fours) { return _mm256_srai_epi16(_mm256_slli_epi16(fours, 8), 8); }
inline __m256i odd(__m256i fours) { return _mm256_srai_epi16(fours, 8); }
#endif

// sums[o] += four unsigned weights of output o times four signed codes. SMALL: weights below 128,
// so that two products fit into 16 bits.
template <bool SMALL = false>
inline Ints add_products(Ints sums, Bytes weights, const int8_t *codes) {
    int32_t four;
    std::memcpy(&four, codes, 4);
#if defined(__AVX512VNNI__)
    sums.part[0] = (Ints::Part)_mm512_dpbusd_epi32((__m512i)sums.part[0], (__m512i)weights.part[0],
                                                   _mm512_set1_epi32(four));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i all = _mm256_set1_epi32(four), low = _mm256_set1_epi16(255);
    EACH_PART {
        const __m256i part = (__m256i)weights.part[p];
        __m256i found;
        if (SMALL) {
            found = _mm256_madd_epi16(_mm256_maddubs_epi16(part, all), _mm256_set1_epi16(1));
        } else {
            found = _mm256_add_epi32(
                _mm256_madd_epi16(_mm256_and_si256(part, low), even(all)),
                _mm256_madd_epi16(_mm256_srli_epi16(part, 8), odd(all)));
        }
        sums.part[p] += (Ints::Part)found;
    }
#else
    const Ints words = as<Ints>(weights);
    for (int i = 0; i < 4; i++) sums += ((words >> (8 * i)) & 255) * Ints(codes[i]);
#endif
    return sums;
}

// sums[i] += four unsigned codes times the four signed bytes of lane i.
inline Ints add_scaled(Ints sums, const uint8_t *codes, Bytes values) {
    int32_t four;
    std::memcpy(&four, codes, 4);
#if defined(__AVX512VNNI__)
    sums.part[0] = (Ints::Part)_mm512_dpbusd_epi32((__m512i)sums.part[0], _mm512_set1_epi32(four),
                                                   (__m512i)values.part[0]);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i all = _mm256_set1_epi32(four);
    const __m256i first = _mm256_and_si256(all, _mm256_set1_epi16(255));
    const __m256i second = _mm256_srli_epi16(all, 8);
    EACH_PART {
        const __m256i part = (__m256i)values.part[p];
        sums.part[p] += (Ints::Part)_mm256_add_epi32(_mm256_madd_epi16(even(part), first),
                                                     _mm256_madd_epi16(odd(part), second));
    }
#else
    const Ints words = as<Ints>(values);
    for (int i = 0; i < 4; i++)
        sums += (words << (24 - 8 * i) >> 24) * Ints((four >> (8 * i)) & 255);
#endif
    return sums;
}

// ---------------------------------------------------------------- across lanes

inline Ints lane_numbers() {
    static const int32_t numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_lanes<int32_t>(numbers);
}

// Halves are folded onto each other: four steps instead of sixteen.
template <typename Vector, typename Fold>
inline auto folded(Vector value, Fold fold) {
    typename Vector::Part one = value.part[0];
    for (int p = 1; p < PARTS; p++) one = fold(one, value.part[p]);
#pragma GCC unroll 4
    for (int by = PART / 2; by; by /= 2) {
        one = fold(one, __builtin_shuffle(one, lane_numbers().part[0] + by));  // they wrap around
    }
    return one[0];
}

template <typename Vector>
inline auto total(Vector value) {
    return folded(value, [](auto a, auto b) { return a + b; });
}

inline float largest(Floats value) {
    return folded(value, [](auto a, auto b) { return a > b ? a : b; });
}

// ---------------------------------------------------------------- functions

// The nearest whole numbers to values well below 2^22, ties to even.
inline Ints rounded(Floats x) {
    const Floats magic = 12582912.0f;  // 1.5 * 2^23: its unit in the last place is 1
    return as<Ints>(x + magic) - as<Ints>(magic);
}

// e^x to about 1e-7: 2^n times a polynomial of the rest.
inline Floats exponential(Floats x) {
    x = smaller(88.0f, larger(-87.3f, x));  // in this order, what is no number stays none
    const Floats magic = 12582912.0f;  // adding it rounds to a whole number
    const Floats n = (x * 1.44269504f + magic) - magic;
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats sum = 1.9875691500e-4f;
    sum = sum * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    const Ints power = (as_ints(n) + 127) << 23;
    return sum * as<Floats>(power);
}

inline Floats tangent(Floats x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace
