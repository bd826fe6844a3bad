/* The work of a bidirectional Mamba mixer between its matrix products, for rows of at most 32 steps, in float32.

   Every tensor is contiguous, (rows, steps, width), except that x, z and the outputs of x_proj may be parts of wider
   tokens: `ld` is the distance of two tokens. Each row is worked on by one thread, a stretch of LANES channels at a time:
   decays, states and adjoints live in registers and are never written to memory. Sums over rows are kept per thread, and
   the caller adds them up in the order of the threads, so that results do not depend on timing.

   The maths (docs/scan.md), with the step size d_t = softplus(raw_t):

       s_t = exp(d_t A) s_{t-1} + d_t u_t B_t        y_t = C_t s_t + D u_t
   */

#include <stdlib.h>
#include <string.h>

#define LANES 16
#define STEPS 32 /* at most */
#define LOG2_E 1.44269504088896340736f
#define LN_2 0.69314718055994530942f

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int ints __attribute__((vector_size(LANES * sizeof(int))));
#define INLINE static inline __attribute__((always_inline))

/* ---- vectors ---- */

INLINE vec same(float x) { return x - (vec){}; }

/* The first n numbers at p, zeros behind them. With n == LANES the copy has a constant size: one instruction. */
INLINE vec load(const float *p, const long n) {
    vec x = {};
    if (n == LANES) memcpy(&x, p, sizeof x);
    else for (long i = 0; i < n; i++) x[i] = p[i];
    return x;
}

INLINE void store(float *p, vec x, const long n) {
    if (n == LANES) memcpy(p, &x, sizeof x);
    else for (long i = 0; i < n; i++) p[i] = x[i];
}

INLINE void add_to(float *p, vec x, const long n) { store(p, load(p, n) + x, n); }

INLINE vec choose(ints which, vec yes, vec no) { return (vec)((which & (ints)yes) | (~which & (ints)no)); }

INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* 2^x, to 1 unit in the last place; 0 below 2^-126, infinite from 2^127.5 on. NaN stays NaN. */
INLINE vec exp2v(vec x) {
    const vec magic = same(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold */
    x = choose(x > 128.0f, same(128.0f), x);
    vec rounded = x + magic;
    ints exponent = (ints)rounded - (ints)magic;
    vec f = x - (rounded - magic);
    vec p = same(0.000153458109707571f);
    p = p * f + 0.00133999309036880f;
    p = p * f + 0.00961848907172679f;
    p = p * f + 0.0555032864212989f;
    p = p * f + 0.240226462483406f;
    p = p * f + 0.693147182464599f;
    p = p * f + 1.0f;
    return choose(x < -126.0f, same(0.0f), p * (vec)((exponent + 127) << 23));
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp2v(x * -LOG2_E)); }

INLINE vec silu_slope(vec x) {
    vec s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

/* log(1 + exp(x)) = max(x, 0) + 2 artanh(e / (2 + e)) with e = exp(-|x|); the series' argument is at most 1/3. */
INLINE vec softplus(vec x) {
    vec e = exp2v(choose(x > 0.0f, -x, x) * LOG2_E);
    vec w = e / (2.0f + e), q = w * w;
    vec p = same(1.0f / 15);
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return choose(x < 0.0f, same(0.0f), x) + 2.0f * w * p;
}

/* ---- how the work is divided ---- */

/* The parameters of one direction of time. A_log2 is A times log2(e); taps[s] is what x_{t-s} is multiplied by. */
typedef struct {
    const float *taps, *conv_bias, *A_log2, *D; /* (width, channels), (channels), (states, channels), (channels) */
    long width, states, reverse;
} Direction;

typedef struct {
    long rows, steps, channels, threads;
} Shape;

/* Do `BODY` for the rows [begin, end) of every part; a part is what one thread works on. */
#define IN_PARTS(shape, BODY)                                                                \
    _Pragma("omp parallel for num_threads(shape.threads) schedule(static, 1)")               \
    for (long part = 0; part < shape.threads; part++) {                                      \
        const long begin = shape.rows * part / shape.threads;                                \
        const long end = shape.rows * (part + 1) / shape.threads;                            \
        BODY                                                                                 \
    }

/* Do CALL(c, n) for every stretch of n channels from c on. n is a constant in all stretches but the last. */
#define IN_STRETCHES(channels, CALL)                                                         \
    {                                                                                        \
        long c = 0;                                                                          \
        for (; c + LANES <= (channels); c += LANES) CALL(c, LANES);                          \
        if (c < (channels)) CALL(c, (channels) - c);                                         \
    }

/* The place among the steps of a row of the step that comes t-th in walking order. */
INLINE long at(long t, long steps, long reverse) { return reverse ? steps - 1 - t : t; }

/* ---- the convolution ---- */

/* conv[t], before the SiLU, of all steps in walking order. */
INLINE void convolved(vec *conv, const float *x, long ld, const Direction *p, const long steps, long channels, long c,
                      const long n) {
    const vec bias = load(p->conv_bias + c, n);
    for (long t = 0; t < steps; t++) {
        conv[t] = bias;
        for (long s = 0; s < p->width && s <= t; s++)
            conv[t] += load(p->taps + s * channels + c, n) * load(x + at(t - s, steps, p->reverse) * ld + c, n);
    }
}

/* u = silu(convolution of x). */
void convolve(const Shape shape, const Direction p, const float *x, long ld, float *u) {
    const long steps = shape.steps, channels = shape.channels;
#define CALL(c, n)                                                                                        \
    {                                                                                                     \
        vec conv[STEPS];                                                                                  \
        convolved(conv, x + row * steps * ld, ld, &p, steps, channels, c, n);                             \
        for (long t = 0; t < steps; t++)                                                                  \
            store(u + (row * steps + at(t, steps, p.reverse)) * channels + c, conv[t] * sigmoid(conv[t]), n); \
    }
    IN_PARTS(shape, for (long row = begin; row < end; row++) IN_STRETCHES(channels, CALL))
#undef CALL
}

/* From du the gradient of x, added to dx where `add` is set, and this direction's sums for the parameters:
   d_taps (threads, width, channels) and d_bias (threads, channels). */
void convolve_backward(const Shape shape, const Direction p, const float *x, long ld, const float *du, float *dx,
                       long ld_dx, long add, float *d_taps, float *d_bias) {
    const long steps = shape.steps, channels = shape.channels;
#define CALL(c, n)                                                                                        \
    {                                                                                                     \
        vec conv[STEPS], back[STEPS], bias = {};                                                          \
        convolved(conv, x + row * steps * ld, ld, &p, steps, channels, c, n);                             \
        for (long t = 0; t < steps; t++) {                                                                \
            conv[t] = load(du + (row * steps + at(t, steps, p.reverse)) * channels + c, n) * silu_slope(conv[t]); \
            bias += conv[t];                                                                              \
            back[t] = (vec){};                                                                            \
        }                                                                                                 \
        add_to(d_bias + part * channels + c, bias, n);                                                    \
        for (long s = 0; s < p.width && s < steps; s++) {                                                 \
            const vec tap = load(p.taps + s * channels + c, n);                                           \
            vec of_tap = {};                                                                              \
            for (long t = s; t < steps; t++) {                                                            \
                of_tap += conv[t] * load(x + (row * steps + at(t - s, steps, p.reverse)) * ld + c, n);    \
                back[t - s] += tap * conv[t];                                                             \
            }                                                                                             \
            add_to(d_taps + (part * p.width + s) * channels + c, of_tap, n);                              \
        }                                                                                                 \
        for (long t = 0; t < steps; t++) {                                                                \
            float *to = dx + (row * steps + at(t, steps, p.reverse)) * ld_dx + c;                         \
            store(to, add ? load(to, n) + back[t] : back[t], n);                                          \
        }                                                                                                 \
    }
    IN_PARTS(shape, for (long row = begin; row < end; row++) IN_STRETCHES(channels, CALL))
#undef CALL
}

/* ---- the scan ---- */

/* y of one row and one stretch, added to what is there where `add` is set. bc holds B and behind it C. */
INLINE void scan_stretch(const Direction *p, const float *u, const float *raw, const float *bc, long ld, float *y,
                         long add, const long steps, const long states, long channels, long c, const long n) {
    vec step[STEPS], step_u[STEPS], out[STEPS];
    const vec skip = load(p->D + c, n);
    for (long t = 0; t < steps; t++) {
        const long place = at(t, steps, p->reverse) * channels + c;
        const vec input = load(u + place, n);
        step[t] = softplus(load(raw + place, n));
        step_u[t] = step[t] * input;
        out[t] = add ? load(y + place, n) + skip * input : skip * input;
    }
    for (long k = 0; k < states; k++) {
        const vec rate = load(p->A_log2 + k * channels + c, n);
        vec state = {};
        for (long t = 0; t < steps; t++) {
            const float *token = bc + at(t, steps, p->reverse) * ld;
            if (t > 0) state *= exp2v(step[t] * rate);
            state += step_u[t] * token[k];
            out[t] += state * token[states + k];
        }
    }
    for (long t = 0; t < steps; t++) store(y + at(t, steps, p->reverse) * channels + c, out[t], n);
}

void scan(const Shape shape, const Direction p, const float *u, const float *raw, const float *bc, long ld, float *y,
          long add) {
    const long channels = shape.channels;
#define ROW(steps, states, c, n)                                                                              \
    scan_stretch(&p, u + row * (steps) * channels, raw + row * (steps) * channels, bc + row * (steps) * ld, ld, \
                 y + row * (steps) * channels, add, steps, states, channels, c, n)
#define USUAL(c, n) ROW(4, 16, c, n)
#define ANY(c, n) ROW(shape.steps, p.states, c, n)
    if (shape.steps == 4 && p.states == 16) { /* the published models: loops of known lengths stay in registers */
        IN_PARTS(shape, for (long row = begin; row < end; row++) IN_STRETCHES(channels, USUAL))
    } else {
        IN_PARTS(shape, for (long row = begin; row < end; row++) IN_STRETCHES(channels, ANY))
    }
#undef ROW
#undef USUAL
#undef ANY
}

/* What `scan_backward` writes: gradients of raw, u, B and behind it C; and sums of every thread. */
typedef struct {
    float *raw, *u, *bc;    /* (tokens, channels) twice, and tokens of ld_bc numbers */
    float *A, *D, *bias;    /* (threads, states, channels), (threads, channels) twice; bias is that of the step size */
    long ld_bc;
} Gradients;

/* of_bc is the row's (steps, 2 * states) sums of products with B and C, a vector each, to be summed over its lanes. */
INLINE void backward_stretch(const Direction *p, const float *u, const float *raw, const float *bc, long ld,
                             const float *dy, float *d_raw, float *du, float *dA, float *dD, float *d_bias, vec *of_bc,
                             const long steps, const long states, long channels, long c, const long n) {
    vec step[STEPS], step_u[STEPS], input[STEPS], seen[STEPS], of_step[STEPS], of_step_u[STEPS];
    for (long t = 0; t < steps; t++) {
        const long place = at(t, steps, p->reverse) * channels + c;
        input[t] = load(u + place, n);
        step[t] = softplus(load(raw + place, n));
        step_u[t] = step[t] * input[t];
        seen[t] = load(dy + place, n);
        of_step[t] = of_step_u[t] = (vec){};
    }
    for (long k = 0; k < states; k++) {
        const vec rate = load(p->A_log2 + k * channels + c, n);
        vec decay[STEPS], state[STEPS], adjoint = {}, of_rate = {};
        for (long t = 0; t < steps; t++) {
            state[t] = step_u[t] * bc[at(t, steps, p->reverse) * ld + k];
            if (t > 0) {
                decay[t] = exp2v(step[t] * rate);
                state[t] += decay[t] * state[t - 1];
            }
        }
        for (long t = steps - 1; t >= 0; t--) {
            const float *token = bc + at(t, steps, p->reverse) * ld;
            vec *sums = of_bc + t * 2 * states + k;
            adjoint += seen[t] * token[states + k];
            sums[states] += seen[t] * state[t];
            sums[0] += adjoint * step_u[t];
            of_step_u[t] += adjoint * token[k];
            if (t > 0) {
                adjoint *= decay[t];
                const vec of_exponent = adjoint * state[t - 1];
                of_step[t] += rate * of_exponent;
                of_rate += step[t] * of_exponent;
            }
        }
        add_to(dA + k * channels + c, of_rate, n);
    }
    const vec skip = load(p->D + c, n);
    vec of_skip = {}, of_bias = {};
    for (long t = 0; t < steps; t++) {
        const long place = at(t, steps, p->reverse) * channels + c;
        const vec of_raw = (of_step[t] * LN_2 + input[t] * of_step_u[t]) * sigmoid(load(raw + place, n));
        store(d_raw + place, of_raw, n);
        store(du + place, step[t] * of_step_u[t] + skip * seen[t], n);
        of_skip += seen[t] * input[t];
        of_bias += of_raw;
    }
    add_to(dD + c, of_skip, n);
    add_to(d_bias + c, of_bias, n);
}

/* Returns 0, or 1 where there is no memory. */
int scan_backward(const Shape shape, const Direction p, const float *u, const float *raw, const float *bc, long ld,
                  const float *dy, const Gradients to) {
    const long channels = shape.channels, count = shape.steps * 2 * p.states;
    vec *sums;
    if (posix_memalign((void **)&sums, sizeof(vec), shape.threads * count * sizeof(vec))) return 1;
#define ROW(steps, states, c, n)                                                                                \
    backward_stretch(&p, u + first, raw + first, bc + row * (steps) * ld, ld, dy + first, to.raw + first, to.u + first, \
                     to.A + part * (states) * channels, to.D + part * channels, to.bias + part * channels, own, steps,  \
                     states, channels, c, n)
#define USUAL(c, n) ROW(4, 16, c, n)
#define ANY(c, n) ROW(shape.steps, p.states, c, n)
#define ROWS(KIND)                                                                                              \
    for (long row = begin; row < end; row++) {                                                                  \
        vec *own = sums + part * count;                                                                         \
        const long first = row * shape.steps * channels;                                                        \
        memset(own, 0, count * sizeof(vec));                                                                    \
        IN_STRETCHES(channels, KIND)                                                                            \
        for (long t = 0; t < shape.steps; t++) {                                                                \
            float *token = to.bc + (row * shape.steps + at(t, shape.steps, p.reverse)) * to.ld_bc;              \
            for (long k = 0; k < 2 * p.states; k++) token[k] = sum(own[t * 2 * p.states + k]);                  \
        }                                                                                                       \
    }
    if (shape.steps == 4 && p.states == 16) {
        IN_PARTS(shape, ROWS(USUAL))
    } else {
        IN_PARTS(shape, ROWS(ANY))
    }
    free(sums);
    return 0;
}

/* ---- the gate ---- */

/* out = total * silu(z). */
void gate(const Shape shape, const float *z, long ld, const float *total, float *out) {
    const long steps = shape.steps, channels = shape.channels;
#define CALL(c, n)                                                                                        \
    {                                                                                                     \
        const vec open = load(z + token * ld + c, n);                                                     \
        store(out + token * channels + c, load(total + token * channels + c, n) * open * sigmoid(open), n); \
    }
    IN_PARTS(shape, for (long token = begin * steps; token < end * steps; token++) IN_STRETCHES(channels, CALL))
#undef CALL
}

/* From d_out the gradients of total and z. */
void gate_backward(const Shape shape, const float *z, long ld, const float *total, const float *d_out, float *d_total,
                   float *dz, long ld_dz) {
    const long steps = shape.steps, channels = shape.channels;
#define CALL(c, n)                                                                                        \
    {                                                                                                     \
        const vec open = load(z + token * ld + c, n), seen = load(d_out + token * channels + c, n);       \
        store(d_total + token * channels + c, seen * open * sigmoid(open), n);                            \
        store(dz + token * ld_dz + c, seen * load(total + token * channels + c, n) * silu_slope(open), n); \
    }
    IN_PARTS(shape, for (long token = begin * steps; token < end * steps; token++) IN_STRETCHES(channels, CALL))
#undef CALL
}
