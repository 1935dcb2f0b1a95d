// What is checked at every access to memory, and what accesses are counted as.
#pragma once
#include "program.hpp"

// ---- reports
// An instruction in the PTX and in the source.
static string where(u32 pc) {
  const Instruction &in = launch->kernel->code[pc];
  string text = fmt("ptx:%d", in.line);
  const char *separator = " ";
  int at = in.location;
  for (int depth = 0; at >= 0 && depth < 8; depth++) {
    const Location &location = launch->kernel->locations[at];
    auto file = launch->kernel->files.find(location.file);
    string path = file == launch->kernel->files.end() ? "?" : file->second;
    text += separator + path.substr(path.rfind('/') + 1) + fmt(":%d", location.line);
    separator = " < ";
    at = location.inlined_at;
  }
  return text + "  `" + in.text + "`";
}
static string who(int thread) { return fmt("cta %u warp %d lane %d", launch->cta, thread >> 5, thread & 31); }

// The first finding of a kind at an instruction (or two) is described; others are counted.
static void report(const string &kind, u32 pc, u32 other_pc, const std::function<string()> &text, bool two = false) {
  string key = kind + "#" + std::to_string(pc) + "#" + std::to_string(other_pc);
  auto it = launch->reports.find(key);
  if (it != launch->reports.end()) it->second.count++;
  else launch->reports[key] = {kind, pc, other_pc, 1, text(), two};
}
static void report_two(const string &kind, u32 pc, u32 other_pc, const std::function<string()> &text) {
  report(kind, pc, other_pc, [&] { return text() + where(pc) + "  against  " + where(other_pc); }, true);
}
static u32 cta_of(u32 epoch) {
  u32 found = ~0u;
  for (auto [first, cta] : launch->ctas)
    if (first <= epoch) found = cta;
  return found;
}

// ---- races: what a thread does to a cell, against what others did to it and no barrier is between
enum Kind { READ, WRITE, ATOMIC };
struct Access {
  const Warp &warp;
  int thread;
  u32 pc;
  Kind kind;
  bool changed;       // by a write: not the same value again
  bool shared;        // memory of the program; else global
  u32 oldest;         // what was done in an earlier epoch is over: of the program, or of the launch
};

// Against another thread of the program, in the same epoch.
static __attribute__((noinline)) void check_thread(const Access &a, const char *how, bool same_value, int other,
                                                   u32 other_pc, u16 syncs, u16 collectives,
                                                   const std::function<string()> &place) {
  const char *kind = "race-warps";
  if (a.thread >> 5 == other >> 5) {
    if (syncs != a.warp.syncs) return;  // a bar.warp.sync is between
    kind = a.pc == other_pc                    ? "race-lanes-same-instruction"
           : collectives != a.warp.collectives ? "race-lanes-converged"
                                               : "race-lanes";
  }
  report_two(string(kind) + (same_value ? "/same-value" : "") + (a.shared ? " shared-" : " global-") + how, a.pc,
             other_pc, [&] {
               return who(a.thread) + " at " + place() +
                      fmt(", and thread warp %d lane %d, at ", other >> 5, other & 31);
             });
}
// Against another program of the launch.
static __attribute__((noinline)) void check_program(const Access &a, const char *how, bool same_value, u32 epoch,
                                                    u32 other_pc, const std::function<string()> &place) {
  report_two(string("race-ctas") + (same_value ? "/same-value" : "") + " global-" + how, a.pc, other_pc,
             [&] { return who(a.thread) + " at " + place() + fmt(", and cta %u: ", cta_of(epoch)); });
}
// Of an access against the last write of these bytes.
template <class Place>
static inline void check_last_write(const Cell &c, u8 mask, const Access &a, const Place &place) {
  if (c.write_epoch < a.oldest || !(c.write_mask & mask)) return;
  const bool was_atomic = c.write_flags & W_ATOMIC;
  if (a.kind == ATOMIC && was_atomic) return;
  const char *how = a.kind != READ ? "write-after-write" : was_atomic ? "read-after-atomic" : "read-after-write";
  const bool same_value = a.kind == READ ? !(c.write_flags & W_CHANGED) : !a.changed;
  if (c.write_epoch < launch->cta_epoch)
    check_program(a, was_atomic && a.kind == READ ? "read-after-write" : how, same_value, c.write_epoch, c.write_pc,
                  place);
  else if (c.write_epoch == launch->epoch && c.writer != a.thread)
    check_thread(a, how, same_value, c.writer, c.write_pc, c.write_syncs, c.write_collectives, place);
}
template <class Place>
static inline void read_cell(Cell &c, u8 mask, const Access &a, const Place &place) {
  check_last_write(c, mask, a, place);
  if (c.read_epoch != launch->epoch) {
    if (c.read_epoch >= a.oldest && c.read_epoch < launch->cta_epoch)
      c.older_read_epoch = c.read_epoch, c.older_read_pc = c.read_pc;
    c.read_epoch = launch->epoch;
    c.reader = c.reader2 = a.thread;
    c.read_pc = c.read_pc2 = a.pc;
    c.read_mask = mask;
    c.read_syncs = a.warp.syncs;
    c.read_collectives = a.warp.collectives;
    return;
  }
  c.read_mask |= mask;
  const bool same_warp = a.thread >> 5 == c.reader >> 5;
  if (a.thread == c.reader) c.read_pc = a.pc;
  else if (c.reader2 >> 5 == c.reader >> 5) c.reader2 = a.thread, c.read_pc2 = a.pc;  // rather of another warp
  if (same_warp) c.read_syncs = a.warp.syncs, c.read_collectives = a.warp.collectives;
}
template <class Place>
static inline void write_cell(Cell &c, u8 mask, const Access &a, const Place &place) {
  check_last_write(c, mask, a, place);
  if (c.read_epoch >= a.oldest && (c.read_mask & mask)) {
    if (c.read_epoch == launch->epoch) {
      const bool second = c.reader == a.thread || c.reader2 >> 5 != a.thread >> 5;
      const int reader = second ? c.reader2 : c.reader;
      if (reader != a.thread)
        check_thread(a, a.kind == ATOMIC ? "atomic-after-read" : "write-after-read", !a.changed, reader,
                     second ? c.read_pc2 : c.read_pc, c.read_syncs, c.read_collectives, place);
    } else if (c.read_epoch < launch->cta_epoch)
      check_program(a, "write-after-read", !a.changed, c.read_epoch, c.read_pc, place);
  }
  if (c.older_read_epoch >= a.oldest && c.older_read_epoch < launch->cta_epoch)
    check_program(a, "write-after-read", !a.changed, c.older_read_epoch, c.older_read_pc, place);
  c.write_epoch = launch->epoch;
  c.write_pc = a.pc;
  c.writer = a.thread;
  c.write_mask = mask;
  c.write_flags = (a.kind == ATOMIC ? W_ATOMIC : 0) | (a.changed ? W_CHANGED : 0);
  c.write_syncs = a.warp.syncs;
  c.write_collectives = a.warp.collectives;
  c.write_fences = a.warp.fences;
}
// All cells of the bytes begin .. begin + n - 1, each of which stands for 1 << shift of them.
template <class CellAt, class Place>
static inline void touch(u64 begin, u32 n, int shift, const Access &a, const CellAt &cell_at, const Place &place) {
  const u64 end = begin + n;
  while (begin < end) {
    const u64 first = begin >> shift << shift, stop = std::min<u64>(end, first + (1ull << shift));
    const u8 mask = ((1u << (stop - begin)) - 1) << (begin - first);
    Cell &cell = cell_at(first);
    if (a.kind == READ) read_cell(cell, mask, a, place);
    else write_cell(cell, mask, a, place);
    begin = stop;
  }
}
static string name_of(const Region *r) { return r->name.empty() ? "an allocation" : r->name; }
static string place_of(u64 address, const Region *r) {
  return fmt("global %s+%llu (of %llu bytes)", name_of(r).c_str(), (unsigned long long)(address - r->base),
             (unsigned long long)r->size);
}
static inline void touch_global(Region *r, u64 address, u32 n, Warp &w, int lane, u32 pc, Kind kind, bool changed) {
  const Access access{w, w.id * 32 + lane, pc, kind, changed, false, launch->launch_epoch};
  touch(address - r->base, n, r->shift, access, [&](u64 offset) -> Cell & { return *r->cell(offset); },
        [&] { return place_of(address, r); });
}
static inline void touch_shared(u32 offset, u32 n, Warp &w, int lane, u32 pc, Kind kind, bool changed) {
  const Access access{w, w.id * 32 + lane, pc, kind, changed, true, launch->cta_epoch};
  auto place = [&] { return fmt("shared+%u", offset); };
  auto cell = [&](u64 at) -> Cell & {
    if (u32 copied = launch->shared_copied[at >> 1])
      report_two("race-async", pc, copied - 1, [&] {
        return who(access.thread) + " at " + place() + ", which a cp.async not yet waited for writes: ";
      });
    return launch->shared_cells[at >> 1];
  };
  touch(offset, n, 1, access, cell, place);
}

// ---- bounds, alignment, and memory that nothing wrote
// Where the bytes are; null, and a report, outside of all tensors.
static inline u8 *global_at(Warp &w, const Details &x, int lane, u64 a, u32 n, bool store, Region *&r) {
  r = x.last;
  if (!(r && a >= r->base && a + n <= r->base + r->size)) {
    r = find_region(a, n);
    x.last = r;
  }
  if (__builtin_expect(!r, 0)) {
    report(store ? "oob-global-write" : "oob-global-read", w.pc, 0, [&] {
      Region *near = nearest_region(a);
      string s = "nothing is registered";
      if (near)
        s = fmt("%lld bytes %s %s of %llu bytes", std::llabs((long long)(a - near->base)),
                a >= near->base ? "behind the begin of" : "before", name_of(near).c_str(),
                (unsigned long long)near->size);
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
           [&] { return who(w.id * 32 + lane) + " reads " + place_of(a, r) + ", never written: " + where(w.pc); });
}
// What an address operand is in a lane.
static inline u64 address(const Warp &w, const Address &a, int lane) {
  if (a.size == 8) return a.offset + ((const u64 *)(w.registers + a.reg))[lane];
  return a.offset + (a.size == 4 ? ((const u32 *)(w.registers + a.reg))[lane] : 0);
}

// ---- costs
// Sectors of 32 bytes that a warp's access of n bytes each touches.
static void count_global(Warp &w, const u64 *addresses, u32 n, u32 pc) {
  std::unordered_set<u64> sectors;
  for (int l = 0; l < 32; l++)
    if (w.mask >> l & 1)
      for (u64 sector = addresses[l] >> 5; sector <= (addresses[l] + n - 1) >> 5; sector++) sectors.insert(sector);
  launch->kernel->n_sectors[pc] += sectors.size();
  launch->kernel->n_requests[pc]++;
}
// Turns that a warp's access to shared memory takes: 32 banks of 4 bytes, each of which answers for one word at a time.
// 8 bytes each are half a warp at a time, 16 bytes a quarter.
static void count_shared(Warp &w, const u32 *addresses, u32 n, u32 pc) {
  const int lanes = n <= 4 ? 32 : n == 8 ? 16 : 8;
  for (int begin = 0; begin < 32; begin += lanes) {
    std::unordered_set<u32> words[32];
    size_t turns = 0;
    for (int l = begin; l < begin + lanes; l++)
      if (w.mask >> l & 1)
        for (u32 word = addresses[l] >> 2; word <= (addresses[l] + n - 1) >> 2; word++) {
          words[word & 31].insert(word);
          turns = std::max(turns, words[word & 31].size());
        }
    launch->kernel->n_conflicts[pc] += turns ? turns - 1 : 0;
    launch->kernel->n_requests[pc] += turns;
  }
}

// ---- registers: lane l of the one at `at`
static inline void put(u8 *R, u32 at, int size, int l, u64 v) {
  switch (size) {
  case 2: ((u16 *)(R + at))[l] = v; break;
  case 4: ((u32 *)(R + at))[l] = v; break;
  case 8: ((u64 *)(R + at))[l] = v; break;
  default: ((u8 *)(R + at))[l] = v;
  }
}
static inline u64 get(const u8 *R, u32 at, int size, int l) {
  switch (size) {
  case 2: return ((const u16 *)(R + at))[l];
  case 4: return ((const u32 *)(R + at))[l];
  case 8: return ((const u64 *)(R + at))[l];
  }
  return 0;
}
static inline u64 extend(u64 v, int n) {
  return n == 1 ? (u64)(i64)(i8)v : n == 2 ? (u64)(i64)(i16)v : n == 4 ? (u64)(i64)(i32)v : v;
}
