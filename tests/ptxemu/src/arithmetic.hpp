// Arithmetic. A macro makes the handler of an operation: a loop over 32 lanes that the compiler turns into vectors.
#pragma once
#include "lanes.hpp"
#include "matrices.hpp"

#define FOR_LANES(BODY)                                                                                                \
  if (w.mask == FULL) {                                                                                                \
    _Pragma("GCC ivdep") for (int l = 0; l < 32; l++) {                                                                \
      BODY;                                                                                                            \
      to[l] = result;                                                                                                  \
    }                                                                                                                  \
  } else {                                                                                                             \
    const u32 mask = w.mask;                                                                                           \
    _Pragma("GCC ivdep") for (int l = 0; l < 32; l++) {                                                                \
      BODY;                                                                                                            \
      to[l] = (mask >> l & 1) ? result : to[l];                                                                        \
    }                                                                                                                  \
  }
#define REGISTERS(TYPE, NAME, I) [[maybe_unused]] TYPE *NAME = (TYPE *)(w.registers + in.at[I])
// NAME, types of the result and of the operands a, b, c, and what is computed from them.
#define UNARY(NAME, R, A, EXPRESSION)                                                                                  \
  static void NAME(Warp &w, const Instruction &in) {                                                                   \
    REGISTERS(R, to, 0);                                                                                               \
    REGISTERS(const A, from_a, 1);                                                                                     \
    FOR_LANES(A a = from_a[l]; R result = (EXPRESSION))                                                                \
  }
#define BINARY(NAME, R, A, B, EXPRESSION)                                                                              \
  static void NAME(Warp &w, const Instruction &in) {                                                                   \
    REGISTERS(R, to, 0);                                                                                               \
    REGISTERS(const A, from_a, 1);                                                                                     \
    REGISTERS(const B, from_b, 2);                                                                                     \
    FOR_LANES(A a = from_a[l]; B b = from_b[l]; R result = (EXPRESSION))                                               \
  }
#define TERNARY(NAME, R, A, B, C, EXPRESSION)                                                                          \
  static void NAME(Warp &w, const Instruction &in) {                                                                   \
    REGISTERS(R, to, 0);                                                                                               \
    REGISTERS(const A, from_a, 1);                                                                                     \
    REGISTERS(const B, from_b, 2);                                                                                     \
    REGISTERS(const C, from_c, 3);                                                                                     \
    FOR_LANES(A a = from_a[l]; B b = from_b[l]; C c = from_c[l]; R result = (EXPRESSION))                              \
  }
#define UNARY_FLOAT(NAME, EXPRESSION) UNARY(NAME, float, float, canon(EXPRESSION))
#define BINARY_FLOAT(NAME, EXPRESSION) BINARY(NAME, float, float, float, canon(EXPRESSION))
#define TERNARY_FLOAT(NAME, EXPRESSION) TERNARY(NAME, float, float, float, float, canon(EXPRESSION))
#define BINARY_DOUBLE(NAME, EXPRESSION) BINARY(NAME, double, double, double, canon(EXPRESSION))
#define BINARY_HALF(NAME, EXPRESSION) BINARY(NAME, u16, u16, u16, EXPRESSION)
#define FOR_INTEGERS(MACRO) MACRO(16, u16, i16) MACRO(32, u32, i32) MACRO(64, u64, i64)

// ---- integers
template <class T>
static inline T shift_left(T a, u32 by) {
  return by >= 8 * sizeof(T) ? 0 : a << by;
}
template <class T>
static inline T shift_right(T a, u32 by) {
  if (std::is_signed<T>::value) return a >> std::min<u32>(by, 8 * sizeof(T) - 1);
  return by >= 8 * sizeof(T) ? 0 : a >> by;
}
template <class T>
static inline T quotient(T a, T b) {
  if (b == 0) return (T)-1;
  if (std::is_signed<T>::value && b == (T)-1) return (T)(0 - (u64)a);
  return a / b;
}
template <class T>
static inline T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed<T>::value && b == (T)-1) return 0;
  return a % b;
}
#define INTEGERS(N, U, S)                                                                                              \
  UNARY(mov##N, U, U, a)                                                                                               \
  UNARY(not##N, U, U, ~a)                                                                                              \
  UNARY(neg##N, U, U, -a)                                                                                              \
  UNARY(abs##N, S, S, a < 0 ? -a : a)                                                                                  \
  BINARY(and##N, U, U, U, a & b)                                                                                       \
  BINARY(or##N, U, U, U, a | b)                                                                                        \
  BINARY(xor##N, U, U, U, a ^ b)                                                                                       \
  BINARY(add##N, U, U, U, a + b)                                                                                       \
  BINARY(sub##N, U, U, U, a - b)                                                                                       \
  BINARY(mullo##N, U, U, U, a * b)                                                                                     \
  TERNARY(madlo##N, U, U, U, U, a * b + c)                                                                             \
  BINARY(divu##N, U, U, U, quotient<U>(a, b))                                                                          \
  BINARY(divs##N, S, S, S, quotient<S>(a, b))                                                                          \
  BINARY(remu##N, U, U, U, remainder_of<U>(a, b))                                                                      \
  BINARY(rems##N, S, S, S, remainder_of<S>(a, b))                                                                      \
  BINARY(minu##N, U, U, U, a < b ? a : b)                                                                              \
  BINARY(mins##N, S, S, S, a < b ? a : b)                                                                              \
  BINARY(maxu##N, U, U, U, a > b ? a : b)                                                                              \
  BINARY(maxs##N, S, S, S, a > b ? a : b)                                                                              \
  BINARY(shl##N, U, U, u32, shift_left<U>(a, b))                                                                       \
  BINARY(shru##N, U, U, u32, shift_right<U>(a, b))                                                                     \
  BINARY(shrs##N, S, S, u32, shift_right<S>(a, b))                                                                     \
  static void selp##N(Warp &w, const Instruction &in) {                                                                \
    REGISTERS(U, to, 0);                                                                                               \
    REGISTERS(const U, from_a, 1);                                                                                     \
    REGISTERS(const U, from_b, 2);                                                                                     \
    const u32 chosen = *(u32 *)(w.registers + in.at[3]);                                                               \
    FOR_LANES(U a = from_a[l]; U b = from_b[l]; U result = (chosen >> l & 1) ? a : b)                                  \
  }
FOR_INTEGERS(INTEGERS)

BINARY(mulhiu16, u16, u16, u16, (u32)a * b >> 16)
BINARY(mulhis16, i16, i16, i16, (i32)a * b >> 16)
BINARY(mulhiu32, u32, u32, u32, (u64)a * b >> 32)
BINARY(mulhis32, i32, i32, i32, (i64)a * b >> 32)
BINARY(mulhiu64, u64, u64, u64, (u128)a * b >> 64)
BINARY(mulhis64, i64, i64, i64, (i128)a * b >> 64)
TERNARY(madhiu32, u32, u32, u32, u32, (u32)((u64)a * b >> 32) + c)
TERNARY(madhis32, i32, i32, i32, i32, (i32)((i64)a * b >> 32) + c)
BINARY(mulwu16, u32, u16, u16, (u32)a * b)
BINARY(mulws16, i32, i16, i16, (i32)a * b)
BINARY(mulwu32, u64, u32, u32, (u64)a * b)
BINARY(mulws32, i64, i32, i32, (i64)a * b)
TERNARY(madwu16, u32, u16, u16, u32, (u32)a * b + c)
TERNARY(madws16, i32, i16, i16, i32, (i32)a * b + c)
TERNARY(madwu32, u64, u32, u32, u64, (u64)a * b + c)
TERNARY(madws32, i64, i32, i32, i64, (i64)a * b + c)

// ---- bits
static inline u32 field_unsigned(u32 a, u32 at, u32 length) {
  at &= 255, length &= 255;
  if (at > 31 || !length) return 0;
  return length > 31 ? a >> at : a >> at & ((1u << length) - 1);
}
static inline u32 field_signed(u32 a, u32 at, u32 length) {
  at &= 255, length &= 255;
  if (!length) return 0;
  u32 sign = a >> std::min(at + length - 1, 31u) & 1, result = 0;
  for (u32 i = 0; i < 32; i++) result |= (i < length && at + i <= 31 ? a >> (at + i) & 1 : sign) << i;
  return result;
}
static inline u32 permute(u32 a, u32 b, u32 selectors) {
  u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> (4 * i) & 15, byte = bytes >> (8 * (selector & 7)) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
static inline u32 reverse(u32 a) {
  u32 result = 0;
  for (int i = 0; i < 32; i++) result |= (a >> i & 1) << (31 - i);
  return result;
}
TERNARY(bfeu32, u32, u32, u32, u32, field_unsigned(a, b, c))
TERNARY(bfes32, u32, u32, u32, u32, field_signed(a, b, c))
TERNARY(prmt32, u32, u32, u32, u32, permute(a, b, c))
TERNARY(shflw, u32, u32, u32, u32, (u32)(((u64)b << 32 | a) << (c & 31) >> 32))
TERNARY(shfrw, u32, u32, u32, u32, (u32)(((u64)b << 32 | a) >> (c & 31)))
TERNARY(shflc, u32, u32, u32, u32, (u32)(((u64)b << 32 | a) << std::min(c, 32u) >> 32))
TERNARY(shfrc, u32, u32, u32, u32, (u32)(((u64)b << 32 | a) >> std::min(c, 32u)))
UNARY(popc32, u32, u32, __builtin_popcount(a))
UNARY(popc64_, u32, u64, __builtin_popcountll(a))
UNARY(clz32, u32, u32, a ? __builtin_clz(a) : 32)
UNARY(clz64_, u32, u64, a ? __builtin_clzll(a) : 64)
UNARY(brev32, u32, u32, reverse(a))
UNARY(bfindu32, u32, u32, a ? 31 - __builtin_clz(a) : ~0u)
static void h_bfi(Warp &w, const Instruction &in) {
  REGISTERS(u32, to, 0);
  REGISTERS(const u32, field, 1);
  REGISTERS(const u32, into, 2);
  REGISTERS(const u32, start, 3);
  REGISTERS(const u32, count, 4);
  for (int l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    u32 at = start[l] & 255, length = count[l] & 255, result = into[l];
    for (u32 i = 0; i < length && at + i < 32; i++)
      result = (result & ~(1u << (at + i))) | ((field[l] >> i & 1) << (at + i));
    to[l] = result;
  }
}
static void h_lop3(Warp &w, const Instruction &in) {  // imm: the truth table
  REGISTERS(u32, to, 0);
  REGISTERS(const u32, from_a, 1);
  REGISTERS(const u32, from_b, 2);
  REGISTERS(const u32, from_c, 3);
  u32 rows[8];
  for (int i = 0; i < 8; i++) rows[i] = in.imm >> i & 1 ? FULL : 0;
  FOR_LANES(u32 a = from_a[l]; u32 b = from_b[l]; u32 c = from_c[l];
            u32 result = (rows[0] & ~a & ~b & ~c) | (rows[1] & ~a & ~b & c) | (rows[2] & ~a & b & ~c) |
                         (rows[3] & ~a & b & c) | (rows[4] & a & ~b & ~c) | (rows[5] & a & ~b & c) |
                         (rows[6] & a & b & ~c) | (rows[7] & a & b & c))
}

// ---- float32; a name that ends with z is .ftz
BINARY_FLOAT(addf, a + b)
BINARY_FLOAT(subf, a - b)
BINARY_FLOAT(mulf, a * b)
BINARY_FLOAT(divf, a / b)
TERNARY_FLOAT(fmaf_, __builtin_fmaf(a, b, c))
TERNARY_FLOAT(fnmaf_, __builtin_fmaf(-a, b, c))
TERNARY_FLOAT(fmsf_, __builtin_fmaf(a, b, -c))
BINARY_FLOAT(addfz, ftz(ftz(a) + ftz(b)))
BINARY_FLOAT(subfz, ftz(ftz(a) - ftz(b)))
BINARY_FLOAT(mulfz, ftz(ftz(a) * ftz(b)))
BINARY_FLOAT(divfz, ftz(ftz(a) / ftz(b)))
TERNARY_FLOAT(fmafz, ftz(__builtin_fmaf(ftz(a), ftz(b), ftz(c))))
BINARY_FLOAT(minf, fmin_(a, b))
BINARY_FLOAT(maxf, fmax_(a, b))
BINARY_FLOAT(minfN, fminN(a, b))
BINARY_FLOAT(maxfN, fmaxN(a, b))
TERNARY_FLOAT(min3f, fmin_(fmin_(a, b), c))
TERNARY_FLOAT(max3f, fmax_(fmax_(a, b), c))
TERNARY_FLOAT(min3fN, fminN(fminN(a, b), c))
TERNARY_FLOAT(max3fN, fmaxN(fmaxN(a, b), c))
UNARY(negf, u32, u32, a ^ 0x80000000u)
UNARY(absf, u32, u32, a & 0x7fffffffu)
BINARY(copysignf_, u32, u32, u32, (b & 0x7fffffffu) | (a & 0x80000000u))

// Functions are computed exactly and rounded.
static inline float rsqrt_of(float a) { return (float)(1.0 / __builtin_sqrt((double)a)); }
UNARY_FLOAT(sqrtf_, __builtin_sqrtf(a))
UNARY_FLOAT(sqrtfz, ftz(__builtin_sqrtf(ftz(a))))
UNARY_FLOAT(rsqrtf_, rsqrt_of(a))
UNARY_FLOAT(rsqrtfz, ftz(rsqrt_of(ftz(a))))
UNARY_FLOAT(rcpf, 1.0f / a)
UNARY_FLOAT(rcpfz, ftz(1.0f / ftz(a)))
UNARY_FLOAT(ex2f, (float)exp2((double)a))
UNARY_FLOAT(ex2fz, ftz((float)exp2((double)ftz(a))))
UNARY_FLOAT(lg2f, (float)log2((double)a))
UNARY_FLOAT(lg2fz, ftz((float)log2((double)ftz(a))))
UNARY_FLOAT(sinf_, (float)sin((double)a))
UNARY_FLOAT(cosf_, (float)cos((double)a))
UNARY_FLOAT(tanhf_, (float)tanh((double)a))

// Or as inexact as the hardware may be: up to one unit in the last place off, unless the result is exact. Which way
// depends on the operands alone.
static inline u32 hash(u32 a, u32 b) {
  u32 h = a * 2654435761u ^ b * 2246822519u ^ 3266489917u;
  h ^= h >> 15;
  h *= 2246822519u;
  return h ^ h >> 13;
}
static inline float blur(float f, bool exact, u32 h) {
  u32 exponent = fbits(f) & 0x7f800000;
  return exact || exponent == 0x7f800000 || exponent == 0 ? f : bitsf(fbits(f) + (int)(h % 3) - 1);
}
static inline float blurred_quotient(float f, float a, float b) {
  return blur(f, __builtin_fmaf(a / b, b, -a) == 0, hash(fbits(a), fbits(b)));
}
static inline float blurred_sqrt(float f, float a) {
  return blur(f, __builtin_fmaf(__builtin_sqrtf(a), __builtin_sqrtf(a), -a) == 0, hash(fbits(a), 5));
}
static inline float blurred_rsqrt(float f, float a) {
  return blur(f, (fbits(a) & 0x7fffff) == 0 && (fbits(a) >> 23 & 1), hash(fbits(a), 7));
}
BINARY_FLOAT(divf_inexact, blurred_quotient(a / b, a, b))
BINARY_FLOAT(divfz_inexact, blurred_quotient(ftz(ftz(a) / ftz(b)), a, b))
UNARY_FLOAT(sqrtf_inexact, blurred_sqrt(__builtin_sqrtf(a), a))
UNARY_FLOAT(sqrtfz_inexact, blurred_sqrt(ftz(__builtin_sqrtf(ftz(a))), a))
UNARY_FLOAT(rsqrtf_inexact, blurred_rsqrt(rsqrt_of(a), a))
UNARY_FLOAT(rsqrtfz_inexact, blurred_rsqrt(ftz(rsqrt_of(ftz(a))), a))

// ---- float64, float16, bfloat16, and pairs of float32
BINARY_DOUBLE(addd, a + b)
BINARY_DOUBLE(subd, a - b)
BINARY_DOUBLE(muld, a * b)
BINARY_DOUBLE(divd, a / b)
BINARY_DOUBLE(mind, dmin_(a, b))
BINARY_DOUBLE(maxd, dmax_(a, b))
TERNARY(fmad, double, double, double, double, canon(__builtin_fma(a, b, c)))
UNARY(sqrtd, double, double, canon(__builtin_sqrt(a)))
UNARY(rcpd, double, double, canon(1.0 / a))
UNARY(negd, u64, u64, a ^ 0x8000000000000000ull)
UNARY(absd, u64, u64, a & 0x7fffffffffffffffull)
BINARY(copysignd, u64, u64, u64, (b & 0x7fffffffffffffffull) | (a & 0x8000000000000000ull))
BINARY_HALF(addh, f2h(h2f(a) + h2f(b)))
BINARY_HALF(subh, f2h(h2f(a) - h2f(b)))
BINARY_HALF(mulh, f2h(h2f(a) * h2f(b)))
BINARY_HALF(minh, f2h(fmin_(h2f(a), h2f(b))))
BINARY_HALF(maxh, f2h(fmax_(h2f(a), h2f(b))))
TERNARY(fmah, u16, u16, u16, u16, d2h((double)h2f(a) * h2f(b) + h2f(c)))
BINARY_HALF(addb, f2bf(bf2f(a) + bf2f(b)))
BINARY_HALF(subb, f2bf(bf2f(a) - bf2f(b)))
BINARY_HALF(mulb, f2bf(bf2f(a) * bf2f(b)))
BINARY_HALF(minb, f2bf(fmin_(bf2f(a), bf2f(b))))
BINARY_HALF(maxb, f2bf(fmax_(bf2f(a), bf2f(b))))
TERNARY(fmab, u16, u16, u16, u16, f2bf(__builtin_fmaf(bf2f(a), bf2f(b), bf2f(c))))
#define PAIR(NAME, EXPRESSION)                                                                                         \
  static void NAME(Warp &w, const Instruction &in) {                                                                   \
    REGISTERS(float, to, 0);                                                                                           \
    REGISTERS(const float, from_a, 1);                                                                                 \
    REGISTERS(const float, from_b, 2);                                                                                 \
    REGISTERS(const float, from_c, 3);                                                                                 \
    for (int i = 0; i < 64; i++) {                                                                                     \
      [[maybe_unused]] float a = from_a[i], b = from_b[i], c = from_c[i];                                              \
      if (w.mask >> (i >> 1) & 1) to[i] = canon(EXPRESSION);                                                           \
    }                                                                                                                  \
  }
PAIR(addx2, a + b)
PAIR(subx2, a - b)
PAIR(mulx2, a * b)
PAIR(fmax2, __builtin_fmaf(a, b, c))

// ---- predicates: the lanes are the bits of a number
static inline void set_predicate(Warp &w, u32 at, u32 value) {
  u32 &to = *(u32 *)(w.registers + at);
  to = (to & ~w.mask) | (value & w.mask);
}
#define PREDICATE(NAME, EXPRESSION)                                                                                    \
  static void NAME(Warp &w, const Instruction &in) {                                                                   \
    [[maybe_unused]] u32 a = *(u32 *)(w.registers + in.at[1]), b = *(u32 *)(w.registers + in.at[2]);                   \
    set_predicate(w, in.at[0], EXPRESSION);                                                                            \
  }
PREDICATE(pand, a & b)
PREDICATE(por, a | b)
PREDICATE(pxor, a ^ b)
PREDICATE(pnot, ~a)
PREDICATE(pmov, a)

// setp.lt.and.s32 p|q, a, b, r: p = (a < b) & r, q = !(a < b) & r
static inline void set_compared(Warp &w, const Instruction &in, u32 p) {
  if (in.details) {
    const Details &x = *in.details;
    u32 q = ~p;
    if (x.has_mask) {
      u32 r = *(u32 *)(w.registers + x.mask) ^ (x.mask_negated ? FULL : 0);
      p = x.op == aAnd ? p & r : x.op == aOr ? p | r : p ^ r;
      q = x.op == aAnd ? q & r : x.op == aOr ? q | r : q ^ r;
    }
    if (x.predicate_to != ~0u) set_predicate(w, x.predicate_to, q);
  }
  set_predicate(w, in.at[0], p);
}
#ifdef __AVX512DQ__
static inline u32 sign_bits(const i32 *lanes) {
  return (u32)_mm512_movepi32_mask(_mm512_loadu_si512(lanes)) |
         (u32)_mm512_movepi32_mask(_mm512_loadu_si512(lanes + 16)) << 16;
}
#else
static inline u32 sign_bits(const i32 *lanes) {
  u32 bits = 0;
  for (int l = 0; l < 32; l++) bits |= (u32)(lanes[l] < 0) << l;
  return bits;
}
#endif
#define COMPARISON(NAME, T, CONVERT, EXPRESSION)                                                                       \
  static void NAME(Warp &w, const Instruction &in) {                                                                   \
    REGISTERS(const T, from_a, 1);                                                                                     \
    REGISTERS(const T, from_b, 2);                                                                                     \
    alignas(64) i32 holds[32];                                                                                         \
    for (int l = 0; l < 32; l++) {                                                                                     \
      auto a = CONVERT(from_a[l]), b = CONVERT(from_b[l]);                                                             \
      holds[l] = (EXPRESSION) ? -1 : 0;                                                                                \
    }                                                                                                                  \
    set_compared(w, in, sign_bits(holds));                                                                             \
  }
#define COMPARE_INTEGERS(N, U, S)                                                                                      \
  COMPARISON(eq##N, U, , a == b)                                                                                       \
  COMPARISON(ne##N, U, , a != b)                                                                                       \
  COMPARISON(ltu##N, U, , a < b)                                                                                       \
  COMPARISON(leu##N, U, , a <= b)                                                                                      \
  COMPARISON(gtu##N, U, , a > b)                                                                                       \
  COMPARISON(geu##N, U, , a >= b)                                                                                      \
  COMPARISON(lts##N, S, , a < b)                                                                                       \
  COMPARISON(les##N, S, , a <= b)                                                                                      \
  COMPARISON(gts##N, S, , a > b)                                                                                       \
  COMPARISON(ges##N, S, , a >= b)
FOR_INTEGERS(COMPARE_INTEGERS)
// With a NaN a comparison is false, or true if its name ends with u.
#define COMPARE_FLOATS(P, N, T, CONVERT)                                                                               \
  COMPARISON(P##eq##N, T, CONVERT, a == b)                                                                             \
  COMPARISON(P##ne##N, T, CONVERT, a < b || a > b)                                                                     \
  COMPARISON(P##lt##N, T, CONVERT, a < b)                                                                              \
  COMPARISON(P##le##N, T, CONVERT, a <= b)                                                                             \
  COMPARISON(P##gt##N, T, CONVERT, a > b)                                                                              \
  COMPARISON(P##ge##N, T, CONVERT, a >= b)                                                                             \
  COMPARISON(P##equ##N, T, CONVERT, !(a < b || a > b))                                                                 \
  COMPARISON(P##neu##N, T, CONVERT, !(a == b))                                                                         \
  COMPARISON(P##ltu##N, T, CONVERT, !(a >= b))                                                                         \
  COMPARISON(P##leu##N, T, CONVERT, !(a > b))                                                                          \
  COMPARISON(P##gtu##N, T, CONVERT, !(a <= b))                                                                         \
  COMPARISON(P##geu##N, T, CONVERT, !(a < b))                                                                          \
  COMPARISON(P##num##N, T, CONVERT, a == a && b == b)                                                                  \
  COMPARISON(P##nan##N, T, CONVERT, a != a || b != b)
COMPARE_FLOATS(f, 32, float, )
COMPARE_FLOATS(f, 64, double, )
COMPARE_FLOATS(h, 16, u16, h2f)
COMPARE_FLOATS(b, 16, u16, bf2f)

// ---- conversions: those that are frequent, then any
UNARY(cv64_u32, u64, u32, a)
UNARY(cv64_s32, i64, i32, a)
UNARY(cv32_64, u32, u64, a)
UNARY(cvf_s32, float, i32, a)
UNARY(cvf_bf, float, u16, bf2f(a))
UNARY(cvbf_f, u16, float, f2bf(a))
static void cvx2(Warp &w, const Instruction &in) {  // two float32 to a pair of halves; imm: float16, not bfloat16
  REGISTERS(u32, to, 0);
  REGISTERS(const float, high, 1);
  REGISTERS(const float, low, 2);
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1)
      to[l] = in.imm ? (u32)f2h(high[l]) << 16 | f2h(low[l]) : (u32)f2bf(high[l]) << 16 | f2bf(low[l]);
}
static void h_tf32(Warp &w, const Instruction &in) {  // imm: .rna, halves away from zero; else to even
  REGISTERS(u32, to, 0);
  REGISTERS(const u32, from, 1);
  for (int l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    u32 bits = from[l];
    if ((bits & 0x7f800000) != 0x7f800000) bits += in.imm ? 0x1000 : 0xfff + (bits >> 13 & 1);
    to[l] = bits & 0xffffe000u;
  }
}
static inline u64 low_bytes(u64 value, int bytes) { return bytes == 8 ? value : value & ((1ull << 8 * bytes) - 1); }
static inline double round_to_integer(double v, int mode) {
  return mode == 0 ? std::nearbyint(v) : mode == 1 ? std::trunc(v) : mode == 2 ? std::floor(v) : std::ceil(v);
}
// A float32 that is the nearest to v, moved to the side that the mode asks for.
template <class T>
static inline float to_side(float f, T v, int mode) {
  bool up = mode == 3 || (mode == 1 && v < 0), down = mode == 2 || (mode == 1 && v > 0);
  if (down && (T)f > v) return std::nextafter(f, -INFINITY);
  if (up && (T)f < v) return std::nextafter(f, INFINITY);
  return f;
}
static i128 integer_from(u64 raw, Type t) {
  return is_signed(t) ? (i128)(i64)extend(raw, bytes_of(t)) : (i128)low_bytes(raw, bytes_of(t));
}
static u64 integer_to_integer(i128 v, Type result, bool saturate) {
  int bits = 8 * bytes_of(result);
  if (saturate) {
    i128 low = is_signed(result) ? -((i128)1 << (bits - 1)) : 0;
    i128 high = is_signed(result) ? ((i128)1 << (bits - 1)) - 1 : ((i128)1 << bits) - 1;
    v = std::clamp(v, low, high);
  }
  return is_signed(result) ? extend((u64)v, bits / 8) : low_bytes((u64)v, bits / 8);
}
static u64 integer_to_float(i128 v, Type result, int mode) {
  if (result == f16) return f2h((float)(double)v);
  if (result == bf16) return f2bf((float)(double)v);
  if (result == f32) return fbits(mode ? to_side((float)v, v, mode) : (float)v);
  u64 bits;
  double d = (double)v;
  memcpy(&bits, &d, 8);
  return bits;
}
static u64 float_to_integer(double v, Type result, int mode) {
  if (v != v) return 0;
  int bits = 8 * bytes_of(result);
  double rounded = round_to_integer(v, mode);
  double high = std::ldexp(1.0, is_signed(result) ? bits - 1 : bits), low = is_signed(result) ? -high : 0;
  i128 integer = rounded >= high ? (i128)1 << 100 : rounded < low ? -((i128)1 << 100) : (i128)rounded;
  return integer_to_integer(integer, result, true);
}
static u64 float_to_float(double v, Type from, const Details &x) {
  u64 bits;
  if (x.integral) v = round_to_integer(v, x.mode);
  if (x.saturate) v = v != v ? 0 : std::clamp(v, 0.0, 1.0);
  if (x.result == f64) {
    v = canon(v);
    memcpy(&bits, &v, 8);
    return bits;
  }
  float f = (float)v;
  if (x.result == f32) {
    if (x.mode && !x.integral && v == v) f = to_side(f, v, x.mode);
    return fbits(canon(x.flush ? ftz(f) : f));
  }
  if (x.result == f16) return from == f64 ? d2h(v) : x.mode == 1 ? f2h_to_zero(f) : f2h(f);
  return x.mode == 1 && v == v ? fbits(f) >> 16 : f2bf(f);
}
static void h_cvt(Warp &w, const Instruction &in) {  // sizes: bytes of the registers, destination and source
  const Details &x = *in.details;
  for (int l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    u64 raw = get(w.registers, in.at[1], x.sizes[1], l), result;
    if (!is_float(x.type)) {
      i128 v = integer_from(raw, x.type);
      result = is_float(x.result) ? integer_to_float(v, x.result, x.mode) : integer_to_integer(v, x.result, x.saturate);
    } else {
      double v;
      if (x.type == f64) memcpy(&v, &raw, 8);
      else v = x.type == f32 ? bitsf(raw) : x.type == f16 ? h2f(raw) : bf2f(raw);
      if (x.flush && x.type == f32) v = ftz((float)v);
      result = is_float(x.result) ? float_to_float(v, x.type, x) : float_to_integer(v, x.result, x.mode);
    }
    put(w.registers, in.at[0], x.sizes[0], l, result);
  }
}
static void h_pack(Warp &w, const Instruction &in) {  // mov.b64 d, {a, b}
  const Details &x = *in.details;
  for (int l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    u64 value = 0;
    for (size_t i = 0, shift = 0; i < x.regs.size(); shift += 8 * x.sizes[i++])
      value |= get(w.registers, x.regs[i], x.sizes[i], l) << shift;
    put(w.registers, in.at[0], x.size, l, value);
  }
}
static void h_unpack(Warp &w, const Instruction &in) {  // mov.b64 {a, b}, d
  const Details &x = *in.details;
  for (int l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    u64 value = get(w.registers, in.at[1], x.size, l);
    for (size_t i = 0; i < x.regs.size(); i++) {
      if (x.sizes[i] > 0) put(w.registers, x.regs[i], x.sizes[i], l, value);
      value >>= 8 * std::abs(x.sizes[i]);
    }
  }
}
static void h_clock(Warp &w, const Instruction &in) {
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1) put(w.registers, in.at[0], in.imm, l, launch->executed);
}
