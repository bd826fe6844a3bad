/* Calls every function of native.c with odd shapes and tensors that end where their memory ends, so that the compiler's
   sanitizers see what is read or written beside them. Arguments: the number of cases and the seed. */

#include SOURCE
#include <stdio.h>

static unsigned seed;
static void *made[32]; /* the tensors of a case */
static int count;

static long from(long low, long high) {
    seed = seed * 1664525u + 1013904223u;
    return low + (long)((seed >> 8) % (unsigned)(high - low + 1));
}

static float *tensor(long numbers) {
    float *p = malloc(numbers * sizeof(float));
    for (long i = 0; i < numbers; i++) p[i] = from(-1000, 1000) / 500.0f;
    return made[count++] = p;
}

static void one_case(void) {
    const long usual = from(0, 3) == 0; /* the case with loops of known lengths */
    const Shape shape = {from(0, 9), usual ? 4 : from(1, 32), from(1, 40), from(1, 9)};
    const long states = usual ? 16 : from(1, 40), taps = from(1, 7), rank = from(1, 4);
    const long channels = shape.channels, tokens = shape.rows * shape.steps, wide = 2 * channels;
    const long ld = rank + 2 * states, threads = shape.threads;
    const Direction p = {tensor(taps * channels), tensor(channels), tensor(states * channels), tensor(channels),
                         taps, states, from(0, 1)};
    float *xz = tensor(tokens * wide), *dxz = tensor(tokens * wide), *bc = tensor(tokens * ld) + rank;
    float *u = tensor(tokens * channels), *raw = tensor(tokens * channels), *y = tensor(tokens * channels);
    float *out = tensor(tokens * channels), *dy = tensor(tokens * channels), *du = tensor(tokens * channels);
    float *d_taps = tensor(threads * taps * channels), *d_bias = tensor(threads * channels);
    const Gradients to = {tensor(tokens * channels), du, tensor(tokens * ld) + rank, tensor(threads * states * channels),
                          tensor(threads * channels), tensor(threads * channels), ld};
    for (long later = 0; later < 2; later++) {
        convolve(shape, p, xz, wide, u);
        scan(shape, p, u, raw, bc, ld, y, later);
    }
    gate(shape, xz + channels, wide, y, out);
    gate_backward(shape, xz + channels, wide, y, out, dy, dxz + channels, wide);
    for (long later = 0; later < 2; later++) {
        if (scan_backward(shape, p, u, raw, bc, ld, dy, to)) abort();
        convolve_backward(shape, p, xz, wide, du, dxz, wide, later, d_taps, d_bias);
    }
    while (count) free(made[--count]);
}

int main(int arguments, char **words) {
    seed = (unsigned)atol(words[arguments - 1]);
    for (long i = atol(words[1]); i > 0; i--) one_case();
    puts("done");
}
