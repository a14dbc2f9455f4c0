// The machine of csrc/cuda/machine.h on the host: runs a kernel's own text, every thread of a block as a fibre, and
// checks each access to shared memory as a state machine.
//
// - A word of shared memory is unwritten, pending (a copy into it is under way) or written. Reading the first two is
//   an error. A copy's bytes arrive only when the thread that started it waits for it: as late as the machine may.
// - Between two barriers no word may be touched by two threads if one of them writes it.
// - Global accesses must lie in memory that was announced.
// - Warps run in a random order; those that wait for each other in vain are an error.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#define SEDA_KERNEL inline

namespace seda::machine {

struct Faults {
  int dropped_barrier = -1;    // its number, counted by the block; no thread waits there
  bool early_arrival = false;  // a wait for copies lets one more group be under way
};

class Emulator {
 public:
  Emulator(int threads, uint32_t shared_bytes, unsigned seed, Faults faults)
      : faults_(faults), random_(seed), words_(shared_bytes / 4), fibres_(static_cast<size_t>(threads)) {}

  void announce(const void* begin, int64_t bytes) {
    const auto* start = static_cast<const unsigned char*>(begin);
    ranges_.push_back({start, start + bytes});
  }

  // Runs `body` as every thread of one block after the other.
  void run(int blocks, const std::function<void()>& body) {
    blocks_ = blocks, body_ = &body;
    for (block_ = 0; block_ < blocks && error_.empty(); ++block_) run_block();
  }

  // The first error, or nothing.
  const std::string& error() const { return error_; }
  int barriers() const { return epoch_; }

  int thread() const { return current_; }
  int block() const { return block_; }
  int blocks() const { return blocks_; }

  void barrier() {
    Fibre& f = fibres_[static_cast<size_t>(current_)];
    if (f.barriers++ == faults_.dropped_barrier) return;
    f.state = State::at_barrier;
    leave();
  }

  void write_word(uint32_t address, uint32_t value) {
    Word& w = word(address);
    claim(w, "a write");
    w.value = value, w.state = Content::written, w.writer = current_, w.write_epoch = epoch_;
  }

  uint32_t read_word(uint32_t address, int reader) {
    Word& w = word(address);
    if (w.state == Content::unwritten) fail("a read of shared memory before any write", address);
    if (w.state == Content::pending) fail("a read of shared memory while a copy into it is under way", address);
    if (w.writer != reader && w.write_epoch == epoch_) fail("a read with no barrier after another thread's write", address);
    if (w.read_epoch != epoch_) w.reader = reader, w.read_epoch = epoch_;
    else if (w.reader != reader) w.reader = kMany;
    return w.value;
  }

  void start_copy(uint32_t address, const void* from, bool real) {
    if (address % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a misaligned copy", address);
    if (real) check_global(from, 16);
    for (uint32_t i = 0; i < 4; ++i) {
      Word& w = word(address + 4 * i);
      claim(w, "a copy");
      if (w.state == Content::pending) fail("two copies into one place", address);
      w.state = Content::pending, w.writer = current_, w.write_epoch = epoch_;
    }
    fibres_[static_cast<size_t>(current_)].open.push_back({address, from, real});
  }

  void end_group() {
    Fibre& f = fibres_[static_cast<size_t>(current_)];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
  }

  void wait_copies(size_t newest) {
    Fibre& f = fibres_[static_cast<size_t>(current_)];
    if (faults_.early_arrival) ++newest;
    while (f.groups.size() > newest) {
      for (const Copy& copy : f.groups.front()) arrive(copy);
      f.groups.pop_front();
    }
  }

  // A warp's 32 lanes meet; the last one calls `all` for everybody.
  void meet(const char* what, void* mine, const std::function<void(void* const*)>& all) {
    Fibre& f = fibres_[static_cast<size_t>(current_)];
    f.state = State::at_meeting, f.what = what, f.mine = mine;
    const auto first = static_cast<size_t>(current_ / 32 * 32);
    void* lanes[32];
    for (size_t i = 0; i < 32; ++i) {
      if (fibres_[first + i].state != State::at_meeting) return leave();
      if (strcmp(fibres_[first + i].what, what) != 0) fail("lanes of a warp meet at different instructions", 0);
      lanes[i] = fibres_[first + i].mine;
    }
    all(lanes);
    for (size_t i = 0; i < 32; ++i) fibres_[first + i].state = State::ready;
  }

  void check_global(const void* p, int64_t bytes) {
    const auto* begin = static_cast<const unsigned char*>(p);
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) fail("a misaligned access to global memory", 0);
    for (const auto& range : ranges_)
      if (begin >= range.first && begin + bytes <= range.second) return;
    fail("an access outside the tensors", 0);
  }

 private:
  static constexpr int kMany = -2;
  enum class State { ready, at_barrier, at_meeting, done };
  enum class Content : uint8_t { unwritten, pending, written };
  struct Word {
    uint32_t value = 0;
    int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1;
    Content state = Content::unwritten;
  };
  struct Copy {
    uint32_t to;
    const void* from;
    bool real;
  };
  struct Fibre {
    State state = State::ready;
    bool started = false;
    int barriers = 0;
    const char* what = nullptr;
    void* mine = nullptr;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf place;
  };

  Word& word(uint32_t address) {
    static Word nowhere;
    if (address % 4 == 0 && address / 4 < words_.size()) return words_[address / 4];
    fail("an access outside shared memory", address);
    return nowhere;
  }

  // Nobody else may have touched a word since the last barrier when it is written.
  void claim(const Word& w, const char* what) {
    const std::string by = what;
    if (w.write_epoch == epoch_ && w.writer != current_) fail((by + " with no barrier after another thread's write").c_str(), 0);
    if (w.read_epoch == epoch_ && w.reader != current_) fail((by + " with no barrier after another thread's read").c_str(), 0);
  }

  void arrive(const Copy& copy) {
    for (uint32_t i = 0; i < 4; ++i) {
      Word& w = word(copy.to + 4 * i);
      w.value = 0;
      if (copy.real) memcpy(&w.value, static_cast<const char*>(copy.from) + 4 * i, 4);
      w.state = Content::written, w.writer = current_, w.write_epoch = epoch_;
    }
  }

  void fail(const char* what, uint32_t address) {
    if (!error_.empty()) return;
    std::ostringstream text;
    text << what << " (block " << block_ << ", thread " << current_ << ", after barrier " << epoch_ << ", address " << address << ")";
    error_ = text.str();
  }

  static void enter() {
    Emulator& e = *current_emulator();
    Fibre& f = e.fibres_[static_cast<size_t>(e.current_)];
    if (_setjmp(f.place) == 0) _longjmp(e.scheduler_, 1);
    (*e.body_)();
    e.fibres_[static_cast<size_t>(e.current_)].state = State::done;
    _longjmp(e.scheduler_, 1);
  }

  void leave() {
    if (_setjmp(fibres_[static_cast<size_t>(current_)].place) == 0) _longjmp(scheduler_, 1);
  }

  void start(Fibre& f) {
    constexpr size_t kStack = 256 * 1024;
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
    makecontext(&f.context, &Emulator::enter, 0);
    if (_setjmp(scheduler_) == 0) setcontext(&f.context);
    f.started = true;
  }

  void resume(int thread) {
    current_ = thread;
    Fibre& f = fibres_[static_cast<size_t>(thread)];
    if (!f.started) start(f);
    if (_setjmp(scheduler_) == 0) _longjmp(f.place, 1);
  }

  void run_block() {
    current_emulator() = this;
    for (Word& w : words_) w = Word{};
    for (Fibre& f : fibres_) f.state = State::ready, f.started = false, f.barriers = 0, f.open.clear(), f.groups.clear();
    epoch_ = 0;
    const int warps = static_cast<int>(fibres_.size()) / 32;
    std::vector<int> order(static_cast<size_t>(warps));
    for (int i = 0; i < warps; ++i) order[static_cast<size_t>(i)] = i;
    while (error_.empty()) {
      std::shuffle(order.begin(), order.end(), random_);
      bool ran = false, all_done = true;
      for (const int warp : order) {
        // A warp runs as far as it comes before another has its turn.
        for (bool again = true; again;) {
          again = false;
          for (int lane = 0; lane < 32; ++lane) {
            const int thread = 32 * warp + lane;
            if (fibres_[static_cast<size_t>(thread)].state != State::ready) continue;
            resume(thread);
            ran = again = true;
            if (!error_.empty()) return;
          }
        }
      }
      bool all_at_barrier = true;
      for (const Fibre& f : fibres_) {
        all_done = all_done && f.state == State::done;
        all_at_barrier = all_at_barrier && f.state == State::at_barrier;
      }
      if (all_done) return;
      if (all_at_barrier) {
        ++epoch_;
        for (Fibre& f : fibres_) f.state = State::ready;
      } else if (!ran) {
        fail("threads wait for each other for ever", 0);
      }
    }
  }

 public:
  static Emulator*& current_emulator() {
    static Emulator* emulator = nullptr;
    return emulator;
  }

 private:
  Faults faults_;
  std::mt19937 random_;
  std::vector<Word> words_;
  std::vector<Fibre> fibres_;
  std::vector<std::pair<const unsigned char*, const unsigned char*>> ranges_;
  const std::function<void()>* body_ = nullptr;
  int blocks_ = 0, block_ = 0, current_ = 0, epoch_ = 0;
  std::string error_;
  jmp_buf scheduler_;
};

inline Emulator& emulator() { return *Emulator::current_emulator(); }

inline int thread() { return emulator().thread(); }
inline int block() { return emulator().block(); }
inline int blocks() { return emulator().blocks(); }
inline uint32_t shared_base() { return 0; }
inline void barrier() { emulator().barrier(); }
inline void store_shared(uint32_t address, uint32_t value) { emulator().write_word(address, value); }
inline uint32_t load_shared(uint32_t address) { return emulator().read_word(address, thread()); }

inline void forget(int&) {}
inline void forget(unsigned char*&) {}

template <class T>
T load(const T* p) {
  emulator().check_global(p, sizeof(T));
  return *p;
}
template <class T>
void store(T* p, T value) {
  emulator().check_global(p, sizeof(T));
  *p = value;
}

inline void copy16(uint32_t to, const void* from, bool real) { emulator().start_copy(to, from, real); }
inline void copies_end_group() { emulator().end_group(); }
template <int kNewest>
void copies_wait() {
  emulator().wait_copies(kNewest);
}

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  struct Mine {
    uint32_t* r;
    uint32_t address;
  } mine{r, address};
  const int first = thread() / 32 * 32;
  emulator().meet("load_matrices", &mine, [first](void* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane) {
        const int giver = 8 * matrix + lane / 4;
        const uint32_t row = static_cast<Mine*>(lanes[giver])->address;
        static_cast<Mine*>(lanes[lane])->r[matrix] =
            emulator().read_word(row + 4 * static_cast<uint32_t>(lane % 4), first + giver);
      }
  });
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Mine {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulator().meet("multiply_add", &mine, [](void* const* lanes) {
    const auto half = [](uint32_t word, int k) { return as_float(k % 2 ? word & 0xFFFF0000u : word << 16); };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Mine& m = *static_cast<Mine*>(lanes[lane]);
      const int group = lane / 4, pair = 2 * (lane % 4);
      for (int k = 0; k < 2; ++k) {
        for (int i = 0; i < 4; ++i) left[group + 8 * (i % 2)][pair + 8 * (i / 2) + k] = half(m.a[i], k);
        for (int i = 0; i < 2; ++i) right[pair + 8 * i + k][group] = half(m.b[i], k);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Mine& m = *static_cast<Mine*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        float sum = m.c[i];
        for (int k = 0; k < 16; ++k) sum += left[lane / 4 + 8 * (i / 2)][k] * right[k][2 * (lane % 4) + i % 2];
        m.c[i] = sum;
      }
    }
  });
}

inline float shuffle_xor(float x, int mask) {
  struct Mine {
    float given, got;
  } mine{x, 0.0f};
  emulator().meet("shuffle", &mine, [mask](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      static_cast<Mine*>(lanes[lane])->got = static_cast<Mine*>(lanes[lane ^ mask])->given;
  });
  return mine.got;
}

inline uint32_t round_to_16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t pack(float low, float high) { return round_to_16(low) | round_to_16(high) << 16; }
inline float silu(float x) { return x / (1.0f + expf(-x)); }
inline float inverse_root(float x) { return 1.0f / sqrtf(x); }

}  // namespace seda::machine
