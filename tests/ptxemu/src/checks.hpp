// What is checked at every access to memory, and what accesses are counted as.
#pragma once
#include "program.hpp"

static string where(u32 pc) {
  const Instruction &in = launch->kernel->code[pc];
  string s = fmt("ptx:%d", in.line);
  int l = in.location, guard = 0;
  const char *sep = " ";
  while (l >= 0 && guard++ < 8) {
    const Location &q = launch->kernel->locations[l];
    string f = launch->kernel->files.count(q.file) ? launch->kernel->files[q.file] : "?";
    auto p = f.rfind('/');
    s += sep + (p == string::npos ? f : f.substr(p + 1)) + fmt(":%d", q.line);
    sep = " < ";
    l = q.inlined_at;
  }
  return s + "  `" + in.text + "`";
}
static void report(const string &kind, u32 pc, u32 opc, const std::function<string()> &text, bool two = false) {
  string key = kind + "#" + std::to_string(pc) + "#" + std::to_string(opc);
  auto it = launch->reports.find(key);
  if (it != launch->reports.end()) {
    it->second.count++;
    return;
  }
  launch->reports[key] = {kind, pc, opc, 1, text(), two};
}
static string who(int tid) { return fmt("cta %u warp %d lane %d", launch->cta, tid >> 5, tid & 31); }
static u32 cta_of_epoch(u32 e) {
  u32 c = ~0u;
  for (auto &p : launch->ctas)
    if (p.first <= e) c = p.second;
    else break;
  return c;
}

static inline bool ordered_class(const Warp &w, int tid, int otid, u16 owb, u16 owc, u32 pc, u32 opc,
                                 const char *&cls) {
  if (tid >> 5 != otid >> 5) {
    cls = "race-warps";
    return true;
  }
  if (owb != w.syncs) return false;
  cls = pc == opc ? "race-lanes-same-instruction" : owc != w.collectives ? "race-lanes-converged" : "race-lanes";
  return true;
}

static __attribute__((noinline)) void race(const char *cls, const char *type, bool same, u32 pc, u32 opc, int tid,
                                           int otid, const string &at, bool lo_shared) {
  string kind = string(cls) + (same ? "/same-value" : "");
  report(
      kind + (lo_shared ? " shared-" : " global-") + type, pc, opc,
      [&] {
        return fmt("%s at %s, and thread warp %d lane %d, at ", who(tid).c_str(), at.c_str(), otid >> 5, otid & 31) +
               where(pc) + "  against  " + where(opc);
      },
      true);
}
static __attribute__((noinline)) void cross(const char *type, bool same, u32 pc, u32 opc, int tid, u32 oe,
                                            const string &at) {
  report(
      string("race-ctas") + (same ? "/same-value" : "") + " global-" + type, pc, opc,
      [&] {
        return fmt("%s at %s, and cta %u: ", who(tid).c_str(), at.c_str(), cta_of_epoch(oe)) + where(pc) +
               "  against  " + where(opc);
      },
      true);
}

template <class At>
static inline void touch_read(Cell &c, u8 mask, Warp &w, int tid, u32 pc, const At &at, u32 lo, bool shared) {
  const u32 E = launch->epoch;
  if (c.write_epoch >= lo && (c.write_mask & mask)) {
    if (c.write_epoch >= launch->cta_epoch) {
      if (c.write_epoch == E && c.writer != tid) {
        const char *k;
        if (ordered_class(w, tid, c.writer, c.write_syncs, c.write_collectives, pc, c.write_pc, k))
          race(k, c.write_flags & W_ATOMIC ? "read-after-atomic" : "read-after-write", !(c.write_flags & W_CHANGED), pc,
               c.write_pc, tid, c.writer, at(), shared);
      }
    } else cross("read-after-write", !(c.write_flags & W_CHANGED), pc, c.write_pc, tid, c.write_epoch, at());
  }
  if (c.read_epoch != E) {
    if (c.read_epoch >= lo && c.read_epoch < launch->cta_epoch)
      c.older_read_epoch = c.read_epoch, c.older_read_pc = c.read_pc;
    c.read_epoch = E;
    c.reader = c.reader2 = tid;
    c.read_pc = c.read_pc2 = pc;
    c.read_mask = mask;
    c.read_syncs = w.syncs;
    c.read_collectives = w.collectives;
  } else {
    c.read_mask |= mask;
    if (tid != c.reader) {
      if (c.reader2 == c.reader || ((c.reader2 >> 5) == (c.reader >> 5))) c.reader2 = tid, c.read_pc2 = pc;
    } else c.read_pc = pc, c.read_syncs = w.syncs, c.read_collectives = w.collectives;
    if ((tid >> 5) == (c.reader >> 5)) c.read_syncs = w.syncs, c.read_collectives = w.collectives;
  }
}
template <class At>
static inline void touch_write(Cell &c, u8 mask, Warp &w, int tid, u32 pc, bool atomic, bool changed, const At &at,
                               u32 lo, bool shared) {
  const u32 E = launch->epoch;
  if (c.write_epoch >= lo && (c.write_mask & mask) && !(atomic && (c.write_flags & W_ATOMIC))) {
    if (c.write_epoch >= launch->cta_epoch) {
      if (c.write_epoch == E && c.writer != tid) {
        const char *k;
        if (ordered_class(w, tid, c.writer, c.write_syncs, c.write_collectives, pc, c.write_pc, k))
          race(k, "write-after-write", !changed, pc, c.write_pc, tid, c.writer, at(), shared);
      }
    } else cross("write-after-write", !changed, pc, c.write_pc, tid, c.write_epoch, at());
  }
  if (c.read_epoch >= lo && (c.read_mask & mask)) {
    if (c.read_epoch == E) {
      int o = c.reader != tid ? c.reader : c.reader2;
      u32 opc = c.reader != tid ? c.read_pc : c.read_pc2;
      if (c.reader2 >> 5 != tid >> 5) o = c.reader2, opc = c.read_pc2;
      if (o != tid) {
        const char *k;
        if (ordered_class(w, tid, o, c.read_syncs, c.read_collectives, pc, opc, k))
          race(k, atomic ? "atomic-after-read" : "write-after-read", !changed, pc, opc, tid, o, at(), shared);
      }
    } else if (c.read_epoch < launch->cta_epoch)
      cross("write-after-read", !changed, pc, c.read_pc, tid, c.read_epoch, at());
  }
  if (c.older_read_epoch >= lo && c.older_read_epoch < launch->cta_epoch)
    cross("write-after-read", !changed, pc, c.older_read_pc, tid, c.older_read_epoch, at());
  c.write_epoch = E;
  c.write_pc = pc;
  c.writer = tid;
  c.write_mask = mask;
  c.write_flags = (atomic ? W_ATOMIC : 0) | (changed ? W_CHANGED : 0);
  c.write_syncs = w.syncs;
  c.write_collectives = w.collectives;
  c.write_fences = w.fences;
}

static string at_global(u64 a, Region *r) {
  return r ? fmt("global %s+%llu (of %llu bytes)", r->name.empty() ? "allocation" : r->name.c_str(),
                 (unsigned long long)(a - r->base), (unsigned long long)r->size)
           : fmt("global 0x%llx", (unsigned long long)a);
}
enum Kind { READ, WRITE, ATOMIC };
static inline void touch_global(Region *r, u64 a, u32 n, Warp &w, int lane, u32 pc, Kind kind, bool changed) {
  u64 off = a - r->base;
  int sh = r->shift;
  u32 G = 1u << sh;
  u64 b = off, e = off + n;
  int tid = w.id * 32 + lane;
  auto at = [&] { return at_global(a, r); };
  while (b < e) {
    u64 g = b & ~(u64)(G - 1);
    u64 stop = std::min(e, g + G);
    u8 mask = ((1u << (stop - b)) - 1) << (b - g);
    Cell &c = *r->cell(g);
    if (kind == READ) touch_read(c, mask, w, tid, pc, at, launch->launch_epoch, false);
    else touch_write(c, mask, w, tid, pc, kind == ATOMIC, changed, at, launch->launch_epoch, false);
    b = stop;
  }
}
static inline void touch_shared(u32 off, u32 n, Warp &w, int lane, u32 pc, Kind kind, bool changed) {
  u32 b = off, e = off + n;
  int tid = w.id * 32 + lane;
  auto at = [&] { return fmt("shared+%u", off); };
  while (b < e) {
    u32 g = b & ~1u, stop = std::min(e, g + 2);
    u8 mask = ((1u << (stop - b)) - 1) << (b - g);
    Cell &c = launch->shared_cells[g >> 1];
    if (launch->shared_copied[g >> 1])
      report(
          "race-async", pc, launch->shared_copied[g >> 1] - 1,
          [&] {
            return who(tid) + " at " + at() + ", which a cp.async not yet waited for writes: " + where(pc) +
                   "  against  " + where(launch->shared_copied[g >> 1] - 1);
          },
          true);
    if (kind == READ) touch_read(c, mask, w, tid, pc, at, launch->cta_epoch, true);
    else touch_write(c, mask, w, tid, pc, kind == ATOMIC, changed, at, launch->cta_epoch, true);
    b = stop;
  }
}

// where the bytes are, or null (reported)
static inline u8 *global_at(Warp &w, const Details &x, int lane, u64 a, u32 n, bool store, Region *&r) {
  r = x.last;
  if (!(r && a >= r->base && a + n <= r->base + r->size)) {
    r = find_region(a, n);
    x.last = r;
  }
  if (__builtin_expect(!r, 0)) {
    report(store ? "oob-global-write" : "oob-global-read", w.pc, 0, [&] {
      Region *q = nearest_region(a);
      string s = q ? a >= q->base
                         ? fmt("%lld bytes behind the begin of %s of %llu bytes", (long long)(a - q->base),
                               q->name.empty() ? "an allocation" : q->name.c_str(), (unsigned long long)q->size)
                         : fmt("%lld bytes before %s of %llu bytes", (long long)(q->base - a),
                               q->name.empty() ? "an allocation" : q->name.c_str(), (unsigned long long)q->size)
                   : "nothing is registered";
      return who(w.id * 32 + lane) +
             fmt(" %s %u bytes at 0x%llx, ", store ? "writes" : "reads", n, (unsigned long long)a) + s + ": " +
             where(w.pc);
    });
    return nullptr;
  }
  if (__builtin_expect((a & (n - 1)) != 0, 0))
    report("misaligned-global", w.pc, 0, [&] {
      return who(w.id * 32 + lane) + fmt(" %u bytes at 0x%llx: ", n, (unsigned long long)a) + where(w.pc);
    });
  return (u8 *)a;
}
static inline u8 *shared_at(Warp &w, int lane, u32 a, u32 n, bool store) {
  if (__builtin_expect((u64)a + n > launch->shared_bytes, 0)) {
    report(store ? "oob-shared-write" : "oob-shared-read", w.pc, 0, [&] {
      return who(w.id * 32 + lane) + fmt(" %u bytes at shared+%u of %u: ", n, a, launch->shared_bytes) + where(w.pc);
    });
    return nullptr;
  }
  if (__builtin_expect((a & (n - 1)) != 0, 0))
    report("misaligned-shared", w.pc, 0,
           [&] { return who(w.id * 32 + lane) + fmt(" %u bytes at shared+%u: ", n, a) + where(w.pc); });
  return launch->shared.data() + a;
}
static inline void check_written(Warp &w, int lane, u32 a, u32 n) {
  for (u32 i = 0; i < n; i++)
    if (!launch->shared_written[a + i]) {
      report("uninit-shared", w.pc, 0,
             [&] { return who(w.id * 32 + lane) + fmt(" reads shared+%u: ", a) + where(w.pc); });
      return;
    }
}
static inline void check_poison(Warp &w, int lane, Region *r, u64 a, u32 n) {
  bool bad = false;
  if (n >= 4) {
    for (u32 i = 0; i < n; i += 4) {
      u32 v;
      memcpy(&v, (u8 *)a + i, 4);
      bad |= v == POISON;
    }
  } else if (n == 2) {
    u16 v;
    memcpy(&v, (u8 *)a, 2);
    bad = v == 0x7fbb;
  }
  if (bad)
    report("uninit-global", w.pc, 0,
           [&] { return who(w.id * 32 + lane) + " reads " + at_global(a, r) + ", never written: " + where(w.pc); });
}
// What an address operand is in a lane.
static inline u64 address(const Warp &w, const Address &a, int lane) {
  if (a.size == 8) return a.offset + ((const u64 *)(w.registers + a.reg))[lane];
  return a.offset + (a.size == 4 ? ((const u32 *)(w.registers + a.reg))[lane] : 0);
}

static void count_global(Warp &w, const u64 *a, u32 n, u32 pc) {
  u64 seen[256];
  int ns = 0;
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1)
      for (u64 s = a[l] >> 5; s <= (a[l] + n - 1) >> 5; s++) {
        bool f = false;
        for (int i = ns - 1; i >= 0; i--)
          if (seen[i] == s) {
            f = true;
            break;
          }
        if (!f && ns < 256) seen[ns++] = s;
      }
  launch->kernel->n_sectors[pc] += ns;
  launch->kernel->n_requests[pc] += 1;
}
static void count_shared(Warp &w, const u32 *a, u32 n, u32 pc) {
  int per = n <= 4 ? 32 : n == 8 ? 16 : 8;
  int waves = 0, ideal = 0;
  for (int b = 0; b < 32; b += per) {
    u32 words[32][8];
    u8 nw[32] = {0};
    int mx = 0;
    bool any = false;
    for (int l = b; l < b + per; l++)
      if (w.mask >> l & 1) {
        any = true;
        for (u32 q = a[l] >> 2; q <= (a[l] + n - 1) >> 2; q++) {
          int k = q & 31;
          bool f = false;
          for (int i = 0; i < nw[k] && i < 8; i++)
            if (words[k][i] == q) f = true;
          if (!f) {
            if (nw[k] < 8) words[k][nw[k]] = q;
            nw[k]++;
            mx = std::max<int>(mx, nw[k]);
          }
        }
      }
    waves += mx;
    ideal += any;
  }
  launch->kernel->n_conflicts[pc] += waves - ideal;
  launch->kernel->n_requests[pc] += waves;
}

static inline void put(u8 *R, u32 off, int size, int l, u64 v) {
  switch (size) {
  case 2: ((u16 *)(R + off))[l] = v; break;
  case 4: ((u32 *)(R + off))[l] = v; break;
  case 8: ((u64 *)(R + off))[l] = v; break;
  default: ((u8 *)(R + off))[l] = v;
  }
}
static inline u64 get(const u8 *R, u32 off, int size, int l) {
  switch (size) {
  case 2: return ((const u16 *)(R + off))[l];
  case 4: return ((const u32 *)(R + off))[l];
  case 8: return ((const u64 *)(R + off))[l];
  }
  return 0;
}
static inline u64 extend(u64 v, int n) {
  return n == 1 ? (u64)(i64)(i8)v : n == 2 ? (u64)(i64)(i16)v : n == 4 ? (u64)(i64)(i32)v : v;
}
