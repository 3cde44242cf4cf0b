/* Products of float16 weights with rows of float32 activations, on all cores.

A weight matrix [out][in] is kept in tiles of 32 outputs: [tiles][columns][32], filled up with zeros. One
activation meets the weights of a column in all lanes, so sums stay in their lanes. Each is made in the order of
the columns with fused multiply-adds: every processor, every number of threads and every number of rows gives the
same bits. */

#include "lanes.h"

#include <stddef.h>
#include <string.h>

#define TILE (2 * LANES)
#define PANEL 48 /* rows of activations that stay in the second-level cache while the weights pass by */

/* How many rows meet a whole tile, or one half of it, so that all sums fit in registers. */
#ifdef WITH_AVX512
#define WIDE 12
#define NARROW 12
#elif defined(WITH_AVX2)
#define WIDE 2
#define NARROW 6
#else
#define WIDE 2
#define NARROW 4
#endif

static int fewer(int one, int other) { return one < other ? one : other; }

/* How many of so many rows are computed together. */
static int together(int rows)
{
    return rows >= NARROW ? NARROW : rows >= 4 && WIDE >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

/* ---------------------------------------------------------------- activations */

/* Rows that are computed together, column by column: read row by row they would lie in the same few lines of the
first-level cache. */
static void turn(const float *rows, int count, int columns, float *turned)
{
    for (int column = 0; column < columns; column++)
        for (int row = 0; row < count; row++)
            turned[(size_t)column * count + row] = rows[(size_t)row * columns + column];
}

/* ---------------------------------------------------------------- products */

/* `count` turned rows with `halves` halves of a tile, of whose outputs `wanted` exist. */
INLINE void multiply_lanes(const uint16_t *weights, const float *turned, int columns, float *results, int outputs,
                           int wanted, int halves, int count)
{
    floats sum[NARROW][2];
    for (int row = 0; row < count; row++)
        for (int half = 0; half < halves; half++)
            sum[row][half] = zero();
#pragma GCC unroll 2
    for (int column = 0; column < columns; column++) {
        floats weight[2];
        expect(weights);
        for (int half = 0; half < halves; half++)
            weight[half] = widen(weights + half * LANES);
        for (int row = 0; row < count; row++) {
            floats input = same(turned[row]);
            for (int half = 0; half < halves; half++)
                sum[row][half] = fused(weight[half], input, sum[row][half]);
        }
        weights += TILE;
        turned += count;
    }
    for (int row = 0; row < count; row++) {
        float *to = results + (size_t)row * outputs, last[TILE];
        for (int half = 0; half < halves; half++)
            store(wanted < halves * LANES ? last + half * LANES : to + half * LANES, sum[row][half]);
        if (wanted < halves * LANES)
            memcpy(to, last, sizeof(float) * wanted);
    }
}

/* The same with a whole tile, in halves where the registers do not suffice. */
INLINE void multiply_rows(const uint16_t *weights, const float *turned, int columns, float *results, int outputs,
                          int wanted, int count)
{
    if (count <= WIDE) {
        multiply_lanes(weights, turned, columns, results, outputs, wanted, 2, count);
        return;
    }
    multiply_lanes(weights, turned, columns, results, outputs, fewer(wanted, LANES), 1, count);
    if (wanted > LANES)
        multiply_lanes(weights + LANES, turned, columns, results + LANES, outputs, wanted - LANES, 1, count);
}

static void multiply_tile(const uint16_t *weights, const float *turned, int rows, int columns, float *results,
                          int outputs, int wanted)
{
    for (int row = 0; row < rows;) {
        const int count = together(rows - row);
#define ROWS(count)                                                                                         \
    case count:                                                                                             \
        multiply_rows(weights, turned + (size_t)row * columns, columns, results + (size_t)row * outputs,    \
                      outputs, wanted, count);                                                              \
        break
        switch (count) {
            ROWS(NARROW);
#if WIDE > 4
            ROWS(4);
#endif
            ROWS(2);
            ROWS(1);
        }
        row += count;
    }
}

/* results[rows][outputs] = inputs[rows][columns] with the weights. `turned` [rows][columns] is scratch memory. */
void multiply_fp16(const uint16_t *weights, const float *inputs, int rows, int outputs, int columns, float *turned,
                   float *results, int threads)
{
    const int tiles = (outputs + TILE - 1) / TILE;
    /* Small pieces, since the other core may be busy with someone else's work. */
    const int piece = tiles / (8 * threads) + 1;
    for (int row = 0, count; row < rows; row += count) {
        count = together(rows - row);
        turn(inputs + (size_t)row * columns, count, columns, turned + (size_t)row * columns);
    }
#pragma omp parallel num_threads(threads)
    for (int first = 0; first < rows; first += PANEL) {
#pragma omp for schedule(dynamic, piece) nowait
        for (int tile = 0; tile < tiles; tile++)
            multiply_tile(weights + (size_t)tile * columns * TILE, turned + (size_t)first * columns,
                          fewer(PANEL, rows - first), columns,
                          results + (size_t)first * outputs + tile * TILE, outputs,
                          fewer(TILE, outputs - tile * TILE));
    }
}

/* Whether this was compiled to use more than one core. */
int uses_threads(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
