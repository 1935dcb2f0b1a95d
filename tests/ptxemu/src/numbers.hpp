// Floating-point numbers as NVIDIA's instructions convert and compare them. A NaN that comes out is always the same
// one.
#pragma once
#include "checks.hpp"

static inline u32 fbits(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}
static inline float bitsf(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline float canon(float f) { return f != f ? bitsf(0x7fffffff) : f; }
static inline double canon(double d) {
  u64 nan = 0x7fffffffffffffffull;
  if (d != d) memcpy(&d, &nan, 8);
  return d;
}
// .ftz: subnormal numbers are zero.
static inline float ftz(float f) { return (fbits(f) & 0x7f800000) ? f : bitsf(fbits(f) & 0x80000000); }

static inline float h2f(u16 h) { return _cvtsh_ss(h); }
static inline u16 f2h(float f) { return f != f ? 0x7fff : _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
static inline u16 f2h_to_zero(float f) { return f != f ? 0x7fff : _cvtss_sh(f, _MM_FROUND_TO_ZERO); }
static inline float bf2f(u16 h) { return bitsf((u32)h << 16); }
static inline u16 f2bf(float f) {
  u32 bits = fbits(f);
  return f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// float64 to float16, rounded once: by way of a float32 that is rounded to odd.
static inline u16 d2h(double d) {
  float f = (float)d;
  if ((double)f == d || f != f || std::isinf(f)) return f2h(f);
  u32 bits = fbits(f);
  if (!(bits & 1)) bits = std::fabs((double)f) > std::fabs(d) ? bits - 1 : bits + 1;
  return f2h(bitsf(bits));
}

// min and max: of -0 and 0 the smaller is -0; of a NaN and a number the number, or with .NaN the NaN.
static inline float fmin_(float a, float b) {
  float r = a < b ? a : b;
  r = a == b ? bitsf(fbits(a) | fbits(b)) : r;
  r = a != a ? b : b != b ? a : r;
  return canon(r);
}
static inline float fmax_(float a, float b) {
  float r = a > b ? a : b;
  r = a == b ? bitsf(fbits(a) & fbits(b)) : r;
  r = a != a ? b : b != b ? a : r;
  return canon(r);
}
static inline float fminN(float a, float b) { return a != a || b != b ? bitsf(0x7fffffff) : fmin_(a, b); }
static inline float fmaxN(float a, float b) { return a != a || b != b ? bitsf(0x7fffffff) : fmax_(a, b); }
static inline double dmin_(double a, double b) {
  return a != a ? canon(b) : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
static inline double dmax_(double a, double b) {
  return a != a ? canon(b) : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
