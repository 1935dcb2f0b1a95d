// A parsed kernel, and the state of a launch of it.
#pragma once
#include "memory.hpp"

// ---- types and operands as PTX writes them
enum Type {
  tNone, b8, b16, b32, b64, b128, u8_, u16_, u32_, u64_, s8, s16, s32, s64, f16, bf16, f32, f64, pred, f16x2, bf16x2,
  f32x2
};
static const std::unordered_map<string, Type> TYPES = {
    {"b8", b8},     {"b16", b16},   {"b32", b32},   {"b64", b64},       {"b128", b128},     {"u8", u8_},
    {"u16", u16_},  {"u32", u32_},  {"u64", u64_},  {"s8", s8},         {"s16", s16},       {"s32", s32},
    {"s64", s64},   {"f16", f16},   {"bf16", bf16}, {"f32", f32},       {"f64", f64},       {"pred", pred},
    {"f16x2", f16x2}, {"bf16x2", bf16x2}, {"f32x2", f32x2}};
static int bytes_of(Type t) {
  switch (t) {
  case b8: case u8_: case s8: return 1;
  case b16: case u16_: case s16: case f16: case bf16: return 2;
  case b32: case u32_: case s32: case f32: case f16x2: case bf16x2: return 4;
  case b64: case u64_: case s64: case f64: case f32x2: return 8;
  case b128: return 16;
  default: return 0;  // predicates, which are bits of a mask
  }
}
static bool is_signed(Type t) { return t == s8 || t == s16 || t == s32 || t == s64; }
static bool is_float(Type t) { return t == f16 || t == bf16 || t == f32 || t == f64; }

struct Register {
  u32 at;  // of its 32 lanes, in the bytes of a warp's registers
  int size;  // bytes of a lane; 0: a predicate, whose lanes are the bits of one number
};
enum OperandKind { oNone, oReg, oImm, oMem, oVec, oSym, oSink };
struct Operand {
  OperandKind kind = oNone;
  Register reg{0, 0};
  bool has_reg = false;  // of an address
  string name;
  u64 imm = 0;
  bool is_float = false;
  int float_size = 0;
  bool negated = false;
  i64 offset = 0;  // of an address
  vector<Operand> parts;  // of a vector; or the second of two destinations, d|p
};

// ---- instructions
struct Warp;
struct Instruction;
typedef void (*Handler)(Warp &, const Instruction &);
// SYNC: all lanes that the instruction names must execute it together.
enum Flow : u8 { NORMAL, BRA, BRX, RET, BAR, SYNC, TRAP };
enum Class {
  cInt, cFp32, cFp64, cHalf, cCvt, cSfu, cMov, cSel, cPred, cLdG, cStG, cAtomG, cLdS, cStS, cAtomS, cAsync, cShfl,
  cRedux, cBar, cMma, cLdm, cBra, cParam, cOther, nClasses
};
static const char *CLASSES[] = {
    "int",       "fp32",      "fp64",        "half",     "cvt",     "sfu",   "mov",     "select",
    "predicate", "ld.global", "st.global",   "atom.global", "ld.shared", "st.shared", "atom.shared", "cp.async",
    "shuffle",   "redux",     "barrier",     "mma",      "ldmatrix", "branch", "param",   "other"};

struct Address {
  int size = 0;  // of the register in bytes; 0: none
  u32 reg = 0;
  i64 offset = 0;
};
// What only some instructions have.
struct Details {
  vector<u32> regs, regs_b, regs_c, regs_d;  // of vectors and matrices
  vector<int> sizes;  // of `regs`, in bytes; below 0: a place that is left out
  vector<int> targets;  // of brx
  bool global = false;  // atomics: not of shared memory
  Type type = tNone;
  int size = 0;  // bytes of an element
  int n = 1, k = 0;  // elements of a vector; shape of a product
  bool sign = false;  // loads extend it
  Address to, from;  // `from` is of asynchronous copies only
  int op = 0;
  bool has_destination = false;
  bool transposed = false;
  int mode = 0;
  Type result = tNone;  // conversions
  bool saturate = false, flush = false, integral = false;  // conversions
  u32 predicate_to = ~0u;  // a second destination
  bool has_mask = false, mask_negated = false;  // a further operand
  u32 mask = 0;
  u32 matrix_a = 0, matrix_b = 0;  // registers with descriptors, of wgmma
  mutable Region *last = nullptr;  // where the last access went
};
struct Instruction {
  Handler run = nullptr;
  u32 at[5] = {0, 0, 0, 0, 0};  // registers: destination, operands; [4] is a SYNC's member mask
  u32 predicate = 0;
  bool predicated = false, negated = false;
  Flow flow = NORMAL;
  u8 kind = cOther;
  bool may_switch = false;  // another warp may run after it
  int target = -1;  // of a branch; threads of a barrier
  int line = 0, location = -1;
  i64 imm = 0;
  std::shared_ptr<Details> details;
  string text;
};
struct Location {
  int file = 0, line = 0, column = 0;
  int inlined_at = -1;  // another location
};
struct Parameter {
  string name;
  int size, offset;
};
struct Kernel {
  string name;
  vector<Parameter> parameters;
  vector<Instruction> code;
  vector<u32> meets;  // where lanes that part at a branch meet again: its immediate post-dominator
  vector<Location> locations;
  std::map<int, string> files;
  vector<u8> registers;  // at the start of a warp: constants are there
  std::unordered_map<string, u32> specials;  // %tid.x and so on
  int contracted = 0;
  vector<u64> n_executed, n_threads, n_sectors, n_conflicts, n_requests;  // by instruction, in one launch
};

static const std::unordered_set<string> SPECIALS = {
    "%tid.x",       "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",           "%ntid.z",
    "%ctaid.x",     "%ctaid.y",     "%ctaid.z",     "%nctaid.x",    "%nctaid.y",         "%nctaid.z",
    "%laneid",      "%warpid",      "%smid",        "%nsmid",       "%lanemask_eq",      "%lanemask_lt",
    "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%cluster_ctaid.x", "%cluster_ctarank", "%cluster_nctaid.x",
    "%cluster_nctarank", "%dynamic_smem_size"};

// ---- warps
struct Token {
  u32 pc, mask, id;  // lanes that parted meet again at pc
};
enum PartState { RUNS, AT_BARRIER, AWAITS_LANES, AWAITS_TOKEN };
struct Part {  // lanes of a warp that go together
  u32 pc, mask;
  PartState state;
  int barrier;
  vector<Token> tokens;
};
struct Copy {  // cp.async
  u32 to, bytes;
  u8 data[16];
  int thread;
  u32 pc;
};
struct MatrixRead {  // 16 bytes of shared memory that a wgmma reads
  u32 at, pc, epoch;
};
struct Warp {
  u8 *registers;
  u32 mask;  // of the instruction that runs
  u32 pc;
  int id;
  vector<Part> parts;
  u16 syncs = 0, collectives = 0;
  u8 fences = 0;
  u32 fence_epoch = 0;
  i64 quantum = 0;  // how long it may run on
  double weight = 1;  // how likely it is chosen
  vector<vector<Copy>> copy_groups;
  vector<Copy> open_copies;
  vector<vector<MatrixRead>> product_groups;
  vector<MatrixRead> open_reads;
};

// ---- launches
struct Report {
  string kind;
  u32 pc, other_pc;
  u64 count;
  string text;
  bool two;  // instructions
};
enum Policy { ANY_WARP, FIRST_WARP, LAST_WARP };  // which of the warps that can run is next
struct Options {  // as driver.py has it
  u64 seed, budget;
  i32 policy, max_quantum, count;
};
struct Launch {
  Kernel *kernel;
  Options options;
  u32 grid[3], program[3];
  u32 cta;  // the program's number
  u32 threads, shared_bytes;
  const u8 *parameters;
  vector<Warp> warps;
  vector<u8> shared, shared_written;
  vector<Cell> shared_cells;
  vector<u32> shared_copied;  // 1 + the cp.async that is on its way to these two bytes; 0: none
  u32 epoch, cta_epoch, launch_epoch;
  u64 random;
  std::map<string, Report> reports;
  vector<std::pair<u32, u32>> ctas;  // first epoch of each
  int arrived[16], expected[16];
  bool dead = false;
  u64 executed = 0;
  u32 alive;
};
static u32 last_epoch = 1;
static Launch *launch;
static u64 draw() {
  u64 x = launch->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  launch->random = x;
  return x * 0x2545F4914F6CDD1Dull >> 16;
}
