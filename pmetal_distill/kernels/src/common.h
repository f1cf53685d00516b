// Helpers of all bodies, the same for every back end. Scores enter as float; sums are float32.
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define LOWEST -1.0e30f  // stands for minus infinity: finite, so fast mathematics may not assume it away
#define BOTTOM -3.4028234e38f
#define BOTTOM_KEY 0x00800000u  // ordered_key(BOTTOM)

// u to the power P, P a small whole number.
template <int P>
FN float whole_power(float u) {
    float result = 1.0f, square = u;
#pragma unroll
    for (int e = P; e > 0; e >>= 1) {
        if (e & 1) result *= square;
        square *= square;
    }
    return result;
}

// T where it is 1, 2 or 4, else 0: exp(d) is then a power of exp(d / T) and needs no exponential of its own.
FN int whole_temperature(float inverse) {
    return inverse == 1.0f ? 1 : inverse == 0.5f ? 2 : inverse == 0.25f ? 4 : 0;
}
// Runs STEP<1>, <2>, <4> or <0> by the number `power`, the same for all threads of a row.
#define BY_POWER(power, STEP, ...) \
    if (power == 2) STEP<2>(__VA_ARGS__); \
    else if (power == 1) STEP<1>(__VA_ARGS__); \
    else if (power == 4) STEP<4>(__VA_ARGS__); \
    else STEP<0>(__VA_ARGS__)

// exp(d) next to u = exp(d / POWER).
template <int POWER>
FN float exp_hard(float d, float u) {
    return POWER > 0 ? whole_power<POWER>(u) : exp2_fast(d * LOG2E);
}

// Sums of exp(x - top) and exp((x - top) / T). `top` follows the largest score only when that leads by `slack`: terms
// stay far from overflow and the sums are rescaled a few times a row instead of at each step.
struct Sums {
    float largest, top, hard, soft;
};

FN Sums no_sums() {
    Sums s;
    s.largest = LOWEST;
    s.top = LOWEST;
    s.hard = 0.0f;
    s.soft = 0.0f;
    return s;
}

FN float slack_for(float inverse) { return 16.0f / larger(1.0f, inverse); }

FN float raise_top(THREAD Sums& s, float top, float rate) {
    float d = s.top - top;
    float scale = exp2_fast(d * rate);
    s.hard *= exp2_fast(d * LOG2E);
    s.soft *= scale;
    s.top = top;
    return scale;
}

template <int N>
FN float largest_of(const THREAD float* x) {
    float m = x[0];
#pragma unroll
    for (int j = 1; j < N; j++) m = larger(m, x[j]);
    return m;
}

template <int N>
FN float smallest_of(const THREAD float* x) {
    float m = x[0];
#pragma unroll
    for (int j = 1; j < N; j++) m = smaller(m, x[j]);
    return m;
}

template <int W, int HINT, typename T>
FN void read_scores(const DEVICE T* from, THREAD float* x) {
    Vector<T, W> v;
    read_vector<HINT>(from, v);
    open_vector(v, x);
}

// The largest and the smallest score of vectors. A prelude may have a better one for a type.
template <typename T>
struct Extremes {
    float high, low, limit;
};
template <typename T>
FN void start_extremes(THREAD Extremes<T>& e, float limit) {
    e.high = BOTTOM;
    e.low = -BOTTOM;
    e.limit = limit;
}
// Whether no score x of the vector v reaches the limit; only then `high` follows it.
template <typename T, int W>
FN bool all_below(THREAD Extremes<T>& e, const THREAD Vector<T, W>&, const THREAD float* x) {
    e.low = smaller(e.low, smallest_of<W>(x));
    const float most = largest_of<W>(x);
    if (most >= e.limit) return false;
    e.high = larger(e.high, most);
    return true;
}
template <typename T>
FN float highest(const THREAD Extremes<T>& e) { return e.high; }
template <typename T>
FN float lowest_of(const THREAD Extremes<T>& e) { return e.low; }

template <int POWER, int N>
FN void add_terms(THREAD Sums& s, const THREAD float (&x)[N], float rate) {
    float hard = 0.0f, soft = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) {
        float d = x[j] - s.top;
        float u = exp2_fast(d * rate);
        soft += u;
        hard += exp_hard<POWER>(d, u);
    }
    s.soft += soft;
    s.hard += hard;
}

template <int N>
FN void add_scores(THREAD Sums& s, const THREAD float (&x)[N], float rate, float slack, int power) {
    float m = largest_of<N>(x);
    s.largest = larger(s.largest, m);
    if (m > s.top + slack) raise_top(s, m, rate);
    BY_POWER(power, add_terms, s, x, rate);
}

// g = soft exp(d / T) + hard exp(d), d = x - top.
template <int POWER, int N>
FN void tail_slopes(THREAD float (&g)[N], const THREAD float* x, float top, float rate, float soft, float hard) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        float d = x[j] - top;
        float u = exp2_fast(d * rate);
        g[j] = soft * u + hard * exp_hard<POWER>(d, u);
    }
}

// Sums over a student's row (x) and a teacher's row (y). Both are shifted by a number of their own before anything else,
// so that a common offset costs no digits; `student.largest` and `largest` alone are of the rows as they are.
struct PairSums {
    Sums student;
    float largest, top, soft;  // of the teacher, at the temperature
    float mean;                // sum of exp((y - top) / T) y
    float forward;             // sum of exp((y - top) / T) (y - x)
    float reverse;             // sum of exp((x - student.top) / T) (x - y)
};

FN PairSums no_pair_sums() {
    PairSums s;
    s.student = no_sums();
    s.largest = LOWEST;
    s.top = LOWEST;
    s.soft = 0.0f;
    s.mean = 0.0f;
    s.forward = 0.0f;
    s.reverse = 0.0f;
    return s;
}

// A teacher's score that a ceiling cuts, or none does.
template <bool CAPPED>
FN float capped(float y, float ceiling) { return CAPPED ? smaller(y, ceiling) : y; }

// A shift for a row: its first score, unless that is a mask.
FN float shift_for(float first) { return metal::fabs(first) < 1.0e6f ? first : 0.0f; }

FN void raise_pair(THREAD PairSums& s, float student_top, float teacher_top, float rate) {
    s.reverse *= raise_top(s.student, student_top, rate);
    float scale = exp2_fast((s.top - teacher_top) * rate);
    s.soft *= scale;
    s.mean *= scale;
    s.forward *= scale;
    s.top = teacher_top;
}

template <int POWER, bool REVERSE, int N>
FN void add_pair_terms(THREAD PairSums& s, const THREAD float (&x)[N], const THREAD float (&y)[N], float x_shift,
                       float y_shift, float rate) {
    float hard = 0.0f, soft = 0.0f, other = 0.0f, mean = 0.0f, forward = 0.0f, reverse = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) {
        float a = x[j] - x_shift, b = y[j] - y_shift;
        float d = a - s.student.top;
        float u = exp2_fast(d * rate), w = exp2_fast((b - s.top) * rate);
        float gap = b - a;
        soft += u;
        hard += exp_hard<POWER>(d, u);
        other += w;
        mean += w * b;
        forward += w * gap;
        if (REVERSE) reverse -= u * gap;
    }
    s.student.hard += hard;
    s.student.soft += soft;
    s.soft += other;
    s.mean += mean;
    s.forward += forward;
    s.reverse += reverse;
}

template <bool REVERSE, int N>
FN void add_pair(THREAD PairSums& s, const THREAD float (&x)[N], const THREAD float (&y)[N], float x_shift,
                 float y_shift, float rate, float slack, int power) {
    float mx = largest_of<N>(x), my = largest_of<N>(y);
    s.student.largest = larger(s.student.largest, mx);
    s.largest = larger(s.largest, my);
    mx -= x_shift;
    my -= y_shift;
    if (mx > s.student.top + slack || my > s.top + slack)
        raise_pair(s, larger(mx, s.student.top), larger(my, s.top), rate);
    if (power == 2) add_pair_terms<2, REVERSE>(s, x, y, x_shift, y_shift, rate);
    else if (power == 1) add_pair_terms<1, REVERSE>(s, x, y, x_shift, y_shift, rate);
    else add_pair_terms<0, REVERSE>(s, x, y, x_shift, y_shift, rate);
}

// One token of a divergence between p and q, given their base-2 logarithms: its value and its derivative in ln q.
struct Term {
    float value, slope;
};

// wp p ln(p / m) + wq q ln(q / m), m = share p + (1 - share) q. Written around the larger of p and q, so that nothing
// overflows and p = q gives exactly 0.
FN Term mixture_term(float lp, float lq, float wp, float wq, float share) {
    float high = larger(lp, lq);
    float ep = exp2_fast(lp - high), eq = exp2_fast(lq - high);
    float m = share * ep + (1.0f - share) * eq;
    float lm = log2_fast(m), scale = exp2_fast(high);
    float p = scale * ep, q = scale * eq, ratio = eq / m;
    float to_p = (lp - high - lm) * LN2, to_q = (lq - high - lm) * LN2;
    Term term;
    term.value = wp * p * to_p + wq * q * to_q;
    term.slope = wq * q * (to_q + 1.0f - (1.0f - share) * ratio) - wp * (1.0f - share) * p * ratio;
    return term;
}

// |p - q| / 2.
FN Term variation_term(float lp, float lq) {
    float p = exp2_fast(lp), q = exp2_fast(lq);
    Term term;
    term.value = 0.5f * metal::fabs(p - q);
    term.slope = q > p ? 0.5f * q : (q < p ? -0.5f * q : 0.0f);
    return term;
}

// Unsigned numbers that sort as the floats do; minus zero and zero are one.
FN uint ordered_key(float x) {
    uint b = float_bits(x);
    if (b == 0x80000000u) b = 0u;
    return (b & 0x80000000u) != 0u ? ~b : b | 0x80000000u;
}
FN float key_value(uint key) {
    return bits_float((key & 0x80000000u) != 0u ? key & 0x7fffffffu : ~key);
}

// The node b of index n: a fraction power / GRID known to the compiler, or a number of `rates` where GRID is 0.
template <int GRID, int P0, int P1, int P2, int P3, int P4, int P5, int P6, int P7>
FN float node_of(int n, const DEVICE float* rates) {
    if (GRID == 0) return rates[n];
    int power = n == 0 ? P0 : n == 1 ? P1 : n == 2 ? P2 : n == 3 ? P3 : n == 4 ? P4 : n == 5 ? P5 : n == 6 ? P6 : P7;
    return float(power) / float(GRID > 0 ? GRID : 1);
}

// Where exponentials are taken from. On a grid exp((x - base) / GRID) = exp2(x scale - shift + slip), one multiply-add;
// `slip` is what rounding took from `shift`, the same for all terms, and is put back at the end. Scores about a base
// beyond 1e9 (masks) are shifted first.
struct Origin {
    float base, shift, slip;
    bool apart;
};
template <int GRID>
FN Origin origin_at(float base) {
    const float scale = LOG2E / float(GRID > 0 ? GRID : 1);
    Origin o;
    o.base = base;
    o.apart = GRID == 0 || metal::fabs(base) > 1.0e9f;
    o.shift = o.apart ? 0.0f : base * scale;
    o.slip = o.apart ? 0.0f : metal::fma(-base, scale, o.shift);
    return o;
}
// The factor that takes a sum at node b from this origin to `reference`.
template <int GRID>
FN float moved(const THREAD Origin& o, float b, float reference) {
    return exp2_fast(((o.base - reference) * LOG2E + o.slip * float(GRID)) * b);
}

// sums[n] += exp(b_n (x - base)) for every x, which is used up. With nodes on a grid one exponential gives all of them.
template <int N, int NODES, int GRID, int P0, int P1, int P2, int P3, int P4, int P5, int P6, int P7>
FN void add_nodes(THREAD float* sums, THREAD float* x, const THREAD Origin& o, const DEVICE float* rates) {
    if (o.apart) {
#pragma unroll
        for (int j = 0; j < N; j++) x[j] -= o.base;
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        if (GRID == 0) {
#pragma unroll
            for (int n = 0; n < NODES; n++) sums[n] += exp2_fast(x[j] * LOG2E * rates[n]);
        } else {
            float u = exp2_fast(metal::fma(x[j], LOG2E / float(GRID > 0 ? GRID : 1), -o.shift));
            if (NODES > 0) sums[0] += whole_power<P0>(u);
            if (NODES > 1) sums[1] += whole_power<P1>(u);
            if (NODES > 2) sums[2] += whole_power<P2>(u);
            if (NODES > 3) sums[3] += whole_power<P3>(u);
            if (NODES > 4) sums[4] += whole_power<P4>(u);
            if (NODES > 5) sums[5] += whole_power<P5>(u);
            if (NODES > 6) sums[6] += whole_power<P6>(u);
            if (NODES > 7) sums[7] += whole_power<P7>(u);
        }
    }
}
