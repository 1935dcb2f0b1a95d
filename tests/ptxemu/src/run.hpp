// Programs one after another; in each, warps that take turns; in each, lanes that part at branches and meet again.
#pragma once
#include "parser.hpp"

static u32 warps_of(u32 threads) { return (threads + 31) / 32; }

// ---- barriers
static u32 alive_lanes(const Warp &w) {
  u32 mask = 0;
  for (auto &part : w.parts) mask |= part.mask;
  return mask;
}
// Let the waiting threads go on if all have come.
static void release(int barrier) {
  int needed = launch->expected[barrier] > 0 ? launch->expected[barrier] : (int)launch->alive;
  if (launch->arrived[barrier] == 0 || launch->arrived[barrier] < needed) return;
  for (auto &w : launch->warps)
    for (auto &part : w.parts)
      if (part.state == AT_BARRIER && part.barrier == barrier) part.state = RUNS, part.pc++;
  bool all = launch->arrived[barrier] >= (int)launch->alive;
  launch->arrived[barrier] = 0;
  if (all) {
    launch->epoch = ++last_epoch;
    for (auto &w : launch->warps) w.weight = 1.0 / (1 + draw() % 16);
  } else
    report("partial-barrier", 0, 0,
           [&] { return fmt("barrier %d of %d threads is not known to the race check", barrier, needed); });
}
static void end_threads(u32 count) {
  launch->alive -= count;
  for (int i = 0; i < 16; i++)
    if (launch->arrived[i]) release(i);
}

// ---- lanes that part and meet
static u32 last_token = 0;
// The lanes of a part are about to go different ways.
static void part_ways(Part &part, u32 pc) {
  u32 meeting = launch->kernel->meets[pc];
  if (meeting == ~0u) return;
  if (!part.tokens.empty() && part.tokens.back().pc == meeting) return;
  part.tokens.push_back({meeting, part.mask, ++last_token});
}
static bool awaits(const Part &part, u32 token) { return part.state == AWAITS_TOKEN && part.tokens.back().id == token; }
// Join the parts that have all come to where they meet, or that wait for each other at one instruction. Whether any
// did.
static bool join(Warp &w) {
  u32 alive = alive_lanes(w);
  for (size_t i = 0; i < w.parts.size(); i++) {
    Part &part = w.parts[i];
    if (part.state == AWAITS_TOKEN) {
      const Token token = part.tokens.back();
      u32 come = 0;
      for (auto &other : w.parts)
        if (awaits(other, token.id)) come |= other.mask;
      if (come != (token.mask & alive)) continue;
      Part joined = part;
      joined.mask = come;
      joined.tokens.pop_back();
      bool again = !joined.tokens.empty() && joined.tokens.back().pc == joined.pc;
      joined.state = again ? AWAITS_TOKEN : RUNS;
      vector<Part> rest;
      for (auto &other : w.parts)
        if (!awaits(other, token.id)) rest.push_back(other);
      rest.push_back(joined);
      w.parts = rest;
      return true;
    }
    if (part.state == AWAITS_LANES)
      for (size_t j = 0; j < w.parts.size(); j++) {
        Part &other = w.parts[j];
        if (j == i || other.pc != part.pc || other.state != AWAITS_LANES) continue;
        part.mask |= other.mask;
        part.state = RUNS;
        if (other.tokens.size() < part.tokens.size()) part.tokens = other.tokens;
        w.parts.erase(w.parts.begin() + j);
        return true;
      }
  }
  return false;
}
static void meet(Warp &w) {
  while (w.parts.size() > 1 && join(w)) {}
}

// ---- one warp
static void stop(const char *kind, u32 pc, const string &text) {
  report(kind, pc, 0, [&] { return text + where(pc); });
  launch->dead = true;
}
static string lane_of(const Warp &w, u32 mask) { return who(w.id * 32 + __builtin_ctz(mask)); }

// The lanes of part `index` go to one place or several. True: to one, which is the new pc.
static bool branch(Warp &w, size_t index, u32 &pc, const std::map<u32, u32> &to) {
  if (to.size() == 1) {
    pc = to.begin()->first;
    return true;
  }
  part_ways(w.parts[index], pc);
  Part part = w.parts[index];
  w.parts.erase(w.parts.begin() + index);
  for (auto [target, mask] : to) {
    part.pc = target;
    part.mask = mask;
    w.parts.push_back(part);
  }
  return false;
}
// Lanes of part `index` end.
static void finish_lanes(Warp &w, size_t index, u32 pc, u32 mask) {
  Instruction wait_for_all;
  wait_for_all.imm = 0;
  if (!w.product_groups.empty()) h_wgwait(w, wait_for_all);
  wait_for_all.imm = -1;
  h_waitgroup(w, wait_for_all);
  Part &part = w.parts[index];
  if (mask == part.mask) w.parts.erase(w.parts.begin() + index);
  else part.mask &= ~mask, part.pc = pc + 1;
  end_threads(__builtin_popcount(mask));
}
// Lanes of part `index` come to a barrier.
static void arrive(Warp &w, size_t index, u32 pc, u32 mask, const Instruction &in) {
  u32 alive = alive_lanes(w);
  if (mask != alive)
    report("barrier-divergence", pc, 0,
           [&] { return lane_of(w, mask) + fmt(": lanes %08x of %08x: ", mask, alive) + where(pc); });
  Part &part = w.parts[index];
  Part others = part;
  others.mask &= ~mask;
  others.pc = pc + 1;
  part.mask = mask;
  part.pc = pc;
  part.state = AT_BARRIER;
  part.barrier = in.imm;
  if (others.mask) w.parts.push_back(others);
  launch->arrived[in.imm] += __builtin_popcount(mask);
  launch->expected[in.imm] = in.target;
  release(in.imm);
}

// Run a warp until its turn is over, it waits, or it has ended.
static void run(Warp &w) {
  Kernel *kernel = launch->kernel;
  w.quantum = 1 + draw() % (1ull << draw() % (launch->options.max_quantum + 1));
  while (!w.parts.empty()) {
    meet(w);
    int chosen = -1, runnable = 0;
    for (size_t i = 0; i < w.parts.size(); i++)
      if (w.parts[i].state == RUNS && draw() % ++runnable == 0) chosen = i;
    if (chosen < 0) return;
    u32 pc = w.parts[chosen].pc;
    const u32 lanes = w.parts[chosen].mask;
    const u32 meeting = w.parts[chosen].tokens.empty() ? ~0u : w.parts[chosen].tokens.back().pc;
    for (bool together = true; together;) {
      if (pc == meeting) {
        w.parts[chosen].pc = pc;
        w.parts[chosen].state = AWAITS_TOKEN;
        break;
      }
      const Instruction &in = kernel->code[pc];
      u32 mask = lanes;
      if (in.predicated) {
        u32 predicate = *(const u32 *)(w.registers + in.predicate);
        mask &= in.negated ? ~predicate : predicate;
      }
      w.pc = pc;
      w.mask = mask;
      kernel->n_executed[pc]++;
      kernel->n_threads[pc] += __builtin_popcount(mask);
      if (__builtin_expect(++launch->executed > launch->options.budget, 0))
        return stop("budget", pc,
                    lane_of(w, lanes) + fmt(": more than %llu instructions: an endless loop? ",
                                            (unsigned long long)launch->options.budget));
      bool may_switch = in.may_switch;
      if (!mask) {
        pc++;
        may_switch &= in.flow != SYNC;
      } else switch (in.flow) {
        case NORMAL:
          in.run(w, in);
          pc++;
          break;
        case BRA:
          if (mask == lanes) pc = in.target;
          else together = branch(w, chosen, pc, {{pc + 1, lanes & ~mask}, {(u32)in.target, mask}});
          break;
        case BRX: {
          const u32 *index = (const u32 *)(w.registers + in.at[0]);
          std::map<u32, u32> to;
          if (lanes & ~mask) to[pc + 1] = lanes & ~mask;
          for (int l = 0; l < 32; l++)
            if (mask >> l & 1) {
              if (index[l] >= in.details->targets.size()) return stop("brx-out-of-range", pc, "");
              to[in.details->targets[index[l]]] |= 1u << l;
            }
          together = branch(w, chosen, pc, to);
          break;
        }
        case RET:
          finish_lanes(w, chosen, pc, mask);
          together = false;
          break;
        case BAR:
          arrive(w, chosen, pc, mask, in);
          together = false;
          break;
        case SYNC: {
          u32 alive = alive_lanes(w), wanted = ((const u32 *)(w.registers + in.at[4]))[__builtin_ctz(mask)] & alive;
          if ((mask & wanted) != wanted) {
            if (mask == lanes && lanes != alive) {
              w.parts[chosen].pc = pc;
              w.parts[chosen].state = AWAITS_LANES;
              together = false;
              break;
            }
            report("sync-divergence", pc, 0, [&] {
              return lane_of(w, mask) + fmt(": lanes %08x execute it for %08x: ", mask, wanted) + where(pc);
            });
          }
          w.collectives++;
          in.run(w, in);
          pc++;
          break;
        }
        case TRAP: return stop("trap", pc, lane_of(w, mask) + ": ");
        }
      if (together && may_switch && --w.quantum <= 0) {
        w.parts[chosen].pc = pc;
        return;
      }
    }
  }
}

// ---- one program
static void set_specials(Warp &w) {
  auto set = [&](const string &name, const std::function<u32(u32)> &value) {
    auto it = launch->kernel->specials.find(name);
    if (it == launch->kernel->specials.end()) return;
    for (u32 l = 0; l < 32; l++) ((u32 *)(w.registers + it->second))[l] = value(l);
  };
  set("%tid.x", [&](u32 l) { return 32 * w.id + l; });
  set("%ntid.x", [](u32) { return launch->threads; });
  const string axes = "xyz";
  for (int i = 0; i < 3; i++) {
    set("%ctaid."s + axes[i], [&](u32) { return launch->program[i]; });
    set("%nctaid."s + axes[i], [&](u32) { return launch->grid[i]; });
  }
  for (const char *name : {"%tid.y", "%tid.z", "%smid", "%cluster_ctaid.x", "%cluster_ctarank"})
    set(name, [](u32) { return 0; });
  for (const char *name : {"%ntid.y", "%ntid.z", "%cluster_nctaid.x", "%cluster_nctarank"})
    set(name, [](u32) { return 1; });
  set("%nsmid", [](u32) { return 132; });
  set("%laneid", [](u32 l) { return l; });
  set("%warpid", [&](u32) { return w.id; });
  set("%lanemask_eq", [](u32 l) { return 1u << l; });
  set("%lanemask_lt", [](u32 l) { return (1u << l) - 1; });
  set("%lanemask_le", [](u32 l) { return (u32)((2ull << l) - 1); });
  set("%lanemask_gt", [](u32 l) { return ~(u32)((2ull << l) - 1); });
  set("%lanemask_ge", [](u32 l) { return ~((1u << l) - 1); });
  set("%dynamic_smem_size", [](u32) { return launch->shared_bytes; });
}
static string deadlock() {
  string text = fmt("cta %u:", launch->cta);
  for (auto &w : launch->warps)
    for (auto &part : w.parts)
      text += fmt(" warp %d lanes %08x %s at ", w.id, part.mask,
                  part.state == AT_BARRIER ? "wait for the barrier" : "wait to converge") +
              where(part.pc) + ";";
  return text;
}
static void run_program(u8 *registers) {
  Kernel *kernel = launch->kernel;
  launch->epoch = launch->cta_epoch = ++last_epoch;
  launch->ctas.push_back({launch->epoch, launch->cta});
  launch->alive = launch->threads;
  std::fill_n(launch->arrived, 16, 0);
  std::fill_n(launch->expected, 16, 0);
  launch->shared.assign(launch->shared_bytes + 16, 0xcd);
  launch->shared_written.assign(launch->shared_bytes + 16, 0);
  std::fill(launch->shared_copied.begin(), launch->shared_copied.end(), 0);
  launch->warps.clear();
  launch->warps.resize(warps_of(launch->threads));
  for (size_t i = 0; i < launch->warps.size(); i++) {
    Warp &w = launch->warps[i];
    w.id = i;
    w.registers = registers + i * kernel->registers.size();
    std::copy(kernel->registers.begin(), kernel->registers.end(), w.registers);
    set_specials(w);
    u32 lanes = std::min(32u, launch->threads - 32 * (u32)i);
    w.parts.push_back({0, lanes == 32 ? FULL : (1u << lanes) - 1, RUNS, 0, {}});
    w.weight = 1.0 / (1 + draw() % 16);
  }
  while (!launch->dead) {
    vector<Warp *> ready;
    bool any = false;
    double total = 0;
    for (auto &w : launch->warps) {
      meet(w);
      any |= !w.parts.empty();
      for (auto &part : w.parts)
        if (part.state == RUNS) {
          ready.push_back(&w);
          total += w.weight;
          break;
        }
    }
    if (!any) return;
    if (ready.empty()) {
      report("deadlock", 0, 0, deadlock);
      launch->dead = true;
      return;
    }
    Warp *next = ready[0];
    if (launch->options.policy == LAST_WARP) next = ready.back();
    if (launch->options.policy == ANY_WARP) {
      double left = (draw() & 0xffffff) / (double)0x1000000 * total;
      for (Warp *w : ready)
        if ((left -= w->weight) <= 0) {
          next = w;
          break;
        }
    }
    run(*next);
  }
}
