// Vectors of sixteen lanes for engine.c. The compiler splits them where registers are shorter. What it does not find by itself has
// a branch for each processor here: AVX-512, AVX2, NEON, and C for all others. Each branch gives the same bits.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))     // constant arguments then unroll loops
#ifdef __AVX2__
#define LANEWISE INLINE
#else
#define LANEWISE static __attribute__((noinline))               // sixteen scalar steps: inlined, they compile for minutes
#endif
#ifdef __AVX512F__
enum { BIG = 12, MID = 4, ROWS = 2 };                            // tokens and tiles of an integer product: 24 of 32 registers
#else
enum { BIG = 2, MID = 1, ROWS = 1 };
#endif
#ifdef __ARM_FEATURE_DOTPROD
enum { ARM = 1 };
#else
enum { ARM = 0 };
#endif
enum { LANES = 16 };

typedef float F16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float F8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t I16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t U16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t B16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t UB16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t H16 __attribute__((vector_size(32), aligned(2), may_alias));

INLINE F16 load(const float *p) { return *(const F16 *)p; }
INLINE void store(float *p, F16 v) { *(F16 *)p = v; }
INLINE F16 all(float f) { return (F16){ f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f }; }
INLINE F16 pick(I16 where, F16 a, F16 b) { return (F16)(((I16)a & where) | ((I16)b & ~where)); }
INLINE F16 bigger(F16 a, F16 b) { return pick(a > b, a, b); }
INLINE F16 size_of(F16 a) { return (F16)((I16)a & 0x7fffffff); }
INLINE F16 rounded(F16 a) { return (a + 12582912.0f) - 12582912.0f; }       // half to even, for |a| < 2^22

LANEWISE F16 fma16(F16 a, F16 b, F16 c)
{
#ifdef __AVX512F__
    return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    F16 r;
    for (int i = 0; i < LANES; i++) r[i] = fmaf(a[i], b[i], c[i]);
    return r;
#endif
}

// table[at & 15]
LANEWISE F16 look(F16 table, U16 at)
{
#ifdef __AVX512F__
    return (F16)_mm512_permutexvar_ps((__m512i)at, (__m512)table);
#elif defined(__AVX2__)
    F16 r;
    __m256 low, high;
    memcpy(&low, &table, 32), memcpy(&high, (char *)&table + 32, 32);
    for (int i = 0; i < 2; i++) {
        __m256i a;
        memcpy(&a, (char *)&at + 32 * i, 32);
        const __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, a), _mm256_permutevar8x32_ps(high, a),
                                          _mm256_castsi256_ps(_mm256_slli_epi32(a, 28)));
        memcpy((char *)&r + 32 * i, &v, 32);
    }
    return r;
#else
    F16 r;
    for (int i = 0; i < LANES; i++) r[i] = table[at[i] & 15];
    return r;
#endif
}

// sum[i] += the four bytes of u[i], unsigned, times the four bytes of s[i], signed. few: 1, u is at most 128, so that two
// products fit in 16 bits; 2, at most 15.
LANEWISE I16 dot4(I16 sum, U16 u, I16 s, int few)
{
#ifdef __AVX512VNNI__
    (void)few;
    return (I16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif defined(__AVX2__)
    for (int i = 0; i < 2; i++) {
        __m256i a, b, c;
        memcpy(&a, (char *)&u + 32 * i, 32), memcpy(&b, (char *)&s + 32 * i, 32), memcpy(&c, (char *)&sum + 32 * i, 32);
        if (few) c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
        else {
            const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                                   _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
            const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
            c = _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
        }
        memcpy((char *)&sum + 32 * i, &c, 32);
    }
    return sum;
#elif defined(__ARM_FEATURE_DOTPROD)
    for (int i = 0; i < 4; i++) {                               // u = 128 + a signed byte
        uint8x16_t a;
        int8x16_t b;
        int32x4_t c;
        memcpy(&a, (char *)&u + 16 * i, 16), memcpy(&b, (char *)&s + 16 * i, 16), memcpy(&c, (char *)&sum + 16 * i, 16);
        if (few == 2) c = vdotq_s32(c, vreinterpretq_s8_u8(a), b);
        else {
            c = vdotq_s32(c, vreinterpretq_s8_u8(veorq_u8(a, vdupq_n_u8(128))), b);
            c = vdotq_s32(vdotq_s32(c, vdupq_n_s8(64), b), vdupq_n_s8(64), b);
        }
        memcpy((char *)&sum + 16 * i, &c, 16);
    }
    return sum;
#else
    (void)few;
    for (int b = 0; b < 32; b += 8) sum += (I16)((u >> b) & 255) * ((s << (24 - b)) >> 24);
    return sum;
#endif
}

INLINE float sum_of(F16 v)
{
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

INLINE float top_of(F16 v)
{
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

INLINE F16 exp16(F16 x)                                          // relative error 2.2e-7; 0 below -87
{
    const F16 within = bigger(x, all(-87.0f));
    const F16 n = rounded(within * 1.44269504f);
    const F16 r = fma16(n, all(-1.42860677e-6f), fma16(n, all(-0.693145752f), within));
    F16 p = all(1.0f / 720);
    p = fma16(p, r, all(1.0f / 120)), p = fma16(p, r, all(1.0f / 24)), p = fma16(p, r, all(1.0f / 6));
    p = fma16(p, r, all(0.5f)), p = fma16(p, r, all(1.0f)), p = fma16(p, r, all(1.0f));
    const F16 e = (F16)((I16)p + (__builtin_convertvector(n, I16) << 23));
    return pick(x < -87.0f, all(0), e);
}

INLINE F16 gelu16(F16 x)                                         // erf: Abramowitz and Stegun 7.1.26, error 1.5e-7
{
    const F16 u = size_of(x) * 0.70710678f, t = 1.0f / fma16(all(0.3275911f), u, all(1.0f));
    F16 p = all(1.061405429f);
    p = fma16(p, t, all(-1.453152027f)), p = fma16(p, t, all(1.421413741f)), p = fma16(p, t, all(-0.284496736f));
    p = fma16(p, t, all(0.254829592f)) * t * exp16(-u * u);     // erfc(|x| / sqrt 2)
    return x * pick(x < 0.0f, 0.5f * p, 1.0f - 0.5f * p);
}
