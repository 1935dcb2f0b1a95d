// PTX text becomes a Kernel. Here are words, declarations and operands; instructions are in decode.hpp, and where
// branches lead in flow.hpp.
#pragma once
#include "arithmetic.hpp"

struct Word {
  string text;
  int line;
  bool quoted = false;
};

class Parser {
public:
  Parser(Kernel &kernel, bool inexact) : kernel(&kernel), inexact(inexact) {}

  void run(const char *text) {
    split(text);
    while (peek() != "") top_level(next());
    finish();
  }

private:
  Kernel *kernel;
  bool inexact;  // as the hardware may be: see arithmetic.hpp
  vector<Word> words;
  size_t at = 0;  // the next word
  std::unordered_map<string, Register> registers;
  vector<std::unordered_map<string, Register>> outer_registers;  // of the blocks around this one
  u32 register_bytes = 64;
  struct Constant {
    u32 at;
    int size;
    u64 value;
  };
  std::map<std::pair<int, u64>, Constant> constants;
  std::unordered_map<string, u32> symbols;  // offsets of parameters and of shared memory
  u32 shared_bytes = 0;
  vector<string> dynamic;  // names of shared memory that the launch allocates
  std::unordered_map<string, int> labels;
  std::map<string, vector<string>> branch_tables;
  vector<std::pair<int, string>> branches, table_branches;  // instructions and where they lead
  std::map<string, int> locations;
  int location = -1;

  // ---- words
  void split(const char *s) {
    auto in_name = [](char c) { return isalnum((u8)c) || strchr("_$%.", c); };
    int line = 1;
    while (*s) {
      if (*s == '\n') {
        words.push_back({"\n", line++});
        s++;
      } else if (isspace((u8)*s)) s++;
      else if (s[0] == '/' && s[1] == '/') s += strcspn(s, "\n");
      else if (s[0] == '/' && s[1] == '*') {
        const char *end = strstr(s + 2, "*/");
        end = end ? end + 2 : s + strlen(s);
        line += std::count(s, end, '\n');
        s = end;
      } else if (*s == '"') {
        size_t length = strcspn(s + 1, "\"");
        words.push_back({string(s + 1, length), line, true});
        s += length + 1 + (s[length + 1] == '"');
      } else {
        const char *begin = s;
        while (*s && (in_name(*s) || (s[0] == ':' && s[1] == ':'))) s += *s == ':' ? 2 : 1;
        if (s == begin) s++;
        words.push_back({string(begin, s), line});
      }
    }
    words.push_back({"", line});
  }
  const string &peek() {
    while (words[at].text == "\n" && !words[at].quoted) at++;
    return words[at].text;
  }
  string next() {
    string text = peek();
    if (at + 1 < words.size()) at++;
    return text;
  }
  int number() { return atoi(next().c_str()); }
  bool end_of_line() { return (words[at].text == "\n" && !words[at].quoted) || at + 1 == words.size(); }
  void skip_line() {
    while (!end_of_line()) at++;
  }
  void skip_statement() {
    while (peek() != "" && next() != ";") {}
  }
  void skip_block() {
    while (peek() != "" && next() != "{") {}
    for (int depth = 1; depth && peek() != "";) {
      string word = next();
      depth += (word == "{") - (word == "}");
    }
  }
  void expect(const char *wanted) {
    string found = next();
    if (found != wanted) throw Fail(fmt("line %d: expected %s, got %s", words[at - 1].line, wanted, found.c_str()));
  }

  // ---- declarations
  void top_level(const string &word) {
    if (word == ".version" || word == ".target" || word == ".address_size" || word == ".loc") skip_line();
    else if (word == ".file") file();
    else if (word == ".section" || word == ".func") skip_block();
    else if (word == ".visible" || word == ".weak" || word == ".common" || word == ";") {
    } else if (word == ".entry") entry();
    else if (word == ".extern") {
      expect(".shared");
      shared(true);
    } else if (word == ".shared") shared(false);
    else if (word == ".global" || word == ".const") skip_statement();
    else throw Fail(fmt("line %d: top level %s", words[at - 1].line, word.c_str()));
  }
  void file() {
    int id = number();
    kernel->files[id] = next();
    skip_line();
  }
  // .align 4 .b32: returns the bytes of the type.
  int type_and_alignment(int &alignment) {
    int size = 1;
    bool pointer = false;
    while (peek()[0] == '.') {
      string word = next();
      auto type = TYPES.find(word.substr(1));
      if (type != TYPES.end()) size = bytes_of(type->second);
      if (word == ".ptr") pointer = true;  // what follows is about what it points to
      if (word == ".align") {
        int value = number();
        if (!pointer) alignment = value;
      }
    }
    return size;
  }
  void shared(bool external) {
    int alignment = 4, size = type_and_alignment(alignment);
    string name = next();
    bool open = external;
    while (peek() == "[") {
      next();
      if (peek() == "]") open = true;
      else size *= number();
      expect("]");
    }
    skip_statement();
    if (open) {
      dynamic.push_back(name);
      return;
    }
    shared_bytes = (shared_bytes + alignment - 1) / alignment * alignment;
    symbols[name] = shared_bytes;
    shared_bytes += size;
  }
  void parameters() {  // .param .u64 .ptr .global .align 1 name, .param .align 64 .b8 name[128]
    int offset = 0;
    while (peek() != ")") {
      if (peek() == ",") next();
      int alignment = 0, size = type_and_alignment(alignment);
      string name = next();
      if (peek() == "[") {
        next();
        size *= number();
        expect("]");
      }
      if (!alignment) alignment = size;
      offset = (offset + alignment - 1) / alignment * alignment;
      kernel->parameters.push_back({name, size, offset});
      symbols[name] = offset;
      offset += size;
    }
    next();
  }
  void entry() {
    kernel->name = next();
    if (peek() == "(") {
      next();
      parameters();
    }
    for (auto &name : dynamic) symbols[name] = (shared_bytes + 127) / 128 * 128;
    while (peek() != "{" && peek() != "") next();  // .reqntid and the like
    next();
    for (int depth = 1; depth;) {
      string word = next();
      if (word == "") throw Fail("unexpected end");
      if (word == "{") {
        depth++;
        outer_registers.push_back(registers);
      } else if (word == "}") {
        if (--depth == 0) break;
        registers = outer_registers.back();
        outer_registers.pop_back();
      } else statement(word);
    }
  }
  void statement(const string &word) {
    if (word == ";") return;
    if (word == ".loc") source_location();
    else if (word == ".reg") declare_registers();
    else if (word == ".file") file();
    else if (word == ".pragma" || word == ".param") skip_statement();
    else if (word == ".shared") shared(false);
    else if (word == ".section") skip_block();
    else if (peek() == ":") {
      next();
      if (peek() != ".branchtargets") {
        labels[word] = kernel->code.size();
        return;
      }
      next();
      auto &targets = branch_tables[word];
      for (string target = next(); target != ";"; target = next())
        if (target != ",") targets.push_back(target);
    } else {
      at--;
      parse_instruction();
    }
  }
  void declare_registers() {  // .b32 %r<20>, %x;
    int size = bytes_of(TYPES.at(next().substr(1)));
    do {
      string name = next();
      if (peek() == "<") {
        next();
        int count = number();
        expect(">");
        for (int i = 0; i < count; i++) registers[name + std::to_string(i)] = {allocate(size), size};
      } else registers[name] = {allocate(size), size};
    } while (next() != ";");
  }
  // .loc 1 20 3 [, function_name ..., inlined_at 1 40 5]
  void source_location() {
    auto place = [&](size_t i) { return words[i].text + ":" + words[i + 1].text + ":" + words[i + 2].text; };
    auto add = [&](size_t i, int inlined_at) {
      Location found;
      found.file = atoi(words[i].text.c_str());
      found.line = atoi(words[i + 1].text.c_str());
      found.inlined_at = inlined_at;
      kernel->locations.push_back(found);
      return (int)kernel->locations.size() - 1;
    };
    size_t begin = at;
    string own = place(begin), key = own;
    int inlined_at = -1;
    for (at += 3; !end_of_line(); at++)
      if (words[at].text == "inlined_at") {
        string around = place(at + 1);
        auto it = locations.find(around);
        inlined_at = it != locations.end() ? it->second : locations[around] = add(at + 1, -1);
        key += "@" + around;
      }
    auto it = locations.find(key);
    location = it != locations.end() ? it->second : add(begin, inlined_at);
    locations[key] = locations[own] = location;
  }

  // ---- registers and operands
  u32 allocate(int size) {
    u32 found = register_bytes;
    register_bytes += size < 2 ? 64 : 32 * size;
    return found;
  }
  u32 constant(int size, u64 value) {
    if (size == 0) value = value ? FULL : 0;
    else if (size < 8) value &= (1ull << (8 * size)) - 1;
    auto [it, is_new] = constants.insert({{size, value}, {0, size, value}});
    if (is_new) it->second.at = allocate(size);
    return it->second.at;
  }
  static bool is_number(const string &word) { return !word.empty() && isdigit((u8)word[0]); }
  static Operand literal(string s, bool negative) {
    Operand o;
    o.kind = oImm;
    char form = s.size() > 2 && s[0] == '0' ? tolower(s[1]) : 0;
    if ((form == 'f' && s.size() == 10) || (form == 'd' && s.size() == 18)) {
      o.is_float = true;
      o.float_size = form == 'f' ? 4 : 8;
      o.imm = strtoull(s.c_str() + 2, 0, 16) ^ (negative ? 1ull << (8 * o.float_size - 1) : 0);
    } else if (s.find('.') != string::npos) {
      o.is_float = true;
      o.float_size = 8;
      double value = atof(s.c_str()) * (negative ? -1 : 1);
      memcpy(&o.imm, &value, 8);
    } else {
      while (toupper(s.back()) == 'U') s.pop_back();
      o.imm = form == 'b' ? strtoull(s.c_str() + 2, 0, 2) : strtoull(s.c_str(), 0, 0);
      if (negative) o.imm = -o.imm;
    }
    return o;
  }
  Operand simple_operand() {
    string word = next();
    if (word == "-") return literal(next(), true);
    if (is_number(word)) return literal(word, false);
    Operand o;
    if (word == "!") {
      o = simple_operand();
      o.negated = true;
      return o;
    }
    if (word == "_") {
      o.kind = oSink;
      return o;
    }
    o.name = word;
    auto reg = registers.find(word);
    if (reg != registers.end()) {
      o.kind = oReg;
      o.reg = reg->second;
    } else if (SPECIALS.count(word)) {
      u32 &special = kernel->specials[word];
      if (!special) special = allocate(4);
      o.kind = oReg;
      o.reg = {special, 4};
    } else {
      o.kind = oSym;
      auto symbol = symbols.find(word);
      if (symbol != symbols.end()) o.imm = symbol->second;
    }
    return o;
  }
  Operand operand() {
    Operand o;
    if (peek() == "{") {
      next();
      o.kind = oVec;
      while (peek() != "}") {
        o.parts.push_back(operand());
        if (peek() == ",") next();
      }
      next();
      return o;
    }
    if (peek() == "[") {
      next();
      o.kind = oMem;
      while (peek() != "]") {
        if (peek() == "+") {
          next();
          continue;
        }
        Operand part = simple_operand();
        if (part.kind == oReg) {
          if (o.has_reg) bad("two registers in an address");
          o.has_reg = true;
          o.reg = part.reg;
        } else {
          if (part.kind == oSym) o.name = part.name;
          o.offset += (i64)part.imm;
        }
      }
      next();
      return o;
    }
    o = simple_operand();
    if ((o.kind == oReg || o.kind == oSink) && peek() == "|") {
      next();
      o.parts.push_back(simple_operand());
    }
    return o;
  }

  // ---- the instruction that is being parsed
  Instruction now;
  vector<string> modifiers;  // ld.global.b32: ld, global, b32
  vector<Operand> operands;

  [[noreturn]] void bad(const string &why) {
    throw Fail(fmt("line %d: %s: %s", now.line, now.text.c_str(), why.c_str()));
  }
  bool has(const char *modifier) { return std::count(modifiers.begin(), modifiers.end(), modifier) > 0; }
  bool has_shared() {
    return std::any_of(modifiers.begin(), modifiers.end(), [](const string &m) { return m.find("shared") == 0; });
  }
  // The i-th type among the modifiers; -1: the last.
  Type type(int i = -1) {
    vector<Type> types;
    for (auto &modifier : modifiers) {
      auto it = TYPES.find(modifier);
      if (it != TYPES.end()) types.push_back(it->second);
    }
    if (i >= (int)types.size()) bad("type");
    return i >= 0 ? types[i] : types.empty() ? tNone : types.back();
  }
  u32 source(const Operand &o, int size, bool as_float = false) {
    if (o.kind == oReg) {
      if (o.reg.size != size) bad(fmt("register %s has %d bytes, not %d", o.name.c_str(), o.reg.size, size));
      return o.reg.at;
    }
    if (o.kind == oSym) {
      if (!symbols.count(o.name)) bad("symbol " + o.name);
      return constant(size, o.imm);
    }
    if (o.kind != oImm) bad("operand");
    u64 value = o.imm;
    if (o.is_float && o.float_size == 8 && size == 4) {
      double d;
      memcpy(&d, &value, 8);
      value = fbits((float)d);
    } else if (as_float && !o.is_float && size == 4) value = fbits((float)(i64)value);
    else if (as_float && !o.is_float && size == 8) {
      double d = (double)(i64)value;
      memcpy(&value, &d, 8);
    }
    return constant(size, value);
  }
  u32 destination(const Operand &o, int size) {
    if (o.kind == oSink) return allocate(size);
    if (o.kind != oReg || o.reg.size != size) bad(fmt("destination of %d bytes, not %d", o.reg.size, size));
    return o.reg.at;
  }
  Details &details() {
    if (!now.details) now.details = std::make_shared<Details>();
    return *now.details;
  }
  Address address(const Operand &o) {
    if (o.kind != oMem) bad("address");
    if (!o.name.empty() && !symbols.count(o.name)) bad("symbol " + o.name);
    return {o.has_reg ? o.reg.size : 0, o.reg.at, o.offset};
  }
  static vector<Operand> elements(const Operand &o) { return o.kind == oVec ? o.parts : vector<Operand>{o}; }
  // The registers of a vector that is loaded or stored, and their sizes.
  void transfer(const Operand &o, int size, bool store, Details &x) {
    for (auto &element : elements(o)) {
      bool reg = element.kind == oReg, left_out = element.kind == oSink;
      if (!reg && !left_out && !store) bad("vector");
      x.regs.push_back(reg ? element.reg.at : left_out ? 0 : source(element, size));
      x.sizes.push_back(reg ? element.reg.size : left_out ? -1 : size);
    }
  }
  void append(const Operand &o, int size, bool as_float, vector<u32> &to) {
    for (auto &element : elements(o)) to.push_back(source(element, size, as_float));
  }
  // destination, source, source...: all of one size.
  void plain(int size, Handler handler, u8 kind, bool as_float = false) {
    now.run = handler;
    now.kind = kind;
    now.at[0] = destination(operands[0], size);
    for (size_t i = 1; i < operands.size(); i++) now.at[i] = source(operands[i], size, as_float);
  }

  void parse_instruction() {
    now = Instruction();
    now.line = words[at].line;
    now.location = location;
    size_t begin = at;
    string word = next();
    if (word == "@") {
      now.negated = peek() == "!";
      if (now.negated) next();
      auto it = registers.find(next());
      if (it == registers.end()) bad("predicate");
      now.predicated = true;
      now.predicate = it->second.at;
      word = next();
    }
    modifiers.clear();
    operands.clear();
    for (size_t i = 0, end; i <= word.size(); i = end + 1) {
      end = std::min(word.find('.', i), word.size());
      modifiers.push_back(word.substr(i, end - i));
    }
    if (modifiers[0] == "call") {  // of an assertion that failed
      skip_statement();
      now.text = "call";
      now.flow = TRAP;
      kernel->code.push_back(now);
      return;
    }
    while (peek() != ";" && peek() != "") {
      if (peek() == ",") next();
      else operands.push_back(operand());
    }
    next();
    for (size_t i = begin; i < at; i++) {
      const string &text = words[i].text;
      if (text == "\n") continue;
      if (!now.text.empty() && text != "," && text != ";") now.text += ' ';
      now.text += text;
    }
    decode();
    if (!now.run && now.flow == NORMAL) bad("not implemented");
    kernel->code.push_back(now);
  }

  void decode();
  void decode_move(int size, Type t);
  void decode_wgmma();
  void decode_setp();
  void decode_cvt();
  void decode_memory(bool load);
  void decode_atomic(bool reduction);
  void decode_async_copy();
  void decode_mma();
  void decode_integer(int size, bool sign);
  void decode_float32();
  void finish();
  void find_meetings();
  void contract();
};
