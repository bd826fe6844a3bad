/* Calls `scale` with random plans on memory of exactly the right size: a sanitizer stops the program at a byte beside it.
 *
 *     gcc -fsanitize=address,undefined -DSOURCE='"scale.c"' -o memory scale_memory.c && ./memory CASES SEED
 */

#include <stdio.h>

#include SOURCE

static unsigned long state;

static long drawn(long least, long most)
{
    state = state * 6364136223846793005ul + 1442695040888963407ul;
    return least + (long)((state >> 33) % (unsigned long)(most - least + 1));
}

static void *exactly(long bytes)
{
    uint8_t *memory = malloc((size_t)(bytes > 0 ? bytes : 1));
    for (long i = 0; memory && i < bytes; i++) memory[i] = (uint8_t)drawn(0, 255);
    return memory;
}

/* As scaler.py makes an axis; checks that each output is made of samples that are there, with weights that sum up. */
static struct axis axis_of(long begin, long length, long count, int shift)
{
    const long parts = 1L << shift, first = begin >> shift, end = (begin + length + parts - 1) >> shift;
    const double step = (double)length / (double)count / (double)parts;
    const double place = ((double)begin + (double)length / (double)count / 2) / (double)parts - 0.5;
    double support = step > 1 ? step : 1;
    long taps = (long)(2 * support);
    if ((double)taps < 2 * support) taps++;
    if (taps > end - first) taps = end - first;
    int32_t *begins = exactly(count * 4);
    uint16_t *weights = exactly(count * taps * 2);
    weigh(place, step, first, end, count, taps, begins, weights);
    for (long i = 0; i < count; i++) {
        long sum = 0;
        for (long k = 0; k < taps; k++) sum += weights[i * taps + k];
        if (begins[i] < first || begins[i] + taps > end || sum < 65535 || sum > 65536) {
            fprintf(stderr, "output %ld: samples from %d on, %ld of them, weights %ld\n", i, begins[i], taps, sum);
            exit(1);
        }
    }
    return (struct axis){begins, weights, taps, count};
}

int main(int argc, char **argv)
{
    const long cases = argc > 1 ? atol(argv[1]) : 100;
    state = argc > 2 ? strtoul(argv[2], NULL, 10) : 1;
    for (long n = 0; n < cases; n++) {
        const int grey = drawn(0, 5) == 0, across = !grey && drawn(0, 1), down = across && drawn(0, 1);
        const long height = drawn(1, 90), width = drawn(1, 120), top = drawn(0, height - 1), left = drawn(0, width - 1);
        const long cut_height = drawn(1, height - top), cut_width = drawn(1, width - left);
        const long out_height = drawn(1, 50), out_width = drawn(1, 50);
        struct plan plan = {.planes = grey ? 1 : PLANES};
        uint8_t *samples[PLANES] = {0};
        long strides[PLANES] = {0};
        for (long p = 0; p < plan.planes; p++) {
            const int x = p ? across : 0, y = p ? down : 0;
            const long rows = (height + (1 << y) - 1) >> y, columns = (width + (1 << x) - 1) >> x;
            strides[p] = columns;
            samples[p] = exactly(rows * columns);
            plan.across[p] = axis_of(left, cut_width, out_width, x);
            plan.down[p] = axis_of(top, cut_height, out_height, y);
        }
        uint8_t *out = exactly(3 * out_height * out_width);
        if (scale(&plan, (const uint8_t *const *)samples, strides, out, out_height * out_width, out_width)) return 1;
        for (long p = 0; p < plan.planes; p++) {
            free(samples[p]);
            free((void *)plan.across[p].begin), free((void *)plan.across[p].weights);
            free((void *)plan.down[p].begin), free((void *)plan.down[p].weights);
        }
        free(out);
    }
    puts("done");
    return 0;
}
