// Device memory: which bytes belong to a tensor, who touched them last, and the allocator that tells us.
#pragma once
#include "common.hpp"

// What is known of a few neighbouring bytes: the last write, two reads by different warps since the last barrier, and
// one read of an earlier program. An epoch is a number that every program and every barrier of all threads advances.
struct Cell {
  u32 write_epoch, write_pc;
  u16 writer;     // thread
  u8 write_mask;  // which of the bytes
  u8 write_flags;
  u16 write_syncs, write_collectives;  // the writing warp's counts of bar.warp.sync and of other .sync instructions
  u32 read_epoch, read_pc, read_pc2;
  u16 reader, reader2;
  u16 read_syncs, read_collectives;
  u32 older_read_epoch, older_read_pc;
  u8 read_mask;
  u8 write_fences;  // the writing warp's count of proxy fences
  u8 padding[2];
};
enum { W_ATOMIC = 1, W_CHANGED = 2 };

// A tensor's storage, or what a launch names as one.
struct Region {
  u64 base, size;
  int shift;    // a cell stands for 1 << shift bytes
  bool hooked;  // allocated by our hook: poison where nothing was written
  string name;
  vector<Cell *> pages;   // of 4096 bytes, made when they are first touched
  static u64 live_bytes;  // of cells
  Cell *cell(u64 offset) {
    if (pages.empty()) pages.resize((size >> 12) + 1);
    Cell *&page = pages[offset >> 12];
    if (!page) {
      page = (Cell *)calloc(4096 >> shift, sizeof(Cell));
      live_bytes += sizeof(Cell) * (4096 >> shift);
    }
    return page + ((offset & 4095) >> shift);
  }
  void drop() {
    for (auto page : pages) free(page);
    pages.clear();
  }
  ~Region() { drop(); }
};
u64 Region::live_bytes = 0;

static std::map<u64, Region *> regions;
static std::recursive_mutex region_lock;
static const u32 POISON = 0x7fbb7fbbu;  // a NaN in float32, float16 and bfloat16

static Region *find_region(u64 address, u64 bytes) {
  std::lock_guard<std::recursive_mutex> guard(region_lock);
  auto it = regions.upper_bound(address);
  if (it == regions.begin()) return nullptr;
  Region *region = (--it)->second;
  return address >= region->base && address + bytes <= region->base + region->size ? region : nullptr;
}
static Region *nearest_region(u64 address) {
  std::lock_guard<std::recursive_mutex> guard(region_lock);
  auto it = regions.upper_bound(address);
  Region *best = nullptr;
  u64 distance = ~0ull;
  if (it != regions.end()) best = it->second, distance = it->first - address;
  if (it != regions.begin()) {
    --it;
    u64 end = it->second->base + it->second->size;
    if ((address >= end ? address - end : 0) < distance) best = it->second;
  }
  return best;
}

// PyTorch's CPU allocator calls posix_memalign and free through the table of imported functions of libc10.so. We put
// our own there, so that every tensor has exact bounds, red zones on both sides, and poison until it is written.
static bool hook_on = false;
static int (*real_memalign)(void **, size_t, size_t) = nullptr;
static void (*real_free)(void *) = nullptr;
static auto *hooked = new std::unordered_map<u64, void *>;  // tensor's bytes -> what was allocated; never destroyed
static const size_t RED_ZONE = 512;

static int our_memalign(void **out, size_t align, size_t size) {
  if (!hook_on) return real_memalign(out, align, size);
  size_t zone = std::max(RED_ZONE, align);
  void *whole = nullptr;
  if (int error = real_memalign(&whole, align, size + 2 * zone)) return error;
  u8 *bytes = (u8 *)whole + zone;
  for (size_t i = 0; i < size; i++) bytes[i] = (u8)(POISON >> 8 * (i & 3));
  std::lock_guard<std::recursive_mutex> guard(region_lock);
  regions[(u64)bytes] = new Region{(u64)bytes, size, 1, true, "", {}};
  (*hooked)[(u64)bytes] = whole;
  *out = bytes;
  return 0;
}
static void our_free(void *bytes) {
  {
    std::lock_guard<std::recursive_mutex> guard(region_lock);
    auto it = hooked->find((u64)bytes);
    if (it != hooked->end()) {
      auto region = regions.find((u64)bytes);
      if (region != regions.end()) {
        delete region->second;
        regions.erase(region);
      }
      bytes = it->second;
      hooked->erase(it);
    }
  }
  real_free(bytes);
}
static int hook_library(struct dl_phdr_info *info, size_t, void *hooks) {
  if (!strstr(info->dlpi_name, "libc10.so")) return 0;
  ElfW(Dyn) *dynamic = nullptr;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_DYNAMIC) dynamic = (ElfW(Dyn) *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
  ElfW(Sym) *symbols = nullptr;
  const char *names = nullptr;
  ElfW(Rela) *jumps = nullptr, *data = nullptr;
  size_t jumps_bytes = 0, data_bytes = 0;
  for (auto entry = dynamic; entry && entry->d_tag != DT_NULL; entry++) {
    switch (entry->d_tag) {
    case DT_SYMTAB: symbols = (ElfW(Sym) *)entry->d_un.d_ptr; break;
    case DT_STRTAB: names = (const char *)entry->d_un.d_ptr; break;
    case DT_JMPREL: jumps = (ElfW(Rela) *)entry->d_un.d_ptr; break;
    case DT_PLTRELSZ: jumps_bytes = entry->d_un.d_val; break;
    case DT_RELA: data = (ElfW(Rela) *)entry->d_un.d_ptr; break;
    case DT_RELASZ: data_bytes = entry->d_un.d_val; break;
    }
  }
  auto replace = [&](ElfW(Rela) *table, size_t bytes) {
    for (size_t i = 0; table && i < bytes / sizeof(*table); i++) {
      u32 type = ELF64_R_TYPE(table[i].r_info);
      if (type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT) continue;
      const char *name = names + symbols[ELF64_R_SYM(table[i].r_info)].st_name;
      void *ours = nullptr;
      if (!strcmp(name, "posix_memalign")) {
        real_memalign = &posix_memalign;
        ours = (void *)our_memalign;
      } else if (!strcmp(name, "free")) {
        real_free = &free;
        ours = (void *)our_free;
      }
      if (!ours) continue;
      void **slot = (void **)(info->dlpi_addr + table[i].r_offset);
      mprotect((void *)((u64)slot & ~4095ull), 8192, PROT_READ | PROT_WRITE);
      *slot = ours;
      ++*(int *)hooks;
    }
  };
  replace(jumps, jumps_bytes);
  replace(data, data_bytes);
  return 0;
}
