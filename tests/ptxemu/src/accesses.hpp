// Loads, stores, atomics and asynchronous copies.
#pragma once
#include "numbers.hpp"

static void h_ld_global(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u64 a[32];
  u32 n = x.size * x.n;
  u32 m = w.mask;
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_global(w, a, n, w.pc);
  int f = __builtin_ctz(m);
  bool uni = true;
  for (int l = 0; l < 32; l++)
    if ((m >> l & 1) && a[l] != a[f]) {
      uni = false;
      break;
    }
  if (uni) {
    Region *r;
    u8 *p = global_at(w, x, f, a[f], n, false, r);
    if (p) {
      touch_global(r, a[f], n, w, f, w.pc, READ, false);
      int g = 31 - __builtin_clz(m);
      if (g != f) touch_global(r, a[f], n, w, g, w.pc, READ, false);
    }
    if (p && r->hooked) check_poison(w, f, r, a[f], n);
    for (int i = 0; i < x.n; i++) {
      if (x.sizes[i] < 0) continue;
      u64 v = 0;
      if (p) memcpy(&v, p + i * x.size, x.size);
      if (x.sign) v = extend(v, x.size);
      for (int l = 0; l < 32; l++)
        if (m >> l & 1) put(w.registers, x.regs[i], x.sizes[i], l, v);
    }
    return;
  }
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      Region *r;
      u8 *p = global_at(w, x, l, a[l], n, false, r);
      if (p) touch_global(r, a[l], n, w, l, w.pc, READ, false);
      if (p && r->hooked) check_poison(w, l, r, a[l], n);
      for (int i = 0; i < x.n; i++) {
        if (x.sizes[i] < 0) continue;
        u64 v = 0;
        if (p) memcpy(&v, p + i * x.size, x.size);
        if (x.sign) v = extend(v, x.size);
        put(w.registers, x.regs[i], x.sizes[i], l, v);
      }
    }
}
static void h_st_global(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u64 a[32];
  u32 n = x.size * x.n;
  u32 m = w.mask;
  u8 buf[16];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_global(w, a, n, w.pc);
  int start = draw() & 31;
  for (int q = 0; q < 32; q++) {
    int l = (q + start) & 31;
    if (!(m >> l & 1)) continue;
    Region *r;
    u8 *p = global_at(w, x, l, a[l], n, true, r);
    if (!p) continue;
    for (int i = 0; i < x.n; i++) {
      u64 v = get(w.registers, x.regs[i], x.sizes[i], l);
      memcpy(buf + i * x.size, &v, x.size);
    }
    touch_global(r, a[l], n, w, l, w.pc, WRITE, memcmp(p, buf, n) != 0);
    memcpy(p, buf, n);
  }
}
static void h_ld_shared(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 a[32];
  u32 n = x.size * x.n;
  u32 m = w.mask;
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_shared(w, a, n, w.pc);
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      u8 *p = shared_at(w, l, a[l], n, false);
      if (p) {
        touch_shared(a[l], n, w, l, w.pc, READ, false);
        check_written(w, l, a[l], n);
      }
      for (int i = 0; i < x.n; i++) {
        if (x.sizes[i] < 0) continue;
        u64 v = 0;
        if (p) memcpy(&v, p + i * x.size, x.size);
        if (x.sign) v = extend(v, x.size);
        put(w.registers, x.regs[i], x.sizes[i], l, v);
      }
    }
}
static void h_st_shared(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 a[32];
  u32 n = x.size * x.n;
  u32 m = w.mask;
  u8 buf[16];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_shared(w, a, n, w.pc);
  int start = draw() & 31;
  for (int q = 0; q < 32; q++) {
    int l = (q + start) & 31;
    if (!(m >> l & 1)) continue;
    u8 *p = shared_at(w, l, a[l], n, true);
    if (!p) continue;
    for (int i = 0; i < x.n; i++) {
      u64 v = get(w.registers, x.regs[i], x.sizes[i], l);
      memcpy(buf + i * x.size, &v, x.size);
    }
    touch_shared(a[l], n, w, l, w.pc, WRITE, memcmp(p, buf, n) != 0 || !launch->shared_written[a[l]]);
    memcpy(p, buf, n);
    memset(launch->shared_written.data() + a[l], 1, n);
  }
}
static void h_ld_param(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  for (int i = 0; i < x.n; i++) {
    u64 v = 0;
    memcpy(&v, launch->parameters + x.to.offset + i * x.size, x.size);
    if (x.sign) v = extend(v, x.size);
    for (int l = 0; l < 32; l++)
      if (w.mask >> l & 1) put(w.registers, x.regs[i], x.sizes[i], l, v);
  }
}

enum AOp { aAdd, aMin, aMax, aExch, aCas, aAnd, aOr, aXor, aInc, aDec };
template <class T>
static T atomic_op(int op, T o, T b, T c) {
  switch (op) {
  case aAdd: return o + b;
  case aMin: return b < o ? b : o;
  case aMax: return b > o ? b : o;
  case aExch: return b;
  case aCas: return o == b ? c : o;
  }
  if constexpr (std::is_integral<T>::value) {
    switch (op) {
    case aAnd: return o & b;
    case aOr: return o | b;
    case aXor: return o ^ b;
    case aInc: return o >= b ? 0 : o + 1;
    case aDec: return o == 0 || o > b ? b : o - 1;
    }
  }
  throw Fail("atomic");
}
static void atomic_apply(const Details &x, u8 *p, u64 b, u64 c, u64 &old) {
  u64 o = 0;
  memcpy(&o, p, x.size);
  old = o;
  u64 r = 0;
#define AT(T)                                                                                                          \
  {                                                                                                                    \
    T ov, bv, cv;                                                                                                      \
    memcpy(&ov, &o, sizeof(T));                                                                                        \
    memcpy(&bv, &b, sizeof(T));                                                                                        \
    memcpy(&cv, &c, sizeof(T));                                                                                        \
    T rv = atomic_op<T>(x.op, ov, bv, cv);                                                                             \
    memcpy(&r, &rv, sizeof(T));                                                                                        \
  }
  switch (x.type) {
  case u32_:
  case b32: AT(u32) break;
  case s32: AT(i32) break;
  case u64_:
  case b64: AT(u64) break;
  case s64: AT(i64) break;
  case f32: AT(float) break;
  case f64: AT(double) break;
  case u16_:
  case b16: AT(u16) break;
  case f16: r = f2h(h2f(o) + h2f(b)); break;
  case bf16: r = f2bf(bf2f(o) + bf2f(b)); break;
  case f16x2: r = (u32)f2h(h2f(o) + h2f(b)) | (u32)f2h(h2f(o >> 16) + h2f(b >> 16)) << 16; break;
  case bf16x2: r = (u32)f2bf(bf2f(o) + bf2f(b)) | (u32)f2bf(bf2f(o >> 16) + bf2f(b >> 16)) << 16; break;
  default: throw Fail("atomic type");
  }
  memcpy(p, &r, x.size);
}
static void h_atom(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 m = w.mask;
  u64 a[32];
  u32 sa[32];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l), sa[l] = a[l];
  u32 n = x.size * x.n;
  if (launch->options.count) {
    if (x.global) count_global(w, a, n, w.pc);
    else count_shared(w, sa, n, w.pc);
  }
  int start = draw() & 31;
  for (int q = 0; q < 32; q++) {
    int l = (q + start) & 31;
    if (!(m >> l & 1)) continue;
    Region *r = nullptr;
    u8 *p;
    if (x.global) {
      p = global_at(w, x, l, a[l], n, true, r);
      if (p) touch_global(r, a[l], n, w, l, w.pc, ATOMIC, true);
      if (p && r->hooked && x.op != aExch) check_poison(w, l, r, a[l], n);
    } else {
      p = shared_at(w, l, a[l], n, true);
      if (p) {
        touch_shared(a[l], n, w, l, w.pc, ATOMIC, true);
        check_written(w, l, a[l], n);
      }
    }
    for (int i = 0; i < x.n; i++) {
      u64 b = get(w.registers, x.regs_b[i], x.sizes[i], l),
          c = x.regs_c.empty() ? 0 : get(w.registers, x.regs_c[i], x.sizes[i], l), old = 0;
      if (p) atomic_apply(x, p + i * x.size, b, c, old);
      if (x.has_destination) put(w.registers, x.regs[i], x.sizes[i], l, old);
    }
  }
}

// ---- cp.async: lands when it is issued or when it is waited for, as the seed says
static void land(Warp &w, const Copy &p, bool copy) {
  for (u32 b = p.to & ~1u; b < p.to + p.bytes; b += 2) launch->shared_copied[b >> 1] = 0;
  if (copy) { memcpy(launch->shared.data() + p.to, p.data, p.bytes); }
  u32 pc = w.pc;
  w.pc = p.pc;
  touch_shared(p.to, p.bytes, w, p.thread & 31, p.pc, WRITE, true);
  w.pc = pc;
  memset(launch->shared_written.data() + p.to, 1, p.bytes);
}
static void h_cpasync(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 m = w.mask;
  u64 ga[32];
  u32 sa[32];
  u32 full = w.mask, read = 0;
  for (int l = 0; l < 32; l++) {
    sa[l] = address(w, x.to, l);
    ga[l] = address(w, x.from, l);
    u32 sz = x.has_mask ? ((u32 *)(w.registers + x.mask))[l] : x.size;
    if ((m >> l & 1) && sz) read |= 1u << l;
  }
  if (launch->options.count) {
    w.mask = read;
    if (read) count_global(w, ga, x.size, w.pc);
    w.mask = full;
  }
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      u32 sz = x.has_mask ? ((u32 *)(w.registers + x.mask))[l] : x.size;
      u8 *p = shared_at(w, l, sa[l], x.size, true);
      if (!p) continue;
      Copy q;
      memset(q.data, 0, 16);
      q.to = sa[l];
      q.bytes = x.size;
      q.thread = w.id * 32 + l;
      q.pc = w.pc;
      if (sz) {
        Region *r;
        u8 *g = global_at(w, x, l, ga[l], sz, false, r);
        if (g) {
          touch_global(r, ga[l], sz, w, l, w.pc, READ, false);
          if (r->hooked) check_poison(w, l, r, ga[l], sz);
          memcpy(q.data, g, sz);
        }
      }
      touch_shared(sa[l], x.size, w, l, w.pc, WRITE, true);
      for (u32 b = sa[l] & ~1u; b < sa[l] + x.size; b += 2) launch->shared_copied[b >> 1] = w.pc + 1;
      if (draw() & 1) memcpy(p, q.data, q.bytes);
      w.open_copies.push_back(q);
    }
}
static void h_commit(Warp &w, const Instruction &) {
  w.copy_groups.push_back(std::move(w.open_copies));
  w.open_copies.clear();
}
static void h_waitgroup(Warp &w, const Instruction &in) {
  while ((i64)w.copy_groups.size() > std::max<i64>(in.imm, 0)) {
    for (auto &p : w.copy_groups.front()) land(w, p, true);
    w.copy_groups.erase(w.copy_groups.begin());
  }
  if (in.imm < 0) {
    for (auto &p : w.open_copies) land(w, p, true);
    w.open_copies.clear();
  }
}
