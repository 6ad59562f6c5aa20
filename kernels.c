// Products of packed weights on the CPU. Compiled and called by quant.py; every function gives the same bits as the torch
// code beside its call.
#include <stdint.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// out[i] = levels[code of i] * scale[i / group] for i in 0 .. n - 1. Two codes a byte, the first in the low half or, with
// high_first, in the high half. n and group are even.
void decode4(const uint8_t *code, const float *scale, const float *levels, int64_t n, int64_t group, int high_first,
             int threads, float *out)
{
    int64_t groups = (n + group - 1) / group;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > 32768)
    for (int64_t g = 0; g < groups; g++) {
        int64_t i = g * group, end = i + group < n ? i + group : n;
        const float s = scale[g];
#ifdef __AVX512F__
        // 8 bytes -> 16 codes -> 16 table entries in one permutation
        const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(s));
        const __m128i low = _mm_set1_epi8(15);
        for (; i + 16 <= end; i += 16) {
            __m128i b = _mm_loadl_epi64((const __m128i *)(code + i / 2));
            __m128i h = _mm_and_si128(_mm_srli_epi16(b, 4), low), l = _mm_and_si128(b, low);
            __m512i c = _mm512_cvtepu8_epi32(high_first ? _mm_unpacklo_epi8(h, l) : _mm_unpacklo_epi8(l, h));
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(c, table));
        }
#endif
        for (; i < end; i += 2) {
            uint8_t b = code[i / 2], h = b >> 4, l = b & 15;
            out[i] = levels[high_first ? h : l] * s;
            out[i + 1] = levels[high_first ? l : h] * s;
        }
    }
}
