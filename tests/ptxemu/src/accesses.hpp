// Loads, stores, atomics and asynchronous copies.
#pragma once
#include "numbers.hpp"

// What a lane has loaded goes to its registers: zeros where that was out of bounds.
static inline void deliver(Warp &w, const Details &x, int lane, const u8 *bytes) {
  for (int i = 0; i < x.n; i++) {
    if (x.sizes[i] < 0) continue;
    u64 value = 0;
    if (bytes) memcpy(&value, bytes + i * x.size, x.size);
    put(w.registers, x.regs[i], x.sizes[i], lane, x.sign ? extend(value, x.size) : value);
  }
}
// What a lane stores.
static inline void collect(const Warp &w, const Details &x, int lane, u8 *bytes) {
  for (int i = 0; i < x.n; i++) {
    u64 value = get(w.registers, x.regs[i], x.sizes[i], lane);
    memcpy(bytes + i * x.size, &value, x.size);
  }
}
// Lanes of the mask, beginning with a random one: which of several stores to one place is the last is not defined.
static inline void in_random_order(u32 mask, const std::function<void(int)> &run) {
  int start = draw() & 31;
  for (int i = 0; i < 32; i++) {
    int lane = (i + start) & 31;
    if (mask >> lane & 1) run(lane);
  }
}

static void h_ld_global(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 n = x.size * x.n, mask = w.mask;
  u64 a[32];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_global(w, a, n, w.pc);
  const int first = __builtin_ctz(mask), last = 31 - __builtin_clz(mask);
  bool uniform = true;
  for (int l = first; l <= last && uniform; l++) uniform = !(mask >> l & 1) || a[l] == a[first];
  const u8 *bytes = nullptr;
  for (int l = first; l <= last; l++) {
    if (!(mask >> l & 1)) continue;
    if (!uniform || l == first || l == last) {  // of many lanes that read one place, two are enough for the checks
      Region *region;
      bytes = global_at(w, x, l, a[l], n, false, region);
      if (bytes) touch_global(region, a[l], n, w, l, w.pc, READ, false);
      if (bytes && region->hooked) check_poison(w, l, region, a[l], n);
    }
    deliver(w, x, l, bytes);
  }
}
static void h_st_global(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 n = x.size * x.n;
  u64 a[32];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_global(w, a, n, w.pc);
  in_random_order(w.mask, [&](int l) {
    Region *region;
    u8 bytes[32], *to = global_at(w, x, l, a[l], n, true, region);
    if (!to) return;
    collect(w, x, l, bytes);
    touch_global(region, a[l], n, w, l, w.pc, WRITE, memcmp(to, bytes, n) != 0);
    memcpy(to, bytes, n);
  });
}
static void h_ld_shared(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 n = x.size * x.n;
  u32 a[32];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_shared(w, a, n, w.pc);
  for (int l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    const u8 *bytes = shared_at(w, l, a[l], n, false);
    if (bytes) {
      touch_shared(a[l], n, w, l, w.pc, READ, false);
      check_written(w, l, a[l], n);
    }
    deliver(w, x, l, bytes);
  }
}
// Bytes that a lane stores in shared memory, which is all there.
static inline void store_shared(Warp &w, int lane, u32 at, u32 n, const u8 *bytes) {
  u8 *to = launch->shared.data() + at;
  touch_shared(at, n, w, lane, w.pc, WRITE, memcmp(to, bytes, n) != 0 || !launch->shared_written[at]);
  memcpy(to, bytes, n);
  memset(launch->shared_written.data() + at, 1, n);
}
static void h_st_shared(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 n = x.size * x.n;
  u32 a[32];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  if (launch->options.count) count_shared(w, a, n, w.pc);
  in_random_order(w.mask, [&](int l) {
    u8 bytes[32];
    if (!shared_at(w, l, a[l], n, true)) return;
    collect(w, x, l, bytes);
    store_shared(w, l, a[l], n, bytes);
  });
}
static void h_ld_param(Warp &w, const Instruction &in) {
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1) deliver(w, *in.details, l, launch->parameters + in.details->to.offset);
}

// ---- atomics
enum AtomicOperation { aAdd, aMin, aMax, aExch, aCas, aAnd, aOr, aXor, aInc, aDec };
template <class T>
static T atomic_result(int op, T old, T b, T c) {
  switch (op) {
  case aAdd: return old + b;
  case aMin: return b < old ? b : old;
  case aMax: return b > old ? b : old;
  case aExch: return b;
  case aCas: return old == b ? c : old;
  }
  if constexpr (std::is_integral<T>::value) {
    switch (op) {
    case aAnd: return old & b;
    case aOr: return old | b;
    case aXor: return old ^ b;
    case aInc: return old >= b ? 0 : old + 1;
    case aDec: return old == 0 || old > b ? b : old - 1;
    }
  }
  throw Fail("atomic operation");
}
template <class T>
static u64 atomic_bits(int op, u64 old, u64 b, u64 c) {
  T values[3];
  const u64 bits[3] = {old, b, c};
  for (int i = 0; i < 3; i++) memcpy(&values[i], &bits[i], sizeof(T));
  const T result = atomic_result<T>(op, values[0], values[1], values[2]);
  u64 found = 0;
  memcpy(&found, &result, sizeof(T));
  return found;
}
static u64 atomic(const Details &x, u64 old, u64 b, u64 c) {
  auto half = [](u64 p, u64 q) { return (u32)f2h(h2f(p) + h2f(q)); };
  auto bhalf = [](u64 p, u64 q) { return (u32)f2bf(bf2f(p) + bf2f(q)); };
  switch (x.type) {
  case u32_: case b32: return atomic_bits<u32>(x.op, old, b, c);
  case u64_: case b64: return atomic_bits<u64>(x.op, old, b, c);
  case u16_: case b16: return atomic_bits<u16>(x.op, old, b, c);
  case s32: return atomic_bits<i32>(x.op, old, b, c);
  case s64: return atomic_bits<i64>(x.op, old, b, c);
  case f32: return atomic_bits<float>(x.op, old, b, c);
  case f64: return atomic_bits<double>(x.op, old, b, c);
  default: break;
  }
  if (x.op != aAdd) throw Fail("atomic operation on halves");
  switch (x.type) {
  case f16: return half(old, b);
  case bf16: return bhalf(old, b);
  case f16x2: return half(old, b) | half(old >> 16, b >> 16) << 16;
  case bf16x2: return bhalf(old, b) | bhalf(old >> 16, b >> 16) << 16;
  default: throw Fail("type of an atomic");
  }
}
static void h_atom(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 n = x.size * x.n;
  u64 a[32];
  u32 in_shared[32];
  for (int l = 0; l < 32; l++) in_shared[l] = a[l] = address(w, x.to, l);
  if (launch->options.count) {
    if (x.global) count_global(w, a, n, w.pc);
    else count_shared(w, in_shared, n, w.pc);
  }
  in_random_order(w.mask, [&](int l) {
    Region *region;
    u8 *to = x.global ? global_at(w, x, l, a[l], n, true, region) : shared_at(w, l, in_shared[l], n, true);
    if (to && x.global) {
      touch_global(region, a[l], n, w, l, w.pc, ATOMIC, true);
      if (region->hooked && x.op != aExch) check_poison(w, l, region, a[l], n);
    } else if (to) {
      touch_shared(in_shared[l], n, w, l, w.pc, ATOMIC, true);
      check_written(w, l, in_shared[l], n);
    }
    for (int i = 0; i < x.n; i++) {
      const u64 b = get(w.registers, x.regs_b[i], x.sizes[i], l);
      const u64 c = x.regs_c.empty() ? 0 : get(w.registers, x.regs_c[i], x.sizes[i], l);
      u64 old = 0;
      if (to) {
        memcpy(&old, to + i * x.size, x.size);
        const u64 result = atomic(x, old, b, c);
        memcpy(to + i * x.size, &result, x.size);
      }
      if (x.has_destination) put(w.registers, x.regs[i], x.sizes[i], l, old);
    }
  });
}

// ---- cp.async: lands when it is issued or when it is waited for, as the seed says
static void mark_copied(u32 at, u32 bytes, u32 by) {
  for (u32 b = at & ~1u; b < at + bytes; b += 2) launch->shared_copied[b >> 1] = by;
}
static void land(Warp &w, const Copy &copy) {
  mark_copied(copy.to, copy.bytes, 0);
  memcpy(launch->shared.data() + copy.to, copy.data, copy.bytes);
  touch_shared(copy.to, copy.bytes, w, copy.thread & 31, copy.pc, WRITE, true);
  memset(launch->shared_written.data() + copy.to, 1, copy.bytes);
}
static void h_cpasync(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  const u32 n = x.size, mask = w.mask;
  u64 from[32];
  u32 to[32], read[32], readers = 0;  // bytes that are read; the others are zero
  for (int l = 0; l < 32; l++) {
    to[l] = address(w, x.to, l);
    from[l] = address(w, x.from, l);
    read[l] = x.has_mask ? ((u32 *)(w.registers + x.mask))[l] : n;
    if ((mask >> l & 1) && read[l]) readers |= 1u << l;
  }
  if (launch->options.count && readers) {
    w.mask = readers;
    count_global(w, from, n, w.pc);
    w.mask = mask;
  }
  for (int l = 0; l < 32; l++) {
    u8 *place = mask >> l & 1 ? shared_at(w, l, to[l], n, true) : nullptr;
    if (!place) continue;
    Copy copy{to[l], n, {}, w.id * 32 + l, w.pc};
    Region *region;
    if (const u8 *bytes = read[l] ? global_at(w, x, l, from[l], read[l], false, region) : nullptr) {
      touch_global(region, from[l], read[l], w, l, w.pc, READ, false);
      if (region->hooked) check_poison(w, l, region, from[l], read[l]);
      memcpy(copy.data, bytes, read[l]);
    }
    touch_shared(to[l], n, w, l, w.pc, WRITE, true);
    mark_copied(to[l], n, w.pc + 1);
    if (draw() & 1) memcpy(place, copy.data, n);
    w.open_copies.push_back(copy);
  }
}
static void h_commit(Warp &w, const Instruction &) {
  w.copy_groups.push_back(std::move(w.open_copies));
  w.open_copies.clear();
}
static void h_waitgroup(Warp &w, const Instruction &in) {
  while ((i64)w.copy_groups.size() > std::max<i64>(in.imm, 0)) {
    for (auto &copy : w.copy_groups.front()) land(w, copy);
    w.copy_groups.erase(w.copy_groups.begin());
  }
  if (in.imm < 0) {
    for (auto &copy : w.open_copies) land(w, copy);
    w.open_copies.clear();
  }
}
