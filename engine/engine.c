// Inference of a GPT or BitNet on packed weights: one call computes whole tokens, from their ids to logits and the next ids.
// engine.py fills the structs below, compiles this file and calls it. Read it from top to bottom: vectors, layers, model.
//
// Layout. A row of a matrix is a stream of 32-bit words, with 32 / bits columns a word, the first column in the lowest bits.
// Sixteen rows form a tile. A tile holds word 0 of its sixteen rows, then word 1 of its sixteen rows, and so on:
//
//     | row 0, word 0 | row 1, word 0 | ... | row 15, word 0 | row 0, word 1 | ...         64 bytes for each word
//
// One load fills a register with a word of sixteen rows. The activations of these columns are broadcast to all lanes. So each
// lane sums one output, and no sum runs across lanes. Zeros fill the last word and the last tile.
//
// Exactness. Ternary and int8 products are sums of integers, so any order gives the same bits. All other sums run in an order
// that is fixed here: every instruction set and every number of threads gives the same bits. Compile with -ffp-contract=off.
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "lanes.h"
#define MIN(a, b) ((a) < (b) ? (a) : (b))

enum { PAD = 64 };                                               // rows of a buffer are padded to PAD floats
enum { CODES, BIN, TERN, INT8 };                                 // kind of a layer
enum { NO_ACT, RELU, GELU, RELU2_GLU, SILU_GLU };
enum { NO_NORM, LAYER_NORM, RMS_NORM };

// ---------------------------------------------------------------------------------------------------------------------
// the structs that engine.py fills; fields as in its classes of the same names

typedef struct { const void *at; int64_t bytes; } Array;

// y = norm(act(x)) * input_scale times the matrix. CODES: any weights of 1, 2, 4, 8, 16 (bf16) or 32 bits. BIN: bits - 1/2, the
// output is normalized. TERN: codes 0, 1, 2 for -1, 0, 1. INT8: int8 weights. `rounded`: int8 activations; always for TERN and
// INT8, for CODES only if the levels of 1, 2 or 4 bits are evenly spaced. Else activations are fp32.
typedef struct {
    int32_t kind, act, norm, chunks, in, out, bits, group, scale_bytes, rounded;     // in: after a gate
    float eps, out_eps, zero, levels[16];
    Array code;         // tiles
    Array scale;        // CODES: tiles of a scale for each group, fp32, fp16 or an index of grid; TERN, INT8: of each row
    Array zeros;        // CODES: tiles of a uint8 for each group, or absent; w = (level - zero) * scale
    Array grid;         // 256 floats
    Array gain, shift;  // of the norm
    Array input_scale, bias;
    Array alpha;        // BIN: for each chunk
    Array sums;         // INT8: int32, the sum of each row
} Linear;

typedef struct {
    int32_t n_layer, n_head, n_kv_head, head_dim, n_embd, vocab, context, sequences, batch, threads, tied;
    Array positions;    // learned (context, n_embd), or absent
    Array cos, sin;     // rotary (context, head_dim), or absent
} Shape;

typedef struct {
    Shape s;
    Linear *layers;     // qkv, out, up, down of each block; head; embedding
    int64_t wide, k_size, v_size;         // floats of a row of a buffer; of the keys and values of a head
    float *x, *qkv, *y, *hidden, *z, *a, *tables, *group_sums, *scores, *logits, *keys, *values, *sorted;
    int8_t *q;
    uint8_t *unpacked;
    float *q_scale;
    int32_t *q_sum;
    int amx;                              // the system lets us use these registers
    atomic_int arrived, turn;
} Engine;

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t words_of(const Linear *l) { return ((int64_t)l->in * l->bits + 31) / 32; }

// All threads wait here for each other. They spin, because the next work is microseconds away.
static void wait_all(Engine *e, int of)
{
    if (of == 1) return;
    const int turn = atomic_load(&e->turn);
    if (atomic_fetch_add(&e->arrived, 1) == of - 1) {
        atomic_store(&e->arrived, 0);
        atomic_fetch_add(&e->turn, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&e->turn, memory_order_acquire) == turn; spins++) {
        if (spins > 4000) sched_yield();
#ifdef __x86_64__
        _mm_pause();
#endif
    }
}

// With -DSTAGES: seconds of the first thread by stage, waiting included.
enum { EMBEDDING, INPUTS, PRODUCTS, NORMALIZATION, ATTENTION, HEAD, N_STAGES };
#ifdef STAGES
#include <time.h>
static double spent[N_STAGES], since;
static void stage(int id, int which)
{
    struct timespec t;
    if (id || clock_gettime(CLOCK_MONOTONIC, &t)) return;
    const double now = t.tv_sec + 1e-9 * t.tv_nsec;
    if (which >= 0) spent[which] += now - since;
    since = now;
}
void engine_stages(double *to) { memcpy(to, spent, sizeof spent), memset(spent, 0, sizeof spent); }
#else
#define stage(id, which)
#endif

// ---------------------------------------------------------------------------------------------------------------------
// input of a layer: activation, norm, then what its product reads

// Root of the sum of squares, in the order of torch.linalg.vector_norm on a CPU: codes then rarely differ by one from torch's.
static float norm_of(const float *a, int64_t n)
{
    F8 lanes = { 0 };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) lanes += *(const F8 *)(a + i) * *(const F8 *)(a + i);
    float sum = lanes[0];
    for (int k = 1; k < 8; k++) sum += lanes[k];
    for (; i < n; i++) sum += a[i] * a[i];
    return sqrtf(sum);
}

// Integer products take 12 tokens at once, then 4, then 1 (AVX2 and others: 2, then 1; AMX: any number above 3). A panel holds
// four bytes of each of its tokens, then the next four. Returns its number of tokens and sets its first one.
static int panel(const Engine *e, const Linear *l, int n, int t, int *first)
{
    const int amx = e->amx && n >= MID && l->kind != CODES;
    const int big = n / BIG * BIG, mid = big + (n - big) / MID * MID;
    *first = t < big ? t / BIG * BIG : t < mid ? big + (t - big) / MID * MID : t;
    if (amx) *first = t;
    return amx || t >= mid ? 1 : t < big ? BIG : MID;
}

static void prepare(Engine *e, const Linear *l, const float *x, int n_tokens, int t)
{
    float *a = e->a + t * e->wide;
    const int64_t n = l->in, end = padded(n, PAD);
    for (int64_t i = 0; i < n; i += LANES) {
        const F16 v = load(x + i);
        if (l->act == GELU) store(a + i, gelu16(v));
        else if (l->act == RELU) store(a + i, bigger(v, all(0)));
        else if (l->act == RELU2_GLU) store(a + i, bigger(v, all(0)) * bigger(v, all(0)) * load(x + n + i));
        else if (l->act == SILU_GLU) store(a + i, v / (1.0f + exp16(-bigger(v, all(-80)))) * load(x + n + i));
        else store(a + i, v);
    }
    memset(a + n, 0, (end - n) * sizeof *a);
    const float *gain = l->gain.at, *shift = l->shift.at, *by = l->input_scale.at;
    if (l->norm == LAYER_NORM) {
        F16 sum = all(0);
        for (int64_t i = 0; i < n; i += LANES) sum += load(a + i);
        const float mean = sum_of(sum) / n;
        for (int64_t i = 0; i < n; i += LANES) store(a + i, load(a + i) - mean);
        memset(a + n, 0, (end - n) * sizeof *a);
        const float norm = norm_of(a, n), rstd = 1 / sqrtf(norm * norm / n + l->eps);
        for (int64_t i = 0; i < n; i++) a[i] = a[i] * rstd * gain[i] + (shift ? shift[i] : 0);
    } else if (l->norm == RMS_NORM) {
        const float norm = norm_of(a, n), rstd = 1 / sqrtf(norm * norm / n + l->eps);
        for (int64_t i = 0; i < n; i++) a[i] = a[i] * rstd * gain[i];
    }
    for (int64_t i = 0; by && i < n; i++) a[i] *= by[i];
    if (l->rounded) {
        // Int8 with the scale of quant.quantize_rows, in the order of dot4: field p of a word of codes has four columns, one in
        // each byte. Four bytes of one token are followed by those of the next token of its panel.
        const int fields = l->kind == INT8 ? 1 : 8 / l->bits;
        int first;
        const int step = l->kind == INT8 ? 1 : panel(e, l, n_tokens, t, &first);
        int8_t *q = step == 1 ? e->q + t * e->wide : e->q + first * e->wide + (t - first) * 4;
        F16 top = all(0);
        for (int64_t i = 0; i < n; i += LANES) top = bigger(size_of(load(a + i)), top);
        const float most = fmaxf(top_of(top), 1e-5f), factor = 127 / most;
        I16 sum = { 0 };
        for (int64_t i = 0; i < end; i += LANES) {
            I16 v = __builtin_convertvector(rounded(load(a + i) * factor), I16);
            sum += v;
            if (l->kind == INT8) v += 128;                      // unsigned: the product subtracts 128 times the row's sum
            B16 bytes = __builtin_convertvector(v, B16);
            if (fields == 4)
                bytes = __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            if (fields == 2)
                bytes = __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
            if (fields == 8)                                    // two bytes of each field; the other two are 16 columns on
                for (int p = 0; p < 8; p++)
                    for (int half = 0; half < 2; half++)
                        q[(i / 32 * 8 + p) * 4 * step + i % 32 / 8 + half] = bytes[p + 8 * half];
            else if (step == 1) *(B16 *)(q + i) = bytes;
            else for (int p = 0; p < 4; p++) memcpy(q + (i / 4 + p) * 4 * step, (char *)&bytes + 4 * p, 4);
        }
        e->q_scale[t] = most / 127;
        e->q_sum[t] = 0;
        for (int i = 0; i < LANES; i++) e->q_sum[t] += sum[i];
        for (int64_t g = 0; l->kind == CODES && g < n / l->group; g++) {
            int32_t of_group = 0;
            for (int64_t k = g * l->group / 4; k < (g + 1) * l->group / 4; k++)
                for (int i = 0; i < 4; i++) of_group += q[4 * k * step + i];
            e->group_sums[t * e->wide + g] = of_group;
        }
    } else if (l->kind == BIN) {
        // For each four columns the sums of all 16 choices of signs, halved: a nibble of code then stands for four products.
        static const float sign[4][LANES] = {
            { -.5, .5, -.5, .5, -.5, .5, -.5, .5, -.5, .5, -.5, .5, -.5, .5, -.5, .5 },
            { -.5, -.5, .5, .5, -.5, -.5, .5, .5, -.5, -.5, .5, .5, -.5, -.5, .5, .5 },
            { -.5, -.5, -.5, -.5, .5, .5, .5, .5, -.5, -.5, -.5, -.5, .5, .5, .5, .5 },
            { -.5, -.5, -.5, -.5, -.5, -.5, -.5, -.5, .5, .5, .5, .5, .5, .5, .5, .5 } };
        float *table = e->tables + t * e->wide * 4;
        for (int64_t i = 0; i < words_of(l) * 32; i += 4)
            store(table + 4 * i, (a[i] * load(sign[0]) + a[i + 1] * load(sign[1]))
                               + (a[i + 2] * load(sign[2]) + a[i + 3] * load(sign[3])));
    } else if (l->zeros.at)
        for (int64_t g = 0; g < n / l->group; g++) {
            const int64_t from = g * l->group, to = from + l->group, whole = to - l->group % LANES;
            F16 lanes = all(0);
            for (int64_t i = from; i < whole; i += LANES) lanes += load(a + i);
            float sum = sum_of(lanes);
            for (int64_t i = whole; i < to; i++) sum += a[i];
            e->group_sums[t * e->wide + g] = sum;
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// products: T tokens times R tiles of 16 rows; T and R are constants, so that all sums stay in registers

typedef struct { Engine *e; const Linear *l; float *y; int64_t stride; int add; } Job;     // add: y += product

// One token reads each code once, in streams too short for a processor to foresee. So word w of R tiles asks for the same words of
// the next R tiles. An address past the end does no harm.
INLINE void ask_next(const U16 *code, int64_t words, int64_t w, int T, int R)
{
    for (int r = 0; T == 1 && r < R; r++) __builtin_prefetch((const void *)((intptr_t)code + ((R + r) * words + w) * 64), 0, 2);
}

INLINE void put(const Job *j, int64_t t, int64_t tile, F16 v)
{
    float *y = j->y + t * j->stride + tile * LANES;
    if (j->l->bias.at) v += load((const float *)j->l->bias.at + tile * LANES);
    if (j->add) v += load(y);
    store(y, v);
}

INLINE void bin_tiles(const Job *j, int64_t t, int64_t tile, int T, int R)
{
    const int64_t words = words_of(j->l), step = j->e->wide * 4;
    const U16 *code = (const U16 *)j->l->code.at + tile * words;
    const float *table = j->e->tables + t * step;
    F16 sum[4][4];
    for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) sum[a][r] = all(0);
    for (int64_t w = 0; w < words; w++) {
        ask_next(code, words, w, T, R);
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++)
            for (int r = 0; r < R; r++) {
                const U16 at = code[r * words + w] >> 4 * n;
                for (int a = 0; a < T; a++) sum[a][r] += look(load(table + a * step + (8 * w + n) * LANES), at);
            }
    }
    for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) put(j, t + a, tile + r, sum[a][r]);
}

// Sums of codes times int8 activations -> outputs.
INLINE void put_sums(const Job *j, int64_t t, int64_t tile, I16 sum)
{
    const F16 s = all(j->e->q_scale[t]);
    const int32_t all_q = j->e->q_sum[t];
    if (j->l->kind == BIN) return put(j, t, tile, __builtin_convertvector(2 * sum - all_q, F16) * (0.5f * s));
    const F16 z = __builtin_convertvector(sum - all_q, F16), of_rows = load((const float *)j->l->scale.at + tile * LANES);
    put(j, t, tile, j->l->chunks == 1 ? z * (s * of_rows) : z * s * of_rows);      // the rounding of layers.py
}

// Codes of 1 or 2 bits. One token: each field of a byte has its own sums. They are multiples of 1, 2, 4 ..., so masks do and one
// shift at the end suffices. Several tokens share the shift of the codes, and need one sum each.
INLINE void bits_tiles(const Job *j, int64_t t, int64_t tile, int T, int R, int bits)
{
    Engine *e = j->e;
    const int fields = 8 / bits, masks = T == 1 && !ARM;
    const int64_t words = words_of(j->l);
    const uint32_t low = bits == 1 ? 0x01010101u : 0x03030303u;
    const U16 *code = (const U16 *)j->l->code.at + tile * words;
    const int8_t *q = e->q + t * e->wide;
    I16 sum[BIG][4], field[8][4];
    for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) sum[a][r] = (I16){ 0 };
    for (int p = 0; p < fields; p++) for (int r = 0; r < R; r++) field[p][r] = (I16){ 0 };
    for (int64_t w = 0; w < words; w++) {
        ask_next(code, words, w, T, R);
#pragma GCC unroll 8
        for (int p = 0; p < fields; p++, q += 4 * T)
            for (int r = 0; r < R; r++) {
                const U16 word = code[r * words + w], c = masks ? word & low << bits * p : word >> bits * p & low;
                for (int a = 0; a < T; a++) {
                    int32_t x;
                    memcpy(&x, q + 4 * a, 4);
                    if (masks) field[p][r] = dot4(field[p][r], c, (I16){ 0 } + x, 1);
                    else sum[a][r] = dot4(sum[a][r], c, (I16){ 0 } + x, 2);
                }
            }
    }
    for (int p = 0; masks && p < fields; p++) for (int r = 0; r < R; r++) sum[0][r] += field[p][r] >> bits * p;
    for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) put_sums(j, t + a, tile + r, sum[a][r]);
}

#ifdef __AMX_INT8__
// The same sums in AMX registers of 16 rows of 64 bytes: 32 tokens times 2 tiles. A field of a word of codes is already a row of
// the right operand. 64 columns take a KB once unpacked.
INLINE void amx_product(const Job *j, int n, int64_t from, int64_t to, uint8_t *unpacked, int bits)
{
    const Engine *e = j->e;
    const int fields = 8 / bits;
    const int64_t words = words_of(j->l), blocks = padded(j->l->in, 64) / 64, wide = e->wide;
    const uint32_t low = bits == 1 ? 0x01010101u : 0x03030303u;
    struct { uint8_t palette, start, zeros[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = { 1, 0, { 0 }, { 0 }, { 0 } };
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    char before[64] __attribute__((aligned(64)));                // other code of this thread may rely on its own shape
    _tile_storeconfig(before);
    __asm__ volatile("" :: "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
    for (int64_t tile = from; tile < to; tile += 2) {
        const int two = tile + 1 < to;
        for (int r = 0; r <= two; r++) {
            const U16 *code = (const U16 *)j->l->code.at + (tile + r) * words;
            U16 *b = (U16 *)(unpacked + r * blocks * 1024);
            for (int64_t w = 0; w < blocks * 16 / fields; w++)
                for (int p = 0; p < fields; p++) b[w * fields + p] = (w < words ? code[w] : (U16){ 0 }) >> bits * p & low;
        }
        __asm__ volatile("" ::: "memory");                       // gcc does not know that tile loads read memory
        const uint8_t *b0 = unpacked, *b1 = unpacked + two * blocks * 1024;
        for (int t = 0; t < n; t += 32) {
            const int8_t *a0 = e->q + t * wide, *a1 = t + 16 < n ? a0 + 16 * wide : a0;
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            for (int64_t k = 0; k < blocks; k++) {
                _tile_loadd(4, a0 + 64 * k, wide); _tile_loadd(6, b0 + 1024 * k, 64); _tile_loadd(7, b1 + 1024 * k, 64);
                _tile_dpbsud(0, 4, 6); _tile_dpbsud(1, 4, 7);
                if (a1 == a0) continue;
                _tile_loadd(5, a1 + 64 * k, wide);
                _tile_dpbsud(2, 5, 6); _tile_dpbsud(3, 5, 7);
            }
            I16 sum[4][16];
            _tile_stored(0, sum[0], 64); _tile_stored(1, sum[1], 64); _tile_stored(2, sum[2], 64); _tile_stored(3, sum[3], 64);
            for (int i = 0; i < MIN(32, n - t); i++)
                for (int r = 0; r <= two; r++) put_sums(j, t + i, tile + r, sum[i / 16 * 2 + r][i % 16]);
        }
    }
    __asm__ volatile("" :: "r"(before) : "memory");
    _tile_loadconfig(before);
}
#endif

INLINE void int8_tiles(const Job *j, int64_t t, int64_t tile, int T, int R)
{
    Engine *e = j->e;
    const int64_t words = words_of(j->l);
    const I16 *code = (const I16 *)j->l->code.at + tile * words;
    const int8_t *q = e->q + t * e->wide;
    I16 sum[12][4];
    for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) sum[a][r] = (I16){ 0 };
    for (int64_t w = 0; w < words; w++) {
        ask_next((const U16 *)code, words, w, T, R);
        for (int a = 0; a < T; a++) {
            uint32_t x;
            memcpy(&x, q + a * e->wide + 4 * w, 4);
            for (int r = 0; r < R; r++) sum[a][r] = dot4(sum[a][r], (U16){ 0 } + x, code[r * words + w], 0);
        }
    }
    for (int a = 0; a < T; a++)
        for (int r = 0; r < R; r++) {
            const I16 of_rows = *(const I16 *)((const int32_t *)j->l->sums.at + (tile + r) * LANES);
            const F16 z = __builtin_convertvector(sum[a][r] - 128 * of_rows, F16);
            put(j, t + a, tile + r, z * e->q_scale[t + a] * load((const float *)j->l->scale.at + (tile + r) * LANES));
        }
}

INLINE F16 scales(const Linear *l, int64_t at)                  // of sixteen rows
{
    F16 s = all(1);
    if (l->scale_bytes == 4) s = load((const float *)l->scale.at + at);
    else if (l->scale_bytes == 2) {
        const uint16_t *h = (const uint16_t *)l->scale.at + at;
#ifdef __AVX512F__
        s = (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
#else
        const U16 u = __builtin_convertvector(*(const H16 *)h, U16);
        s = (F16)((U16)((F16)((u & 0x7fff) << 13) * 0x1p112f) | (u & 0x8000) << 16);   // exact, but wrong for infinities
#endif
    } else if (l->scale_bytes == 1)
        for (int i = 0; i < LANES; i++) s[i] = ((const float *)l->grid.at)[((const int8_t *)l->scale.at)[at + i] + 128];
    return s;
}

// Evenly spaced levels and int8 activations: an integer sum for each group.
INLINE void even_tiles(const Job *j, int64_t t, int64_t tile, int T, int R, int bits)
{
    Engine *e = j->e;
    const Linear *l = j->l;
    const int fields = 8 / bits;
    const int64_t words = words_of(l), groups = l->in / l->group, in_group = l->group * bits / 32;
    const uint32_t low = bits == 1 ? 0x01010101u : bits == 2 ? 0x03030303u : 0x0f0f0f0fu;
    const float least = l->levels[0], step = l->levels[1] - l->levels[0];
    const U16 *code = (const U16 *)l->code.at + tile * words;
    const int8_t *q = e->q + t * e->wide;
    F16 sum[BIG][4];
    for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) sum[a][r] = all(0);
    for (int64_t g = 0; g < groups; g++) {
        I16 part[BIG][4];
        for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) part[a][r] = (I16){ 0 };
        for (int64_t w = g * in_group; w < (g + 1) * in_group; w++) {
            ask_next(code, words, w, T, R);
#pragma GCC unroll 8
            for (int p = 0; p < fields; p++, q += 4 * T)
                for (int r = 0; r < R; r++) {
                    const U16 c = code[r * words + w] >> bits * p & low;
                    for (int a = 0; a < T; a++) {
                        int32_t x;
                        memcpy(&x, q + 4 * a, 4);
                        part[a][r] = dot4(part[a][r], c, (I16){ 0 } + x, 2);
                    }
                }
        }
        for (int r = 0; r < R; r++) {
            const int64_t at = ((tile + r) * groups + g) * LANES;
            const F16 s = scales(l, at);
            F16 shift = all(least);
            if (l->zeros.at) shift -= __builtin_convertvector(*(const UB16 *)((const uint8_t *)l->zeros.at + at), F16);
            for (int a = 0; a < T; a++)
                sum[a][r] = fma16(fma16(__builtin_convertvector(part[a][r], F16), all(step),
                                        shift * e->group_sums[(t + a) * e->wide + g]), s, sum[a][r]);
        }
    }
    for (int a = 0; a < T; a++) for (int r = 0; r < R; r++) put(j, t + a, tile + r, sum[a][r] * e->q_scale[t + a]);
}

INLINE F16 weights(U16 word, int column, F16 table, int bits)   // a column of sixteen rows; 8 bits: minus the table
{
    if (bits == 32) return (F16)word;
    if (bits == 16 && column) return (F16)(word & 0xffff0000u);
    if (bits == 16) return (F16)(word << 16);
    if (bits == 8) return __builtin_convertvector((I16)(word >> 8 * column & 255), F16) - table;
    return look(table, word >> bits * column);                  // below 4 bits the table of levels repeats
}

INLINE void codes_tiles(const Job *j, int64_t t, int64_t tile, int T, int R, int bits)
{
    const Linear *l = j->l;
    const int64_t words = words_of(l), groups = l->in / l->group, columns = 32 / bits, in_group = l->group / columns;
    const U16 *code = (const U16 *)l->code.at + tile * words;
    const float *a = j->e->a + t * j->e->wide;
    const F16 table = bits == 8 ? all(l->zero) : load(l->levels);
    F16 sum[8][4], part[8][4];
    for (int b = 0; b < T; b++) for (int r = 0; r < R; r++) sum[b][r] = all(0);
    for (int64_t g = 0; g < groups; g++) {
        for (int b = 0; b < T; b++) for (int r = 0; r < R; r++) part[b][r] = all(0);
        for (int64_t w = g * in_group; w < (g + 1) * in_group; w++) {
            ask_next(code, words, w, T, R);
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++)
                for (int r = 0; r < R; r++) {
                    const F16 v = weights(code[r * words + w], c, table, bits);
                    for (int b = 0; b < T; b++)
                        part[b][r] = fma16(v, all(a[b * j->e->wide + w * columns + c]), part[b][r]);
                }
        }
        for (int r = 0; r < R; r++) {
            const int64_t at = ((tile + r) * groups + g) * LANES;
            const F16 s = scales(l, at);
            for (int b = 0; b < T; b++) {
                if (l->zeros.at)
                    part[b][r] -= __builtin_convertvector(*(const UB16 *)((const uint8_t *)l->zeros.at + at), F16)
                                * j->e->group_sums[(t + b) * j->e->wide + g];
                sum[b][r] = fma16(part[b][r], s, sum[b][r]);
            }
        }
    }
    for (int b = 0; b < T; b++) for (int r = 0; r < R; r++) put(j, t + b, tile + r, sum[b][r]);
}

// The next tokens while T are left: tiles in steps of R, then of 1.
#define STEPS(T, R, tiles, ...)                                      \
    for (; n - t >= T; t += T) {                                     \
        int64_t i = from;                                            \
        for (; R > 1 && to - i >= R; i += R) tiles(j, t, i, T, R, ##__VA_ARGS__); \
        for (; i < to; i++) tiles(j, t, i, T, 1, ##__VA_ARGS__);     \
    }
#ifdef __AVX512F__
#define CODES_OF(bits)                                               \
    case bits:                                                       \
        STEPS(8, 1, codes_tiles, bits)                               \
        STEPS(2, 1, codes_tiles, bits)                               \
        STEPS(1, 4, codes_tiles, bits)                               \
        break;
#else
#define CODES_OF(bits) case bits: STEPS(1, 1, codes_tiles, bits) break;
#endif

#define ROUNDED_OF(tiles, bits)                                      \
        STEPS(BIG, ROWS, tiles, bits)                                \
        if (MID > 1) STEPS(MID, ROWS, tiles, bits)                   \
        STEPS(1, (ROWS == 1 ? 1 : bits == 1 ? 2 : 4), tiles, bits)

static void product(const Job *j, int n, int64_t from, int64_t to, uint8_t *unpacked)
{
    int64_t t = 0;
    (void)unpacked;
#ifdef __AMX_INT8__
    if (j->e->amx && n >= MID && j->l->rounded && (j->l->kind == TERN || j->l->kind == BIN)) {
        if (j->l->bits == 1) amx_product(j, n, from, to, unpacked, 1);
        else amx_product(j, n, from, to, unpacked, 2);
        return;
    }
#endif
    const int rounded = j->l->rounded ? 100 : 0;
    switch (j->l->kind == CODES ? j->l->bits + rounded : -j->l->kind - rounded) {
    case -TERN - 100: ROUNDED_OF(bits_tiles, 2) break;
    case -BIN - 100: ROUNDED_OF(bits_tiles, 1) break;
    case 101: ROUNDED_OF(even_tiles, 1) break;
    case 102: ROUNDED_OF(even_tiles, 2) break;
    case 104: ROUNDED_OF(even_tiles, 4) break;
#ifdef __AVX512F__                              // 32 registers of 64 bytes: several tokens and tiles at once
    case -BIN:
        STEPS(4, 4, bin_tiles)
        STEPS(1, 4, bin_tiles)
        break;
    case -INT8 - 100:
        STEPS(8, 2, int8_tiles)
        STEPS(1, 4, int8_tiles)
        break;
#else
    case -BIN: STEPS(1, 1, bin_tiles) break;
    case -INT8 - 100: STEPS(2, 1, int8_tiles) STEPS(1, 1, int8_tiles) break;
#endif
    CODES_OF(1) CODES_OF(2) CODES_OF(4) CODES_OF(8) CODES_OF(16) CODES_OF(32)
    }
}

// out (+)= alpha (z - mean) / (std + eps) over the rows of a chunk, population std; z is overwritten
static void normalize(const Linear *l, float *z, float *out, int add)
{
    const int64_t n = l->out / l->chunks, whole = n / LANES * LANES;
    for (int64_t c = 0; c < l->chunks; c++, z += n, out += n) {
        const float first = z[0];                               // equal outputs then have a variance of exactly 0
        F16 lanes = all(0);
        for (int64_t i = 0; i < n; i++) z[i] -= first;
        for (int64_t i = 0; i < whole; i += LANES) lanes += load(z + i);
        float sum = sum_of(lanes);
        for (int64_t i = whole; i < n; i++) sum += z[i];
        const float mean = sum / n;
        lanes = all(0), sum = 0;
        for (int64_t i = 0; i < n; i++) z[i] -= mean;
        for (int64_t i = 0; i < whole; i += LANES) lanes += load(z + i) * load(z + i);
        for (int64_t i = whole; i < n; i++) sum += z[i] * z[i];
        const float rstd = 1 / sqrtf((sum_of(lanes) + sum) / n + 1e-30f), alpha = ((const float *)l->alpha.at)[c];
        const float by = (fabsf(alpha) < 1e-6f ? 1e-6f : alpha) * (rstd / (1 + l->out_eps * rstd));
        if (add) for (int64_t i = 0; i < n; i++) out[i] += z[i] * by;
        else for (int64_t i = 0; i < n; i++) out[i] = z[i] * by;
    }
}

// One layer for n tokens; x has rows of x_stride, out of out_stride. `id` of `of` threads.
static void linear(Engine *e, const Linear *l, int n, const float *x, int64_t x_stride, float *out, int64_t out_stride,
                   int add, int id, int of)
{
    for (int t = id; t < n; t += of) prepare(e, l, x + t * x_stride, n, t);
    wait_all(e, of);
    stage(id, INPUTS);
    const int64_t tiles = padded(l->out, LANES) / LANES;
    const int binary = l->kind == BIN, head = l == e->layers + 4 * e->s.n_layer;
    (void)head;
    const Job job = { e, l, binary ? e->z : out, binary ? e->wide : out_stride, add && !binary };
    product(&job, n, tiles * id / of, tiles * (id + 1) / of, e->unpacked + id * e->wide * 32);
    wait_all(e, of);
    stage(id, head ? HEAD : PRODUCTS);
    if (!binary) return;
    for (int t = id; t < n; t += of) normalize(l, e->z + t * e->wide, out + t * out_stride, add);
    wait_all(e, of);
    stage(id, NORMALIZATION);
}

// A row of a matrix in fp32, for an embedding.
static void look_up(const Linear *l, int64_t row, float *out)
{
    const int64_t words = words_of(l), columns = 32 / l->bits, tile = row / LANES, lane = row % LANES;
    const uint32_t *code = (const uint32_t *)l->code.at + tile * words * LANES + lane;
    const float *by = l->input_scale.at;
    for (int64_t i = 0; i < l->in; i++) {
        const uint32_t c = code[i / columns * LANES] >> i % columns * l->bits;
        if (l->kind == INT8) {
            out[i] = (int8_t)c * ((const float *)l->scale.at)[row];
            continue;
        }
        const int64_t g = i / l->group, at = (tile * (l->in / l->group) + g) * LANES;
        const uint32_t shifted = c << 16;
        float w = l->levels[c & 15], zero = l->zeros.at ? ((const uint8_t *)l->zeros.at)[at + lane] : l->zero;
        if (l->bits == 32) memcpy(&w, &c, 4);
        if (l->bits == 16) memcpy(&w, &shifted, 4);
        if (l->bits == 8) w = c & 255;
        out[i] = (w - zero) * scales(l, at)[lane] * (by ? by[i] : 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// attention over preallocated keys and values of each sequence, block and head
//
// Keys lie in tiles of 16 positions, like the rows of a matrix: [position / 16][dimension][position % 16]. So lanes are
// positions in q k^T, and dimensions in the sum over the values [position][dimension].

// Q queries at once: several tokens of a prompt, or heads with the same keys. No bit depends on Q.
INLINE void scores_of(const float **q, const float *keys, int dim, float scale, float *scores, int64_t room, int Q, int R)
{
    F16 sum[4][4];
    for (int i = 0; i < Q; i++) for (int r = 0; r < R; r++) sum[i][r] = all(0);
    for (int d = 0; d < dim; d++)
        for (int r = 0; r < R; r++) {
            const F16 k = load(keys + (r * dim + d) * LANES);
            for (int i = 0; i < Q; i++) sum[i][r] = fma16(k, all(q[i][d]), sum[i][r]);
        }
    for (int i = 0; i < Q; i++) for (int r = 0; r < R; r++) store(scores + i * room + r * LANES, sum[i][r] * scale);
}

INLINE void sum_values(const float *scores, int64_t room, const float *values, int64_t count, int64_t stride,
                       const float *divisor, float **y, int left, int Q, int R)
{
    F16 sum[4][4];
    for (int i = 0; i < Q; i++) for (int r = 0; r < R; r++) sum[i][r] = all(0);
    for (int64_t c = 0; c < count; c++)
        for (int r = 0; r < R; r++) {
            const F16 v = load(values + c * stride + r * LANES);
            for (int i = 0; i < Q; i++) sum[i][r] = fma16(v, all(scores[i * room + c]), sum[i][r]);
        }
    for (int i = 0; i < Q; i++) {
        for (int r = 0; r < R; r++) sum[i][r] = sum[i][r] / divisor[i];
        memcpy(y[i], sum[i], MIN(R * LANES, left) * sizeof **y);
    }
}

// q, y: Q queries and outputs (head_dim); count: how many positions each of them sees.
INLINE void attend(const Shape *s, const float **q, const float *keys, const float *values, const int64_t *count, float *scores,
                   float **y, int Q)
{
    const int dim = s->head_dim;
    int64_t most = 0, b = 0;
    for (int i = 0; i < Q; i++) most = count[i] > most ? count[i] : most;
    const int64_t blocks = padded(most, LANES) / LANES, stride = padded(dim, LANES), room = padded(s->context, PAD);
    const float scale = 1 / sqrtf(dim);
    for (; b + 4 <= blocks; b += 4) scores_of(q, keys + b * dim * LANES, dim, scale, scores + b * LANES, room, Q, 4);
    for (; b < blocks; b++) scores_of(q, keys + b * dim * LANES, dim, scale, scores + b * LANES, room, Q, 1);
    float divisor[4];
    for (int i = 0; i < Q; i++) {
        float *row = scores + i * room;
        for (int64_t c = count[i]; c < blocks * LANES; c++) row[c] = -INFINITY;
        F16 top = all(-INFINITY), sum = all(0);
        for (int64_t c = 0; c < most; c += LANES) top = bigger(load(row + c), top);
        const float largest = top_of(top);
        for (int64_t c = 0; c < most; c += LANES) {
            const F16 p = exp16(load(row + c) - largest);
            sum += p;
            store(row + c, p);
        }
        divisor[i] = sum_of(sum);
    }
    for (int64_t d = 0; d < dim; d += 4 * LANES) {
        float *to[4];
        for (int i = 0; i < Q; i++) to[i] = y[i] + d;
        if (stride - d >= 4 * LANES) sum_values(scores, room, values + d, most, stride, divisor, to, dim - d, Q, 4);
        else for (int64_t at = d; at < dim; at += LANES) {
            for (int i = 0; i < Q; i++) to[i] = y[i] + at;
            sum_values(scores, room, values + at, most, stride, divisor, to, dim - at, Q, 1);
        }
    }
}

static float *cache_of(const Engine *e, float *cache, int64_t size, int layer, int sequence, int head)
{
    return cache + (((int64_t)layer * e->s.sequences + sequence) * e->s.n_kv_head + head) * size;
}

// Rotary positions for q and k in the half-and-half layout, then keys and values of a token go to the cache.
static void remember(Engine *e, int layer, float *qkv, int sequence, int64_t at)
{
    const Shape *s = &e->s;
    const int dim = s->head_dim, half = dim / 2, heads = s->n_head + s->n_kv_head;
    if (s->cos.at) {
        const float *cosines = (const float *)s->cos.at + at * dim, *sines = (const float *)s->sin.at + at * dim;
        for (int h = 0; h < heads; h++)
            for (int d = 0; d < half; d++) {
                const float a = qkv[h * dim + d], b = qkv[h * dim + half + d];
                qkv[h * dim + d] = a * cosines[d] + -b * sines[d];
                qkv[h * dim + half + d] = b * cosines[half + d] + a * sines[half + d];
            }
    }
    for (int h = 0; h < s->n_kv_head; h++) {
        const float *k = qkv + (s->n_head + h) * dim, *v = k + s->n_kv_head * dim;
        float *keys = cache_of(e, e->keys, e->k_size, layer, sequence, h) + at / LANES * dim * LANES + at % LANES;
        float *values = cache_of(e, e->values, e->v_size, layer, sequence, h) + at * padded(dim, LANES);
        for (int d = 0; d < dim; d++) keys[d * LANES] = k[d];
        memset(values, 0, padded(dim, LANES) * sizeof *values);
        memcpy(values, v, dim * sizeof *values);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the model

typedef struct { const int32_t *id, *sequence, *at; const uint8_t *wanted; int n; } Tokens;

// Four queries at a time: the heads of a group, of up to four tokens that follow each other in a sequence.
static void attention(Engine *e, const Tokens *t, int layer, int id, int of)
{
    const Shape *s = &e->s;
    const int groups = s->n_head / s->n_kv_head, dim = s->head_dim;
    float *scores = e->scores + 4 * id * padded(s->context, PAD);
    for (int h = id; h < s->n_kv_head; h += of)
        for (int from = 0, to; from < t->n; from = to) {
            for (to = from + 1; to < t->n && to < from + 4 && t->sequence[to] == t->sequence[from] && t->at[to] == t->at[to - 1] + 1;)
                to++;
            const float *keys = cache_of(e, e->keys, e->k_size, layer, t->sequence[from], h), *q[4];
            const float *values = cache_of(e, e->values, e->v_size, layer, t->sequence[from], h);
            float *y[4];
            int64_t count[4];
            int Q = 0;
            for (int i = 0; i < (to - from) * groups; i++) {
                const int token = from + i / groups, head = h * groups + i % groups;
                q[Q] = e->qkv + token * e->wide + head * dim, y[Q] = e->y + token * e->wide + head * dim;
                count[Q++] = t->at[token] + 1;
                if (Q == 4) attend(s, q, keys, values, count, scores, y, 4), Q = 0;
            }
            for (int i = 0; i < Q; i++) attend(s, q + i, keys, values, count + i, scores, y + i, 1);
        }
}

static void forward(Engine *e, const Tokens *t, int id, int of)
{
    const Shape *s = &e->s;
    const Linear *head = e->layers + 4 * s->n_layer, *embedding = s->tied ? head : head + 1;
    const int64_t wide = e->wide, width = s->n_embd;
    stage(id, -1);
    for (int i = id; i < t->n; i += of) {
        float *x = e->x + i * wide;
        look_up(embedding, t->id[i], x);
        const float *learned = s->positions.at ? (const float *)s->positions.at + t->at[i] * width : NULL;
        for (int64_t d = 0; learned && d < width; d++) x[d] += learned[d];
    }
    wait_all(e, of);
    stage(id, EMBEDDING);
    for (int layer = 0; layer < s->n_layer; layer++) {
        const Linear *l = e->layers + 4 * layer;
        linear(e, l, t->n, e->x, wide, e->qkv, wide, 0, id, of);
        for (int i = id; i < t->n; i += of) remember(e, layer, e->qkv + i * wide, t->sequence[i], t->at[i]);
        wait_all(e, of);
        attention(e, t, layer, id, of);
        wait_all(e, of);
        stage(id, ATTENTION);
        linear(e, l + 1, t->n, e->y, wide, e->x, wide, 1, id, of);
        linear(e, l + 2, t->n, e->x, wide, e->hidden, wide, 0, id, of);
        linear(e, l + 3, t->n, e->hidden, wide, e->x, wide, 1, id, of);
    }
    int wanted = 0;                                              // the head only for these tokens
    for (int i = 0; i < t->n; i++)
        if (t->wanted[i]) {
            if (wanted % of == id) memcpy(e->y + wanted * wide, e->x + i * wide, width * sizeof *e->x);
            wanted++;
        }
    wait_all(e, of);
    if (wanted) linear(e, head, wanted, e->y, wide, e->logits, padded(s->vocab, PAD), 0, id, of);
}

// The k-th largest of n numbers (quickselect); their order changes.
static float kth(float *v, int64_t n, int64_t k)
{
    for (int64_t from = 0, to = n - 1;;) {
        const float middle = v[from + (to - from) / 2];
        int64_t i = from, j = to;
        while (i <= j) {
            while (v[i] > middle) i++;
            while (v[j] < middle) j--;
            if (i <= j) {
                const float other = v[i];
                v[i++] = v[j], v[j--] = other;
            }
        }
        if (k - 1 <= j) to = j;
        else if (k - 1 >= i) from = i;
        else return v[k - 1];
    }
}

// Draw from softmax(logits / temperature) over the top_k most likely ids, ties with the last included; 0: the most likely id.
static int32_t draw(Engine *e, const float *logits, int64_t n, float temperature, int64_t top_k, uint64_t seed)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) if (logits[i] > logits[best]) best = i;
    if (temperature <= 0) return best;
    float least = -INFINITY;
    if (top_k > 0 && top_k < n) {
        memcpy(e->sorted, logits, n * sizeof *logits);
        least = kth(e->sorted, n, top_k);
    }
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += e->sorted[i] = logits[i] >= least ? expf((logits[i] - logits[best]) / temperature) : 0;
    seed += 0x9e3779b97f4a7c15u;                                 // else seed 0 would draw 0
    seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9u, seed = (seed ^ seed >> 27) * 0x94d049bb133111ebu;    // splitmix64
    double left = ((seed ^ seed >> 31) >> 11) * 0x1p-53 * sum;
    for (int64_t i = 0; i < n; i++) if (e->sorted[i] > 0 && (left -= e->sorted[i]) < 0) return i;
    return best;                                                 // rounding left nothing to draw, or a logit is not finite
}

// ---------------------------------------------------------------------------------------------------------------------
// what engine.py calls. Each function checks what it gets and returns NULL or a message.

static const char *check(const Linear *l, int in, int out)
{
    const int64_t rows = padded(l->out, LANES);
    const int codes = l->kind == CODES, int8 = l->kind == INT8, binary = l->kind == BIN;
    if (l->in < 1 || l->in >= 1 << 17 || l->out < 1 || l->out > 1 << 24 || l->in != in || out && l->out != out) return "shape";
    if (l->kind < CODES || l->kind > INT8 || l->act < NO_ACT || l->act > SILU_GLU || l->norm < NO_NORM || l->norm > RMS_NORM)
        return "kind";
    if (l->bits != 1 && l->bits != 2 && l->bits != 4 && l->bits != 8 && l->bits != 16 && l->bits != 32) return "bits";
    if (binary && l->bits != 1 || l->kind == TERN && l->bits != 2 || int8 && l->bits != 8) return "bits of the kind";
    if (codes && (l->group < 1 || l->in % l->group || l->group % (32 / l->bits) && l->bits < 32)) return "group";
    if (l->rounded < 0 || l->rounded > 1 || !l->rounded && (int8 || l->kind == TERN) || codes && l->rounded && l->bits > 4)
        return "rounded";
    if (l->chunks < 1 || l->out % l->chunks && binary) return "chunks";
    const int64_t groups = codes ? l->in / l->group : 1, width = codes ? l->scale_bytes : 4;
    const int has_scales = !binary && width != 0;
    if (codes && width != 0 && width != 1 && width != 2 && width != 4) return "bytes of a scale";
    const struct { const Array *a; int64_t bytes; int needed; } arrays[] = {
        { &l->code, rows * words_of(l) * 4, 1 }, { &l->scale, rows * groups * width, has_scales },
        { &l->zeros, rows * groups, 0 }, { &l->grid, 256 * 4, codes && width == 1 },
        { &l->gain, l->in * 4, l->norm != NO_NORM },
        { &l->shift, l->in * 4, 0 }, { &l->input_scale, l->in * 4, 0 }, { &l->bias, rows * 4, 0 },
        { &l->alpha, l->chunks * 4, binary }, { &l->sums, rows * 4, int8 } };
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        if (arrays[i].a->at ? arrays[i].a->bytes != arrays[i].bytes : arrays[i].needed) return "size of an array";
    return NULL;
}

static int gated(const Linear *l) { return l->act == RELU2_GLU || l->act == SILU_GLU; }

static void *room(int64_t count, int64_t size, int *failed)
{
    void *p = NULL;
    if (count < 0 || count > (int64_t)1 << 40 || posix_memalign(&p, 64, padded(count * size, 64) + 256)) *failed = 1;
    return p;
}

void engine_free(Engine *e)
{
    if (!e) return;
    void *all[] = { e->layers, e->x, e->qkv, e->y, e->hidden, e->z, e->a, e->tables, e->group_sums, e->scores, e->logits,
                    e->keys, e->values, e->sorted, e->q, e->q_scale, e->q_sum, e->unpacked };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(e);
}

// layers: qkv, out, up, down of each block, the head and, if it is not tied to it, the embedding.
const char *engine_new(const Shape *s, const Linear *layers, int n, Engine **made)
{
    *made = NULL;
    if (s->n_layer < 1 || s->n_layer > 4096 || s->n_head < 1 || s->n_kv_head < 1 || s->n_head % s->n_kv_head || s->head_dim < 1
        || s->n_head > 1 << 14 || s->n_embd >= 1 << 17 || s->n_embd != (int64_t)s->n_head * s->head_dim || s->context < 1
        || s->context > 1 << 24 || s->vocab < 1
        || s->sequences < 1 || s->sequences > 1 << 16 || s->batch < 1 || s->batch > 1 << 12 || s->threads < 1
        || s->threads > 1024 || n != 4 * s->n_layer + 2 - !!s->tied)
        return "the shape of the model is wrong";
    if (s->positions.at && s->positions.bytes != (int64_t)s->context * s->n_embd * 4 || !s->cos.at != !s->sin.at
        || s->cos.at && (s->head_dim % 2 || s->cos.bytes != (int64_t)s->context * s->head_dim * 4
                         || s->sin.bytes != s->cos.bytes))
        return "the size of the positions is wrong";
    int64_t wide = 0;
    for (int i = 0; i < n; i++) {
        const Linear *l = layers + i;
        const int block = i < 4 * s->n_layer, part = i % 4;
        const int in = !block || part < 3 ? s->n_embd : gated(l) ? layers[i - 1].out / 2 : layers[i - 1].out;
        const int heads = s->n_head + 2 * s->n_kv_head;
        const int out = !block ? s->vocab : part == 0 ? heads * s->head_dim : part == 2 ? 0 : s->n_embd;
        const char *why = check(l, in, out);
        if (why) return why;
        if (gated(l) && (!block || part != 3 || layers[i - 1].out % 2) || !block && l->kind != CODES && l->kind != INT8)
            return "kind of the layer at this place";
        const int64_t row = padded(block && l->out > l->in ? l->out : l->in, PAD);
        wide = row > wide ? row : wide;
    }
    int failed = 0;
    Engine *e = calloc(1, sizeof *e);
    if (!e) return "there is not enough memory";
    e->s = *s;
    e->wide = wide + PAD;
    int64_t heads = (int64_t)s->n_layer * s->sequences * s->n_kv_head, cache;
    if (__builtin_mul_overflow(heads, padded(s->context, LANES) * padded(s->head_dim, LANES), &cache) || cache > (int64_t)1 << 40)
        failed = 1, heads = 0;
    const int64_t rows = s->batch * e->wide;
    e->k_size = padded(s->context, LANES) * s->head_dim;
    e->v_size = s->context * padded(s->head_dim, LANES);
    e->layers = room(n, sizeof *layers, &failed);
    float **floats[] = { &e->x, &e->qkv, &e->y, &e->hidden, &e->z, &e->a, &e->group_sums };
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) *floats[i] = room(rows, 4, &failed);
    e->tables = room(rows * 4, 4, &failed);
    e->scores = room(4 * s->threads * padded(s->context, PAD), 4, &failed);
    e->logits = room(s->batch * padded(s->vocab, PAD), 4, &failed);
    e->keys = room(heads * e->k_size, 4, &failed);
    e->values = room(heads * e->v_size, 4, &failed);
    e->sorted = room(s->vocab, 4, &failed);
    e->q = room(rows + 32 * e->wide, 1, &failed);                // AMX reads whole panels of 32 tokens
    e->unpacked = room(s->threads * e->wide * 32, 1, &failed);
#ifdef __AMX_INT8__
    e->amx = !syscall(SYS_arch_prctl, 0x1023, 18);               // ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA
#endif
    e->q_scale = room(s->batch, 4, &failed);
    e->q_sum = room(s->batch, 4, &failed);
    if (failed) {
        engine_free(e);
        return "there is not enough memory";
    }
    memset(e->q, 0, rows + 32 * e->wide);
    memcpy(e->layers, layers, n * sizeof *layers);
    *made = e;
    return NULL;
}

// n tokens, at most `batch`. sequence, at: where each token stands; earlier positions hold earlier tokens. `wanted` tokens get
// logits: row i of `logits` (wanted, vocab) or, with `next`, an id drawn from the first `known` ones with the seed seeds[i].
const char *engine_run(Engine *e, int n, const int32_t *id, const int32_t *sequence, const int32_t *at, const uint8_t *wanted,
                       float *logits, int32_t *next, int known, float temperature, int top_k, const uint64_t *seeds)
{
    const Shape *s = &e->s;
    if (n < 1 || n > s->batch) return "the number of tokens is not 1 to the batch";
    if (next && (known < 1 || known > s->vocab || temperature != temperature || temperature > 0 && !seeds))
        return "sampling needs a vocabulary, a temperature and seeds";
    for (int i = 0; i < n; i++) {
        if (id[i] < 0 || id[i] >= s->vocab) return "an id is not in the vocabulary";
        if (at[i] < 0 || at[i] >= s->context) return "a position is not in the context";
        if (sequence[i] < 0 || sequence[i] >= s->sequences) return "a sequence has no cache";
    }
    const Tokens t = { id, sequence, at, wanted, n };
#ifdef _OPENMP
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    forward(e, &t, omp_get_thread_num(), omp_get_num_threads());
#else
    forward(e, &t, 0, 1);
#endif
    const int64_t stride = padded(s->vocab, PAD);
    for (int i = 0, row = 0; i < n; i++)
        if (wanted[i]) {
            const float *from = e->logits + row * stride;
            if (logits) memcpy(logits + (int64_t)row * s->vocab, from, s->vocab * sizeof *from);
            if (next) next[row] = draw(e, from, known, temperature, top_k, seeds ? seeds[row] : 0);
            row++;
        }
    return NULL;
}

// Ask for huge pages before the memory is written, so that 1,000 times fewer page entries are looked up.
void engine_advise(void *at, int64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const intptr_t from = padded((intptr_t)at, 4096), to = ((intptr_t)at + bytes) / 4096 * 4096;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
    (void)at, (void)bytes;
}

int64_t engine_sizes(int which) { return which ? sizeof(Shape) : sizeof(Linear); }
