/* From the planes of a decoded picture to a crop in RGB: cut, scaled and converted in one pass.
 *
 * Scaling is bilinear with antialiasing. Along each direction, output i of n lies at the place (i + 1/2) s - 1/2 among
 * the samples of the input, with s = input / output, and is the mean of the samples j with the weights
 * max(0, 1 - |j - place| / max(s, 1)). The planes of chroma are scaled from their own size.
 *
 * A block of ROWS output rows of a plane is scaled down its columns first. Then it is laid out so that the ROWS numbers
 * of a column lie together: a vector holds one column while the rows are scaled across, and no number is gathered.
 *
 * Numbers between the passes are samples times 2^8 in 16 bits without a sign, weights are numbers times 2^16. A product
 * is rounded down, and each sum begins with half a unit per product to make up for this. Colours are computed in units
 * of 2^-5, modulo 2^16, because the largest ones lie outside of 0 to 255.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 16, SIDE = 8, COLOUR_BITS = 5, PLANES = 3 };

/* One direction of one plane: output i is made of `taps` samples, from begin[i] on. weights: count x taps. */
struct axis {
    const int32_t *begin;
    const uint16_t *weights;
    long taps, count;
};

/* red = (y Y + red_v V) / 2^16 + red, and so on: coefficients times 2^13, as Y is times 2^8 and the result times 2^5;
 * offsets times 2^5, with what rounds to the nearest. Those of green_u and green_v are taken away. */
struct colours {
    uint16_t y, red_v, green_u, green_v, blue_u, red, green, blue;
};

struct plan {
    struct axis across[PLANES], down[PLANES];
    struct colours colours;
    long planes; /* 1: grey; 3: Y, U, V */
};

typedef uint16_t words __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(16)));

static inline uint16_t product(uint16_t number, uint16_t weight)
{
    return (uint16_t)(((uint32_t)number * weight) >> 16);
}

static inline long below(double x)
{
    long whole = (long)x;
    return whole > x ? whole - 1 : whole;
}

/* Fill the tables of an axis: output i lies at place + i * step; samples are numbered from `first` to before `end`. */
void weigh(double place, double step, long first, long end, long count, long taps, int32_t *begin, uint16_t *weights)
{
    const double support = step > 1 ? step : 1;
    for (long i = 0; i < count; i++, weights += taps) {
        const double at = place + (double)i * step;
        long from = below(at - support) + 1;
        if (from > end - taps) from = end - taps;
        if (from < first) from = first;
        begin[i] = (int32_t)from;
        double sum = 0;
        for (int pass = 0; pass < 2; pass++) {
            long rest = 65536, largest = 0;
            for (long k = 0; k < taps; k++) {
                double distance = (double)(from + k) - at;
                double weight = 1 - (distance < 0 ? -distance : distance) / support;
                if (weight < 0) weight = 0;
                if (pass == 0) {
                    sum += weight;
                    continue;
                }
                long rounded = (long)(weight / sum * 65536 + 0.5);
                weights[k] = (uint16_t)(rounded < 65535 ? rounded : 65535);
                rest -= weights[k];
                if (weights[k] > weights[largest]) largest = k;
            }
            if (pass == 1 && weights[largest] + rest <= 65535) weights[largest] = (uint16_t)(weights[largest] + rest);
        }
    }
}

/* The loops over taps are unrolled for the usual numbers of them. */
#define FOR_TAPS(taps, work)              \
    switch (taps) {                       \
    case 1: work(1); break;               \
    case 2: work(2); break;               \
    case 3: work(3); break;               \
    case 4: work(4); break;               \
    case 5: work(5); break;               \
    case 6: work(6); break;               \
    default: work((int)(taps));           \
    }

static inline __attribute__((always_inline)) void
down(const uint8_t *samples, long stride, const uint16_t *weights, int taps, long count, uint16_t *restrict out)
{
    for (long x = 0; x < count; x++) {
        uint16_t sum = (uint16_t)(taps / 2);
        for (int k = 0; k < taps; k++) sum += product((uint16_t)(samples[k * stride + x] << 8), weights[k]);
        out[x] = sum;
    }
}

static inline __attribute__((always_inline)) void
across(const struct axis *axis, const uint16_t *restrict columns, int taps, uint16_t *restrict out)
{
    const uint16_t *weights = axis->weights;
    for (long x = 0; x < axis->count; x++, out += ROWS, weights += taps) {
        const uint16_t *from = columns + (axis->begin[x] - axis->begin[0]) * ROWS;
        for (int r = 0; r < ROWS; r++) {
            uint16_t sum = (uint16_t)(taps / 2);
            for (int k = 0; k < taps; k++) sum += product(from[k * ROWS + r], weights[k]);
            out[r] = sum;
        }
    }
}

#ifdef __clang__
#define CHOSEN(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CHOSEN(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif
#define LOW_WORDS 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_WORDS 4, 12, 5, 13, 6, 14, 7, 15
#define LOW_BYTES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_BYTES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

/* Three times, the upper and the lower half are interleaved: this exchanges rows and columns. */
#define EXCHANGE(type, v, low, high)                                     \
    for (int pass = 0; pass < 3; pass++) {                               \
        type next[SIDE];                                                 \
        for (int i = 0; i < SIDE / 2; i++) {                             \
            next[2 * i] = CHOSEN(type, v[i], v[i + SIDE / 2], low);      \
            next[2 * i + 1] = CHOSEN(type, v[i], v[i + SIDE / 2], high); \
        }                                                                \
        memcpy(v, next, sizeof next);                                    \
    }

static inline void exchange_words(words v[SIDE]) /* 8 x 8 */
{
    EXCHANGE(words, v, LOW_WORDS, HIGH_WORDS)
}

static inline void exchange_bytes(bytes v[SIDE]) /* 8 x 16: comes out as 16 x 8 */
{
    EXCHANGE(bytes, v, LOW_BYTES, HIGH_BYTES)
}

/* Output rows [top, top + ROWS) of one plane, scaled down the columns that the rows need: a column's ROWS numbers
 * together. Rows after the last one are the last one. lines: SIDE x wide numbers of scratch memory. */
static void columns_of(
    const struct plan *plan, long p, const uint8_t *samples, long stride, long top, long wide, uint16_t *lines,
    uint16_t *columns)
{
    const struct axis *axis = &plan->down[p];
    const long first = plan->across[p].begin[0];
    const long count = plan->across[p].begin[plan->across[p].count - 1] + plan->across[p].taps - first;
    for (long half = 0; half < ROWS; half += SIDE) {
        for (long r = 0; r < SIDE; r++) {
            long i = top + half + r < axis->count ? top + half + r : axis->count - 1;
            const uint8_t *from = samples + axis->begin[i] * stride + first;
            const uint16_t *weights = axis->weights + i * axis->taps;
#define DOWN(taps) down(from, stride, weights, taps, count, lines + r * wide)
            FOR_TAPS(axis->taps, DOWN)
#undef DOWN
        }
        for (long x = 0; x < count; x += SIDE) {
            words v[SIDE];
            for (int r = 0; r < SIDE; r++) memcpy(&v[r], lines + r * wide + x, sizeof v[r]);
            exchange_words(v);
            for (int i = 0; i < SIDE; i++) memcpy(columns + (x + i) * ROWS + half, &v[i], sizeof v[i]);
        }
    }
}

static inline uint8_t in_range(uint16_t sum)
{
    int16_t value = (int16_t)sum;
    value >>= COLOUR_BITS;
    value = value < 0 ? 0 : value;
    value = value > 255 ? 255 : value;
    return (uint8_t)value;
}

static void convert(
    const struct colours *colours, long count, const uint16_t *restrict Y, const uint16_t *restrict U,
    const uint16_t *restrict V, uint8_t *restrict red, uint8_t *restrict green, uint8_t *restrict blue)
{
    const struct colours c = *colours;
    for (long i = 0; i < count; i++) {
        uint16_t y = product(Y[i], c.y);
        red[i] = in_range((uint16_t)(y + product(V[i], c.red_v) + c.red));
        green[i] = in_range((uint16_t)(y - product(U[i], c.green_u) - product(V[i], c.green_v) + c.green));
        blue[i] = in_range((uint16_t)(y + product(U[i], c.blue_u) + c.blue));
    }
}

/* Write `rows` rows of a colour, of which the ROWS bytes of a column lie together. */
static void write_rows(const uint8_t *columns, long width, long rows, uint8_t *out, long row_stride)
{
    for (long x = 0; x < width; x += SIDE) {
        bytes v[SIDE];
        uint8_t lines[ROWS][SIDE];
        memcpy(v, columns + x * ROWS, sizeof v);
        exchange_bytes(v);
        memcpy(lines, v, sizeof lines);
        if (width - x >= SIDE && rows == ROWS)
            for (long r = 0; r < ROWS; r++) memcpy(out + r * row_stride + x, lines[r], SIDE);
        else
            for (long r = 0; r < rows; r++)
                memcpy(out + r * row_stride + x, lines[r], (size_t)(width - x < SIDE ? width - x : SIDE));
    }
}

static inline long rounded_up(long count)
{
    return (count + SIDE - 1) / SIDE * SIDE;
}

/* samples, strides: of each plane, the address of its first sample and the bytes from row to row. out: the address of
 * the first red byte; green and blue lie plane_stride and 2 plane_stride bytes behind it. Returns 0, or 1 where there is
 * no memory. */
int scale(
    const struct plan *plan, const uint8_t *const samples[PLANES], const long strides[PLANES], uint8_t *out,
    long plane_stride, long row_stride)
{
    const long width = plan->across[0].count, height = plan->down[0].count, padded = rounded_up(width);
    long wide = 0;
    for (long p = 0; p < plan->planes; p++) {
        const struct axis *axis = &plan->across[p];
        long needed = rounded_up(axis->begin[axis->count - 1] + axis->taps - axis->begin[0]);
        if (needed > wide) wide = needed;
    }
    /* Cleared, because what pads the rows is read too. */
    uint16_t *memory = calloc((size_t)((SIDE + ROWS) * wide + PLANES * ROWS * padded), sizeof *memory);
    uint8_t *colours = calloc((size_t)(PLANES * ROWS * padded), 1);
    if (!memory || !colours) {
        free(memory);
        free(colours);
        return 1;
    }
    uint16_t *lines = memory, *columns = lines + SIDE * wide, *scaled = columns + ROWS * wide;
    const long size = ROWS * padded, second = plan->planes > 1 ? 1 : 0, third = plan->planes > 1 ? 2 : 0;
    for (long top = 0; top < height; top += ROWS) {
        for (long p = 0; p < plan->planes; p++) {
            columns_of(plan, p, samples[p], strides[p], top, wide, lines, columns);
#define ACROSS(taps) across(&plan->across[p], columns, taps, scaled + p * size)
            FOR_TAPS(plan->across[p].taps, ACROSS)
#undef ACROSS
        }
        convert(
            &plan->colours, ROWS * width, scaled, scaled + second * size, scaled + third * size, colours, colours + size,
            colours + 2 * size);
        const long rows = height - top < ROWS ? height - top : ROWS;
        for (long k = 0; k < PLANES; k++)
            write_rows(colours + k * size, width, rows, out + k * plane_stride + top * row_stride, row_stride);
    }
    free(memory);
    free(colours);
    return 0;
}
