// A perceptron with one hidden layer and its gradients, for training: few inputs and outputs, and very many columns.
// Hidden values of a block of columns live in registers, one hidden unit after the other; the gradients compute them again.
#include "simd.h"

struct Perceptron {
  const float* x;  // [inputs, n]
  int64_t n, inputs, hidden, outputs;
  const float *weight1, *bias1, *weight2, *bias2;  // [hidden, inputs], [hidden], [outputs, hidden], [outputs]
  float* out;         // [outputs, n]
  const float* grad;  // [outputs, n]
  float* grad_x;      // [inputs, n]
  // [PARTS, hidden, inputs + 1 + outputs, VL], zeroed: gradients of weight1, bias1 and weight2 (transposed), a sum in each
  // lane.
  float* sums;
  float* scratch;  // [threads, sr_perceptron_scratch]
  int64_t threads;
};
SR_SIZE_OF(Perceptron)

extern "C" int omp_get_thread_num(void);

// Vectors of a block, and parts of the columns with sums of their own: their number does not depend on that of threads,
// so neither does the result.
static const int NV = 8;
static const int64_t WIDTH = NV * VL, PARTS = 8;

SR_API int64_t sr_perceptron_parts(void) { return PARTS; }
SR_API int64_t sr_perceptron_lanes(void) { return VL; }
SR_API int64_t sr_perceptron_scratch(int64_t inputs, int64_t outputs) { return 2 * (inputs + outputs) * WIDTH; }

struct Row {
  vec v[NV];
};
SR_INLINE void load_row(Row& row, const float* p) { SR_UNROLL for (int i = 0; i < NV; i++) row.v[i] = load(p + i * VL); }
SR_INLINE void store_row(float* p, const Row& row) { SR_UNROLL for (int i = 0; i < NV; i++) store(p + i * VL, row.v[i]); }
SR_INLINE void add_row(Row& row, const float* p, float factor) {
  SR_UNROLL for (int i = 0; i < NV; i++) row.v[i] += load(p + i * VL) * factor;
}
SR_INLINE void fill_row(Row& row, float value) { SR_UNROLL for (int i = 0; i < NV; i++) row.v[i] = splat(value); }

// Copies of the first n <= WIDTH columns, zeros beyond.
static void copy_in(float* to, const float* from, int64_t rows, int64_t stride, int64_t n) {
  for (int64_t r = 0; r < rows; r++) {
    memcpy(to + r * WIDTH, from + r * stride, n * sizeof(float));
    memset(to + r * WIDTH + n, 0, (WIDTH - n) * sizeof(float));
  }
}
static void copy_out(float* to, const float* from, int64_t rows, int64_t stride, int64_t n) {
  for (int64_t r = 0; r < rows; r++) memcpy(to + r * stride, from + r * WIDTH, n * sizeof(float));
}

SR_INLINE void hidden_row(Row& row, const Perceptron& a, const float* x, int64_t h) {
  fill_row(row, a.bias1[h]);
  for (int64_t i = 0; i < a.inputs; i++) add_row(row, x + i * WIDTH, a.weight1[h * a.inputs + i]);
  SR_UNROLL for (int v = 0; v < NV; v++) row.v[v] = relu(row.v[v]);
}

SR_INLINE void add_product(float* sum, const Row& row, const float* p) {
  vec total = load(sum);
  SR_UNROLL for (int v = 0; v < NV; v++) total += row.v[v] * load(p + v * VL);
  store(sum, total);
}

static void forward_block(const Perceptron& a, float* scratch, int64_t first, int64_t n) {
  float *x = scratch, *out = scratch + a.inputs * WIDTH;
  copy_in(x, a.x + first, a.inputs, a.n, n);
  Row row;
  for (int64_t o = 0; o < a.outputs; o++) fill_row(row, a.bias2[o]), store_row(out + o * WIDTH, row);
  for (int64_t h = 0; h < a.hidden; h++) {
    hidden_row(row, a, x, h);
    for (int64_t o = 0; o < a.outputs; o++) {
      float *p = out + o * WIDTH, factor = a.weight2[o * a.hidden + h];
      SR_UNROLL for (int v = 0; v < NV; v++) store(p + v * VL, load(p + v * VL) + row.v[v] * factor);
    }
  }
  copy_out(a.out + first, out, a.outputs, a.n, n);
}

static void backward_block(const Perceptron& a, float* scratch, float* sums, int64_t first, int64_t n) {
  float *x = scratch, *grad = x + a.inputs * WIDTH, *grad_x = grad + a.outputs * WIDTH;
  copy_in(x, a.x + first, a.inputs, a.n, n);
  copy_in(grad, a.grad + first, a.outputs, a.n, n);
  memset(grad_x, 0, a.inputs * WIDTH * sizeof(float));
  for (int64_t h = 0; h < a.hidden; h++, sums += (a.inputs + 1 + a.outputs) * VL) {
    Row value, slope;
    hidden_row(value, a, x, h);
    fill_row(slope, 0);
    for (int64_t o = 0; o < a.outputs; o++) {
      add_row(slope, grad + o * WIDTH, a.weight2[o * a.hidden + h]);
      add_product(sums + (a.inputs + 1 + o) * VL, value, grad + o * WIDTH);
    }
    vec total = load(sums + a.inputs * VL);
    SR_UNROLL for (int v = 0; v < NV; v++) {
      slope.v[v] = value.v[v] > 0.f ? slope.v[v] : vec{};  // the gradient passes where the hidden value is above 0
      total += slope.v[v];
    }
    store(sums + a.inputs * VL, total);
    for (int64_t i = 0; i < a.inputs; i++) {
      add_product(sums + i * VL, slope, x + i * WIDTH);
      float *p = grad_x + i * WIDTH, factor = a.weight1[h * a.inputs + i];
      SR_UNROLL for (int v = 0; v < NV; v++) store(p + v * VL, load(p + v * VL) + slope.v[v] * factor);
    }
  }
  copy_out(a.grad_x + first, grad_x, a.inputs, a.n, n);
}

// The results where `grad` is null, else the gradients.
SR_API int64_t sr_perceptron(const Perceptron* call) {
  const Perceptron& a = *call;
  const int64_t part = round_up(ceil_div(a.n, PARTS), WIDTH), floats = a.hidden * (a.inputs + 1 + a.outputs) * VL;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t p = 0; p < PARTS; p++) {
    float* scratch = a.scratch + omp_get_thread_num() * sr_perceptron_scratch(a.inputs, a.outputs);
    const int64_t end = smaller(a.n, (p + 1) * part);
    for (int64_t first = p * part; first < end; first += WIDTH) {
      if (a.grad) backward_block(a, scratch, a.sums + p * floats, first, smaller(WIDTH, end - first));
      else forward_block(a, scratch, first, smaller(WIDTH, end - first));
    }
  }
  return SR_OK;
}
