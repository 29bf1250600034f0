// Runs kernels on the CPU, a block (or a cluster of blocks) after the other, one fiber for each CUDA thread. What a GPU leaves open is drawn at random, from a
// seed: the order of the blocks, which warp goes on and for how long, in which direction its lanes do, when asynchronous work is done.
//
//     bar.sync, mma, wgmma ...   lanes of a warp meet; a barrier counts warps. Lanes that arrive from different places in the code are reported
//     shared memory              NaN (0xff) in the beginning, and where a copy is on its way; addresses are checked; each block of a cluster has a window
//     copies, products           done at once, or when they are waited for, or some time in between (GSA_EMULATION=early, late, random). Accumulators of
//                                products in flight hold NaN, and so does what a copy will fill: reading is seen in the results, writing is reported
//     nobody can go on           reported, with what everybody waits for
//
// What it cannot show: time, registers, bank conflicts, and all that follows from a memory model weaker than one CPU's (fences are nothing here).
#include "device.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr int64_t kWindow = 1 << 18, kStack = 1 << 18, kPage = 4096;
constexpr int64_t kShared = 232448;  // bytes that a block can have
constexpr int kBarriers = 16, kMaxCluster = 8;

// ------------------------------------------------------------------------------------------------------------ chance

uint64_t seed = [] {
  const char* s = getenv("GSA_EMULATION_SEED");
  return s ? strtoull(s, nullptr, 0) : 1;
}();
uint64_t launches = 0, chance_state = 1;  // launches: since begin()
uint32_t chance() {  // splitmix64
  uint64_t z = chance_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9, z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return static_cast<uint32_t>((z ^ z >> 31) >> 32);
}
enum class When { early, late, random };
const When when = [] {
  const char* s = getenv("GSA_EMULATION");
  return !s ? When::random : s[0] == 'e' ? When::early : s[0] == 'l' ? When::late : When::random;
}();
bool now() { return when == When::random ? chance() & 1 : when == When::early; }

// ------------------------------------------------------------------------------------------------------------ who there is

struct Product {
  Kind kind;
  bool from_registers, a_transposed, b_transposed, add;
  int n, warp;
  uint32_t a[32][4];
  uint64_t A, B;
  int flight;
};
// Accumulators that products in flight have.
struct Flight {
  float* c[32];
  int n = 0, products = 0;
  float value[16][256];
};
struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes, read;
};
struct Store {
  void* to;
  uint32_t from, bytes;
  std::vector<char> data;  // once shared memory is read
};
struct Thread : Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool done = true;
  const uint32_t* watched = nullptr;  // waits while *watched & mask == value
  uint32_t mask = 0, value = 0;
  const char* waits = "";
  int64_t on = 0;
  uint32_t cluster_turn = 0;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
  std::vector<Store> open_stores, stores;
  bool ready() const { return !watched || (*watched & mask) != value; }
};
struct Cta;

}  // namespace

struct Warp {
  int index = 0;  // in its block
  uint32_t live = 0;
  // Lanes that meet.
  void* brought[32];
  Meeting f[32];
  const void* place[32];
  uint32_t here = 0, met[32] = {};
  // Lanes at bar.sync.
  uint32_t at_barrier = 0;
  int id = 0, threads = 0, value = 0;
  const void* barrier_place = nullptr;
  uint32_t arrivals = 0, side = 0;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::deque<Flight> flights;
};

namespace {

struct Barrier {
  int count = 0, threads = 0, value = 0, result[2] = {};
  uint32_t turn = 0;
};
struct Variable {
  const void* key;
  int64_t at;
};
struct Cta : Block {
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::vector<Variable> variables;
  int64_t bytes = 0;  // of shared memory, variables included
  int live = 0;
};
struct Load {
  Cta* cta;
  uint32_t to;
  const void* from;
  uint32_t bytes, barrier;
  uint32_t value;  // from == nullptr: of st.async
};

std::mutex one_launch;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<std::unique_ptr<Cta>> ctas;
int cluster_size = 1;
std::deque<Load> under_way;
std::vector<Store> stores_under_way;  // to memory, of data already read
struct {
  int arrived = 0, live = 0;
  uint32_t turn = 0;
} cluster_barrier;
int64_t dynamic_bytes = 0;
int lanes = 0;  // of a block: its threads, and what its last warp has no thread for
const void* kernel_at = nullptr;
std::set<const void*> launched;
std::string trouble;
void (*kernel_body)(void*);
void* kernel_arguments;
void* scheduler_stack;

Thread& me() { return *static_cast<Thread*>(self); }
Cta& cta() { return *static_cast<Cta*>(self->block); }

// ------------------------------------------------------------------------------------------------------------ fibers

extern "C" void gsa_emulation_switch(void** save, void* to);
asm(R"(
.text
.globl gsa_emulation_switch
.hidden gsa_emulation_switch
.type gsa_emulation_switch,@function
gsa_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gsa_emulation_switch,.-gsa_emulation_switch
)");

#if defined(__SANITIZE_ADDRESS__)
const void* host_stack;
size_t host_stack_size;
void* host_fake;
void to_thread(Thread& t) {
  __sanitizer_start_switch_fiber(&host_fake, t.stack, kStack);
  gsa_emulation_switch(&scheduler_stack, t.stack_pointer);
  __sanitizer_finish_switch_fiber(host_fake, nullptr, nullptr);
}
void to_scheduler(Thread& t, bool for_good) {
  void* fake;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, host_stack, host_stack_size);
  gsa_emulation_switch(&t.stack_pointer, scheduler_stack);
  __sanitizer_finish_switch_fiber(fake, &host_stack, &host_stack_size);
}
#else
void to_thread(Thread& t) { gsa_emulation_switch(&scheduler_stack, t.stack_pointer); }
void to_scheduler(Thread& t, bool) { gsa_emulation_switch(&t.stack_pointer, scheduler_stack); }
#endif

void wait_while(const uint32_t* watched, uint32_t mask, uint32_t value, const char* waits, int64_t on) {
  Thread& t = me();
  if ((*watched & mask) != value) return;
  t.watched = watched, t.mask = mask, t.value = value, t.waits = waits, t.on = on;
  while (!t.ready()) to_scheduler(t, false);
  t.watched = nullptr;
}

// ------------------------------------------------------------------------------------------------------------ reports

// The name of a function of this library, local ones included: from its table of symbols.
std::string name_of(const void* function) {
  Dl_info info;
  if (!function || !dladdr(function, &info)) return "?";
  std::string found = "?";
  const int file = open(info.dli_fname, O_RDONLY);
  struct stat s;
  if (file < 0 || fstat(file, &s)) return found;
  if (char* m = static_cast<char*>(mmap(nullptr, s.st_size, PROT_READ, MAP_PRIVATE, file, 0)); m != MAP_FAILED) {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(m);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(m + header->e_shoff);
    const uint64_t offset = static_cast<const char*>(function) - static_cast<const char*>(info.dli_fbase);
    for (int i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const auto* symbols = reinterpret_cast<const Elf64_Sym*>(m + sections[i].sh_offset);
      const char* names = m + sections[sections[i].sh_link].sh_offset;
      for (uint64_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); ++k)
        if (symbols[k].st_value == offset && ELF64_ST_TYPE(symbols[k].st_info) == STT_FUNC) {
          char* plain = abi::__cxa_demangle(names + symbols[k].st_name, nullptr, nullptr, nullptr);
          found = plain ? plain : names + symbols[k].st_name;
          free(plain);
        }
    }
    munmap(m, s.st_size);
  }
  close(file);
  return found;
}

std::string text(const char* format, va_list a) {
  char line[1024];
  vsnprintf(line, sizeof line, format, a);
  return line;
}
std::string text(const char* format, ...) {
  va_list a;
  va_start(a, format);
  const std::string s = text(format, a);
  va_end(a);
  return s;
}
// Where in the source a call returns to: the line, and those that it was inlined into.
std::string source_of(const void* place) {
  static std::map<const void*, std::string> known;
  const auto [it, fresh] = known.try_emplace(place);
  Dl_info info;
  if (!fresh || !dladdr(place, &info)) return it->second;
  const std::string command =
      text("addr2line -i -e '%s' %#lx", info.dli_fname, long(static_cast<const char*>(place) - static_cast<const char*>(info.dli_fbase)) - 1);
  if (FILE* f = popen(command.c_str(), "r")) {
    char line[1024];
    while (fgets(line, sizeof line, f)) {
      std::string s(line);
      s = s.substr(s.rfind('/') + 1), s = s.substr(0, s.find_first_of(" \n"));
      it->second += (it->second.empty() ? "" : " in ") + s;
    }
    pclose(f);
  }
  return it->second;
}
// The compiler may have made several of one place.
bool same_place(const void* a, const void* b) { return a == b || (a && b && source_of(a) == source_of(b)); }

std::string head() {
  return text("emulation of %s, launch %llu with seed %llu", name_of(kernel_at).c_str(), static_cast<unsigned long long>(launches),
              static_cast<unsigned long long>(seed));
}

// What everybody waits for, lanes with the same in one line.
std::string who_waits(int per_block) {
  std::string all;
  for (size_t i = 0; i < threads.size() && static_cast<int>(i) < per_block * cluster_size;) {
    const Thread& t = *threads[i];
    size_t k = i;
    while (k < threads.size() && static_cast<int>(k) < per_block * cluster_size && threads[k]->block == t.block && threads[k]->done == t.done &&
           (t.done || (threads[k]->waits == t.waits && threads[k]->on == t.on)))
      ++k;
    all += text("\n  block %u, threads %d to %d: ", t.block->index.x, t.index, threads[k - 1]->index);
    all += t.done ? "done" : text("%s %lld", t.waits, static_cast<long long>(t.on));
    i = k;
  }
  return all;
}

}  // namespace

Fiber* self = nullptr;

void fail(const char* format, ...) {
  va_list a;
  va_start(a, format);
  const std::string what = text(format, a);
  va_end(a);
  if (!self) throw std::runtime_error(head() + ": " + what);
  Thread& t = me();
  trouble = head() + text(", block %u, thread %d: ", t.block->index.x, t.index) + what;
  for (;;) to_scheduler(t, false);
}

// ------------------------------------------------------------------------------------------------------------ shared memory

void* at(uint32_t address, uint32_t bytes) {
  if (int64_t(address) + bytes > cta().bytes) fail("shared memory: %u bytes at %u, and there are %ld", bytes, address, long(cta().bytes));
  return cta().shared + address;
}
uint32_t address_of(const void* p) {
  const int64_t a = static_cast<const char*>(p) - cta().shared;
  if (a < 0 || a > cta().bytes) fail("an address that is not in shared memory: offset %ld, and there are %ld bytes", long(a), long(cta().bytes));
  return static_cast<uint32_t>(a);
}
void* dynamic_shared(int64_t alignment) {
  if (alignment > 1024) fail("shared memory aligned to %ld", long(alignment));
  return cta().shared;
}
static void* place_of(Cta& c, int64_t a, int64_t bytes) {
  if (a + bytes > kShared) fail("more shared memory than there is: %ld bytes", long(a + bytes));
  return c.shared + a;
}
void* static_shared(const void* key, int64_t bytes, int64_t alignment) {
  Cta& c = cta();
  for (const Variable& v : c.variables)
    if (v.key == key) return c.shared + v.at;
  const int64_t a = (c.bytes + alignment - 1) / alignment * alignment;
  void* p = place_of(c, a, bytes);
  c.variables.push_back({key, a}), c.bytes = a + bytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#endif
  memset(p, 0xff, bytes);
  return p;
}

// Bytes that a copy will write: NaN until then, and nobody else's.
static void* cover(Cta& c, uint32_t to, uint32_t bytes) {
  if (int64_t(to) + bytes > c.bytes) fail("shared memory: %u bytes at %u, and there are %ld", bytes, to, long(c.bytes));
  return memset(c.shared + to, 0xff, bytes);
}
static char* uncover(Cta& c, uint32_t to, uint32_t bytes) {
  char* p = c.shared + to;
  for (uint32_t i = 0; i < bytes; ++i)
    if (p[i] != '\xff') fail("shared memory at %u is written while a copy to it is on its way", to + i);
  return p;
}

// ------------------------------------------------------------------------------------------------------------ warps and blocks

static void forget(Warp& w, uint32_t lanes) {
  w.here &= ~lanes;
  for (int l = 0; l < 32; ++l) w.met[l] += lanes >> l & 1;
}
void meet(uint32_t mask, Meeting f, void* mine, const void* aligned) {
  Thread& t = me();
  Warp& w = *t.warp;
  if (!(mask >> t.lane & 1)) fail("a lane that is not in its own mask %08x", mask);
  w.brought[t.lane] = mine, w.f[t.lane] = f, w.place[t.lane] = aligned, w.here |= 1u << t.lane;
  if ((w.here & mask) != mask) {
    const uint32_t before = w.met[t.lane];
    return wait_while(&w.met[t.lane], ~0u, before, "for lanes of its warp, mask", mask);
  }
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) {
      if (w.f[l] != f) fail("lanes %d and %d of a warp meet in different instructions", t.lane, l);
      if (!same_place(w.place[l], aligned))
        fail("lanes of a warp meet in an .aligned instruction at different places:\n  %s\n  %s", source_of(aligned).c_str(), source_of(w.place[l]).c_str());
    }
  f(w.brought, mask);
  forget(w, mask);
}
uint32_t ballot(uint32_t mask, bool x) {
  uint32_t mine = x;
  meet(
      mask,
      [](void* const(&brought)[32], uint32_t mask) {
        uint32_t all = 0;
        for (int l = 0; l < 32; ++l)
          if (mask >> l & 1) all |= *static_cast<uint32_t*>(brought[l]) << l;
        for (int l = 0; l < 32; ++l)
          if (mask >> l & 1) *static_cast<uint32_t*>(brought[l]) = all;
      },
      &mine);
  return mine;
}

// A warp arrives once all its lanes that have not ended are there.
static void arrive_if_all(Cta& c, Warp& w) {
  if (!w.at_barrier || w.at_barrier != w.live) return;
  Barrier& b = c.barriers[w.id];
  if (b.count && b.threads != w.threads) fail("bar.sync %d of %d threads, where others say %d", w.id, w.threads, b.threads);
  b.threads = w.threads, b.count += 32, b.value |= w.value;
  w.at_barrier = 0, w.side = b.turn & 1, ++w.arrivals;
  if (b.count > b.threads) fail("bar.sync %d: more than its %d threads", w.id, b.threads);
  if (b.count == b.threads) b.result[b.turn & 1] = b.value, b.count = b.value = 0, ++b.turn;
}
static int synchronise(int id, int n, int value, const void* place) {
  Thread& t = me();
  Cta& c = cta();
  Warp& w = *t.warp;
  if (id < 0 || id >= kBarriers || n <= 0 || n % 32 || n > lanes) fail("bar.sync %d, %d", id, n);
  if (w.at_barrier && (w.id != id || w.threads != n))
    fail("lanes of a warp at different barriers: bar.sync %d, %d and bar.sync %d, %d", w.id, w.threads, id, n);
  if (w.at_barrier && !same_place(w.barrier_place, place))
    fail("lanes of a warp come to bar.sync %d from different places:\n  %s\n  %s", id, source_of(place).c_str(), source_of(w.barrier_place).c_str());
  if (!w.at_barrier) w.value = 0;
  w.id = id, w.threads = n, w.barrier_place = place, w.value |= value != 0, w.at_barrier |= 1u << t.lane;
  Barrier& b = c.barriers[id];
  const uint32_t turn = b.turn;
  arrive_if_all(c, w);
  wait_while(&b.turn, ~0u, turn, "at bar.sync", id);
  return b.result[turn & 1];
}
void sync(int id, int n) { synchronise(id, n, 0, __builtin_return_address(0)); }
void sync_all() { synchronise(0, lanes, 0, __builtin_return_address(0)); }
int sync_or(int value) { return synchronise(0, lanes, value, __builtin_return_address(0)); }

// Every thread of the cluster arrives, and waits for all of them later.
void cluster_arrive() {
  me().cluster_turn = cluster_barrier.turn;
  if (++cluster_barrier.arrived == cluster_barrier.live) cluster_barrier.arrived = 0, ++cluster_barrier.turn;
}
void cluster_wait() { wait_while(&cluster_barrier.turn, ~0u, me().cluster_turn, "at barrier.cluster", 0); }

// An address of the cluster: the window's rank above the offset in it.
uint32_t mapa(uint32_t address, uint32_t rank) {
  if (static_cast<int>(rank) >= cluster_size) fail("mapa: block %u of a cluster of %d", rank, cluster_size);
  at(address, 1);
  return address | (rank + 1) << 20;
}
static Cta& of_cluster(uint32_t& address) {
  const uint32_t rank = (address >> 20) - 1;
  if (static_cast<int>(rank) >= cluster_size) fail("%08x is no address of a cluster", address);
  address &= (1u << 20) - 1;
  return *ctas[rank];
}

// The phase in the lowest bit, which is what is waited for.
struct MBarrier {
  uint32_t phase : 1, count : 15, pending : 16;
  int32_t bytes;
};
static_assert(sizeof(MBarrier) == 8);
static MBarrier& mbarrier(Cta& c, uint32_t a) {
  if (a % 8 || int64_t(a) + 8 > c.bytes) fail("no mbarrier can be at %u", a);
  auto& b = *reinterpret_cast<MBarrier*>(c.shared + a);
  if (b.count == 0 || b.pending > b.count) fail("the mbarrier at %u is not initialised", a);
  return b;
}
static void settle(MBarrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.count;
}
void mbarrier_init(uint32_t a, uint32_t count) {
  if (a % 8) fail("no mbarrier can be at %u", a);
  auto& b = *static_cast<MBarrier*>(at(a, 8));
  if (count == 0 || count >= 1 << 15) fail("an mbarrier of %u arrivals", count);
  b.phase = 0, b.count = b.pending = count, b.bytes = 0;
}
static void arrive_at(Cta& c, uint32_t a, int32_t bytes) {
  MBarrier& b = mbarrier(c, a);
  if (b.pending == 0) fail("the mbarrier at %u: an arrival too many", a);
  b.bytes += bytes, b.pending = b.pending - 1;
  settle(b);
}
void mbarrier_arrive(uint32_t a) { arrive_at(cta(), a, 0); }
void mbarrier_arrive_there(uint32_t a) {
  Cta& c = of_cluster(a);
  if (c.live == 0) fail("an arrival at a block that has ended");
  arrive_at(c, a, 0);
}
void mbarrier_expect(uint32_t a, uint32_t bytes) { arrive_at(cta(), a, static_cast<int32_t>(bytes)); }
void mbarrier_wait(uint32_t a, uint32_t parity) {
  mbarrier(cta(), a);
  wait_while(reinterpret_cast<const uint32_t*>(cta().shared + a), 1, parity & 1, "for the mbarrier at", a);
}

// ------------------------------------------------------------------------------------------------------------ asynchronous copies

static void run(const Load& l) {
  if (l.cta->live == 0) fail("a copy to a block that has ended");
  char* to = uncover(*l.cta, l.to, l.bytes);
  memcpy(to, l.from ? l.from : &l.value, l.bytes);
  MBarrier& b = mbarrier(*l.cta, l.barrier);
  b.bytes -= static_cast<int32_t>(l.bytes);
  settle(b);
}
static void issue(const Load& l) {
  cover(*l.cta, l.to, l.bytes), mbarrier(*l.cta, l.barrier);
  if (now()) run(l);
  else under_way.push_back(l);
}
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 || bytes % 16 || bytes == 0 || reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async.bulk: %u bytes from %p to %u", bytes, from, to);
  issue({&cta(), to, from, bytes, barrier, 0});
}

// What a CUtensorMap holds here.
struct TensorMap {
  char* base;
  int rank;
  int64_t size[5], stride[5];                              // bytes, of all dimensions but the first
  int box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
static CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size, const cuuint64_t* stride,
                       const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill) {
  if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || rank < 2 || rank > 5 || box[0] != 64)
    return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(base) % 16) return CUDA_ERROR_INVALID_VALUE;
  TensorMap& m = *new (map) TensorMap{static_cast<char*>(base), static_cast<int>(rank), {}, {}, {}};
  for (cuuint32_t i = 0; i < rank; ++i) {
    m.size[i] = static_cast<int64_t>(size[i]), m.box[i] = static_cast<int>(box[i]);
    if (i) m.stride[i] = static_cast<int64_t>(stride[i - 1]);
    if (size[i] == 0 || size[i] > (1ull << 32) || box[i] > 256 || steps[i] != 1 || m.stride[i] % 16 || m.stride[i] >> 40 || (i && !m.stride[i]))
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
cudaError_t driver_function(const char* name, void** function, cudaDriverEntryPointQueryResult* result) {
  if (strcmp(name, "cuTensorMapEncodeTiled")) fail("a function of the driver that is not emulated: %s", name);
  *function = reinterpret_cast<void*>(encode), *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
// f(place in shared memory, in memory or nullptr where the tensor has ended) of each 16 bytes of a box.
template <class F>
static void each_piece(const TensorMap& m, std::initializer_list<int> at, uint32_t shared, F&& f) {
  if (shared % 128 || static_cast<int>(at.size()) != m.rank) fail("cp.async.bulk.tensor: %d coordinates, to or from %u", int(at.size()), shared);
  int rows = 1;
  for (int d = 1; d < m.rank; ++d) rows *= m.box[d];
  for (int row = 0; row < rows; ++row, shared += 128) {
    int64_t offset = 0;
    bool inside = true;
    for (int d = 1, rest = row; d < m.rank; rest /= m.box[d++]) {
      const int64_t i = at.begin()[d] + rest % m.box[d];
      inside &= i >= 0 && i < m.size[d];
      offset += i * m.stride[d];
    }
    for (int piece = 0; piece < 8; ++piece) {
      const int64_t column = at.begin()[0] + piece * 8;
      const uint32_t place = shared + piece * 16;
      f(place ^ (place >> 7 & 7) << 4, inside && column >= 0 && column < m.size[0] ? m.base + offset + column * 2 : nullptr);
    }
  }
}
void tensor_load(uint32_t to, const CUtensorMap* map, std::initializer_list<int> at, uint32_t barrier) {
  static const char zeros[16] = {};
  each_piece(*reinterpret_cast<const TensorMap*>(map), at, to,
             [&](uint32_t to, const char* from) { issue({&cta(), to, from ? from : zeros, 16, barrier, 0}); });
}
void tensor_store(const CUtensorMap* map, std::initializer_list<int> at, uint32_t from) {
  each_piece(*reinterpret_cast<const TensorMap*>(map), at, from, [&](uint32_t from, char* to) {
    if (to) bulk_store(to, from, 16);
  });
}
void store_async(uint32_t to, uint32_t value, uint32_t barrier) {
  Cta& c = of_cluster(to);
  if (&of_cluster(barrier) != &c) fail("st.async: data and barrier in different blocks");
  if (to % 4) fail("st.async: 4 bytes to %u", to);
  issue({&c, to, nullptr, 4, barrier, value});
}
void store_four_async(uint32_t to, float a, float b, float c, float d, uint32_t barrier) {
  if (to % 16) fail("st.async: 16 bytes to %u", to);
  for (const float x : {a, b, c, d}) store_async(to, std::bit_cast<uint32_t>(x), barrier), to += 4;
}

void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  if (from % 16 || bytes % 16 || bytes == 0 || reinterpret_cast<uintptr_t>(to) % 16) fail("cp.async.bulk: %u bytes from %u to %p", bytes, from, to);
  const void* p = at(from, bytes);
  if (now()) memcpy(to, p, bytes);
  else me().open_stores.push_back({to, from, bytes, {}});
}
void bulk_commit() {
  Thread& t = me();
  std::move(t.open_stores.begin(), t.open_stores.end(), std::back_inserter(t.stores));
  t.open_stores.clear();
}
static void land(const Store& s) { memcpy(s.to, s.data.data(), s.bytes); }
void bulk_wait(bool only_read) {
  Thread& t = me();
  for (Store& s : t.stores) {
    const char* p = static_cast<const char*>(at(s.from, s.bytes));
    s.data.assign(p, p + s.bytes);
    if (only_read && !now()) stores_under_way.push_back(std::move(s));
    else land(s);
  }
  t.stores.clear();
}

static void run(const Copy& c) {
  char* to = uncover(cta(), c.to, c.bytes);
  if (c.read) memcpy(to, c.from, c.read);
  memset(to + c.read, 0, c.bytes - c.read);
}
void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t read) {
  if (to % bytes || (read && reinterpret_cast<uintptr_t>(from) % bytes) || read > bytes) fail("cp.async: %u of %u bytes from %p to %u", read, bytes, from, to);
  cover(cta(), to, bytes);
  if (now()) run(Copy{to, from, bytes, read});
  else me().open_copies.push_back({to, from, bytes, read});
}
void copy_commit() {
  Thread& t = me();
  t.copies.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}
void copy_wait(int pending) {
  Thread& t = me();
  while (static_cast<int>(t.copies.size()) > pending) {
    for (const Copy& c : t.copies.front()) run(c);
    t.copies.pop_front();
  }
}

// ------------------------------------------------------------------------------------------------------------ matrices

static void all_lanes(uint32_t mask) {
  if (mask != ~0u) fail("a product by a part of a warp");
}
struct Rows8 {
  uint32_t from, r[4];
};
template <bool transposed>
static void load_matrices(void* const (&brought)[32], uint32_t mask) {
  all_lanes(mask);
  uint16_t x[4][8][8];
  for (int l = 0; l < 32; ++l) {
    const uint32_t from = static_cast<Rows8*>(brought[l])->from;
    if (from % 16) fail("ldmatrix at %u", from);
    memcpy(x[l / 8][l % 8], at(from, 16), 16);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = transposed ? x[i][column][row] : x[i][row][column], high = transposed ? x[i][column + 1][row] : x[i][row][column + 1];
      static_cast<Rows8*>(brought[l])->r[i] = low | high << 16;
    }
}
void load_matrix(bool transposed, uint32_t* r, const uint32_t* last, uint32_t from) {
  if (last != r + 3) fail("ldmatrix: registers that are no array");
  Rows8 mine{from, {}};
  meet(~0u, transposed ? load_matrices<true> : load_matrices<false>, &mine, __builtin_return_address(0));
  memcpy(r, mine.r, sizeof mine.r);
}
template <bool transposed>
static void store_matrices(void* const (&brought)[32], uint32_t mask) {
  all_lanes(mask);
  uint16_t x[4][8][8];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t v = static_cast<Rows8*>(brought[l])->r[i];
      (transposed ? x[i][column][row] : x[i][row][column]) = static_cast<uint16_t>(v);
      (transposed ? x[i][column + 1][row] : x[i][row][column + 1]) = static_cast<uint16_t>(v >> 16);
    }
  for (int l = 0; l < 32; ++l) {
    const uint32_t to = static_cast<Rows8*>(brought[l])->from;
    if (to % 16) fail("stmatrix at %u", to);
    memcpy(at(to, 16), x[l / 8][l % 8], 16);
  }
}
void store_matrix(bool transposed, uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  Rows8 mine{to, {a, b, c, d}};
  meet(~0u, transposed ? store_matrices<true> : store_matrices<false>, &mine, __builtin_return_address(0));
}

static float element(Kind kind, uint16_t x) { return kind == kF16 ? float(std::bit_cast<_Float16>(x)) : std::bit_cast<float>(uint32_t(x) << 16); }

struct Mma {
  float* c;
  uint32_t a[4], b[2];
};
template <Kind kind>
static void multiply(void* const (&brought)[32], uint32_t mask) {
  all_lanes(mask);
  constexpr int K = kind == kTf32 ? 8 : 16;
  float A[16][K], B[K][8], C[16][8] = {};
  for (int l = 0; l < 32; ++l) {
    const Mma& x = *static_cast<Mma*>(brought[l]);
    const int r = l / 4, c = l % 4;
    if constexpr (kind == kTf32) {
      for (int i = 0; i < 4; ++i) A[r + (i & 1) * 8][c + (i >> 1) * 4] = std::bit_cast<float>(x.a[i] & 0xffffe000u);
      for (int i = 0; i < 2; ++i) B[c + i * 4][r] = std::bit_cast<float>(x.b[i] & 0xffffe000u);
    } else {
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) A[r + (i & 1) * 8][c * 2 + e + (i >> 1) * 8] = element(kind, uint16_t(x.a[i] >> 16 * e));
        for (int i = 0; i < 2; ++i) B[c * 2 + e + i * 8][r] = element(kind, uint16_t(x.b[i] >> 16 * e));
      }
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) C[i][n] += A[i][k] * B[k][n];
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) static_cast<Mma*>(brought[l])->c[e] += C[l / 4 + (e >> 1) * 8][l % 4 * 2 + (e & 1)];
}
void mma(Kind kind, float* c, const float* last, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if (last != c + 3) fail("mma: accumulators that are no array");
  Mma mine{c, {a0, a1, a2, a3}, {b0, b1}};
  meet(~0u, kind == kBf16 ? multiply<kBf16> : kind == kF16 ? multiply<kF16> : multiply<kTf32>, &mine, __builtin_return_address(0));
}

// Eight elements of an operand in shared memory, X[mn][k]: neighbours along k, or along mn if it is transposed (SWIZZLE_128B).
static void read8(float (&x)[8], Kind kind, uint64_t descriptor, bool transposed, int mn, int k) {
  const auto field = [&](int at) { return static_cast<uint32_t>(descriptor >> at & 0x3fff) << 4; };
  uint32_t a = field(0) + (transposed ? mn / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + mn % 64 * 2 : mn / 8 * field(32) + mn % 8 * 128 + k * 2);
  a ^= a >> 3 & 0x70;
  uint16_t bits[8];
  memcpy(bits, at(a, 16), 16);
  for (int i = 0; i < 8; ++i) x[i] = element(kind, bits[i]);
}
static void run(const Product& p, Flight& f) {
  float A[16][16], x[8];
  alignas(64) float B[16][256];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; k += 8)
      if (p.from_registers) {
        for (int e = 0; e < 8; ++e) A[i][k + e] = element(p.kind, uint16_t(p.a[i % 8 * 4 + e / 2][(i >> 3) + (k >> 3) * 2] >> 16 * (e & 1)));
      } else if (!p.a_transposed) {
        read8(x, p.kind, p.A, false, p.warp % 4 * 16 + i, k);
        for (int e = 0; e < 8; ++e) A[i][k + e] = x[e];
      } else {  // the 16 x 16 the other way round
        read8(x, p.kind, p.A, true, p.warp % 4 * 16 + k, i);
        for (int e = 0; e < 8; ++e) A[k + e][i] = x[e];
      }
  if (p.b_transposed) {
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < p.n; n += 8) {
        read8(x, p.kind, p.B, true, n, k);
        for (int e = 0; e < 8; ++e) B[k][n + e] = x[e];
      }
  } else {
    for (int n = 0; n < p.n; ++n)
      for (int k = 0; k < 16; k += 8) {
        read8(x, p.kind, p.B, false, n, k);
        for (int e = 0; e < 8; ++e) B[k + e][n] = x[e];
      }
  }
  alignas(64) float C[256];
  for (int i = 0; i < 16; ++i) {
    for (int n = 0; n < p.n; ++n) C[n] = 0.f;
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < p.n; ++n) C[n] += A[i][k] * B[k][n];
    for (int n = 0; n < p.n; ++n) f.value[i][n] = p.add ? f.value[i][n] + C[n] : C[n];
  }
}

constexpr uint32_t kInFlight = 0xfff1f1f1u;  // a NaN that nothing makes
template <class F>
static void each_accumulator(Flight& f, F&& use) {  // use(the thread's, what it is)
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < f.n / 2; ++i) use(f.c[l][i], f.value[l / 4 + (i >> 1 & 1) * 8][i / 4 * 8 + l % 4 * 2 + (i & 1)]);
}
struct Wgmma {
  Product p;
  float* c;
  uint32_t a[4];
};
static void issue_products(void* const (&brought)[32], uint32_t mask) {
  all_lanes(mask);
  Warp& w = *self->warp;
  const Wgmma& x = *static_cast<Wgmma*>(brought[0]);
  Product p = x.p;
  p.warp = w.index;
  if ((!p.from_registers && p.A >> 62 != 1) || p.B >> 62 != 1) fail("wgmma: an operand without SWIZZLE_128B");
  int at = -1;
  for (int i = 0; i < static_cast<int>(w.flights.size()); ++i)
    if (w.flights[i].products && w.flights[i].c[0] == x.c) at = i;
  const bool fresh = at < 0;
  if (fresh) {
    for (at = 0; at < static_cast<int>(w.flights.size()) && w.flights[at].products;) ++at;
    if (at == static_cast<int>(w.flights.size())) w.flights.emplace_back();
    w.flights[at].n = p.n;
  }
  Flight& f = w.flights[at];
  for (int l = 0; l < 32; ++l) {
    const Wgmma& y = *static_cast<Wgmma*>(brought[l]);
    if (y.p.A != p.A || y.p.B != p.B || y.p.add != p.add || y.p.n != p.n || y.p.kind != p.kind) fail("wgmma: lanes 0 and %d of a warp disagree", l);
    if (fresh) f.c[l] = y.c;
    else if (f.c[l] != y.c || f.n != p.n) fail("wgmma: other accumulators than those of the products in flight");
    memcpy(p.a[l], y.a, sizeof y.a);
  }
  if (fresh) each_accumulator(f, [](float& c, float& value) { value = c, c = std::bit_cast<float>(kInFlight); });
  ++f.products, p.flight = at;
  w.open.push_back(p);
}
void wgmma_ss(Kind kind, int n, float* c, const float* last, uint64_t a, uint64_t b, int add, bool a_transposed, bool b_transposed) {
  if (last != c + n / 2 - 1) fail("wgmma: accumulators that are no array");
  Wgmma mine{{kind, false, a_transposed, b_transposed, add != 0, n, 0, {}, a, b, 0}, c, {}};
  meet(~0u, issue_products, &mine, __builtin_return_address(0));
}
void wgmma_rs(Kind kind, int n, float* c, const float* last, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool b_transposed) {
  if (last != c + n / 2 - 1) fail("wgmma: accumulators that are no array");
  Wgmma mine{{kind, true, false, b_transposed, true, n, 0, {}, 0, b, 0}, c, {a0, a1, a2, a3}};
  meet(~0u, issue_products, &mine, __builtin_return_address(0));
}
// Also orders what the warp did to its registers before; that is not looked at.
void wgmma_fence() {
  meet(~0u, [](void* const(&)[32], uint32_t) {}, nullptr, __builtin_return_address(0));
}
static void finish(Warp& w, int pending) {
  while (static_cast<int>(w.groups.size()) > pending) {
    for (const Product& p : w.groups.front()) {
      Flight& f = w.flights[p.flight];
      run(p, f);
      if (--f.products) continue;
      each_accumulator(f, [](float& c, float& value) {
        if (std::bit_cast<uint32_t>(c) != kInFlight) fail("accumulators are written while products with them are in flight");
        c = value;
      });
    }
    w.groups.pop_front();
  }
}
void wgmma_commit() {
  meet(
      ~0u,
      [](void* const(&)[32], uint32_t) {
        Warp& w = *self->warp;
        w.groups.push_back(std::move(w.open));
        w.open.clear();
        if (now()) finish(w, 0);
      },
      nullptr, __builtin_return_address(0));
}
void wgmma_wait(int pending) {
  meet(~0u, [](void* const(&brought)[32], uint32_t) { finish(*self->warp, *static_cast<int*>(brought[0])); }, &pending, __builtin_return_address(0));
}

// ------------------------------------------------------------------------------------------------------------ grids

static void ends(Thread& t) {
  Cta& c = cta();
  Warp& w = *t.warp;
  if (!t.open_copies.empty() || !t.open_stores.empty()) fail("a thread ends with copies that it has not committed");
  if (!t.stores.empty()) fail("a thread ends while its bulk copies may still read shared memory");
  if (w.here >> t.lane & 1) fail("a lane ends while it meets others");
  t.copies.clear();
  t.done = true, --c.live, w.live &= ~(1u << t.lane);
  arrive_if_all(c, w);
  if (--cluster_barrier.live && cluster_barrier.arrived == cluster_barrier.live) cluster_barrier.arrived = 0, ++cluster_barrier.turn;
  if (!w.live && (!w.open.empty() || !w.groups.empty())) fail("a warp ends with products in flight");
}
static void body() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
  kernel_body(kernel_arguments);
  Thread& t = me();
  ends(t);
  for (;;) to_scheduler(t, false);
}

static void prepare(Cta& c, int rank, uint3 index, int n) {
  if (!c.shared) {
    char* p = static_cast<char*>(mmap(nullptr, 2 * kWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    c.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + kWindow - 1) & ~(kWindow - 1));
  }
  c.index = index, c.rank = rank, c.bytes = dynamic_bytes, c.live = n;
  c.variables.clear(), c.warps.clear(), c.warps.resize(lanes / 32);
  std::fill(std::begin(c.barriers), std::end(c.barriers), Barrier{});
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(c.shared, kWindow);
  ASAN_UNPOISON_MEMORY_REGION(c.shared, dynamic_bytes);
#endif
  memset(c.shared, 0xff, dynamic_bytes);
  for (int i = 0; i < lanes; ++i) {
    Thread& t = *threads[rank * lanes + i];
    Warp& w = c.warps[i / 32];
    w.index = i / 32, w.live |= uint32_t(i < n) << i % 32;
    t.thread = uint3{unsigned(i), 0, 0}, t.index = i, t.lane = i % 32, t.warp = &w, t.block = &c, t.done = i >= n, t.watched = nullptr, t.waits = "";
    t.open_copies.clear(), t.copies.clear(), t.open_stores.clear(), t.stores.clear();
    void** top = reinterpret_cast<void**>(t.stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(body);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    t.stack_pointer = top;
  }
}

// The threads of a warp, until all of them wait or it is another's turn. Whether any of them went on.
static bool go_on(Warp& w, Thread& first) {
  bool any = false;
  for (bool again = true; again && w.live;) {
    again = false;
    const bool down = when == When::random && chance() & 1;
    for (int i = 0; i < 32; ++i) {
      Thread& t = *threads[first.block->rank * lanes + first.index + (down ? 31 - i : i)];
      if (t.done || !t.ready()) continue;
      self = &t;
      to_thread(t);
      self = nullptr;
      if (!trouble.empty()) throw std::runtime_error(trouble);
      again = any = true;
    }
    if (when == When::random && chance() % 8 == 0) break;
  }
  return any;
}
static void deliver() {
  std::swap(under_way[chance() % under_way.size()], under_way.front());
  const Load l = under_way.front();
  under_way.pop_front();
  run(l);
}
static void run_cluster() {
  const int count = lanes / 32 * cluster_size;
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  auto live = [] { return std::any_of(ctas.begin(), ctas.begin() + cluster_size, [](auto& c) { return c->live > 0; }); };
  while (live()) {
    bool any = false;
    for (int i = 0; i < count; ++i) {
      if (when == When::random) std::swap(order[i], order[i + chance() % (count - i)]);
      Thread& first = *threads[order[i] * 32];
      any |= go_on(*first.warp, first);
      if (when != When::late && !under_way.empty() && chance() % 8 == 0) deliver(), any = true;
    }
    if (any) continue;
    if (under_way.empty()) throw std::runtime_error(head() + ": nobody can go on" + who_waits(lanes));
    deliver();
  }
  if (!under_way.empty()) fail("a block ends while copies to it are on their way");
}

void run(const void* kernel, void (*body)(void*), void* arguments, dim3 grid, dim3 block, int64_t shared_bytes, dim3 cluster) {
  const std::lock_guard lock(one_launch);
  const int n = static_cast<int>(block.x);
  ++launches, kernel_at = kernel, kernel_body = body, kernel_arguments = arguments, self = nullptr;
  chance_state = seed * 0x2545f4914f6cdd1d + launches;
  launched.insert(kernel);
  cluster_size = static_cast<int>(cluster.x), dynamic_bytes = shared_bytes, lanes = (n + 31) / 32 * 32, blockDim = block, gridDim = grid;
  if (block.y * block.z * cluster.y * cluster.z != 1 || n == 0 || n > 1024) fail("blocks of %u x %u x %u threads are not emulated", block.x, block.y, block.z);
  if (shared_bytes > kShared || cluster_size > kMaxCluster || grid.x % cluster.x)
    fail("%ld bytes of shared memory, clusters of %u", long(shared_bytes), cluster.x);
  while (static_cast<int>(threads.size()) < lanes * cluster_size) {
    threads.push_back(std::make_unique<Thread>());
    char* p = static_cast<char*>(mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(p, kPage, PROT_NONE);  // who needs more ends here
    threads.back()->stack = p + kPage;
  }
  while (static_cast<int>(ctas.size()) < cluster_size) ctas.push_back(std::make_unique<Cta>());
  under_way.clear(), stores_under_way.clear(), trouble.clear();
  const int64_t across = grid.x / cluster.x, total = across * grid.y * grid.z;
  std::vector<int64_t> order(total);
  for (int64_t i = 0; i < total; ++i) order[i] = i;
  if (when == When::random)
    for (int64_t i = total - 1; i > 0; --i) std::swap(order[i], order[chance() % (i + 1)]);
  for (const int64_t i : order) {
    cluster_barrier = {0, n * cluster_size, 0};
    for (int rank = 0; rank < cluster_size; ++rank)
      prepare(*ctas[rank], rank, uint3{unsigned(i % across) * cluster.x + rank, unsigned(i / across % grid.y), unsigned(i / across / grid.y)}, n);
    run_cluster();
  }
  for (const Store& s : stores_under_way) land(s);
  stores_under_way.clear();
}

}  // namespace emulation

// What Python calls, through ctypes: chance starts anew from the seed; the names of the kernels that ran since they were last asked for, one a line.
extern "C" __attribute__((visibility("default"))) void gsa_emulation_begin() { emulation::launches = 0; }
extern "C" __attribute__((visibility("default"))) const char* gsa_emulation_launched() {
  static std::string names;
  names.clear();
  for (const void* kernel : emulation::launched) names += emulation::name_of(kernel) + "\n";
  emulation::launched.clear();
  return names.c_str();
}
