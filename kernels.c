// Decode and multiply packed weights of 1 to 4 bits on the CPU. quant.py compiles and calls this file. decode gives the same
// bits as the torch code next to its call. product sums in another order than a matrix product.
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))     // constant arguments then unroll loops

enum { BLOCK = 64 };                                             // number of groups whose scales are computed together

static float half_to_float(uint16_t h)
{
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    union { uint32_t i; float f; } bits = { (uint32_t)(h & 0x7fff) << 13 };
    bits.f *= 0x1p112f;                                         // corrects the exponent; exact for subnormals too
    bits.i |= (uint32_t)(h & 0x8000) << 16;
    return bits.f;                                              // wrong for infinities, but no packed scale is one
#endif
}

// Scales of 4 bytes are float, of 2 bytes half. A scale of 1 byte is an index -128 .. 127 into grid (256 floats).
static void some_scales(const void *scale, int bytes, const float *grid, int64_t first, int64_t count, float *s)
{
    if (bytes == 4)
        memcpy(s, (const float *)scale + first, count * sizeof *s);
    else if (bytes == 2)
        for (int64_t g = 0; g < count; g++) s[g] = half_to_float(((const uint16_t *)scale)[first + g]);
    else
        for (int64_t g = 0; g < count; g++) s[g] = grid[((const int8_t *)scale)[first + g] + 128];
}

#ifdef __AVX512F__
// Look up 16 codes (2 * bits bytes) in the table with one permutation. 3 bits: three bytes hold eight codes.
INLINE __m512 sixteen(const uint8_t *code, __m512 table, int bits, int high_first)
{
    if (bits < 4) {
        const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i at = bits == 3 ? _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21)
                                     : _mm512_slli_epi32(i, bits - 1);
        uint32_t low = 0;
        uint16_t high;
        memcpy(&low, code, bits == 1 ? 2 : 4);                  // one copy of 6 bytes would go through memory
        memcpy(&high, code + 2 * bits - 2, 2);
        __m512i c = _mm512_set1_epi32(low);
        if (bits == 3)
            c = _mm512_mask_set1_epi32(c, 0xff00, low >> 24 | (uint32_t)high << 8);
        c = _mm512_and_si512(_mm512_srlv_epi32(c, at), _mm512_set1_epi32((1 << bits) - 1));
        return _mm512_permutexvar_ps(c, table);
    }
    const __m128i b = _mm_loadl_epi64((const __m128i *)code), low = _mm_set1_epi8(15);
    const __m128i h = _mm_and_si128(_mm_srli_epi16(b, 4), low), l = _mm_and_si128(b, low);
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(high_first ? _mm_unpacklo_epi8(h, l) : _mm_unpacklo_epi8(l, h)), table);
}
#endif

static uint16_t to_bf16(float f)                                // rounds half to even, like torch
{
    uint32_t i;
    memcpy(&i, &f, 4);
    return (i + 0x7fff + ((i >> 16) & 1)) >> 16;
}

INLINE void put(float f, int64_t i, int bf16, void *out)
{
    if (bf16) ((uint16_t *)out)[i] = to_bf16(f);
    else ((float *)out)[i] = f;
}

INLINE void some_groups(const uint8_t *code, const float *s, const float *levels, int64_t n, int64_t group, int bits,
                        int high_first, int bf16, int64_t from, void *out)
{
    int64_t i = 0;
#ifdef __AVX512F__
    const __m512 table = _mm512_loadu_ps(levels);
    if (group % 16 == 0)
        for (int64_t g = 0; i + group <= n; g++) {
            const __m512 by = _mm512_set1_ps(s[g]);
            for (const int64_t end = i + group; i < end; i += 16) {
                const __m512 w = _mm512_mul_ps(sixteen(code + i * bits / 8, table, bits, high_first), by);
                if (!bf16) {
                    _mm512_storeu_ps((float *)out + from + i, w);
                    continue;
                }
#ifdef __AVX512BF16__
                _mm256_storeu_si256((__m256i *)((uint16_t *)out + from + i), (__m256i)_mm512_cvtneps_pbh(w));
#else
                __m512i b = _mm512_castps_si512(w);
                b = _mm512_add_epi32(b, _mm512_add_epi32(_mm512_set1_epi32(0x7fff),
                                     _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1))));
                _mm256_storeu_si256((__m256i *)((uint16_t *)out + from + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)));
#endif
            }
        }
#endif
    for (int64_t g = i / group; bits < 4 && i < n; g++)
        for (const int64_t end = (g + 1) * group < n ? (g + 1) * group : n; i < end; i++) {
            const int64_t at = i * bits % 8, both = code[i * bits / 8] | (at + bits > 8 ? code[i * bits / 8 + 1] << 8 : 0);
            put(levels[both >> at & ((1 << bits) - 1)] * s[g], from + i, bf16, out);
        }
    for (; i < n; i += 2) {
        const uint8_t b = code[i / 2], h = b >> 4, l = b & 15;
        put(levels[high_first ? h : l] * s[i / group], from + i, bf16, out);
        put(levels[high_first ? l : h] * s[i / group], from + i + 1, bf16, out);
    }
}

// out[i] = levels[code i] * scale[i / group] for i in 0 .. n - 1, as float or bf16. 4 bits: a byte holds two codes, the first
// in the low half or, with high_first, the high half; n and group are even. Fewer bits: the first code is in the lowest bits.
void decode(const uint8_t *code, const void *scale, int scale_bytes, const float *grid, const float *levels, int64_t n,
            int64_t group, int bits, int high_first, int threads, int bf16, void *out)
{
    const int64_t groups = (n + group - 1) / group;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > 32768)
    for (int64_t first = 0; first < groups; first += BLOCK) {
        const int64_t count = groups - first < BLOCK ? groups - first : BLOCK, i = first * group;
        const int64_t here = (i + count * group < n ? i + count * group : n) - i;
        float s[BLOCK];
        some_scales(scale, scale_bytes, grid, first, count, s);
#define FEW(BITS) some_groups(code + i * BITS / 8, s, levels, here, group, BITS, 0, bf16, i, out)
#define CASE(G, B) some_groups(code + i / 2, s, levels, here, G, 4, high_first, B, i, out)
        if (bits == 3) FEW(3);
        else if (bits == 2) FEW(2);
        else if (bits == 1) FEW(1);
        else if (bf16) {
            if (group == 16) CASE(16, 1);
            else if (group == 32) CASE(32, 1);
            else if (group == 64) CASE(64, 1);
            else CASE(group, 1);
        } else {
            if (group == 16) CASE(16, 0);
            else if (group == 32) CASE(32, 0);
            else if (group == 64) CASE(64, 0);
            else CASE(group, 0);
        }
    }
}

// The largest number of tokens for product; 0 if product is not compiled.
#ifdef __AVX512F__
int most_tokens(void) { return 4; }

// Multiplies two rows together: their sums run in parallel, and both share one read of x.
INLINE void rows_times(const float *x, int tokens, const uint8_t *code, const void *scale, int scale_bytes, const float *grid,
                       const float *levels, int64_t row, int rows, int64_t in, int64_t out, int64_t group, int bits,
                       int high_first, float *y)
{
    const __m512 table = _mm512_loadu_ps(levels);
    const int64_t groups = in / group;
    __m512 sum[2][4];
    float s[2][BLOCK];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sum[r][t] = _mm512_setzero_ps();
    code += row * in * bits / 8;
    for (int64_t first = 0, k = 0; first < groups; first += BLOCK) {
        const int64_t count = groups - first < BLOCK ? groups - first : BLOCK;
        for (int r = 0; r < rows; r++)
            some_scales(scale, scale_bytes, grid, (row + r) * groups + first, count, s[r]);
        for (int64_t g = 0; g < count; g++) {
            __m512 part[2][4];
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < tokens; t++) part[r][t] = _mm512_setzero_ps();
            for (const int64_t end = k + group; k < end; k += 16)
                for (int r = 0; r < rows; r++) {
                    const __m512 w = sixteen(code + (r * in + k) * bits / 8, table, bits, high_first);
                    for (int t = 0; t < tokens; t++) part[r][t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + t * in + k), part[r][t]);
                }
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < tokens; t++) sum[r][t] = _mm512_fmadd_ps(part[r][t], _mm512_set1_ps(s[r][g]), sum[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) y[t * out + row + r] = _mm512_reduce_add_ps(sum[r][t]);
}

// y (tokens, out) = x (tokens, in) W^T in fp32 for 1 to 4 tokens, without the decoded W in memory. group divides `in` and is
// a multiple of 16.
void product(const float *x, int tokens, const uint8_t *code, const void *scale, int scale_bytes, const float *grid,
             const float *levels, int64_t in, int64_t out, int64_t group, int bits, int high_first, int threads, float *y)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && in * out > 32768)
    for (int64_t row = 0; row < out; row += 2) {
#define ROWS(T, R, G, B) rows_times(x, T, code, scale, scale_bytes, grid, levels, row, R, in, out, G, B, high_first, y)
#define FEW_BITS(B) { if (tokens == 1) ROWS(1, 2, group, B); else if (tokens == 2) ROWS(2, 2, group, B); \
                      else if (tokens == 3) ROWS(3, 2, group, B); else ROWS(4, 2, group, B); }
        if (row + 1 == out) {
            for (int t = 0; t < tokens; t++)
                rows_times(x + t * in, 1, code, scale, scale_bytes, grid, levels, row, 1, in, out, group, bits, high_first,
                           y + t * out);
        }
        else if (bits == 3) FEW_BITS(3)
        else if (bits == 2) FEW_BITS(2)
        else if (bits == 1) FEW_BITS(1)
        else if (tokens == 1 && group == 16) ROWS(1, 2, 16, 4);
        else if (tokens == 1 && group == 32) ROWS(1, 2, 32, 4);
        else if (tokens == 1 && group == 64) ROWS(1, 2, 64, 4);
        else FEW_BITS(4)
    }
}
#else
int most_tokens(void) { return 0; }
#endif
