// Products of packed weights on the CPU. Compiled and called by quant.py; every function gives the same bits as the torch
// code beside its call.
#include <stdint.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

static float half_to_float(uint16_t h)
{
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    union { uint32_t i; float f; } bits = { (uint32_t)(h & 0x7fff) << 13 };
    bits.f *= 0x1p112f;                                     // moves the exponent, exact for subnormals too
    bits.i |= (uint32_t)(h & 0x8000) << 16;
    return bits.f;                                          // infinities are refused before they are packed
#endif
}

static inline __attribute__((always_inline)) void some_groups(const uint8_t *code, const float *scale, const float *levels,
                                                              int64_t n, int64_t group, int high_first, float *out)
{
    int64_t i = 0;
#ifdef __AVX512F__
    // 8 bytes -> 16 codes -> 16 table entries in one permutation
    const __m512 table = _mm512_loadu_ps(levels);
    const __m128i low = _mm_set1_epi8(15);
    if (group % 16 == 0)
        for (int64_t g = 0; i + group <= n; g++) {
            const __m512 by = _mm512_set1_ps(scale[g]);
            for (const int64_t end = i + group; i < end; i += 16) {
                const __m128i b = _mm_loadl_epi64((const __m128i *)(code + i / 2));
                const __m128i h = _mm_and_si128(_mm_srli_epi16(b, 4), low), l = _mm_and_si128(b, low);
                const __m512i c = _mm512_cvtepu8_epi32(high_first ? _mm_unpacklo_epi8(h, l) : _mm_unpacklo_epi8(l, h));
                _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(c, table), by));
            }
        }
#endif
    for (; i < n; i += 2) {
        const uint8_t b = code[i / 2], h = b >> 4, l = b & 15;
        out[i] = levels[high_first ? h : l] * scale[i / group];
        out[i + 1] = levels[high_first ? l : h] * scale[i / group];
    }
}

// out[i] = levels[code of i] * scale of group i / group, for i in 0 .. n - 1. Two codes a byte, the first in the low half
// or, with high_first, in the high half; n and group are even. Scales of 4 bytes are floats, of 2 halves, of 1 places in
// grid (256 floats, from -128 on), times top.
void decode4(const uint8_t *code, const void *scale, int scale_bytes, const float *grid, float top, const float *levels,
             int64_t n, int64_t group, int high_first, int threads, float *out)
{
    enum { SOME = 64 };                                     // groups at a time
    const int64_t groups = (n + group - 1) / group;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > 32768)
    for (int64_t first = 0; first < groups; first += SOME) {
        const int64_t count = groups - first < SOME ? groups - first : SOME;
        float s[SOME];
        if (scale_bytes == 4)
            for (int64_t g = 0; g < count; g++) s[g] = ((const float *)scale)[first + g];
        else if (scale_bytes == 2)
            for (int64_t g = 0; g < count; g++) s[g] = half_to_float(((const uint16_t *)scale)[first + g]);
        else
            for (int64_t g = 0; g < count; g++) s[g] = grid[((const int8_t *)scale)[first + g] + 128] * top;
        const int64_t i = first * group, last = i + count * group < n ? i + count * group : n;
        const uint8_t *from = code + i / 2;
        if (group == 16) some_groups(from, s, levels, last - i, 16, high_first, out + i);   // the compiler unrolls these
        else if (group == 32) some_groups(from, s, levels, last - i, 32, high_first, out + i);
        else if (group == 64) some_groups(from, s, levels, last - i, 64, high_first, out + i);
        else some_groups(from, s, levels, last - i, group, high_first, out + i);
    }
}
