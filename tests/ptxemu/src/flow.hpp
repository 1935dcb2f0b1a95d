// Where branches lead, and where lanes that part meet again.
#pragma once
#include "parser.hpp"

void Parser::finish() {
  auto &code = kernel->code;
  if (code.empty()) throw Fail("no entry");
  if (code.back().flow != RET) {
    Instruction end;
    end.flow = RET;
    end.kind = cBra;
    end.text = "ret";
    code.push_back(end);
  }
  auto place = [&](const string &label) {
    auto it = labels.find(label);
    if (it == labels.end()) throw Fail("label " + label);
    return it->second;
  };
  for (auto &[instruction, label] : branches) code[instruction].target = place(label);
  for (auto &[instruction, table] : table_branches)
    for (auto &label : branch_tables.at(table)) code[instruction].details->targets.push_back(place(label));
  find_meetings();
  if (inexact) contract();
  kernel->registers.assign(register_bytes, 0xcd);
  for (auto &[key, c] : constants) {
    u8 *registers = kernel->registers.data();
    if (c.size == 0) memcpy(registers + c.at, &c.value, 4);
    else
      for (int l = 0; l < 32; l++) put(registers, c.at, c.size, l, c.value);
  }
}

// Immediate post-dominators of the blocks that end with a branch, by the algorithm of Cooper, Harvey and Kennedy.
void Parser::find_meetings() {
  const auto &code = kernel->code;
  const size_t n = code.size();
  vector<bool> leads(n + 1, false);  // a block
  leads[0] = true;
  for (size_t i = 0; i < n; i++) {
    if (code[i].flow == BRA) leads[code[i].target] = true;
    if (code[i].flow == BRX)
      for (int target : code[i].details->targets) leads[target] = true;
    if (code[i].flow == BRA || code[i].flow == BRX || code[i].flow == RET || code[i].flow == TRAP) leads[i + 1] = true;
  }
  vector<int> block_of(n), first;
  for (size_t i = 0; i < n; i++) {
    if (leads[i]) first.push_back(i);
    block_of[i] = first.size() - 1;
  }
  const int end = first.size();  // a block of its own, to which all returns lead
  auto last = [&](int block) { return (block + 1 < end ? first[block + 1] : (int)n) - 1; };
  vector<vector<int>> successors(end), predecessors(end + 1);
  for (int block = 0; block < end; block++) {
    const Instruction &in = code[last(block)];
    auto lead_to = [&](int other) {
      successors[block].push_back(other);
      predecessors[other].push_back(block);
    };
    bool leaves = true;
    if (in.flow == RET || in.flow == TRAP) lead_to(end);
    else if (in.flow == BRA) lead_to(block_of[in.target]);
    else if (in.flow == BRX)
      for (int target : in.details->targets) lead_to(block_of[target]);
    else leaves = false;
    if (!leaves || in.predicated) lead_to(std::min(block + 1, end));
  }
  vector<int> order, number(end + 1, -1), dominator(end + 1, -1);  // postorder of the reversed graph
  vector<bool> seen(end + 1, false);
  vector<std::pair<int, size_t>> stack = {{end, 0}};
  seen[end] = true;
  while (!stack.empty()) {
    auto &[block, i] = stack.back();
    if (i < predecessors[block].size()) {
      int before = predecessors[block][i++];
      if (!seen[before]) {
        seen[before] = true;
        stack.push_back({before, 0});
      }
    } else {
      number[block] = order.size();
      order.push_back(block);
      stack.pop_back();
    }
  }
  dominator[end] = end;
  for (bool change = true; change;) {
    change = false;
    for (int k = (int)order.size() - 1; k >= 0; k--) {
      int block = order[k], found = -1;
      if (block == end) continue;
      for (int other : successors[block]) {
        if (dominator[other] < 0) continue;
        if (found < 0) found = other;
        while (found != other) {
          while (number[found] < number[other]) found = dominator[found];
          while (number[other] < number[found]) other = dominator[other];
        }
      }
      if (found >= 0 && dominator[block] != found) {
        dominator[block] = found;
        change = true;
      }
    }
  }
  kernel->meets.assign(n, ~0u);
  for (int block = 0; block < end; block++)
    if (dominator[block] >= 0 && dominator[block] < end) kernel->meets[last(block)] = first[dominator[block]];
}

// A product that only one sum uses becomes one fma with it, as ptxas does.
void Parser::contract() {
  auto &code = kernel->code;
  std::unordered_map<u32, int> uses, definitions;
  vector<bool> labelled(code.size() + 1, false);
  for (auto &[label, i] : labels) labelled[i] = true;
  for (auto &in : code) {
    for (int k = 1; k < 5; k++)
      if (in.at[k]) uses[in.at[k]]++;
    if (in.at[0]) definitions[in.at[0]]++;
    if (!in.details) continue;
    for (u32 r : in.details->regs) uses[r]++, definitions[r]++;
    for (auto *regs : {&in.details->regs_b, &in.details->regs_c, &in.details->regs_d})
      for (u32 r : *regs) uses[r]++;
    for (u32 r : {in.details->to.reg, in.details->from.reg}) uses[r]++;
  }
  std::unordered_map<u32, size_t> products;  // by register
  for (size_t i = 0; i < code.size(); i++) {
    Instruction &in = code[i];
    if (labelled[i]) products.clear();
    for (int k = 1; k <= 2 && (in.run == addf || in.run == subf); k++) {
      auto it = products.find(in.at[k]);
      if (it == products.end() || uses[in.at[k]] != 1 || definitions[in.at[k]] != 1) continue;
      Instruction &product = code[it->second];
      in.run = in.run == addf ? fmaf_ : k == 1 ? fmsf_ : fnmaf_;
      in.at[3] = in.at[3 - k];
      in.at[1] = product.at[1];
      in.at[2] = product.at[2];
      in.text += "  (contracted)";
      product.run = h_nop;
      product.kind = cOther;
    }
    if (in.at[0]) {
      products.erase(in.at[0]);
      for (auto it = products.begin(); it != products.end();) {
        const Instruction &product = code[it->second];
        if (product.at[1] == in.at[0] || product.at[2] == in.at[0]) it = products.erase(it);
        else ++it;
      }
    }
    if (in.run == mulf && !in.predicated) products[in.at[0]] = i;
  }
}
