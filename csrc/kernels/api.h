// Launcher API: raw pointers and plain structs, no torch and no exceptions.
//
// Arguments keep one order from the schema down: x, grad, x0, step_size, eps, norm, lo, hi, sparsity, active, what the
// model reads, and what is saved.
// What the ops mean stands in fastlip/ops/__init__.py and, as code, in fastlip/ops/reference.py.
#pragma once
#include <cstdint>

// Of functions that units of several instruction sets include: none of them has a copy for the linker to keep, see
// cpu/scalar.h. Of a lambda: what it captures by reference may lie in registers.
#define FASTLIP_INLINE __attribute__((always_inline))

namespace fastlip {

enum class DType : int32_t { f32, f64, f16, bf16 };
enum class Norm : int32_t { linf, l2, l1 };
enum class MatmulPrecision : int32_t { float32, tf32x3 };
enum class Loss : int32_t { dlr, ce, margin };

// One number for all, or numbers of the arithmetic's type (double for f64 storage, else float) read at
// data[sample * stride + element]; `element` stays 0 for what is one number a sample.
struct Value {
  double scalar;
  const void* data;  // null: scalar
  int64_t stride;
};

// How many of a sample's elements an L1 step moves, ties apart, where it spares the share `sparsity` of them.
inline int64_t kept_elements(int64_t size, double sparsity) {
  const int64_t kept = size - static_cast<int64_t>(sparsity * static_cast<double>(size));
  return kept > 0 || size == 0 ? kept : 1;
}

// Samples are dense blocks of `size` elements that all operands lay out alike.
struct PgdStep {
  void* x;
  const void* grad;  // null: projection only
  const void* x0;
  Value step_size;  // stride 1: one number a sample
  Value eps;        // stride 1: one number a sample
  Norm norm;
  Value lo;  // stride 0 (one sample's worth, shared) or size
  Value hi;
  int64_t kept;           // elements that an L1 step moves, ties apart: the top `kept` magnitudes
  const uint8_t* active;  // null: all
  DType dtype;
  int64_t batch, size;
  int64_t x_stride, grad_stride, x0_stride;  // elements from sample to sample
  // With f32 storage: (x - mean) / std in a type of its own, f32 or 16 bits, which then is grad's too; grad is the
  // gradient with respect to it.
  void* input = nullptr;  // null: x itself is what the model reads
  DType input_dtype = DType::f32;
  Value mean = {}, std = {};  // stride 0
  int64_t input_stride = 0;
  // Saved before x moves, of samples that take part.
  void* best = nullptr;             // null: nothing; else takes x where better, which then is given
  const uint8_t* better = nullptr;  // one number a sample
  int64_t best_stride = 0;
  uint8_t* not_finite = nullptr;  // null: nothing; else 1 where an element of grad is not finite, unchanged elsewhere
};

// step: the move and its ball, without step_size and kept, which are the sample's own here; grad is given.
struct ApgdStep {
  PgdStep step;
  const void* loss;  // one number a sample, in the arithmetic's type like the following
  void *x_prev, *x_best, *grad_best;
  void* best_loss;
  void* past_loss;  // two numbers a sample: of the last iterate; the best at the last checkpoint
  void* step_size;
  int32_t* counters;  // six a sample: see kernels/apgd.h
  const int32_t* schedule;
  int64_t steps;  // of the schedule
  double momentum, rho;
  int64_t x_prev_stride, x_best_stride, grad_best_stride;
};

// Rows are contiguous; booleans are bytes, 0 or 1.
struct Judge {
  const void* logits;  // [batch, classes]
  const int64_t* labels;
  const int64_t *targets, *toward;  // null: none; not both
  Loss kind;
  double rounding;
  double* best_loss;  // null: no record is kept, and the following are null
  uint8_t* succeeded;
  uint8_t *unconfirmed, *best_doubtful;  // null: not wanted
  bool early_stop;
  void* loss;  // [batch], like the logits
  void* grad;  // [batch, classes]
  uint8_t *adversarial, *doubtful, *better;
  DType dtype;  // f32 or f64
  int64_t batch, classes;
  // CPU only, for Loss::ce: log softmax, [batch, classes]; grad then holds the gradient already.
  const void* log_softmax;
};

struct RandomStart {
  void* out;
  const void* x0;
  Value eps;
  Norm norm;
  Value lo;
  Value hi;
  const int64_t* ids;
  const int64_t* key;  // one number
  DType dtype;
  int64_t batch, size;
  int64_t out_stride, x0_stride;
  // Random numbers are indexed by the logical (row-major) element e. In memory it stands at e where channels is 1, and
  // at (e % plane) * channels + e / plane, plane = size / channels, in channels_last.
  int64_t channels;
};

// Half a step of Golub-Kahan bidiagonalisation for many operators: out = A x / |x| - (|x| / |previous|) previous, and
// |out|^2. fastlip/ops/_operator_plan.py makes the tables and describes the memory layout; their contents are trusted.
struct OperatorStep {
  void* out;
  double* out_square;  // one number per vector, like all squares
  const void* x;
  const double* x_square;  // null: x is not scaled
  const void* previous;    // null: nothing is subtracted
  const double* previous_square;
  const void* weights;
  const int64_t* problems;       // rows of Problem
  const int64_t* tiles;          // rows of Tile
  const int64_t* gather_groups;  // rows of GatherGroup
  const int32_t* entries;
  const uint8_t* active;             // null: all
  double* partial;                   // scratch, tile_count x max_vectors: squared norms of what each tile wrote
  DType dtype;                       // f32 or f64
  MatmulPrecision matmul_precision;  // CUDA only: how float32 numbers are multiplied
  int64_t problem_count, tile_count, max_vectors;
  // CUDA only: how many rows of `tiles` are parts of a tile (split-K); scratch of kBlock x kPartColumns elements for
  // each of them; and problem_count + parts counters.
  int64_t parts;
  void* sums;
  int32_t* counters;

  static constexpr int64_t kBlock = 64;        // target channels of a full block
  static constexpr int64_t kLanes = 16;        // a block's channels are padded to a multiple of this
  static constexpr int64_t kPartColumns = 64;  // most columns of a tile that is split into parts
  struct Problem {
    int64_t depthwise, source_at, target_at, weight_at, vector_at, vectors, groups, taps;
    int64_t source_channels, target_channels;  // per group
    int64_t source_pixels, target_pixels;
    int64_t tile_at, tiles;
  };
  struct GatherGroup {
    int64_t taps, pixels, taps_at, targets_at, sources_at;
  };
  struct Tile {
    int64_t problem, gather_group, group, block, column, columns;
    int64_t part, parts, slot;  // slot: row of `sums`, -1 for a whole tile
  };
};

// Convolution kernels in the layout that operator_step_ reads, one after the other; see pack.h.
struct PackWeights {
  struct Problem {
    const void* weight;                      // [groups * outputs, inputs, taps], dense
    DType dtype;                             // f32 or f64
    int32_t groups, targets, sources, taps;  // channels of a group: A's outputs and inputs, or the adjoint's
    int64_t at;                              // offset of its elements in `out`
  };
  void* out;
  DType dtype;  // f32 or f64
  const Problem* problems;
  int64_t count;
  bool adjoint;
};

// Symmetric tridiagonal matrices T, one per start vector: [count, steps] each; off-diagonals are not negative.
struct Tridiagonal {
  const double* diagonal;
  const double* off;  // the last one couples to the vector after the last step
  int64_t count, steps;
};

// The Krylov certificate, see fastlip/ops/_krylov.py. One number per matrix.
struct KrylovBound {
  Tridiagonal matrix;
  const double *last, *residual, *start_overlap;
  double tolerance;  // relative width of the bracket whose upper end is returned
  double* upper;
};

// A convolution of maps in channels_last, or its adjoint, by a table of who meets whom (Dukhan 2019, "The Indirect
// Convolution Algorithm"): for every image and every row (target, source of tap 0, source of tap 1, ...) of the table
//   out[target] = act(sum over taps whose source >= 0 of x[source] weight[tap] + bias + other[target]),
// where act is ReLU, the gradient of a ReLU that is active in part, or nothing. CPU only.
struct IndirectConv {
  float* out;            // [batch, targets, outputs]
  const float* x;        // [batch, sources, channels]
  const float* weight;   // [panels, taps * channels, kLanes]: panels of kLanes outputs, the last one padded;
                         // adjoint: as the other map's, [panels, taps * outputs, kLanes] with panels of channels
  const float* bias;     // [outputs]; null: 0
  const float* other;    // like out; null: 0
  uint8_t* active;       // like out: with relu written, 1 where it passes its argument and 0 elsewhere; else 0 makes 0
                         // of the result; null: none of this
  const int32_t* table;  // [targets, 1 + taps]
  bool adjoint, relu;
  int64_t batch, sources, targets, taps, channels, outputs;

  // The same for images [begin, end) alone.
  IndirectConv images(int64_t begin, int64_t end) const {
    IndirectConv part = *this;
    const int64_t at = begin * targets * outputs;
    part.out += at;
    part.x += begin * sources * channels;
    if (other) part.other += at;
    if (active) part.active += at;
    part.batch = end - begin;
    return part;
  }

  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kMostRows = 14;   // of a tile, whatever the instruction set
  static constexpr int64_t kTiles = 16;      // gathered at a time, at most
  static constexpr int64_t kInL2 = 1 << 16;  // floats that L2 holds with room to spare
  // The adjoint's tiles have pixels in place of outputs, in up to kMostPanels panels, and outputs in place of pixels;
  // of kOutputs at a time the sums are kept.
  static constexpr int64_t kMostPanels = 2, kOutputs = 3 * kLanes;
  // Floats and bytes of scratch memory: as many gathered values as stay in L2, or one tile.
  FASTLIP_INLINE int64_t values() const {
    const int64_t rows = adjoint ? kMostPanels * kLanes : kMostRows, tile = rows * taps * ((channels + 15) / 16 * 16);
    return tile > kInL2 ? tile : kInL2;
  }
  FASTLIP_INLINE int64_t sums() const { return adjoint ? kTiles * kOutputs * kMostPanels * kLanes : 0; }
  int64_t scratch_bytes() const { return 4 * (values() + sums() + kTiles * taps); }
};

// How a convolution by a 3x3 kernel is filtered: every tile of side x side pixels of its result is
//   A^T (sum over channels of (G g[channel] G^T) * (B^T d[channel] B)) A
// of the kernel g and the pixels d that the tile meets, with values x values products for each channel.
struct Filtering {
  int64_t side;
  int64_t left_out;  // pixels at either end of those that a tile meets along a side, being padding
  int64_t values;

  static constexpr int64_t kLanes = IndirectConv::kLanes;
  static constexpr int64_t kMostPanels = 2;  // multiplied at once, whatever the instruction set
  static constexpr int64_t kChannels = 64;   // whose kernels are transformed at a time, and stay in L2

  FASTLIP_INLINE constexpr int64_t pixels() const { return side + 2 - 2 * left_out; }
  FASTLIP_INLINE constexpr int64_t taps() const { return values * values; }
  // Tiles taken at a time: as many as the outer caches hold, with their sums.
  FASTLIP_INLINE constexpr int64_t together(int64_t channels) const {
    const int64_t most = (1 << 20) / (taps() * (padded(channels) + kMostPanels * kLanes));
    constexpr int64_t low = 2 * IndirectConv::kMostRows, high = 8 * IndirectConv::kMostRows;
    return most < low ? low : most > high ? high : most;
  }
  FASTLIP_INLINE static constexpr int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }
  // From one tap to the next: an odd number of cache lines, so that taps do not meet in a few sets of the cache.
  FASTLIP_INLINE static constexpr int64_t tap_stride(int64_t rows, int64_t width) {
    return (rows * width / kLanes | 1) * kLanes;
  }
  constexpr int64_t scratch_bytes(int64_t channels) const {
    const int64_t rows = together(channels), own = padded(channels);
    const int64_t sums = tap_stride(rows, kMostPanels * kLanes), kernels = kMostPanels * tap_stride(kChannels, kLanes);
    return 4 * (taps() * (tap_stride(rows, own) + sums + kernels) + own);
  }
};
// Winograd's F(4x4, 3x3) (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks") at the points 0,
// +-sqrt(1/2), +-sqrt(2) and infinity.
constexpr Filtering kTiles4{4, 0, 6};
// Maps of 2x2 pixels that stay so: their padding, which is most of what they meet, takes no products. Along a side
//   y0 = g1 d0 + g2 d1 = g1 (d0 + d1) + (g2 - g1) d1
//   y1 = g0 d0 + g1 d1 = g1 (d0 + d1) + (g0 - g1) d0
// share a product, as in Karatsuba's multiplication (Karatsuba and Ofman 1962, "Multiplication of Multidigit Numbers on
// Automata"): 9 in two dimensions, in place of 16.
constexpr Filtering kMap2{2, 1, 3};

// A convolution by a 3x3 kernel at stride 1, padded with zeros, by minimal filtering; and then, as in IndirectConv,
// bias, other and act. CPU only.
struct WinogradConv {
  float* out;           // [batch, out_height, out_width, outputs]
  const float* x;       // [batch, height, width, channels]
  const float* weight;  // [panels, 9 * channels, kLanes]
  bool adjoint;         // as in IndirectConv; and the weight's last tap is the kernel's first
  const float* bias;    // as in IndirectConv, these four
  const float* other;
  uint8_t* active;
  bool relu;
  int64_t batch, height, width, out_height, out_width, channels, outputs;

  static constexpr int64_t kLanes = IndirectConv::kLanes;

  FASTLIP_INLINE int64_t padding() const { return (out_height - height + 2) / 2; }
  // Whether kMap2 is taken, and not kTiles4; the batch has no say, so that no result depends on it.
  FASTLIP_INLINE bool is_map2() const { return height == 2 && width == 2 && out_height == 2 && out_width == 2; }
  FASTLIP_INLINE const Filtering& filtering() const { return is_map2() ? kMap2 : kTiles4; }
  FASTLIP_INLINE int64_t tiles_across(int64_t side) const { return (out_width + side - 1) / side; }
  FASTLIP_INLINE int64_t tiles(int64_t side) const {  // of an image
    return (out_height + side - 1) / side * tiles_across(side);
  }
};

// A convolution, or its adjoint, of few channels: vectors hold neighbouring pixels, which is direct summation without a
// matrix product. Like IndirectConv, then bias, other and act. CPU only.
//
// With stride s the pixels of an image are divided into phases, x = s X + phase, and each tap i meets one of them
// alone: with i - padding = s shift + phase, output X meets pixel X + shift of the phase. A band of rows of the source
// is copied to planes, one for each phase and channel, of `pitch` pixels a row: their own, and zeros that are as many
// as taps reach beyond either side. Then pixels of several rows share a vector, and a tap is an offset for all of them.
// Targets have that pitch too.
struct DirectConv {
  float* out;           // [batch, targets, height, width], in either of torch's memory formats
  const float* x;       // [batch, sources, height, width], likewise
  const float* weight;  // [outputs, channels, kernel[0], kernel[1]]
  const float* bias;    // [targets]; null: 0
  const float* other;   // like out; null: 0
  uint8_t* active;      // like out; as in IndirectConv
  bool relu, adjoint;
  int64_t out_stride[4], x_stride[4];
  int64_t batch, sources, targets;
  int64_t image[2], map[2];  // height and width of the convolution's input and of its output
  int64_t kernel[2], stride[2], padding[2];

  // Targets whose weights lie side by side; taps and stride along a side; padding.
  static constexpr int64_t kTargets = 8, kMostTaps = 64, kMostPadding = 1 << 30;

  // Pixels at, at + step, ... of a source or a target, in rows and columns.
  struct Phase {
    int64_t at[2], size[2];
    // Of a target: how many taps it meets, what they add to a pixel's place in the first source's planes, and where its
    // weights begin: for every kTargets targets, for each source, for each tap.
    int64_t taps;
    const int64_t* offset;
    int64_t weight;
  };
  // Made by DirectConvPlan.
  const Phase *source_phase, *target_phase;  // row by row
  const float* packed;
  int64_t source_phases[2], target_phases[2];
  int64_t source_step[2];
  int64_t x_floats;              // of x in all
  int64_t above, reach, before;  // the first row that a target at 0 meets, rows met beyond, zeros before a row
  int64_t pitch, plane, planes;  // floats of a row, a plane, all planes of a source
  int64_t sums, joined;          // of a target in a band: a phase's sums, all pixels
  int64_t rows, bands;           // rows of a target phase in a band

  // Floats of scratch memory: planes, sums, some targets of out, and the way to a cache line.
  int64_t scratch_floats() const {
    constexpr int64_t kLanes = IndirectConv::kLanes;
    return sources * planes + target_phases[0] * target_phases[1] * targets * sums + kLanes * joined + 2 * kLanes;
  }
};

// Convolutions, pools and linear layers that follow one another, or their adjoints in reverse, where channels are too
// few to fill vectors: a vector holds one element of several images. CPU only.
//
// kImages images at a time go through all layers, each map as planes [channels, height, pitch] of vectors. A row has
// zeros at its sides, as many as taps reach beyond them; rows beyond the map are left out. A linear layer is a
// convolution of maps of one pixel; what a map's elements are one after the other serves as its input.
struct InterleavedLayers {
  static constexpr int64_t kImages = 16;  // side by side
  static constexpr int64_t kTargets = 8;  // whose weights are side by side
  static constexpr uint8_t kStopped = 255;
  static constexpr int64_t kMostTaps = 16, kMostStride = 64;  // along a side; dilation and padding have the latter too

  struct Maps {
    int64_t channels, height, width;
    int64_t pitch, before;  // pixels of a row, and of them zeros before the map's own
    FASTLIP_INLINE int64_t elements() const { return channels * height * width; }
    FASTLIP_INLINE int64_t plane() const { return height * pitch; }
    int64_t floats() const { return channels * plane() * kImages; }
  };
  struct Tap {
    int64_t at;      // of a kernel's row or column
    int64_t source;  // the row that it meets; or the column, for the first target column of a phase
  };
  // kSpread: the source's elements, laid out as the target's.
  enum class Kind { kConvolution, kMaxPool, kAveragePool, kSpread };
  // A layer, in one direction.
  struct Step {
    Kind kind;
    Maps source, target;
    const float* weight;  // of a convolution, [ceil(targets / kTargets), sources, taps, kTargets]
    const float* bias;    // [targets]; null: 0
    bool relu;
    int64_t flags;  // where the target's begin among an image's; negative: none
    int64_t taken;  // likewise, which elements the source's maxima are
    int64_t taps, taps_across;
    // Target columns phase, phase + target_step, ... meet source columns Tap::source, Tap::source + source_step, ...
    int64_t source_step, target_step;
    const Tap *row, *column;
    const int64_t *row_begin, *column_begin;  // [target.height + 1], [target_step + 1], in these
  };

  float* out;      // [batch, elements of the last step's target]
  const float* x;  // [batch, elements of the first step's source]
  // [blocks, flags, kImages], of elements on which ReLUs act whether they pass them on, 0 or 1; of maxima which tap
  // they are, and kStopped where a ReLU stops them. Null: not kept.
  uint8_t* active;
  bool adjoint;  // of the last layer's adjoint first; then active is read
  int64_t batch, flags;
  int64_t x_flags;  // of x, which go before all else; negative: none
  const Step* step;
  int64_t steps;
  int64_t floats[2];  // of scratch memory for the steps' sources and targets, in turns

  int64_t blocks() const { return (batch + kImages - 1) / kImages; }
  int64_t scratch_floats() const { return floats[0] + floats[1] + 2 * kImages; }
};

// The gradient G of a norm <G, W> in a weight W [rows, columns]: left right, or left where rank is 0. CPU only.
struct NormGradient {
  const void* left;   // [rows, rank]; [rows, columns] where rank is 0
  const void* right;  // [rank, columns]
  DType dtype;        // f32 or f64
  int64_t rows, columns, rank;
};

// The gradient in W of what depends on scaled = (bound / norm) W, norm = <G, W>:
//   out = scale grad + factor G, with scale = bound / norm and factor = -<grad, scaled> / norm. CPU only.
struct ScaledWeightGrad {
  NormGradient gradient;
  void* out;
  const void *grad, *scaled;
  double scale, factor;
};

namespace cpu {
struct Kernels {
  const char* isa;
  // Elements [begin, end) of the batch x size grid; samples need not be whole.
  void (*pgd_step_linf)(const PgdStep&, int64_t begin, int64_t end);
  // Samples [begin, end), norm l2 or l1; scratch holds scratch_bytes(size) bytes.
  void (*pgd_step_ball)(const PgdStep&, int64_t begin, int64_t end, void* scratch);
  // Samples [begin, end), any norm; scratch as above.
  void (*apgd_step)(const ApgdStep&, int64_t begin, int64_t end, void* scratch);
  // One tile; those of inactive problems do nothing.
  void (*operator_tile)(const OperatorStep&, int64_t tile);
  // Rows [begin, end) of the targets x batch of the product, and panels of outputs; scratch as IndirectConv says.
  void (*indirect_conv)(const IndirectConv&, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel,
                        void* scratch);
  // Tiles [begin, end) of all images, and panels of outputs; scratch as WinogradConv says.
  void (*winograd_conv)(const WinogradConv&, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel,
                        void* scratch);
  // Bands [begin, end) of all images; scratch as DirectConv says.
  void (*direct_conv)(const DirectConv&, int64_t begin, int64_t end, float* scratch);
  // Blocks [begin, end) of images; scratch as InterleavedLayers says.
  void (*interleaved_layers)(const InterleavedLayers&, int64_t begin, int64_t end, float* scratch);
  // <G, weight> over rows [begin, end).
  double (*norm_along)(const NormGradient&, const void* weight, int64_t begin, int64_t end);
  // <a, b> over elements [begin, end) of f32 or f64.
  double (*product)(const void* a, const void* b, DType, int64_t begin, int64_t end);
  // Rows [begin, end) of the result.
  void (*scaled_weight_grad)(const ScaledWeightGrad&, int64_t begin, int64_t end);
  // Benchmark floor: y[i] = a[i] + b[i] + c[i], three reads and one write.
  void (*stream)(float* y, const float* a, const float* b, const float* c, int64_t n);
};
// Samples [begin, end); scratch as above.
void random_start(const RandomStart&, int64_t begin, int64_t end, void* scratch);
void judge(const Judge&, int64_t begin, int64_t end);

constexpr int64_t scratch_bytes(int64_t size) { return 4 * (size + 64) * static_cast<int64_t>(sizeof(double)); }

// Table for this CPU, or for FASTLIP_CPU_ISA; null with a message in `error` where that is unknown or unsupported.
const Kernels* kernels(const char** error);
void pack_weights(const PackWeights&, int64_t problem);
// out_square: the partial sums of all tiles, added in order.
void operator_squares(const OperatorStep&);
const char* compiled_isas();  // comma-separated
// Matrices [begin, end), of at least one step. Largest eigenvalues [count] and their unit vectors [count, steps].
void top_eigenpairs(const Tridiagonal&, double* values, double* vectors, int64_t begin, int64_t end);
void krylov_bound(const KrylovBound&, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t; the result is a cudaError_t. Nothing synchronises; all launches can be captured.
int pgd_step_(const PgdStep& step, void* stream);
int random_start(const RandomStart& start, void* stream);
int judge(const Judge& judge, void* stream);
int apgd_step_(const ApgdStep& step, void* stream);
int operator_step_(const OperatorStep& step, void* stream);
int pack_weights_(const PackWeights& pack, void* stream);
const char* error_string(int error);
}  // namespace cuda
}  // namespace fastlip
