/* Products of block-quantized weights with rows of float activations, on all cores.

A weight matrix [out][in] is kept in tiles of 16 rows. Along a row, 32 numbers form a block with one
float16 scale. Inside a tile the numbers of 4 neighbouring columns lie together for all 16 rows, so that one
64-byte load meets 4 activations that are the same for all rows: sums stay in their lanes and are never added
across a register.

  values, 8 bits: [tiles][blocks][8 quads][16 rows][4 columns], stored as number + 128
  values, 4 bits: [tiles][blocks][4 quads][16 rows][4 columns], stored as number + 8; the low half of a byte is
                  of quad q, the high half of quad q + 4
  scales:         [tiles][blocks][16 rows]

Rows and columns are filled up with zeros to whole tiles and blocks. Activations are rounded to 8 bits per block
of 32 as well. Inside a block everything is whole numbers; blocks are added in order with fused
multiply-adds. So every processor, every number of threads and every number of rows gives the same bits. */

#include "lanes.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define TILE LANES
#define BLOCK 32
#define QUADS (BLOCK / 4)
#define MOST 4 /* rows at a time; with 8 the compiler keeps sums in memory and is a quarter slower */
#define PANEL 64 /* activation rows that are kept in the second-level cache while the weights pass by */

/* ---------------------------------------------------------------- sixteen lanes on each processor

sums: 16 int32. floats: 16 float. DOT adds to `sums` the products of 64 bytes of biased weights with 4
activations. START is what the sums begin with, so that the bias of the weights cancels. */

#ifdef WITH_AVX512
typedef __m512i bytes;
typedef __m512i sums;
static inline bytes load(const uint8_t *from) { return _mm512_loadu_si512(from); }
static inline bytes low_half(bytes both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
static inline bytes high_half(bytes both) { return low_half(_mm512_srli_epi16(both, 4)); }
static inline sums start(int bias, int total) { return _mm512_set1_epi32(-bias * total); }
static inline sums dot(sums into, bytes weights, const int8_t *quad, int bias)
{
    int32_t four;
    memcpy(&four, quad, 4);
    (void)bias;
    return _mm512_dpbusd_epi32(into, weights, _mm512_set1_epi32(four));
}
static inline floats whole(sums from) { return _mm512_cvtepi32_ps(from); }

#elif defined(WITH_AVX2)
typedef struct { __m256i part[2]; } bytes;
typedef struct { __m256i part[2]; } sums;
static inline bytes load(const uint8_t *from)
{
#define PART(p) _mm256_loadu_si256((const __m256i *)(from + 32 * p))
    return (bytes)BOTH(PART);
#undef PART
}
static inline bytes low_half(bytes both)
{
#define PART(p) _mm256_and_si256(both.part[p], _mm256_set1_epi8(15))
    return (bytes)BOTH(PART);
#undef PART
}
static inline bytes high_half(bytes both)
{
#define PART(p) _mm256_and_si256(_mm256_srli_epi16(both.part[p], 4), _mm256_set1_epi8(15))
    return (bytes)BOTH(PART);
#undef PART
}
/* Biased 8-bit weights would overflow the 16 bits of a pair of products, so they lose their bias in `dot`. */
static inline sums start(int bias, int total)
{
    __m256i all = _mm256_set1_epi32(bias == 128 ? 0 : -bias * total);
    return (sums){{all, all}};
}
static inline __m256i dot_part(__m256i into, __m256i weights, __m256i four, int bias)
{
    __m256i pairs;
    if (bias == 128) {
        weights = _mm256_xor_si256(weights, _mm256_set1_epi8((char)128));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(four, weights));
    } else
        pairs = _mm256_maddubs_epi16(weights, four);
    return _mm256_add_epi32(into, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline sums dot(sums into, bytes weights, const int8_t *quad, int bias)
{
    int32_t four;
    memcpy(&four, quad, 4);
    __m256i same = _mm256_set1_epi32(four);
#define PART(p) dot_part(into.part[p], weights.part[p], same, bias)
    return (sums)BOTH(PART);
#undef PART
}
static inline floats whole(sums from)
{
#define PART(p) _mm256_cvtepi32_ps(from.part[p])
    return (floats)BOTH(PART);
#undef PART
}

#else
typedef struct { int8x16_t part[4]; } bytes;
typedef struct { int32x4_t part[4]; } sums;
static inline bytes load(const uint8_t *from)
{
    bytes to;
    EACH to.part[p] = vreinterpretq_s8_u8(vld1q_u8(from + 16 * p));
    return to;
}
static inline bytes low_half(bytes both)
{
    EACH both.part[p] = vandq_s8(both.part[p], vdupq_n_s8(15));
    return both;
}
static inline bytes high_half(bytes both)
{
    EACH both.part[p] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(both.part[p]), 4));
    return both;
}
/* Products are of signed numbers here, so 8-bit weights lose their bias in `dot`. */
static inline sums start(int bias, int total)
{
    sums to;
    EACH to.part[p] = vdupq_n_s32(bias == 128 ? 0 : -bias * total);
    return to;
}
static inline sums dot(sums into, bytes weights, const int8_t *quad, int bias)
{
    int32_t four;
    memcpy(&four, quad, 4);
    int8x16_t same = vreinterpretq_s8_s32(vdupq_n_s32(four));
    int8x16_t flip = vdupq_n_s8(bias == 128 ? (int8_t)128 : 0);
    EACH into.part[p] = vdotq_s32(into.part[p], veorq_s8(weights.part[p], flip), same);
    return into;
}
static inline floats whole(sums from)
{
    floats to;
    EACH to.part[p] = vcvtq_f32_s32(from.part[p]);
    return to;
}
#endif

/* A block's sum with its scales, added to those before. */
static inline floats add_block(floats into, sums block, floats scales, float scale)
{
    return fused(times(scales, same(scale)), whole(block), into);
}

/* ---------------------------------------------------------------- activations */

/* Round rows [rows][columns] to 8 bits; `totals` are the sums of the rounded numbers of each block. */
static void round_row(const float *row, int columns, int8_t *rounded, float *scales, int32_t *totals)
{
    for (int block = 0; block * BLOCK < columns; block++) {
        float numbers[BLOCK] = {0};
        int left = columns - block * BLOCK;
        memcpy(numbers, row + block * BLOCK, sizeof(float) * (left < BLOCK ? left : BLOCK));
        /* Positive floats are in the order of their bits, and whole numbers have a fast maximum. */
        int32_t bits[BLOCK], most = 0, total = 0;
        memcpy(bits, numbers, sizeof bits);
        for (int i = 0; i < BLOCK; i++) {
            int32_t size = bits[i] & 0x7fffffff;
            most = size > most ? size : most;
        }
        float largest;
        memcpy(&largest, &most, sizeof largest);
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        int8_t *to = rounded + block * BLOCK;
        for (int i = 0; i < BLOCK; i++) {
            int32_t whole = (int32_t)rintf(numbers[i] * inverse);
            whole = whole > 127 ? 127 : whole < -127 ? -127 : whole;
            to[i] = (int8_t)whole;
            total += whole;
        }
        scales[block] = largest / 127.0f;
        totals[block] = total;
    }
}

/* ---------------------------------------------------------------- products */

/* One tile of weights with `count` rows of activations; `results` are [rows][outputs]. */
INLINE void multiply_tile(const uint8_t *values, const uint16_t *weight_scales, const int8_t *rounded,
                          const float *scales, const int32_t *totals, float *results, int outputs, int wanted,
                          int blocks, int bits, int count)
{
    const int bias = bits == 8 ? 128 : 8;
    const int padded = blocks * BLOCK;
    floats result[MOST];
    for (int row = 0; row < count; row++)
        result[row] = zero();
    for (int block = 0; block < blocks; block++) {
        sums sum[MOST];
        for (int row = 0; row < count; row++)
            sum[row] = start(bias, totals[row * blocks + block]);
        const int8_t *from = rounded + block * BLOCK;
        if (bits == 8) {
#pragma GCC unroll 1
            for (int quad = 0; quad < QUADS; quad++) {
                expect(values + 64 * quad);
                bytes weights = load(values + 64 * quad);
                for (int row = 0; row < count; row++)
                    sum[row] = dot(sum[row], weights, from + row * padded + 4 * quad, bias);
            }
            values += 64 * QUADS;
        } else {
#pragma GCC unroll 1
            for (int quad = 0; quad < QUADS / 2; quad++) {
                expect(values + 64 * quad);
                bytes both = load(values + 64 * quad);
                bytes low = low_half(both), high = high_half(both);
                for (int row = 0; row < count; row++) {
                    const int8_t *quads = from + row * padded + 4 * quad;
                    sum[row] = dot(sum[row], low, quads, bias);
                    sum[row] = dot(sum[row], high, quads + BLOCK / 2, bias);
                }
            }
            values += 32 * QUADS;
        }
        floats tile_scales = widen(weight_scales + block * TILE);
        for (int row = 0; row < count; row++)
            result[row] = add_block(result[row], sum[row], tile_scales, scales[row * blocks + block]);
    }
    for (int row = 0; row < count; row++) {
        float last[TILE];
        if (wanted == TILE) {
            store(results + (size_t)row * outputs, result[row]);
            continue;
        }
        store(last, result[row]);
        memcpy(results + (size_t)row * outputs, last, sizeof(float) * wanted);
    }
}

INLINE void multiply(const uint8_t *values, const uint16_t *weight_scales, const float *inputs, int rows,
                     int outputs, int columns, int bits, int8_t *rounded, float *scales, int32_t *totals,
                     float *results, int threads)
{
    const int blocks = (columns + BLOCK - 1) / BLOCK, tiles = (outputs + TILE - 1) / TILE;
    const int padded = blocks * BLOCK;
    const size_t tile_bytes = (size_t)blocks * TILE * BLOCK * bits / 8;
    /* Small pieces, since the other core may be busy with someone else's work. */
    const int piece = tiles / (8 * threads) + 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < rows; row++)
            round_row(inputs + (size_t)row * columns, columns, rounded + (size_t)row * padded,
                      scales + (size_t)row * blocks, totals + (size_t)row * blocks);
        for (int panel = 0; panel < rows; panel += PANEL) {
            const int end = panel + PANEL < rows ? panel + PANEL : rows;
#pragma omp for schedule(dynamic, piece) nowait
            for (int tile = 0; tile < tiles; tile++) {
                const int wanted = outputs - tile * TILE < TILE ? outputs - tile * TILE : TILE;
#define ROWS(count)                                                                                         \
    multiply_tile(values + tile * tile_bytes, weight_scales + (size_t)tile * blocks * TILE,                 \
                  rounded + (size_t)row * padded, scales + (size_t)row * blocks,                            \
                  totals + (size_t)row * blocks, results + (size_t)row * outputs + tile * TILE, outputs,    \
                  wanted, blocks, bits, count)
                int row = panel;
                for (; row + MOST <= end; row += MOST)
                    ROWS(MOST);
                for (; row + 2 <= end; row += 2)
                    ROWS(2);
                for (; row < end; row++)
                    ROWS(1);
            }
        }
    }
}

/* results[rows][outputs] = inputs[rows][columns] with the weights. `rounded` [rows][blocks * 32], `scales` and
`totals` [rows][blocks] are scratch memory. */
void multiply_8(const uint8_t *values, const uint16_t *scales, const float *inputs, int rows, int outputs,
                int columns, int8_t *rounded, float *row_scales, int32_t *totals, float *results, int threads)
{
    multiply(values, scales, inputs, rows, outputs, columns, 8, rounded, row_scales, totals, results, threads);
}

void multiply_4(const uint8_t *values, const uint16_t *scales, const float *inputs, int rows, int outputs,
                int columns, int8_t *rounded, float *row_scales, int32_t *totals, float *results, int threads)
{
    multiply(values, scales, inputs, rows, outputs, columns, 4, rounded, row_scales, totals, results, threads);
}

/* ---------------------------------------------------------------- packing */

static int nearest(float number, int least, int most)
{
    int whole = (int)rintf(number);
    return whole < least ? least : whole > most ? most : whole;
}

/* The scale of one block. 8 bits: the largest number becomes 127. 4 bits: the number farthest from zero becomes
-8, or somewhat beyond; of a few such scales the one with the least squared error is taken. */
static float block_scale(const float *numbers, int bits)
{
    float farthest = 0;
    for (int i = 0; i < BLOCK; i++)
        farthest = fabsf(numbers[i]) > fabsf(farthest) ? numbers[i] : farthest;
    if (bits == 8)
        return (float)(_Float16)(fabsf(farthest) / 127.0f);
    float best = 0, least_error = INFINITY;
    for (int step = 0; step < 5; step++) {
        float scale = (float)(_Float16)(farthest / (-8.0f + 0.35f * step)), error = 0;
        float inverse = scale != 0 ? 1.0f / scale : 0.0f;
        for (int i = 0; i < BLOCK; i++) {
            float rest = numbers[i] - scale * nearest(numbers[i] * inverse, -8, 7);
            error += rest * rest;
        }
        if (error < least_error) {
            least_error = error;
            best = scale;
        }
    }
    return best;
}

static void pack_row(const float *row, int lane, int columns, int bits, uint8_t *values, _Float16 *scales)
{
    for (int block = 0; block * BLOCK < columns; block++) {
        float numbers[BLOCK] = {0};
        int left = columns - block * BLOCK;
        memcpy(numbers, row + block * BLOCK, sizeof(float) * (left < BLOCK ? left : BLOCK));
        float scale = block_scale(numbers, bits), inverse = scale != 0 ? 1.0f / scale : 0.0f;
        scales[block * TILE + lane] = (_Float16)scale;
        for (int i = 0; i < BLOCK; i++) {
            if (bits == 8) {
                values[64 * (i / 4) + 4 * lane + i % 4] = nearest(numbers[i] * inverse, -127, 127) + 128;
                continue;
            }
            uint8_t *both = values + 64 * (i / 4 % 4) + 4 * lane + i % 4;
            int number = nearest(numbers[i] * inverse, -8, 7) + 8;
            *both = i < BLOCK / 2 ? number : *both | number << 4;
        }
        values += TILE * BLOCK * bits / 8;
    }
}

/* Round weights [outputs][columns] into `values` and `scales`, which are as long as the layout above says. */
void pack(const float *weights, int outputs, int columns, int bits, uint8_t *values, uint16_t *half_scales,
          int threads)
{
    _Float16 *scales = (_Float16 *)half_scales;
    const int blocks = (columns + BLOCK - 1) / BLOCK, tiles = (outputs + TILE - 1) / TILE;
    const size_t tile_bytes = (size_t)blocks * TILE * BLOCK * bits / 8;
    const uint8_t nothing = bits == 8 ? 128 : 0x88;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int tile = 0; tile < tiles; tile++) {
        memset(values + tile * tile_bytes, nothing, tile_bytes);
        memset(scales + (size_t)tile * blocks * TILE, 0, sizeof(_Float16) * blocks * TILE);
        for (int lane = 0; lane < TILE && tile * TILE + lane < outputs; lane++)
            pack_row(weights + (size_t)(tile * TILE + lane) * columns, lane, columns, bits,
                     values + tile * tile_bytes, scales + (size_t)tile * blocks * TILE);
    }
}

/* The weights [outputs][columns] that the products are made with, as float. */
void unpack(const uint8_t *values, const uint16_t *half_scales, int outputs, int columns, int bits,
            float *weights, int threads)
{
    const _Float16 *scales = (const _Float16 *)half_scales;
    const int blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int output = 0; output < outputs; output++) {
        const int lane = output % TILE;
        const size_t first = (size_t)(output / TILE) * blocks;
        for (int column = 0; column < columns; column++) {
            const size_t block = first + column / BLOCK;
            const int i = column % BLOCK;
            const uint8_t *at = values + block * TILE * BLOCK * bits / 8 + 4 * lane + i % 4;
            int number;
            if (bits == 8)
                number = at[64 * (i / 4)] - 128;
            else
                number = (at[64 * (i / 4 % 4)] >> (i < BLOCK / 2 ? 0 : 4) & 15) - 8;
            weights[(size_t)output * columns + column] = number * (float)scales[block * TILE + lane];
        }
    }
}
