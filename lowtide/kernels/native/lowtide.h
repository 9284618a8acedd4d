// The C interface of the native kernels.
//
// A program is a list of calls. Each call names a kernel and points to its arguments, one of the
// structures below. All addresses are fixed when the program is built; only the numbers behind
// `scale`, `zero` and the tables of a step change between two runs.
// lowtide/kernels/native_library.py mirrors every structure field by field; LOWTIDE_ABI changes
// whenever one of them does.

#pragma once
#include <cstdint>

#define LOWTIDE_ABI 9
#define LOWTIDE_EXPORT __attribute__((visibility("default")))

extern "C" {

// What an elementwise kernel applies to each value before it is stored.
enum Activation : int32_t { IDENTITY = 0, SILU = 1, GELU_TANH = 2, GELU_ERF = 3 };

enum Kernel : int32_t {
  GEMM = 0,
  GROUP_MOMENTS = 1,
  STREAM = 2,
  LAYER_NORM = 3,
  ATTENTION = 4,
  ROW = 5,
  ARRANGE = 6,
  HASH = 7,
  CHECKSUM = 8
};

// Bits that lowtide_run returns. NOT_A_NUMBER: a value to be rounded was NaN, which no code stands
// for, or a row of attention has no softmax.
enum Outcome : int32_t { FINE = 0, NOT_A_NUMBER = 1, BAD_CALL = 2, NO_MEMORY = 4 };

// Where a kernel stores its result: float32 values, or codes of the layer that reads them next.
// Strides are in elements. Only Stream repeats pixels (upsample 2) and fills the padding; the other
// kernels leave room for them.
struct Sink {
  void* y;
  int64_t sample, row, column;        // strides of the output
  const float* scale;                 // null: store float32; else one number, the running step's
  const float* zero;                  // the zero point as a float
  const float* smooth;                // divisor of each channel before it is rounded, or null
  const float* inverse;               // 1 / divisor, or null where one of them is no normal number
  float top;                          // the last code
  int32_t upsample;                   // 1, or 2 for nearest upsampling by two
  int32_t above, left, below, right;  // padding with zeros, or the code of zero
  int32_t channels;                   // channels in memory, those after the last value are 0
};

// One panel is 64 columns of a weight (fewer at the end) for all k, in dwords of four k.
// Bits 8: int8 values. Otherwise codes in bit planes of 4, 2 and 1 bits; see gemm.inc.
struct Weight {
  const uint8_t* data;    // aligned to 64
  const int64_t* panel;   // byte offset of each panel
  const uint32_t* masks;  // per 16 columns: which columns have the planes of 8, 4, 2, 1
  const int32_t* shifts;  // per column: left shifts of the planes of 8, 4, 2, 1
  const int32_t* zeros;   // per column: what is subtracted from a code, in each byte
  const float* scale;     // per column
  const int32_t* sums;    // per column: the sum of its int8 values
  const uint8_t* factors;  // vector x group x 16: what the values of a group are multiplied by, or
                           // null: all by 1, and those of int8 panels are multiplied already
  const int32_t* groups;   // the group of each k, in whole runs of 32
  int64_t columns, k4;     // k4: dwords of four k, over all taps
  int64_t group_count;
  int32_t planes;         // 0: int8 values; else bit planes
  int32_t uniform;        // 4, 2 or 1: all columns have exactly this plane; else 0
};

// y = epilogue(x @ weight): a linear layer, or a convolution as an implicit product. x holds codes,
// or float32 values.
//   value = sum * scale + bias
//   value = activation(value + per_sample[sample])
//   value = (value * gate[sample] + residual) * factor
// A gated unit has the columns of two layers, half of them each, and n whole panels in each half:
//   value[c] = value[c] * activation(value[n + c])
// It has no per_sample, gate, residual or factor.
struct Gemm {
  const uint8_t* x;
  int64_t batch, height, width;       // of the output
  int64_t x_sample, x_row, x_column;  // bytes between the inputs of two samples, rows, columns
  const int64_t* taps;                // byte offset of each tap
  int64_t tap_count, tap_k4;          // dwords of four channels in a tap
  const float* x_scale;               // the running step's; null: x holds float32
  const float* x_zero;
  Weight weight;
  const float* bias;        // per column, or null
  const float* per_sample;  // sample x columns, or null
  int64_t per_sample_stride;
  const float* gate;  // sample x columns, or null
  int64_t gate_stride;
  const float* residual;  // or null; its strides
  int64_t r_sample, r_row, r_column;
  float factor;
  int32_t activation;
  int32_t gated;
  int32_t unused;
  Sink sink;
};

// Mean and deviation of each group of channels, as the affine map that normalizes:
// gain[sample][channel], offset[sample][channel]. The input may be two tensors side by side.
struct GroupMoments {
  const float* x[2];
  int64_t channels[2];
  int64_t x_sample[2], x_pixel[2];
  int64_t batch, pixels, groups;
  float epsilon;
  const float* weight;  // per channel, or null
  const float* bias;
  float* gain;
  float* offset;
  float* partial;  // scratch: batch x blocks x 2 x channels
  int64_t blocks;
};

// value = activation(x * gain + offset) * times, stored by up to four sinks.
struct Stream {
  const float* x[2];
  int64_t channels[2];
  int64_t x_sample[2], x_row[2], x_column[2];
  int64_t batch, height, width;
  const float* gain;  // sample x channels, or null
  const float* offset;
  const float* times;  // in the layout of one input, or null; its strides
  int64_t t_sample, t_row, t_column;
  int32_t activation;
  int32_t sinks;
  Sink sink[4];
};

// Each row normalized, then * weight + bias, then * gain[sample] + shift[sample].
struct LayerNorm {
  const float* x;
  int64_t batch, rows, channels;  // rows: of one sample
  int64_t x_sample, x_row;
  float epsilon;
  const float* weight;
  const float* bias;
  const float* gain;  // sample x channels, or null
  int64_t gain_stride;
  const float* shift;  // sample x channels, or null
  int64_t shift_stride;
  int32_t sinks;
  int32_t unused;
  Sink sink[4];
};

// A quantized operand of attention: float32 values, or their codes, and the grid of the running
// step.
struct Operand {
  const void* x;
  int64_t sample, head, token;  // strides in elements
  const float* scale;
  const float* zero;
  float top;
  int32_t is_codes;  // x holds codes, a byte each
};

struct Attention {
  Operand q, k, v;
  const float* p_scale;  // of the softmax output
  const float* p_zero;
  float p_top;
  int32_t adaptive;  // the zero point 1 means log2 codes
  float factor;      // of the scores
  float y_top;       // the last code of y
  const float* bias;  // per key, added to the scores, or null; its strides
  int64_t bias_sample, bias_head;
  int64_t batch, heads, queries, keys, width;
  void* y;
  int64_t y_sample, y_head, y_token;
  const float* y_scale;  // null: y holds float32, else codes
  const float* y_zero;
  uint8_t* scratch;  // lowtide_attention_scratch() bytes, aligned to 64
};

// y = table[*step]: the features of the running step.
struct Row {
  const float* table;
  const int64_t* step;
  float* y;
  int64_t width;
  int64_t copies;  // rows of y that get the same features
};

// A weight between the order of a checkpoint (`packed`) and panels (`data`); see arrange.inc and
// restore.inc.
struct Arrange {
  uint8_t* packed;
  const int64_t* row_start;  // byte offset of each row
  const int32_t* bits;       // of each row
  const int32_t* zero;       // of each row
  const int32_t* doubled;    // of each row: 1 where a code counts twice
  const uint8_t* factor;     // rows x groups, or null
  int64_t group;             // columns of a group
  int64_t rows, channels, taps;
  uint8_t* data;
  const int64_t* panel;   // byte offset of each panel
  const int32_t* masks;   // as in Weight
  int32_t* sums;          // of each row: the sum of its int8 values
  int32_t planes;         // 0: int8 values
  int32_t backwards;      // 1: from panels to the checkpoint's order
};

// BLAKE2b of each message.
struct Hash {
  const uint8_t* const* data;
  const int64_t* bytes;  // of each message
  uint64_t* hashes;      // of each message: the first bytes of its hash, lowest first
  int64_t count;
  int64_t size;          // bytes of a hash, up to 8
};

// The checksum of each message; see checksum.inc.
struct Checksum {
  const uint8_t* const* data;
  const int64_t* bytes;  // of each message
  uint64_t* sums;
  int64_t count;
};

struct Call {
  int32_t kernel;
  int32_t unused;
  const void* arguments;
};

LOWTIDE_EXPORT int32_t lowtide_abi(void);

// The instruction sets of this machine that the kernels know, one bit each, the best the highest:
// 1 portable, 2 AVX2, 4 AVX-VNNI, 8 AVX512-VNNI.
LOWTIDE_EXPORT int32_t lowtide_instruction_sets(void);

LOWTIDE_EXPORT int64_t lowtide_attention_scratch(const Attention* a);

// Runs all calls. `set` is one of the bits above, 0 for the best. Returns Outcome bits.
LOWTIDE_EXPORT int32_t lowtide_run(const Call* calls, int64_t count, int32_t threads, int32_t set);

// Bytes of a structure, in the order of Kernel, then Sink, Weight and Operand: a check of the
// mirror.
LOWTIDE_EXPORT int64_t lowtide_sizeof(int32_t which);
}
