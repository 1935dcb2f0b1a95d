// The handler and the operands of every instruction.
#pragma once
#include "parser.hpp"

typedef std::unordered_map<string, Handler> Handlers;  // by the instruction's name, with .ftz or .NaN where it matters
static Handler find_handler(const Handlers &handlers, const string &name) {
  auto it = handlers.find(name);
  return it == handlers.end() ? nullptr : it->second;
}
static const Handlers FLOAT32 = {
    {"add", addf},  {"add.ftz", addfz}, {"sub", subf},  {"sub.ftz", subfz}, {"mul", mulf},           {"mul.ftz", mulfz},
    {"fma", fmaf_}, {"fma.ftz", fmafz}, {"mad", fmaf_}, {"mad.ftz", fmafz}, {"min", minf},           {"min.NaN", minfN},
    {"max", maxf},  {"max.NaN", maxfN}, {"neg", negf},  {"abs", absf},      {"copysign", copysignf_}};
static const Handlers FLOAT32_OF_THREE = {{"min", min3f}, {"min.NaN", min3fN}, {"max", max3f}, {"max.NaN", max3fN}};
static const Handlers FUNCTIONS = {{"div", divf},      {"div.ftz", divfz},     {"sqrt", sqrtf_}, {"sqrt.ftz", sqrtfz},
                                   {"rsqrt", rsqrtf_}, {"rsqrt.ftz", rsqrtfz}, {"rcp", rcpf},    {"rcp.ftz", rcpfz},
                                   {"ex2", ex2f},      {"ex2.ftz", ex2fz},     {"lg2", lg2f},    {"lg2.ftz", lg2fz},
                                   {"sin", sinf_},     {"cos", cosf_},         {"tanh", tanhf_}};
static const Handlers INEXACT_FUNCTIONS = {{"div", divf_inexact},     {"div.ftz", divfz_inexact},
                                           {"sqrt", sqrtf_inexact},   {"sqrt.ftz", sqrtfz_inexact},
                                           {"rsqrt", rsqrtf_inexact}, {"rsqrt.ftz", rsqrtfz_inexact}};
static const Handlers FLOAT64 = {{"add", addd},   {"sub", subd}, {"mul", muld},          {"fma", fmad}, {"mad", fmad},
                                 {"div", divd},   {"min", mind}, {"max", maxd},          {"neg", negd}, {"abs", absd},
                                 {"sqrt", sqrtd}, {"rcp", rcpd}, {"copysign", copysignd}};
static const Handlers FLOAT16 = {{"add", addh}, {"sub", subh}, {"mul", mulh},
                                 {"fma", fmah}, {"min", minh}, {"max", maxh}};
static const Handlers BFLOAT16 = {{"add", addb}, {"sub", subb}, {"mul", mulb},
                                  {"fma", fmab}, {"min", minb}, {"max", maxb}};
static const Handlers PAIRS = {{"add", addx2}, {"sub", subx2}, {"mul", mulx2}, {"fma", fmax2}};
static const Handlers PREDICATES = {{"and", pand}, {"or", por}, {"xor", pxor}, {"not", pnot}};
static const std::unordered_set<string> WITHOUT_EFFECT = {"membar",     "fence",          "prefetch",
                                                          "prefetchu",  "griddepcontrol", "nanosleep",
                                                          "setmaxnreg", "discard",        "applypriority"};

// The handler for integers of 2, 4 or 8 bytes; and the one for signed or unsigned ones.
#define PICK(SIZE, NAME) (SIZE == 2 ? (Handler)NAME##16 : SIZE == 4 ? (Handler)NAME##32 : (Handler)NAME##64)
#define PICK_SIGN(SIZE, SIGN, NAME) (SIGN ? PICK(SIZE, NAME##s) : PICK(SIZE, NAME##u))

void Parser::decode() {
  const string &name = modifiers[0];
  Type t = type();
  int size = bytes_of(t);
  auto is = [&](std::initializer_list<const char *> names) {
    return std::any_of(names.begin(), names.end(), [&](const char *n) { return name == n; });
  };
  // All lanes of `members`, the last operand, do it together.
  auto together = [&](Handler handler, u8 kind, const Operand &members) {
    now.run = handler;
    now.kind = kind;
    now.flow = SYNC;
    now.at[4] = source(members, 4);
  };

  // ---- flow
  if (is({"ret", "exit"})) {
    now.flow = RET;
    now.kind = cBra;
  } else if (is({"trap", "brkpt"})) now.flow = TRAP;
  else if (name == "bra") {
    now.flow = BRA;
    now.kind = cBra;
    now.may_switch = true;
    branches.push_back({(int)kernel->code.size(), operands[0].name});
  } else if (name == "brx") {
    now.flow = BRX;
    now.kind = cBra;
    now.at[0] = source(operands[0], 4);
    details();
    table_branches.push_back({(int)kernel->code.size(), operands[1].name});
  } else if (is({"bar", "barrier"}) && has("warp")) together(h_warpsync, cBar, operands[0]);
  else if (is({"bar", "barrier"})) {
    if (!has("sync") || operands[0].kind != oImm) bad("barrier");
    now.flow = BAR;
    now.kind = cBar;
    now.imm = operands[0].imm;
    now.target = operands.size() > 1 ? (int)operands[1].imm : -1;
  } else if (name == "fence" && has("proxy")) now.run = h_proxyfence;
  else if (WITHOUT_EFFECT.count(name)) now.run = h_nop;

  // ---- memory, matrices, lanes
  else if (is({"ld", "ldu", "st"})) decode_memory(name != "st");
  else if (is({"atom", "red"})) decode_atomic(name == "red");
  else if (name == "cp") decode_async_copy();
  else if (name == "mma") decode_mma();
  else if (name == "wgmma") decode_wgmma();
  else if (is({"ldmatrix", "stmatrix"})) {
    if (!has("m8n8")) bad("shape");
    bool load = name == "ldmatrix";
    Details &x = details();
    now.run = load ? h_ldmatrix : h_stmatrix;
    now.kind = cLdm;
    now.flow = SYNC;
    now.may_switch = true;
    now.at[4] = constant(4, FULL);
    x.n = has("x4") ? 4 : has("x2") ? 2 : 1;
    x.transposed = has("trans");
    x.to = address(operands[load ? 1 : 0]);
    transfer(operands[load ? 0 : 1], 4, !load, x);
  } else if (name == "shfl") {
    together(h_shfl, cShfl, operands[4]);
    Details &x = details();
    x.mode = has("up") ? 0 : has("down") ? 1 : has("bfly") ? 2 : 3;
    if (!operands[0].parts.empty()) x.predicate_to = destination(operands[0].parts[0], 0);
    now.at[0] = destination(operands[0], 4);
    for (int i = 1; i < 4; i++) now.at[i] = source(operands[i], 4);
  } else if (name == "redux") {
    together(t == f32 ? h_reduxf : h_redux, cRedux, operands[2]);
    Details &x = details();
    x.type = t;
    x.op = has("add") ? aAdd : has("min") ? aMin : has("max") ? aMax : has("and") ? aAnd : has("or") ? aOr : aXor;
    x.k = has("abs");
    x.mode = has("NaN");
    if (is_float(t) && (t != f32 || (x.op != aMin && x.op != aMax))) bad("redux of floats");
    now.at[0] = destination(operands[0], 4);
    now.at[1] = source(operands[1], 4);
  } else if (name == "vote") {
    together(h_vote, cShfl, operands[2]);
    Details &x = details();
    x.mode = has("all") ? 0 : has("any") ? 1 : has("uni") ? 2 : 3;
    now.imm = operands[1].negated;
    now.at[0] = destination(operands[0], x.mode == 3 ? 4 : 0);
    now.at[1] = source(operands[1], 0);
  } else if (name == "match") {
    if (!has("any")) bad("match");
    together(h_match, cShfl, operands[2]);
    now.at[0] = destination(operands[0], 4);
    now.at[1] = source(operands[1], 4);
  } else if (name == "elect") {
    together(h_elect, cShfl, operands[1]);
    now.at[0] = destination(operands[0], 4);
    details().predicate_to = operands[0].parts.empty() ? allocate(0) : destination(operands[0].parts[0], 0);
  } else if (name == "activemask") {
    now.run = h_activemask;
    now.at[0] = destination(operands[0], 4);

    // ---- moves and comparisons
  } else if (name == "mov") decode_move(size, t);
  else if (name == "cvta") plain(size, PICK(size, mov), cMov);
  else if (name == "createpolicy") {  // of the cache
    now.run = mov64;
    now.at[0] = destination(operands[0], 8);
    now.at[1] = constant(8, 0);
  } else if (name == "setp") decode_setp();
  else if (name == "selp") {
    now.run = PICK(size, selp);
    now.kind = cSel;
    now.at[0] = destination(operands[0], size);
    for (int i = 1; i < 3; i++) now.at[i] = source(operands[i], size, is_float(t));
    now.at[3] = source(operands[3], 0);
  } else if (name == "cvt") decode_cvt();

  // ---- arithmetic
  else if (t == pred) {
    now.run = find_handler(PREDICATES, name);
    now.kind = cPred;
    now.at[0] = destination(operands[0], 0);
    now.at[1] = source(operands[1], 0);
    now.at[2] = operands.size() > 2 ? source(operands[2], 0) : now.at[1];
  } else if (t == f32) decode_float32();
  else if (t == f64 || t == f16 || t == bf16 || t == f32x2) {
    const Handlers &handlers = t == f64 ? FLOAT64 : t == f16 ? FLOAT16 : t == bf16 ? BFLOAT16 : PAIRS;
    for (const char *modifier : {"rz", "rm", "rp", "sat", "ftz", "NaN"})
      if (has(modifier)) bad(modifier);
    plain(size, find_handler(handlers, name), t == f64 ? cFp64 : t == f32x2 ? cFp32 : cHalf, t == f64);
  } else if (t != f16x2 && t != bf16x2) decode_integer(size, is_signed(t));
}

void Parser::decode_move(int size, Type t) {
  now.kind = cMov;
  const Operand &to = operands[0], &from = operands[1];
  if (to.kind == oVec) {
    Details &x = details();
    now.run = h_unpack;
    x.size = size;
    now.at[1] = source(from, size);
    for (auto &part : to.parts) {
      x.regs.push_back(part.kind == oSink ? 0 : part.reg.at);
      x.sizes.push_back(part.kind == oSink ? -size / (int)to.parts.size() : part.reg.size);
    }
  } else if (from.kind == oVec) {
    Details &x = details();
    now.run = h_pack;
    x.size = size;
    now.at[0] = destination(to, size);
    for (auto &part : from.parts) {
      x.sizes.push_back(size / from.parts.size());
      x.regs.push_back(source(part, x.sizes.back()));
    }
  } else if (t == pred) {
    now.run = pmov;
    now.at[0] = destination(to, 0);
    now.at[1] = now.at[2] = source(from, 0);
  } else if (from.kind == oSym && (from.name.find("%clock") == 0 || from.name.find("%globaltimer") == 0)) {
    now.run = h_clock;
    now.imm = size;
    now.at[0] = destination(to, size);
  } else plain(size, PICK(size, mov), cMov, is_float(t));
}

void Parser::decode_integer(int size, bool sign) {
  const string &name = modifiers[0];
  if (has("sat") || has("cc")) bad("modifier");
  now.kind = cInt;
  auto counted = [&](Handler handler) {  // popc, clz: 4 bytes of what may have 8
    now.run = handler;
    now.at[0] = destination(operands[0], 4);
    now.at[1] = source(operands[1], size);
  };
  if (name == "and") plain(size, PICK(size, and), cInt);
  else if (name == "or") plain(size, PICK(size, or), cInt);
  else if (name == "xor") plain(size, PICK(size, xor), cInt);
  else if (name == "not") plain(size, PICK(size, not), cInt);
  else if (name == "add") plain(size, PICK(size, add), cInt);
  else if (name == "sub") plain(size, PICK(size, sub), cInt);
  else if (name == "neg") plain(size, PICK(size, neg), cInt);
  else if (name == "abs") plain(size, PICK(size, abs), cInt);
  else if (name == "min") plain(size, PICK_SIGN(size, sign, min), cInt);
  else if (name == "max") plain(size, PICK_SIGN(size, sign, max), cInt);
  else if (name == "div") plain(size, PICK_SIGN(size, sign, div), cInt);
  else if (name == "rem") plain(size, PICK_SIGN(size, sign, rem), cInt);
  else if (name == "shl" || name == "shr") {
    now.run = name == "shl" ? PICK(size, shl) : PICK_SIGN(size, sign, shr);
    now.at[0] = destination(operands[0], size);
    now.at[1] = source(operands[1], size);
    now.at[2] = source(operands[2], 4);
  } else if ((name == "mul" || name == "mad") && has("lo"))
    plain(size, name == "mul" ? PICK(size, mullo) : PICK(size, madlo), cInt);
  else if (name == "mul" && has("hi")) plain(size, PICK_SIGN(size, sign, mulhi), cInt);
  else if (name == "mad" && has("hi") && size == 4) plain(size, sign ? madhis32 : madhiu32, cInt);
  else if ((name == "mul" || name == "mad") && has("wide")) {
    if (name == "mul") now.run = size == 4 ? (sign ? mulws32 : mulwu32) : (sign ? mulws16 : mulwu16);
    else now.run = size == 4 ? (sign ? madws32 : madwu32) : (sign ? madws16 : madwu16);
    now.at[0] = destination(operands[0], 2 * size);
    for (int i = 1; i < 3; i++) now.at[i] = source(operands[i], size);
    if (name == "mad") now.at[3] = source(operands[3], 2 * size);
  } else if (name == "popc") counted(size == 4 ? popc32 : popc64_);
  else if (name == "clz") counted(size == 4 ? clz32 : clz64_);
  else if (size != 4) bad("not implemented");
  else if (name == "lop3") {
    now.run = h_lop3;
    now.at[0] = destination(operands[0], 4);
    for (int i = 1; i < 4; i++) now.at[i] = source(operands[i], 4);
    now.imm = operands[4].imm;
  } else if (name == "prmt" && modifiers.size() == 2) plain(4, prmt32, cInt);
  else if (name == "bfe") plain(4, sign ? bfes32 : bfeu32, cInt);
  else if (name == "bfi") plain(4, h_bfi, cInt);
  else if (name == "shf" && has("l")) plain(4, has("clamp") ? shflc : shflw, cInt);
  else if (name == "shf") plain(4, has("clamp") ? shfrc : shfrw, cInt);
  else if (name == "brev") plain(4, brev32, cInt);
  else if (name == "bfind" && !sign) plain(4, bfindu32, cInt);
}

void Parser::decode_float32() {
  for (const char *modifier : {"rz", "rm", "rp", "sat"})
    if (has(modifier)) bad(modifier);
  string name = modifiers[0] + (has("NaN") ? ".NaN" : has("ftz") ? ".ftz" : "");
  auto find = [&](const Handlers &handlers) {
    Handler found = find_handler(handlers, name);
    return found ? found : find_handler(handlers, modifiers[0]);
  };
  Handler function = find(FUNCTIONS);
  if (function && inexact && (has("full") || has("approx")))
    if (Handler rough = find(INEXACT_FUNCTIONS)) function = rough;
  Handler handler = function ? function : operands.size() == 4 ? find(FLOAT32_OF_THREE) : nullptr;
  plain(4, handler ? handler : find(FLOAT32), function ? cSfu : cFp32, true);
}

void Parser::decode_setp() {
  Type t = type();
  int size = bytes_of(t);
  string how = modifiers[1];
  Handler handler = nullptr;
  if (!is_float(t)) {
    bool sign = is_signed(t) && how.size() == 2 && how[0] != 'h' && how != "lo" && how != "ls";
    if (how == "lo") how = "lt";
    if (how == "ls") how = "le";
    if (how == "hi") how = "gt";
    if (how == "hs") how = "ge";
    if (how == "eq") handler = PICK(size, eq);
    if (how == "ne") handler = PICK(size, ne);
    if (how == "lt") handler = sign ? PICK(size, lts) : PICK(size, ltu);
    if (how == "le") handler = sign ? PICK(size, les) : PICK(size, leu);
    if (how == "gt") handler = sign ? PICK(size, gts) : PICK(size, gtu);
    if (how == "ge") handler = sign ? PICK(size, ges) : PICK(size, geu);
  }
#define COMPARE(HOW)                                                                                                   \
  if (is_float(t) && how == #HOW)                                                                                      \
    handler = t == f16 ? h##HOW##16 : t == bf16 ? b##HOW##16 : t == f32 ? f##HOW##32 : f##HOW##64;
  COMPARE(eq) COMPARE(ne) COMPARE(lt) COMPARE(le) COMPARE(gt) COMPARE(ge) COMPARE(num) COMPARE(nan)
  COMPARE(equ) COMPARE(neu) COMPARE(ltu) COMPARE(leu) COMPARE(gtu) COMPARE(geu)
#undef COMPARE
  if (!handler) bad("comparison");
  now.run = handler;
  now.kind = cPred;
  now.at[0] = destination(operands[0], 0);
  for (int i = 1; i < 3; i++) now.at[i] = source(operands[i], size, is_float(t));
  if (!operands[0].parts.empty()) details().predicate_to = destination(operands[0].parts[0], 0);
  if (has("and") || has("or") || has("xor")) {
    Details &x = details();
    x.has_mask = true;
    x.op = has("and") ? aAnd : has("or") ? aOr : aXor;
    x.mask_negated = operands[3].negated;
    x.mask = source(operands[3], 0);
  }
}

void Parser::decode_cvt() {
  now.kind = cCvt;
  const Operand &to = operands[0], &from = operands[1];
  if (has("tf32")) {
    now.run = h_tf32;
    now.imm = has("rna");
    now.at[0] = destination(to, 4);
    now.at[1] = source(from, 4, true);
    return;
  }
  Type result = type(0), t = type(1);
  if (result == bf16x2 || result == f16x2) {
    if (t != f32) bad("cvt of a pair");
    now.run = cvx2;
    now.imm = result == f16x2;
    now.at[0] = destination(to, 4);
    for (int i = 1; i < 3; i++) now.at[i] = source(operands[i], 4, true);
    return;
  }
  int to_size = to.reg.size, from_size = from.kind == oReg ? from.reg.size : std::max(2, bytes_of(t));
  now.at[0] = to.reg.at;
  now.at[1] = source(from, from_size);
  if (!has("sat")) {  // quick ones
    bool long_result = result == u64_ || result == s64, long_source = t == u64_ || t == s64;
    if (long_result && t == u32_ && from_size == 4) now.run = cv64_u32;
    else if (long_result && t == s32 && from_size == 4) now.run = cv64_s32;
    else if ((result == u32_ || result == s32) && long_source && from_size == 8 && to_size == 4) now.run = cv32_64;
    else if (result == f32 && t == s32 && has("rn")) now.run = cvf_s32;
    else if (result == f32 && t == bf16) now.run = cvf_bf;
    else if (result == bf16 && t == f32 && has("rn")) now.run = cvbf_f;
    if (now.run) return;
  }
  Details &x = details();
  now.run = h_cvt;
  x.type = t;
  x.result = result;
  x.sizes = {to_size, from_size};
  x.saturate = has("sat");
  x.flush = has("ftz");
  x.integral = is_float(result) && (has("rni") || has("rzi") || has("rmi") || has("rpi"));
  x.mode = has("rz") || has("rzi") ? 1 : has("rm") || has("rmi") ? 2 : has("rp") || has("rpi") ? 3 : 0;
}

void Parser::decode_memory(bool load) {
  Details &x = details();
  x.type = type();
  x.size = bytes_of(x.type);
  x.sign = is_signed(x.type);
  x.n = has("v8") ? 8 : has("v4") ? 4 : has("v2") ? 2 : 1;
  if (x.type == b128 || has("const") || has("local")) bad("not implemented");
  x.to = address(operands[load ? 1 : 0]);
  transfer(operands[load ? 0 : 1], x.size, !load, x);
  if ((int)x.regs.size() != x.n) bad("vector size");
  if (operands.size() > 2 && operands[2].kind != oReg) bad("more operands");
  if (has("param")) {
    if (!load || x.to.size) bad("parameter");
    now.run = h_ld_param;
    now.kind = cParam;
    return;
  }
  bool shared = has_shared();
  if (!shared && x.to.size == 4) bad("32 bit global address");
  now.may_switch = true;
  now.run = shared ? (load ? h_ld_shared : h_st_shared) : (load ? h_ld_global : h_st_global);
  now.kind = shared ? (load ? cLdS : cStS) : (load ? cLdG : cStG);
}

void Parser::decode_atomic(bool reduction) {
  static const vector<std::pair<const char *, int>> OPERATIONS = {
      {"add", aAdd}, {"min", aMin}, {"max", aMax}, {"exch", aExch}, {"cas", aCas},
      {"and", aAnd}, {"or", aOr},   {"xor", aXor}, {"inc", aInc},   {"dec", aDec}};
  Details &x = details();
  x.type = type();
  x.size = bytes_of(x.type);
  x.n = has("v8") ? 8 : has("v4") ? 4 : has("v2") ? 2 : 1;
  x.global = !has_shared();
  x.op = -1;
  for (auto [name, operation] : OPERATIONS)
    if (has(name)) x.op = operation;
  if (x.op < 0) bad("atomic");
  now.run = h_atom;
  now.kind = x.global ? cAtomG : cAtomS;
  now.may_switch = true;
  int i = reduction ? 0 : 1;
  bool as_float = is_float(x.type);
  x.to = address(operands[i]);
  append(operands[i + 1], x.size, as_float, x.regs_b);
  if (x.op == aCas) append(operands[i + 2], x.size, as_float, x.regs_c);
  x.has_destination = !reduction && operands[0].kind != oSink;
  if (x.has_destination) transfer(operands[0], x.size, false, x);
  x.sizes.assign(x.n, x.size);
}

void Parser::decode_async_copy() {
  if (!has("async") || has("bulk") || has("mbarrier")) bad("not implemented");
  now.kind = cAsync;
  if (has("commit_group")) now.run = h_commit;
  else if (has("wait_group") || has("wait_all")) {
    now.run = h_waitgroup;
    now.imm = has("wait_all") ? -1 : (i64)operands[0].imm;
  } else {
    Details &x = details();
    now.run = h_cpasync;
    now.may_switch = true;
    x.to = address(operands[0]);
    x.from = address(operands[1]);
    x.size = operands[2].imm;
    x.has_mask = operands.size() > 3;  // how many bytes are read; the others are zero
    if (x.has_mask) x.mask = source(operands[3], 4);
  }
}

void Parser::decode_mma() {
  Details &x = details();
  now.run = h_mma;
  now.kind = cMma;
  now.flow = SYNC;
  now.at[4] = constant(4, FULL);
  x.k = has("m16n8k16") ? 16 : has("m16n8k8") ? 8 : has("m8n8k4") ? 4 : 0;
  x.type = has("f64") ? f64 : has("tf32") ? b32 : has("bf16") ? bf16 : has("f16") ? f16 : tNone;
  bool sums_float32 = modifiers.back() == "f32" && modifiers[modifiers.size() - 4] == "f32";
  if (!x.k || x.type == tNone || (x.k == 4) != (x.type == f64) || (x.type != f64 && !sums_float32))
    bad("shape or types");
  vector<u32> *to[] = {&x.regs, &x.regs_b, &x.regs_c, &x.regs_d};
  for (int i = 0; i < 4; i++) append(operands[i], x.type == f64 ? 8 : 4, true, *to[i]);
}

void Parser::decode_wgmma() {
  now.kind = cMma;
  if (has("fence")) {
    now.run = h_nop;
    return;
  }
  if (has("commit_group")) {
    now.run = h_wgcommit;
    return;
  }
  if (has("wait_group")) {
    now.run = h_wgwait;
    now.imm = operands[0].imm;
    return;
  }
  if (!has("mma_async") || modifiers.size() < 8) bad("wgmma");
  Details &x = details();
  now.run = h_wgmma;
  now.flow = SYNC;
  now.may_switch = true;
  now.at[4] = constant(4, FULL);
  const string &of = modifiers[6];
  if (sscanf(modifiers[4].c_str(), "m64n%dk%d", &x.n, &x.k) != 2 || modifiers[5] != "f32") bad("shape");
  x.type = of == "tf32" ? b32 : of == "f16" ? f16 : of == "bf16" ? bf16 : tNone;
  if (x.type == tNone) bad("types");
  x.size = x.type == b32 ? 4 : 2;
  append(operands[0], 4, false, x.regs);
  if ((int)x.regs.size() != x.n / 2) bad("registers");
  if (operands[1].kind == oVec) append(operands[1], 4, false, x.regs_b);
  else x.matrix_a = source(operands[1], 8);
  x.matrix_b = source(operands[2], 8);
  x.mask = source(operands[3], 0);
  if (operands[4].imm != 1 || operands[5].imm != 1) bad("scale");
  size_t i = 6;
  if (x.regs_b.empty() && operands.size() > i + 1) x.transposed = operands[i++].imm;
  if (operands.size() > i) x.mode = operands[i].imm;
}
