// What the lanes of a warp do together.
#pragma once
#include "accesses.hpp"

static void h_shfl(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 out[32];
  const u32 *a = (u32 *)(w.registers + in.at[1]);
  const u32 *b = (u32 *)(w.registers + in.at[2]);
  const u32 *c = (u32 *)(w.registers + in.at[3]);
  u32 p = 0;
  for (int l = 0; l < 32; l++) {
    u32 cl = c[l] & 31, seg = c[l] >> 8 & 31, bv = b[l] & 31;
    int mx = (l & seg) | (cl & ~seg & 31), mn = l & seg, j = l;
    bool ok = true;
    switch (x.mode) {
    case 0: j = l - (int)bv; break;
    case 1: j = l + bv; break;
    case 2: j = l ^ bv; break;
    case 3: j = mn | (bv & ~seg & 31); break;
    }
    ok = x.mode == 0 ? j >= mx : j <= mx;
    if (!ok) j = l;
    else p |= 1u << l;
    if (!(w.mask >> j & 1) && (w.mask >> l & 1))
      report("shfl-from-inactive", w.pc, 0,
             [&] { return who(w.id * 32 + l) + fmt(" reads lane %d: ", j) + where(w.pc); });
    out[l] = a[j];
  }
  u32 *d = (u32 *)(w.registers + in.at[0]);
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1) d[l] = out[l];
  if (x.predicate_to != ~0u) {
    u32 &q = *(u32 *)(w.registers + x.predicate_to);
    q = (q & ~w.mask) | (p & w.mask);
  }
}
static void h_redux(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 *a = (u32 *)(w.registers + in.at[1]);
  int f = __builtin_ctz(w.mask);
  u32 r = a[f];
  for (int l = f + 1; l < 32; l++)
    if (w.mask >> l & 1) switch (x.op) {
      case aAdd: r += a[l]; break;
      case aAnd: r &= a[l]; break;
      case aOr: r |= a[l]; break;
      case aXor: r ^= a[l]; break;
      case aMin: r = x.type == s32 ? std::min((i32)r, (i32)a[l]) : std::min(r, a[l]); break;
      case aMax: r = x.type == s32 ? std::max((i32)r, (i32)a[l]) : std::max(r, a[l]); break;
      }
  u32 *d = (u32 *)(w.registers + in.at[0]);
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1) d[l] = r;
}
static void h_reduxf(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 *a = (u32 *)(w.registers + in.at[1]);
  int f = __builtin_ctz(w.mask);
  u32 mask = x.k ? 0x7fffffffu : ~0u;
  float r = bitsf(a[f] & mask);
  for (int l = f + 1; l < 32; l++)
    if (w.mask >> l & 1) {
      float v = bitsf(a[l] & mask);
      r = x.op == aMin ? (x.mode ? fminN(r, v) : fmin_(r, v)) : (x.mode ? fmaxN(r, v) : fmax_(r, v));
    }
  r = canon(r);
  u32 *d = (u32 *)(w.registers + in.at[0]);
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1) d[l] = fbits(r);
}
static void h_vote(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 p = *(u32 *)(w.registers + in.at[1]);
  if (in.imm) p = ~p;
  p &= w.mask;
  if (x.mode == 3) {
    u32 *d = (u32 *)(w.registers + in.at[0]);
    for (int l = 0; l < 32; l++)
      if (w.mask >> l & 1) d[l] = p;
    return;
  }
  bool r = x.mode == 0 ? p == w.mask : x.mode == 1 ? p != 0 : (p == w.mask || !p);
  u32 &d = *(u32 *)(w.registers + in.at[0]);
  d = (d & ~w.mask) | (r ? w.mask : 0);
}
static void h_match(Warp &w, const Instruction &in) {
  const u32 *a = (u32 *)(w.registers + in.at[1]);
  u32 o[32];
  for (int l = 0; l < 32; l++) {
    u32 r = 0;
    for (int j = 0; j < 32; j++)
      if ((w.mask >> j & 1) && a[j] == a[l]) r |= 1u << j;
    o[l] = r;
  }
  u32 *d = (u32 *)(w.registers + in.at[0]);
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1) d[l] = o[l];
}
static void h_elect(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  int f = __builtin_ctz(w.mask);
  if (x.has_destination) {
    u32 *d = (u32 *)(w.registers + in.at[0]);
    for (int l = 0; l < 32; l++)
      if (w.mask >> l & 1) d[l] = f;
  }
  u32 &q = *(u32 *)(w.registers + x.predicate_to);
  q = (q & ~w.mask) | (1u << f);
}
static void h_warpsync(Warp &w, const Instruction &) { w.syncs++; }
static void h_nop(Warp &, const Instruction &) {}
static void h_activemask(Warp &w, const Instruction &in) {
  u32 *d = (u32 *)(w.registers + in.at[0]);
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1) d[l] = w.mask;
}
