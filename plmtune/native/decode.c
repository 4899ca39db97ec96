/* One token through a whole decoder: PLM's (latent attention, squared ReLU) and Llama's (grouped queries, SwiGLU).
 *
 * Weights are read where they lie, in fp32, bf16, or 8- or 4-bit integers; everything between them is fp32, and what
 * attention keeps is written in the cache's dtype. A token is one parallel region: threads share what a product gives,
 * and each prepares the (small) inputs of a product for itself, which is cheaper than to wait for one that does it.
 * Vectors are the compilers' own, of 16 numbers, which they divide where registers are shorter.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define ROWS 4   /* of a matrix that share what is read of the input */
#define BLOCK 16 /* tokens whose scores are one vector */
#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef float V_at __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(32)));
typedef uint16_t H_at __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t B_at __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t N_at __attribute__((vector_size(16), aligned(1), may_alias));

enum { F32, BF16, INT8, INT4 };               /* how numbers lie */
enum { SET, ADD, SQUARED_RELU, GATED };       /* what becomes of a product */

/* structs.py declares the same structures; plmtune_sizes lets it compare their sizes. */
typedef struct {
    const void *at; /* none: NULL */
    int64_t kind;   /* F32 or BF16 */
} vector;

typedef struct {
    const void *weight; /* [rows, cols]; INT4: two to a byte, the even column low */
    const int8_t *zeros; /* [rows, cols / group]; NULL: 8 of INT4, 0 of INT8 */
    vector scales, bias; /* [rows, cols / group], [rows] */
    int64_t kind, rows, cols, group, dynamic;
} matrix;

typedef struct {
    matrix q, k, v, o;         /* of latent attention k is kv_a and v is kv_b */
    matrix gate, up, down;     /* no gate: squared ReLU */
    vector attention_norm, latent_norm, ffn_norm;
    float attention_eps, latent_eps, ffn_eps, scale;
    const float *cos, *sin;    /* [positions, turned] */
    int64_t latent, heads, kv_heads, nope, turned, value, interleaved;
    int64_t sparse;            /* `down` is [cols, rows], of which rows with inputs that are not zero are read */
} layer;

typedef struct {
    const layer *layers;
    matrix embedding, head;
    vector norm;
    float eps;
    int64_t num_layers;
} model;

typedef struct { /* one thread's */
    float *normed, *rounded, *even, *odd, *sums, *scales, *keys, *values, *scores;
    int32_t *kept;
} scratch;

INLINE V load(const float *p) { return *(const V_at *)p; }
INLINE void store(float *p, V v) { *(V_at *)p = v; }
#ifdef __AVX512F__ /* compilers widen half a vector at a time, or number by number */
INLINE V widen(const uint16_t *p) {
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
}
INLINE I signed_bytes(const void *p) { return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
INLINE I bytes(const void *p) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
#else
typedef int16_t S __attribute__((vector_size(32)));
INLINE V widen(const uint16_t *p) { return (V)(__builtin_convertvector(*(const H_at *)p, U) << 16); }
INLINE I signed_bytes(const void *p) {
    return __builtin_convertvector(__builtin_convertvector(*(const B_at *)p, S), I);
}
INLINE I bytes(const void *p) { return __builtin_convertvector(__builtin_convertvector(*(const N_at *)p, S), I); }
#endif
INLINE V pick(I choose, V a, V b) { return (V)((choose & (I)a) | (~choose & (I)b)); }
INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE float half(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t to_half(float f) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float element(vector v, int64_t i) {
    return v.kind == F32 ? ((const float *)v.at)[i] : half(((const uint16_t *)v.at)[i]);
}

INLINE V elements(vector v, int64_t i) {
    return v.kind == F32 ? load((const float *)v.at + i) : widen((const uint16_t *)v.at + i);
}

INLINE void put(void *to, int64_t kind, int64_t i, float f) {
    if (kind == F32)
        ((float *)to)[i] = f;
    else
        ((uint16_t *)to)[i] = to_half(f);
}

#if defined(__clang__) || __GNUC__ >= 12
#define FOLD(v, by) __builtin_shufflevector(v, v, by ^ 0, by ^ 1, by ^ 2, by ^ 3, by ^ 4, by ^ 5, by ^ 6, by ^ 7, \
                                            by ^ 8, by ^ 9, by ^ 10, by ^ 11, by ^ 12, by ^ 13, by ^ 14, by ^ 15)
#else
#define FOLD(v, by) __builtin_shuffle(v, (I){by ^ 0, by ^ 1, by ^ 2, by ^ 3, by ^ 4, by ^ 5, by ^ 6, by ^ 7, \
                                             by ^ 8, by ^ 9, by ^ 10, by ^ 11, by ^ 12, by ^ 13, by ^ 14, by ^ 15})
#endif

INLINE float sum(V v) {
    v += FOLD(v, 8);
    v += FOLD(v, 4);
    v += FOLD(v, 2);
    v += FOLD(v, 1);
    return v[0];
}

INLINE V larger(V a, V b) { return pick(a > b, a, b); }

INLINE float largest(V v) {
    v = larger(v, FOLD(v, 8));
    v = larger(v, FOLD(v, 4));
    v = larger(v, FOLD(v, 2));
    v = larger(v, FOLD(v, 1));
    return v[0];
}

/* e^x to 2 units of the last place; below e^-87 it stays there. Cephes' polynomial. */
INLINE V power(V x) {
    const V low = (V){} - 87.0f, high = (V){} + 88.0f;
    x = pick(x < low, low, x);
    x = pick(x > high, high, x);
    V n = x * 1.44269504f + 12582912.0f; /* rounds, since no smaller digits are left */
    n -= 12582912.0f;
    V r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* Ask for what is read next: rows are too short for processors to find out by themselves. */
#define AHEAD(at, row_bytes) __builtin_prefetch((at) + ROWS * (row_bytes), 0, 2)

/* A row's scales as fp32, times `by` if that is given; returns what sums up to scale * zero * sum of inputs, over
 * groups. */
INLINE V read_scales(const matrix *a, int64_t row, const float *sums, const float *by, float *scales) {
    const int64_t groups = a->cols / a->group, at = row * groups;
    const float zero = a->kind == INT4 ? 8.0f : 0.0f;
    const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float rest = 0;
    V total = {};
    if (groups >= LANES) {
        for (int64_t done = 0; done < groups; done += LANES) {
            const int64_t g = done + LANES <= groups ? done : groups - LANES; /* the last begins among the others */
            const V scale = elements(a->scales, at + g);
            V z = (V){} + zero;
            if (a->zeros) z = __builtin_convertvector(signed_bytes(a->zeros + at + g), V);
            store(scales + g, by ? scale * load(by + g) : scale);
            if (a->kind == INT4) total += pick(lanes >= (int32_t)(done - g), scale * z * load(sums + g), (V){});
        }
        return total;
    }
    for (int64_t g = 0; g < groups; g++) {
        const float scale = element(a->scales, at + g);
        scales[g] = by ? scale * by[g] : scale;
        if (a->kind == INT4) rest += scale * (a->zeros ? (float)a->zeros[at + g] : zero) * sums[g];
    }
    return (V){rest};
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
/* Four-bit weights by products of bytes: a group's inputs become whole numbers of 24 bits times a scale (fp32 rounds no
 * finer what is as large as the group's largest), and those three signed digits of 8 bits. Sums stay exact: a lane adds
 * 8 products of less than 15 * 2^23. It is a third of the instructions of fp32, which cost more time than memory. */
#define DIGITS 3
#define CHUNK 64          /* bytes of a row at a time */
#define GREATEST 8323072.0f /* 127 * 2^16: rounding up does not leave three digits */

INLINE int by_digits(const matrix *a) {
    return a->kind == INT4 && a->cols % (2 * CHUNK) == 0 && (a->group == 32 || a->group == 64 || a->group % 128 == 0);
}

/* A chunk's digits, highest first: each of its even and of its odd columns. Scales of inputs are left in s->odd. */
static void to_digits(const matrix *a, scratch *s, const float *x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1)), half_digit = _mm512_set1_epi32(128);
    int8_t *digits = (int8_t *)s->even;
    for (int64_t g = 0; g < a->cols / a->group; g++) {
        const int64_t from = g * a->group, to = from + a->group;
        V total = {}, greatest = {}, not_finite = {};
        for (int64_t c = from; c < to; c += LANES) {
            const V in = load(x + c);
            total += in;
            greatest = larger(larger(in, -in), greatest);
            not_finite += in * 0.0f;
        }
        const float top = largest(greatest), inverse = top > 1e-30f ? GREATEST / top : 0.0f; /* no infinity */
        s->sums[g] = sum(total);
        s->odd[g] = top / GREATEST + sum(not_finite); /* + 0, or NaN where an input is no number */
        for (int64_t c = from; c < to; c += 2 * LANES) {
            const __m512 one = (__m512)(load(x + c) * inverse), other = (__m512)(load(x + c + LANES) * inverse);
            int8_t *at = digits + c / (2 * CHUNK) * 2 * DIGITS * CHUNK + c % (2 * CHUNK) / 2;
            __m512i lower = _mm512_cvtps_epi32(_mm512_permutex2var_ps(one, even, other));
            __m512i upper = _mm512_cvtps_epi32(_mm512_permutex2var_ps(one, odd, other));
            for (int d = DIGITS - 1; d >= 0; d--) {
                _mm_storeu_si128((void *)(at + 2 * d * CHUNK), _mm512_cvtepi32_epi8(lower));
                _mm_storeu_si128((void *)(at + (2 * d + 1) * CHUNK), _mm512_cvtepi32_epi8(upper));
                lower = _mm512_srai_epi32(_mm512_add_epi32(lower, half_digit), 8); /* less a digit that was signed */
                upper = _mm512_srai_epi32(_mm512_add_epi32(upper, half_digit), 8);
            }
        }
    }
}

/* Rows of int4; a chunk has `groups_each` groups (4, 2 or 1: or part of one). */
INLINE void digit_rows(const matrix *a, const scratch *s, int64_t row, const int count, const int groups_each, float *y) {
    const int64_t groups = a->cols / a->group, step = groups_each == 1 ? a->group / 2 : CHUNK;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i spread = _mm512_srli_epi32(lanes, groups_each == 4 ? 2 : 3), nibble = _mm512_set1_epi8(15);
    const uint8_t *w[ROWS];
    V total[ROWS], rest[ROWS];
    for (int r = 0; r < count; r++) {
        w[r] = (const uint8_t *)a->weight + (row + r) * (a->cols / 2);
        rest[r] = read_scales(a, row + r, s->sums, s->odd, s->scales + r * groups);
        total[r] = (V){};
    }
    const int8_t *digits = (const int8_t *)s->even;
    for (int64_t g = 0, c = 0; g < groups; g += groups_each) {
        for (const int64_t end = c + step; c < end; c += CHUNK, digits += 2 * DIGITS * CHUNK) {
            for (int r = 0; r < count; r++) {
                const __m512i pairs = _mm512_loadu_si512(w[r] + c);
                const __m512i low = _mm512_and_si512(pairs, nibble);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
                __m512i dots = _mm512_setzero_si512();
                for (int d = 0; d < DIGITS; d++) {
                    if (d) dots = _mm512_slli_epi32(dots, 8);
                    dots = _mm512_dpbusd_epi32(dots, low, _mm512_load_si512(digits + 2 * d * CHUNK));
                    dots = _mm512_dpbusd_epi32(dots, high, _mm512_load_si512(digits + (2 * d + 1) * CHUNK));
                }
                const float *scale = s->scales + r * groups + g;
                const V by = groups_each == 1 ? (V){} + *scale
                           : (V)_mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_loadu_ps(scale)));
                total[r] += (V)_mm512_cvtepi32_ps(dots) * by;
                AHEAD(w[r] + c, a->cols / 2);
            }
        }
    }
    for (int r = 0; r < count; r++) y[r] = sum(total[r] - rest[r]);
}
#else
INLINE int by_digits(const matrix *a) { return (void)a, 0; }
INLINE void to_digits(const matrix *a, scratch *s, const float *x) { (void)a, (void)s, (void)x; }
INLINE void digit_rows(const matrix *a, const scratch *s, int64_t row, const int count, const int groups_each, float *y) {
    (void)a, (void)s, (void)row, (void)count, (void)groups_each, (void)y;
}
#endif

INLINE void int4_rows(const matrix *a, const scratch *s, int64_t row, const int count, float *y) {
    const int64_t groups = a->cols / a->group, half_group = a->group / 2;
    const uint8_t *w[ROWS];
    V total[ROWS] = {}, rest[ROWS];
    for (int r = 0; r < count; r++) {
        w[r] = (const uint8_t *)a->weight + (row + r) * (a->cols / 2);
        rest[r] = read_scales(a, row + r, s->sums, NULL, s->scales + r * groups);
    }
    for (int64_t g = 0; g < groups; g++) {
        V part[ROWS] = {};
        for (int64_t c = g * half_group; c < (g + 1) * half_group; c += LANES) {
            const V even = load(s->even + c), odd = load(s->odd + c);
            for (int r = 0; r < count; r++) {
                const I pairs = bytes(w[r] + c);
                part[r] += __builtin_convertvector(pairs & 15, V) * even;
                part[r] += __builtin_convertvector(pairs >> 4, V) * odd;
                AHEAD(w[r] + c, a->cols / 2);
            }
        }
        for (int r = 0; r < count; r++) total[r] += part[r] * s->scales[r * groups + g];
    }
    for (int r = 0; r < count; r++) y[r] = sum(total[r] - rest[r]);
}

INLINE void int8_rows(const matrix *a, const scratch *s, const float *x, int64_t row, const int count, float *y) {
    const int64_t groups = a->cols / a->group;
    const int8_t *w[ROWS];
    V total[ROWS] = {};
    for (int r = 0; r < count; r++) {
        w[r] = (const int8_t *)a->weight + (row + r) * a->cols;
        read_scales(a, row + r, s->sums, NULL, s->scales + r * groups);
    }
    for (int64_t g = 0; g < groups; g++) {
        V part[ROWS] = {};
        for (int64_t c = g * a->group; c < (g + 1) * a->group; c += LANES) {
            const V in = load(x + c);
            for (int r = 0; r < count; r++) {
                part[r] += __builtin_convertvector(signed_bytes(w[r] + c), V) * in;
                AHEAD(w[r] + c, a->cols);
            }
        }
        for (int r = 0; r < count; r++) total[r] += part[r] * s->scales[r * groups + g];
    }
    for (int r = 0; r < count; r++) y[r] = sum(total[r]);
}

INLINE void float_rows(const matrix *a, const float *x, int64_t row, const int count, const int kind, float *y) {
    vector w[ROWS];
    V one[ROWS] = {}, other[ROWS] = {};
    int64_t c = 0;
    for (int r = 0; r < count; r++) {
        w[r].at = (const char *)a->weight + (row + r) * a->cols * (kind == F32 ? 4 : 2);
        w[r].kind = kind;
    }
    for (; c + 2 * LANES <= a->cols; c += 2 * LANES) {
        const V in = load(x + c), next = load(x + c + LANES);
        for (int r = 0; r < count; r++) {
            one[r] += elements(w[r], c) * in;
            other[r] += elements(w[r], c + LANES) * next;
            AHEAD((const char *)w[r].at + c * (kind == F32 ? 4 : 2), a->cols * (kind == F32 ? 4 : 2));
        }
    }
    for (; c + LANES <= a->cols; c += LANES)
        for (int r = 0; r < count; r++) one[r] += elements(w[r], c) * load(x + c);
    for (int r = 0; r < count; r++) y[r] = sum(one[r] + other[r]);
    for (; c < a->cols; c++)
        for (int r = 0; r < count; r++) y[r] += element(w[r], c) * x[c];
}

INLINE void some_rows(const matrix *a, const scratch *s, const float *x, int64_t row, const int count, float *y) {
    if (by_digits(a)) {
        if (a->group == 32)
            digit_rows(a, s, row, count, 4, y);
        else if (a->group == 64)
            digit_rows(a, s, row, count, 2, y);
        else
            digit_rows(a, s, row, count, 1, y);
    } else if (a->kind == INT4)
        int4_rows(a, s, row, count, y);
    else if (a->kind == INT8)
        int8_rows(a, s, x, row, count, y);
    else if (a->kind == BF16)
        float_rows(a, x, row, count, BF16, y);
    else
        float_rows(a, x, row, count, F32, y);
}

/* y[from, to) = rows of a, times what `prepare` returned. */
static void rows(const matrix *a, const scratch *s, const float *x, int64_t from, int64_t to, float *y) {
    for (; from + ROWS <= to; from += ROWS) some_rows(a, s, x, from, ROWS, y + from);
    for (; from < to; from++) some_rows(a, s, x, from, 1, y + from);
}

/* Inputs to whole numbers, and back: modules.quantized.round_rows to the last bit. */
static void round_inputs(const float *x, int64_t n, float *out) {
    V least = {}, greatest = {}, not_finite = {}; /* n is a multiple of 16 */
    for (int64_t i = 0; i < n; i += LANES) {
        const V in = load(x + i);
        least = pick(in < least, in, least);
        greatest = larger(in, greatest);
        not_finite += in * 0.0f;
    }
    const float low = -largest(-least), high = largest(greatest), finite = sum(not_finite);
    float scale = (high - low) / 255.0f;
    scale = scale < 1.1920928955078125e-07f ? 1.1920928955078125e-07f : scale;
    float zero = -128.0f - rintf(low / scale);
    zero = zero < -128.0f ? -128.0f : zero > 127.0f ? 127.0f : zero;
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < n; i++) {
        float q = rintf(x[i] * inverse) + zero;
        q = q < -128.0f ? -128.0f : q > 127.0f ? 127.0f : q;
        out[i] = (q - zero) * scale + finite; /* + 0, or NaN where an input is no number */
    }
}

/* Make x what `rows` of this matrix wants. */
static const float *prepare(const matrix *a, scratch *s, const float *x) {
    if (a->dynamic) {
        round_inputs(x, a->cols, s->rounded);
        x = s->rounded;
    }
    if (by_digits(a))
        to_digits(a, s, x);
    else if (a->kind == INT4) {
        for (int64_t i = 0; i < a->cols / 2; i++) {
            s->even[i] = x[2 * i];
            s->odd[i] = x[2 * i + 1];
        }
        for (int64_t g = 0; g < a->cols / a->group; g++) {
            V total = {};
            for (int64_t c = g * a->group; c < (g + 1) * a->group; c += LANES) total += load(x + c);
            s->sums[g] = sum(total);
        }
    }
    return x;
}

/* y = W x + bias and what is to become of it, by all threads of a region; none waits for the others. */
static void product(const matrix *a, scratch *s, const float *x, float *y, int then, const float *gate) {
    static const int64_t bits[] = {32, 16, 8, 4};
    const int64_t row_bytes = a->cols * bits[a->kind] / 8, threads = omp_get_num_threads();
    int64_t step = (1 << 17) / row_bytes;
    if (step > a->rows / (4 * threads)) step = a->rows / (4 * threads);
    if (step > 512) step = 512;
    step = (step + ROWS - 1) / ROWS * ROWS;
    if (step < ROWS) step = ROWS;
    x = prepare(a, s, x);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t from = 0; from < a->rows; from += step) {
        const int64_t to = from + step < a->rows ? from + step : a->rows;
        float found[512];
        rows(a, s, x, from, to, found - from);
        if (a->bias.at)
            for (int64_t i = from; i < to; i++) found[i - from] += element(a->bias, i);
        if (then == GATED) {
            for (int64_t i = from; i < to; i += LANES) { /* buffers are longer than what is in them */
                const V in = load(gate + i);
                store(found + (i - from), load(found + (i - from)) * in / (power(-in) + 1.0f));
            }
        }
        for (int64_t i = from; i < to; i++) {
            const float f = found[i - from];
            y[i] = then == ADD ? y[i] + f : then == SQUARED_RELU ? (f > 0 || f != f ? f * f : 0) : f;
        }
    }
}

/* y[from, to) += the sum of rows kept[i] of w, [.., cols], times factors[i]. */
static void gather(const matrix *a, int64_t cols, const int32_t *kept, int64_t count, const float *factors, int64_t from,
                   int64_t to, float *y) {
    const int64_t size = a->kind == F32 ? 4 : 2;
    for (int64_t i = 0; i < count; i += ROWS) {
        vector w[ROWS];
        float by[ROWS];
        for (int r = 0; r < ROWS; r++) { /* the last ones are filled up with nothing times a row */
            const int there = i + r < count;
            w[r].at = (const char *)a->weight + (int64_t)kept[there ? i + r : i] * cols * size;
            w[r].kind = a->kind;
            by[r] = there ? factors[kept[i + r]] : 0;
        }
        int64_t c = from;
        if (a->kind == BF16)
            for (; c + LANES <= to; c += LANES) {
                V out = load(y + c);
                for (int r = 0; r < ROWS; r++) out += widen((const uint16_t *)w[r].at + c) * by[r];
                store(y + c, out);
            }
        else
            for (; c + LANES <= to; c += LANES) {
                V out = load(y + c);
                for (int r = 0; r < ROWS; r++) out += load((const float *)w[r].at + c) * by[r];
                store(y + c, out);
            }
        for (; c < to; c++)
            for (int r = 0; r < ROWS; r++) y[c] += element(w[r], c) * by[r];
    }
}

/* x += `down` of hidden, reading only the rows whose inputs are not zero; each thread has its columns. */
static void skip_zeros(const matrix *a, scratch *s, const float *hidden, float *x) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t share = padded((a->rows + threads - 1) / threads), from = me * share;
    const int64_t to = from + share < a->rows ? from + share : a->rows;
    int64_t count = 0;
    for (int64_t i = 0; i < a->cols; i++) {
        s->kept[count] = (int32_t)i;
        count += hidden[i] != 0;
    }
    if (from < to) gather(a, a->rows, s->kept, count, hidden, from, to, x);
}

/* ---- between products -------------------------------------------------------------------------------------------- */

static void norm(const float *x, int64_t n, vector weight, float eps, float *out) {
    V squares = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < n; i++) rest += x[i] * x[i];
    const float by = 1.0f / sqrtf((sum(squares) + rest) / (float)n + eps);
    for (i = 0; i + LANES <= n; i += LANES) store(out + i, load(x + i) * by * elements(weight, i));
    for (; i < n; i++) out[i] = x[i] * by * element(weight, i);
}

INLINE float turned(const layer *l, const float *x, int64_t i, int64_t position) {
    const int64_t other = l->interleaved ? i ^ 1 : i < l->turned / 2 ? i + l->turned / 2 : i - l->turned / 2;
    return x[i] * l->cos[position * l->turned + i] + x[other] * l->sin[position * l->turned + i];
}

INLINE void score_heads(const float *query, int64_t width, const int heads, const float *keys, float *scores) {
    for (int t = 0; t < BLOCK; t += 4) {
        V total[4][4] = {};
        for (int64_t c = 0; c < width; c += LANES) {
            V key[4];
            for (int j = 0; j < 4; j++) key[j] = load(keys + (t + j) * width + c);
            for (int h = 0; h < heads; h++) {
                const V q = load(query + h * width + c);
                for (int j = 0; j < 4; j++) total[h][j] += q * key[j];
            }
        }
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < 4; j++) scores[h * BLOCK + t + j] = sum(total[h][j]);
    }
}

INLINE void add_values(const float *weights, const int heads, const float *values, int64_t width, int64_t stride,
                       const int columns, float *out) {
    V total[4][4];
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < columns; j++) total[h][j] = load(out + h * width + j * LANES);
    for (int t = 0; t < BLOCK; t++) {
        V value[4];
        for (int j = 0; j < columns; j++) value[j] = load(values + t * stride + j * LANES);
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < columns; j++) total[h][j] += value[j] * weights[h * BLOCK + t];
    }
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < columns; j++) store(out + h * width + j * LANES, total[h][j]);
}

static void widen_rows(const char *from, int64_t kind, int64_t width, int64_t count, float *to) {
    const int64_t size = kind == F32 ? 4 : 2, stride = padded(width);
    for (int64_t t = 0; t < count; t++) {
        const vector row = {from + t * width * size, kind};
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) store(to + t * stride + c, elements(row, c));
        for (; c < width; c++) to[t * stride + c] = element(row, c);
        for (; c < stride; c++) to[t * stride + c] = 0;
    }
    memset(to + count * stride, 0, sizeof(float) * (BLOCK - count) * stride);
}

/* Softmax of query keys^T over tokens [from, to), and its sum of values, not yet divided: out [heads, padded width of
 * values], top and total of each head. Keys and values [tokens, width]; without values they are the keys' first numbers.
 */
static void attend(const float *query, int64_t heads, int64_t width, const char *keys, const char *values,
                   int64_t value_width, int64_t kind, int64_t from, int64_t to, float scale, scratch *s, float *out,
                   float *top, float *total) {
    const int64_t size = kind == F32 ? 4 : 2, long_width = padded(width), out_width = padded(value_width);
    memset(out, 0, sizeof(float) * heads * out_width);
    for (int64_t h = 0; h < heads; h++) top[h] = -INFINITY, total[h] = 0;
    for (int64_t t = from; t < to; t += BLOCK) {
        const int64_t count = to - t < BLOCK ? to - t : BLOCK;
        widen_rows(keys + t * width * size, kind, width, count, s->keys);
        if (values) widen_rows(values + t * value_width * size, kind, value_width, count, s->values);
        const float *added = values ? s->values : s->keys;
        const int64_t stride = values ? out_width : long_width;
        int64_t h = 0;
        for (; h + 4 <= heads; h += 4) score_heads(query + h * long_width, long_width, 4, s->keys, s->scores + h * BLOCK);
        for (; h < heads; h++) score_heads(query + h * long_width, long_width, 1, s->keys, s->scores + h * BLOCK);
        for (h = 0; h < heads; h++) {
            for (int64_t i = count; i < BLOCK; i++) s->scores[h * BLOCK + i] = -INFINITY;
            const V score = load(s->scores + h * BLOCK) * scale;
            const float best = largest(score);
            if (best > top[h]) {
                const float by = expf(top[h] - best);
                for (int64_t c = 0; c < out_width; c += LANES)
                    store(out + h * out_width + c, load(out + h * out_width + c) * by);
                total[h] *= by;
                top[h] = best;
            }
            const V weight = power(score - top[h]);
            store(s->scores + h * BLOCK, weight);
            total[h] += sum(weight);
        }
        for (h = 0; h < heads; h += heads - h >= 4 ? 4 : 1) {
            const float *weights = s->scores + h * BLOCK;
            float *to_head = out + h * out_width;
            int64_t c = 0;
            for (; c + 4 * LANES <= out_width; c += 4 * LANES) {
                if (heads - h >= 4)
                    add_values(weights, 4, added + c, out_width, stride, 4, to_head + c);
                else
                    add_values(weights, 1, added + c, out_width, stride, 4, to_head + c);
            }
            for (; c < out_width; c += LANES) {
                if (heads - h >= 4)
                    add_values(weights, 4, added + c, out_width, stride, 1, to_head + c);
                else
                    add_values(weights, 1, added + c, out_width, stride, 1, to_head + c);
            }
        }
    }
}

INLINE U halves(V v) { /* as bf16, in the low half of each lane */
    const U bits = (U)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (U)pick(v == v, (V)rounded, (V)((U){} + 0x7fc0));
}

INLINE void put_lanes(void *to, int64_t kind, int64_t i, V v) {
    if (kind == F32)
        store((float *)to + i, v);
    else
        *(H_at *)((uint16_t *)to + i) = __builtin_convertvector(halves(v), H);
}

/* 32 numbers, of which `even` has those in even places. */
INLINE void put_pairs(void *to, int64_t kind, int64_t i, V even, V odd) {
    if (kind == BF16) {
        store((float *)((uint16_t *)to + i), (V)(halves(even) | halves(odd) << 16)); /* the lower address is even */
        return;
    }
    float *out = (float *)to + i;
    for (int lane = 0; lane < LANES; lane++) out[2 * lane] = even[lane], out[2 * lane + 1] = odd[lane];
}

/* One row of a matrix, written out in fp32 or bf16. */
static void write_row(const matrix *a, int64_t row, void *out, int64_t kind) {
    const int64_t groups = a->cols / a->group;
    if (a->kind == F32 || a->kind == BF16) {
        const vector all = {a->weight, a->kind};
        for (int64_t c = 0; c < a->cols; c++) put(out, kind, c, element(all, row * a->cols + c));
        return;
    }
    for (int64_t g = 0; g < groups; g++) {
        const int64_t from = g * a->group, to = from + a->group;
        const float scale = element(a->scales, row * groups + g);
        const int32_t zero = a->zeros ? a->zeros[row * groups + g] : a->kind == INT4 ? 8 : 0;
        if (a->kind == INT8) {
            const int8_t *w = (const int8_t *)a->weight + row * a->cols;
            for (int64_t c = from; c < to; c += LANES)
                put_lanes(out, kind, c, __builtin_convertvector(signed_bytes(w + c) - zero, V) * scale);
        } else {
            const uint8_t *w = (const uint8_t *)a->weight + row * (a->cols / 2);
            for (int64_t c = from; c < to; c += 2 * LANES) {
                const I pairs = bytes(w + c / 2);
                put_pairs(out, kind, c, __builtin_convertvector((pairs & 15) - zero, V) * scale,
                          __builtin_convertvector((pairs >> 4) - zero, V) * scale);
            }
        }
    }
}

/* ---- what Python calls ------------------------------------------------------------------------------------------- */

static float *numbers(int64_t count) {
    void *found = NULL;
    return posix_memalign(&found, 64, sizeof(float) * (size_t)(padded(count) + 64)) ? NULL : found;
}

/* A thread's share of memory: `longest` input of a product, width and heads of attention. */
static float *scratch_of(scratch *s, int64_t longest, int64_t width, int64_t heads) {
    const int64_t n = padded(longest) + 64, groups = n / LANES + LANES, block = BLOCK * padded(width);
    float *at = numbers(5 * n + (1 + ROWS) * groups + 2 * block + heads * BLOCK);
    if (!at) return NULL;
    s->normed = at, s->rounded = at + n, s->even = at + 2 * n, s->odd = at + 3 * n;
    s->kept = (int32_t *)(at + 4 * n);
    s->sums = at + 5 * n, s->scales = s->sums + groups;
    s->keys = s->scales + ROWS * groups, s->values = s->keys + block, s->scores = s->values + block;
    return at;
}

/* Bytes of vector, matrix, layer and model. */
void plmtune_sizes(int64_t *out) {
    out[0] = sizeof(vector), out[1] = sizeof(matrix), out[2] = sizeof(layer), out[3] = sizeof(model);
}

/* y = a x + bias; 0, or -1 without memory. */
int plmtune_product(const matrix *a, vector x, float *y, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        scratch s;
        float *mine = scratch_of(&s, a->cols, 0, 0);
        if (!mine) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
            for (int64_t i = 0; i < a->cols; i++) s.normed[i] = element(x, i);
            product(a, &s, s.normed, y, SET, NULL);
        }
        free(mine);
    }
    return -failed;
}

/* Rows [from, to) written out in fp32 or bf16: out [to - from, cols]. */
void plmtune_rows(const matrix *a, int64_t from, int64_t to, void *out, int64_t kind, int threads) {
    const int64_t row_bytes = a->cols * (kind == F32 ? 4 : 2);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = from; row < to; row++) write_row(a, row, (char *)out + (row - from) * row_bytes, kind);
}

/* Each row of x [count, cols] rounded to 8 bits and back, in x's kind; 0, or -1 without memory. */
int plmtune_round(vector x, int64_t count, int64_t cols, void *out, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *row = numbers(2 * padded(cols)), *rounded = row + padded(cols);
        if (!row) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for
        for (int64_t r = 0; r < (failed ? 0 : count); r++) {
            for (int64_t c = 0; c < cols; c += LANES) store(row + c, elements(x, r * cols + c));
            round_inputs(row, cols, rounded);
            for (int64_t c = 0; c < cols; c += LANES) put_lanes(out, x.kind, r * cols + c, load(rounded + c));
        }
        free(row);
    }
    return -failed;
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* One token at `position`: kept holds each layer's buffers (one, or keys and values), [heads, capacity, width] of
 * `kept_kind`; out [embed_dim] of `out_kind`. 0, or -1 without memory. */
int plmtune_decode(const model *m, int64_t token, int64_t position, char *const *kept, int64_t kept_kind,
                   int64_t capacity, void *out, int64_t out_kind, int threads) {
    const int64_t dim = m->embedding.cols, size = kept_kind == F32 ? 4 : 2, tokens = position + 1;
    const int64_t parts = most(1, tokens / 256 < threads ? tokens / 256 : threads);
    int64_t longest = dim, width = 0, value = 0, heads = 0;
    for (int64_t i = 0; i < m->num_layers; i++) {
        const layer *l = m->layers + i;
        const matrix *all[] = {&l->q, &l->k, &l->v, &l->o, &l->up, &l->down};
        for (int j = 0; j < 6; j++) longest = most(longest, most(all[j]->rows, all[j]->cols));
        width = most(width, l->latent + l->turned);
        value = most(value, most(l->latent, l->value));
        heads = most(heads, l->heads);
    }
    const int64_t n = padded(longest) + 64, key_width = padded(most(width, value)), out_width = padded(value);
    float *shared = numbers(6 * n + heads * key_width + parts * heads * (out_width + 2));
    if (!shared) return -1;
    float *x = shared, *q = x + n, *k = q + n, *v = k + n, *joined = v + n, *hidden = joined + n;
    float *query = hidden + n, *sums = query + heads * key_width;
    float *tops = sums + parts * heads * out_width, *totals = tops + parts * heads;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        scratch s;
        float *mine = scratch_of(&s, longest, key_width, heads);
        if (!mine) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp single
        write_row(&m->embedding, token, x, F32);
        for (int64_t i = 0; i < (failed ? 0 : m->num_layers); i++) {
            const layer *l = m->layers + i;
            const int64_t key = l->latent + l->turned, long_key = padded(key);
            const int64_t values = l->latent ? l->latent : l->value, long_values = padded(values);
            const int64_t query_dim = l->nope + l->turned, group = l->heads / l->kv_heads;
            char *const *buffers = kept + i * (l->latent ? 1 : 2);
            norm(x, dim, l->attention_norm, l->attention_eps, s.normed);
            product(&l->q, &s, s.normed, q, SET, NULL);
            product(&l->k, &s, s.normed, k, SET, NULL);
            if (!l->latent) product(&l->v, &s, s.normed, v, SET, NULL);
#pragma omp barrier
#pragma omp single nowait
            {
                if (l->latent) norm(k, l->latent, l->latent_norm, l->latent_eps, s.normed);
                for (int64_t h = 0; h < l->kv_heads; h++) {
                    char *entry = buffers[0] + (h * capacity + position) * key * size;
                    const float *from = k + h * key;
                    for (int64_t c = 0; c < l->latent; c++) put(entry, kept_kind, c, s.normed[c]);
                    for (int64_t c = 0; c < l->turned; c++)
                        put(entry, kept_kind, l->latent + c, turned(l, from + l->latent, c, position));
                    if (l->latent) continue;
                    entry = buffers[1] + (h * capacity + position) * values * size;
                    for (int64_t c = 0; c < values; c++) put(entry, kept_kind, c, v[h * values + c]);
                }
            }
#pragma omp for schedule(static)
            for (int64_t h = 0; h < l->heads; h++) {
                float *to = query + h * long_key;
                const float *from = q + h * query_dim;
                memset(to, 0, sizeof(float) * long_key);
                if (l->latent) { /* q (W_uk c) = (q W_uk) c, as in modules.mla */
                    float factors[l->nope]; /* of the rows that `some` names */
                    for (int64_t c = 0; c < l->nope; c++) s.kept[c] = (int32_t)c, factors[c] = from[c];
                    matrix some = l->v;
                    some.weight = (const char *)l->v.weight
                                  + h * (l->nope + l->value) * l->latent * (l->v.kind == F32 ? 4 : 2);
                    gather(&some, l->latent, s.kept, l->nope, factors, 0, l->latent, to);
                }
                for (int64_t c = 0; c < l->turned; c++) to[l->latent + c] = turned(l, from + l->nope, c, position);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = 0; item < parts * l->kv_heads; item++) {
                const int64_t part = item / l->kv_heads, h = item % l->kv_heads, first = h * group;
                attend(query + first * long_key, group, key, buffers[0] + h * capacity * key * size,
                       l->latent ? NULL : buffers[1] + h * capacity * values * size, values, kept_kind,
                       part * tokens / parts, (part + 1) * tokens / parts, l->scale, &s,
                       sums + (part * heads + first) * long_values, tops + part * heads + first,
                       totals + part * heads + first);
            }
#pragma omp for schedule(static)
            for (int64_t h = 0; h < l->heads; h++) {
                float top = -INFINITY, total = 0;
                for (int64_t p = 0; p < parts; p++) top = tops[p * heads + h] > top ? tops[p * heads + h] : top;
                float *latent = s.normed;
                memset(latent, 0, sizeof(float) * values);
                for (int64_t p = 0; p < parts; p++) {
                    const float by = expf(tops[p * heads + h] - top);
                    total += totals[p * heads + h] * by;
                    for (int64_t c = 0; c < values; c++) latent[c] += sums[(p * heads + h) * long_values + c] * by;
                }
                for (int64_t c = 0; c < values; c++) latent[c] /= total;
                if (l->latent) {
                    const int64_t from = h * (l->nope + l->value) + l->nope;
                    rows(&l->v, &s, latent, from, from + l->value, joined + h * l->value - from);
                } else
                    memcpy(joined + h * values, latent, sizeof(float) * values);
            }
            product(&l->o, &s, joined, x, ADD, NULL);
#pragma omp barrier
            norm(x, dim, l->ffn_norm, l->ffn_eps, s.normed);
            if (l->gate.weight) {
                product(&l->gate, &s, s.normed, q, SET, NULL);
#pragma omp barrier
            }
            product(&l->up, &s, s.normed, hidden, l->gate.weight ? GATED : SQUARED_RELU, q);
#pragma omp barrier
            if (l->sparse)
                skip_zeros(&l->down, &s, hidden, x);
            else
                product(&l->down, &s, hidden, x, ADD, NULL);
#pragma omp barrier
        }
        free(mine);
    }
    if (!failed) {
        norm(x, dim, m->norm, m->eps, q);
        for (int64_t c = 0; c < dim; c++) put(out, out_kind, c, q[c]);
    }
    free(shared);
    return -failed;
}
