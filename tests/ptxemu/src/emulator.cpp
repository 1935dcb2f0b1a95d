// What driver.py calls. Answers are JSON.
#include "decode.hpp"
#include "flow.hpp"
#include "run.hpp"

static string answer, error;

static string quoted(const string &text) {
  string s = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') s += '\\';
    s += (u8)c < 32 ? ' ' : c;
  }
  return s + '"';
}
static string list(const vector<string> &items) {
  string s = "[";
  for (auto &item : items) s += (s.size() > 1 ? "," : "") + item;
  return s + "]";
}
typedef unsigned long long ull;

extern "C" {
// Null if the text has something that is not implemented: see emu_error.
void *emu_parse(const char *ptx, int inexact) {
  std::unique_ptr<Kernel> kernel(new Kernel);
  try {
    Parser(*kernel, inexact).run(ptx);
  } catch (std::exception &e) {
    error = e.what();
    return nullptr;
  }
  return kernel.release();
}
const char *emu_error() { return error.c_str(); }

// The name, and [bytes, offset] of every parameter.
const char *emu_signature(const Kernel *kernel) {
  vector<string> parameters;
  for (auto &p : kernel->parameters) parameters.push_back(fmt("[%d,%d]", p.size, p.offset));
  answer = "[" + quoted(kernel->name) + "," + list(parameters) + "]";
  return answer.c_str();
}

// From now on CPU tensors have exact bounds, red zones and poison. Returns how many imported functions were replaced.
int emu_hook() {
  static int replaced = 0;
  if (!replaced) dl_iterate_phdr(hook_library, &replaced);
  hook_on = true;
  return replaced;
}

// Bytes that a launch may touch, under a name for its reports. Those of the allocator's hook are only named.
void emu_region(u64 base, u64 bytes, int element, const char *name) {
  std::lock_guard<std::recursive_mutex> guard(region_lock);
  int shift = element >= 4 ? 2 : element == 2 ? 1 : 0;
  auto it = regions.find(base);
  if (it != regions.end() && it->second->hooked) {
    Region *region = it->second;
    region->name = name;
    if (region->shift != shift) region->drop(), region->shift = shift;
    return;
  }
  if (it != regions.end()) {
    delete it->second;
    regions.erase(it);
  }
  if (Region *around = find_region(base, bytes)) {
    if (around->name.empty()) around->name = name;
    return;
  }
  regions[base] = new Region{base, bytes, shift, false, name, {}};
}
void emu_unregion(u64 base) {
  std::lock_guard<std::recursive_mutex> guard(region_lock);
  auto it = regions.find(base);
  if (it == regions.end()) return;
  if (it->second->hooked) {
    it->second->name.clear();
    return;
  }
  delete it->second;
  regions.erase(it);
}

// Run all programs, one after another in random order. Returns 0, or -1 for a failure of the emulator (see emu_error).
int emu_launch(Kernel *kernel, const u32 *grid, u32 threads, u32 shared_bytes, const u8 *parameters,
               const Options *options) {
  Launch *outer = launch, own{};
  launch = &own;
  own.kernel = kernel;
  own.options = *options;
  std::copy(grid, grid + 3, own.grid);
  own.threads = threads;
  own.shared_bytes = shared_bytes;
  own.parameters = parameters;
  own.random = options->seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (int i = 0; i < 4; i++) draw();
  own.shared_cells.resize(shared_bytes / 2 + 8);
  own.shared_copied.resize(shared_bytes / 2 + 8);
  for (auto *counts :
       {&kernel->n_executed, &kernel->n_threads, &kernel->n_sectors, &kernel->n_conflicts, &kernel->n_requests})
    counts->assign(kernel->code.size(), 0);
  for (auto &instruction : kernel->code)
    if (instruction.details) instruction.details->last = nullptr;
  if (last_epoch > 0xf0000000u) {
    last_epoch = 1;
    for (auto &r : regions) r.second->drop();
  }
  own.launch_epoch = last_epoch + 1;
  u8 *registers = (u8 *)aligned_alloc(64, (size_t)warps_of(threads) * kernel->registers.size() + 64);
  int code = 0;
  try {
    vector<u32> order((u64)grid[0] * grid[1] * grid[2]);
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
    for (size_t i = 0; i < order.size() && !own.dead; i++) {
      own.cta = order[i];
      own.program[0] = own.cta % grid[0];
      own.program[1] = own.cta / grid[0] % grid[1];
      own.program[2] = own.cta / grid[0] / grid[1];
      run_program(registers);
    }
  } catch (std::exception &e) {
    error = e.what();
    code = -1;
  }
  free(registers);
  if (Region::live_bytes > (1ull << 30)) {
    std::lock_guard<std::recursive_mutex> guard(region_lock);
    for (auto &r : regions) r.second->drop();
    Region::live_bytes = 0;
  }
  vector<string> found;
  for (auto &[key, r] : own.reports) {
    string place = where(r.pc) + (r.two ? " | " + where(r.other_pc) : "");
    found.push_back("[" + quoted(r.kind) + "," + quoted(place) + "," + quoted(r.text) + fmt(",%llu]", (ull)r.count));
  }
  answer = fmt("[%llu,", (ull)own.executed) + list(found) + "]";
  launch = outer;
  return code;
}
// Of the last launch: warp instructions, and [kind, place, text, how often] of all that was found.
const char *emu_result() { return answer.c_str(); }

// Of the last launch of a kernel, for each instruction: class, source, how often warps and threads executed it, and
// what its accesses cost: sectors, bank conflicts, requests.
const char *emu_profile(Kernel *kernel) {
  Launch *outer = launch, own{};
  launch = &own;
  own.kernel = kernel;
  vector<string> rows;
  for (size_t i = 0; i < kernel->code.size(); i++) {
    if (!kernel->n_executed[i]) continue;
    rows.push_back("[" + quoted(CLASSES[kernel->code[i].kind]) + "," + quoted(where(i)) +
                   fmt(",%llu,%llu,%llu,%llu,%llu]", (ull)kernel->n_executed[i], (ull)kernel->n_threads[i],
                       (ull)kernel->n_sectors[i], (ull)kernel->n_conflicts[i], (ull)kernel->n_requests[i]));
  }
  answer = list(rows);
  launch = outer;
  return answer.c_str();
}
}
