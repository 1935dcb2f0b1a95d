// Products of matrices, and how their operands come from shared memory.
#pragma once
#include "accesses.hpp"

// ---- 8 x 8 matrices of halves, whose rows the lanes of a quarter address
static void count_rows(Warp &w, int matrix, const u32 *addresses) {
  const u32 mask = w.mask;
  w.mask = 0xffu << (8 * matrix);
  if (launch->options.count) count_shared(w, addresses, 16, w.pc);
  w.mask = mask;
}
static void h_ldmatrix(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 a[32];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  for (int i = 0; i < x.n; i++) {
    u16 matrix[8][8] = {};
    count_rows(w, i, a);
    for (int r = 0; r < 8; r++) {
      const int l = 8 * i + r;
      const u8 *bytes = shared_at(w, l, a[l], 16, false);
      if (!bytes) continue;
      touch_shared(a[l], 16, w, l, w.pc, READ, false);
      check_written(w, l, a[l], 16);
      memcpy(matrix[r], bytes, 16);
    }
    u32 *to = (u32 *)(w.registers + x.regs[i]);
    for (int l = 0; l < 32; l++) {
      const int r = l >> 2, c = 2 * (l & 3);
      to[l] = x.transposed ? matrix[c][r] | (u32)matrix[c + 1][r] << 16 : matrix[r][c] | (u32)matrix[r][c + 1] << 16;
    }
  }
}
static void h_stmatrix(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  u32 a[32];
  for (int l = 0; l < 32; l++) a[l] = address(w, x.to, l);
  for (int i = 0; i < x.n; i++) {
    u16 matrix[8][8];
    count_rows(w, i, a);
    const u32 *from = (u32 *)(w.registers + x.regs[i]);
    for (int l = 0; l < 32; l++) {
      const int r = l >> 2, c = 2 * (l & 3);
      (x.transposed ? matrix[c][r] : matrix[r][c]) = from[l];
      (x.transposed ? matrix[c + 1][r] : matrix[r][c + 1]) = from[l] >> 16;
    }
    for (int r = 0; r < 8; r++) {
      const int l = 8 * i + r;
      if (shared_at(w, l, a[l], 16, true)) store_shared(w, l, a[l], 16, (const u8 *)matrix[r]);
    }
  }
}

// ---- mma: lane l has row l / 4 and two columns of every 8 x 8 part
static void h_mma(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  if (x.type == f64) {
    double A[8][4], B[4][8];
    for (int l = 0; l < 32; l++) {
      A[l >> 2][l & 3] = ((double *)(w.registers + x.regs_b[0]))[l];
      B[l & 3][l >> 2] = ((double *)(w.registers + x.regs_c[0]))[l];
    }
    for (int l = 0; l < 32; l++)
      for (int j = 0; j < 2; j++) {
        int r = l >> 2, c = (l & 3) * 2 + j;
        double s = ((double *)(w.registers + x.regs_d[j]))[l];
        for (int k = 0; k < 4; k++) s = std::fma(A[r][k], B[k][c], s);
        ((double *)(w.registers + x.regs[j]))[l] = canon(s);
      }
    return;
  }
  float A[16][16], BT[8][16];
  if (x.type == b32) {
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      for (size_t j = 0; j < x.regs_b.size(); j++)
        A[g + 8 * (j & 1)][t + 4 * (j >> 1)] = bitsf(((u32 *)(w.registers + x.regs_b[j]))[l] & 0xffffe000u);
      for (size_t j = 0; j < x.regs_c.size(); j++)
        BT[g][t + 4 * j] = bitsf(((u32 *)(w.registers + x.regs_c[j]))[l] & 0xffffe000u);
    }
  } else {
    auto cv = [&](u16 v) { return x.type == f16 ? h2f(v) : bf2f(v); };
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      for (size_t j = 0; j < x.regs_b.size(); j++) {
        u32 v = ((u32 *)(w.registers + x.regs_b[j]))[l];
        int r = g + 8 * (j & 1), c = 2 * t + 8 * (j >> 1);
        A[r][c] = cv(v);
        A[r][c + 1] = cv(v >> 16);
      }
      for (size_t j = 0; j < x.regs_c.size(); j++) {
        u32 v = ((u32 *)(w.registers + x.regs_c[j]))[l];
        BT[g][2 * t + 8 * j] = cv(v);
        BT[g][2 * t + 8 * j + 1] = cv(v >> 16);
      }
    }
  }
  float D[16][8];
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 8; c++) {
      double s = 0;
      for (int k = 0; k < x.k; k++) s += (double)A[r][k] * (double)BT[c][k];
      int l = (r & 7) * 4 + c / 2, j = (c & 1) + 2 * (r >> 3);
      s += (double)((float *)(w.registers + x.regs_d[j]))[l];
      D[r][c] = canon((float)s);
    }
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 8; c++) {
      int l = (r & 7) * 4 + c / 2, j = (c & 1) + 2 * (r >> 3);
      ((float *)(w.registers + x.regs[j]))[l] = D[r][c];
    }
}

// ---- wgmma: every warp of the four computes its 16 rows when it is issued; what it read must stay until it is waited
// for
static inline u32 wg_address(u64 desc, bool mn, u32 row, u32 kbyte, u32 es) {  // row: of M or N; kbyte: k * es
  u32 start = (desc & 0x3fff) << 4, lbo = (desc >> 16 & 0x3fff) << 4, sbo = (desc >> 32 & 0x3fff) << 4;
  int mode = desc >> 62;
  u32 width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16, a;
  if (!mn) a = start + (row & 7) * width + (row >> 3) * sbo + (mode ? kbyte : (kbyte & 15) + (kbyte >> 4) * lbo);
  else {
    u32 k = kbyte / es, b = row * es;
    if (mode) a = start + b % width + b / width * lbo + (k & 7) * width + (k >> 3) * sbo;
    else a = start + (b & 15) + (b >> 4) * sbo + (k & 7) * 16 + (k >> 3) * lbo;
  }
  u32 x = mode == 1 ? (a >> 7 & 7) << 4 : mode == 2 ? (a >> 7 & 3) << 4 : mode == 3 ? (a >> 7 & 1) << 4 : 0;
  return a ^ x;
}
static void wg_read(Warp &w, u32 a) {  // 16 bytes
  if ((u64)a + 16 > launch->shared_bytes) {
    shared_at(w, 0, a, 16, false);
    return;
  }
  check_written(w, 0, a, 16);
  for (u32 i = a >> 1; i < (a >> 1) + 8; i++) {
    const Cell &c = launch->shared_cells[i];
    const bool fenced = w.fence_epoch >= c.write_epoch || launch->warps[c.writer >> 5].fences != c.write_fences;
    if (c.write_epoch < launch->cta_epoch || fenced) continue;
    report_two("proxy-fence-missing", w.pc, c.write_pc,
               [&] { return who(w.id * 32) + fmt(" reads shared+%u through the asynchronous proxy: ", a); });
    break;
  }
  touch_shared(a, 16, w, 0, w.pc, READ, false);
  w.open_reads.push_back({a, w.pc, launch->epoch});
}
static void h_wgmma(Warp &w, const Instruction &in) {
  const Details &x = *in.details;
  int N = x.n, es = x.size, R = w.id & 3;
  static thread_local float A[16][16], B[16][256];
  u8 *S = launch->shared.data();
  auto val = [&](u32 a) -> float {
    if ((u64)a + es > launch->shared_bytes) return 0;
    if (es == 4) {
      u32 v;
      memcpy(&v, S + a, 4);
      return bitsf(v & 0xffffe000u);
    }
    u16 v;
    memcpy(&v, S + a, 2);
    return x.type == f16 ? h2f(v) : bf2f(v);
  };
  if (x.regs_b.empty()) {
    u64 d = ((u64 *)(w.registers + x.matrix_a))[0];
    std::map<u32, char> seen;
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < x.k; k++) {
        u32 a = wg_address(d, x.transposed, 16 * R + r, k * es, es);
        seen[a & ~15u] = 1;
        A[r][k] = val(a);
      }
    for (auto &q : seen) wg_read(w, q.first);
  } else
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      for (size_t j = 0; j < 4; j++) {
        u32 v = ((u32 *)(w.registers + x.regs_b[j]))[l];
        if (es == 4) A[g + 8 * (j & 1)][t + 4 * (j >> 1)] = bitsf(v & 0xffffe000u);
        else {
          int r = g + 8 * (j & 1), c = 2 * t + 8 * (j >> 1);
          A[r][c] = x.type == f16 ? h2f(v) : bf2f(v);
          A[r][c + 1] = x.type == f16 ? h2f(v >> 16) : bf2f(v >> 16);
        }
      }
    }
  {
    u64 d = ((u64 *)(w.registers + x.matrix_b))[0];
    vector<char> seen(launch->shared_bytes / 16 + 2, 0);
    for (int c = 0; c < N; c++)
      for (int k = 0; k < x.k; k++) {
        u32 a = wg_address(d, x.mode, c, k * es, es);
        if (a / 16 < seen.size()) seen[a / 16] = 1;
        else wg_read(w, a & ~15u);
        B[k][c] = val(a);
      }
    for (size_t q = 0; q < seen.size(); q++)
      if (seen[q]) wg_read(w, q * 16);
  }
  bool keep = *(u32 *)(w.registers + x.mask) & 1;
  static thread_local double D[256];
  for (int r = 0; r < 16; r++) {
    for (int c = 0; c < N; c++) D[c] = 0;
    for (int k = 0; k < x.k; k++) {
      double a = A[r][k];
      for (int c = 0; c < N; c++) D[c] += a * (double)B[k][c];
    }
    for (int c = 0; c < N; c++) {
      int l = (r & 7) * 4 + (c & 7) / 2, i = 4 * (c >> 3) + (c & 1) + 2 * (r >> 3);
      float &f = ((float *)(w.registers + x.regs[i]))[l];
      f = canon((float)(D[c] + (keep ? (double)f : 0.0)));
    }
  }
}
static void h_wgcommit(Warp &w, const Instruction &) {
  w.product_groups.push_back(std::move(w.open_reads));
  w.open_reads.clear();
}
static void h_wgwait(Warp &w, const Instruction &in) {
  while ((i64)w.product_groups.size() > in.imm) {
    for (auto &q : w.product_groups.front())
      for (u32 g = q.at >> 1; g < (q.at >> 1) + 8; g++) {
        Cell &c = launch->shared_cells[g];
        if (c.write_epoch > q.epoch) {
          report_two("race-wgmma", q.pc, c.write_pc, [&] {
            return who(w.id * 32) + fmt(": shared+%u is written by warp %d before the wgmma that reads it has ended: ",
                                        q.at, c.writer >> 5);
          });
          break;
        }
      }
    w.product_groups.erase(w.product_groups.begin());
  }
}
static void h_proxyfence(Warp &w, const Instruction &) {
  w.fences++;
  w.fence_epoch = launch->epoch;
}
