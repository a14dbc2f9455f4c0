// The machine of csrc/cuda/machine.h on the host: runs a kernel's own text, every thread of a block as a fibre, and
// checks each access to shared memory as a state machine.
//
// - A word of shared memory is unwritten, pending (a copy into it is under way) or written. Reading the first two is
//   an error. A copy's bytes arrive only when the thread that started it waits for it: as late as the machine may.
// - Between two barriers no word may be touched by two threads if one of them writes it.
// - What blocks of threads exchange through global memory keeps the same rules between two meetings of all blocks.
// - Global accesses must lie in memory that was announced.
// - Warps run in a random order; those that wait for each other in vain are an error.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#define SEDA_KERNEL inline

namespace seda::machine {

struct Faults {
  int dropped_barrier = -1;    // its number, counted by the block; no thread waits there
  bool early_arrival = false;  // a wait for copies lets one more group be under way
  int dropped_meeting = -1;    // of all blocks; its number, counted by the thread
};

class Emulator {
 public:
  Emulator(int threads, uint32_t shared_bytes, unsigned seed, Faults faults)
      : faults_(faults), random_(seed), threads_(threads), words_of_a_block_(shared_bytes / 4) {}

  void announce(const void* begin, int64_t bytes) {
    const auto* start = static_cast<const unsigned char*>(begin);
    ranges_.push_back({start, start + bytes});
  }

  // Runs `body` as every thread of the blocks, one block after the other or all at once.
  void run(int blocks, bool together, const std::function<void()>& body) {
    count_ = blocks, body_ = &body, current_emulator() = this;
    for (int first = 0; first < blocks && error_.empty(); first += together ? blocks : 1) {
      blocks_.clear();
      for (int i = 0; i < (together ? blocks : 1); ++i) blocks_.emplace_back(new Block(first + i, threads_, words_of_a_block_));
      run_blocks();
    }
  }

  // The first error, or nothing.
  const std::string& error() const { return error_; }
  int barriers() const { return block_->epoch; }
  int meetings() const { return meetings_; }

  int thread() const { return current_; }
  int block() const { return block_->number; }
  int blocks() const { return count_; }

  void barrier() {
    Fibre& f = fibre();
    if (f.barriers++ == faults_.dropped_barrier) return;
    f.state = State::at_barrier;
    leave();
  }

  void meet_all(uint32_t number) {
    if (static_cast<int>(number) - 1 == faults_.dropped_meeting) return;
    fibre().state = State::at_meeting_of_all;
    leave();
  }

  // Two bytes that another block of threads may have written; `write` for its own.
  void exchange(const void* at, bool write) {
    check_global(at, 2);
    Exchanged& e = exchanged_[reinterpret_cast<uintptr_t>(at)];
    const int me = block_->number * threads_ + current_;
    if (!write && e.writer < 0) fail("a read of exchanged memory before any write", 0);
    if (e.writer >= 0 && e.writer != me && e.write_meeting == meetings_)
      fail("an exchange with no meeting after another thread's write", 0);
    if (write && e.read_meeting == meetings_ && e.reader != me)
      fail("a write with no meeting after another thread's read of exchanged memory", 0);
    if (write) e.writer = me, e.write_meeting = meetings_;
    else if (e.read_meeting != meetings_) e.reader = me, e.read_meeting = meetings_;
    else if (e.reader != me) e.reader = kMany;
  }

  void write_word(uint32_t address, uint32_t value) {
    Word& w = word(address);
    claim(w, "a write");
    w.value = value, w.state = Content::written, w.writer = current_, w.write_epoch = block_->epoch;
  }

  uint32_t read_word(uint32_t address, int reader) {
    Word& w = word(address);
    if (w.state == Content::unwritten) fail("a read of shared memory before any write", address);
    if (w.state == Content::pending) fail("a read of shared memory while a copy into it is under way", address);
    if (w.writer != reader && w.write_epoch == block_->epoch) fail("a read with no barrier after another thread's write", address);
    if (w.read_epoch != block_->epoch) w.reader = reader, w.read_epoch = block_->epoch;
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
      w.state = Content::pending, w.writer = current_, w.write_epoch = block_->epoch;
    }
    fibre().open.push_back({address, from, real});
  }

  void end_group() {
    Fibre& f = fibre();
    f.groups.push_back(std::move(f.open));
    f.open.clear();
  }

  void wait_copies(size_t newest) {
    Fibre& f = fibre();
    if (faults_.early_arrival) ++newest;
    while (f.groups.size() > newest) {
      for (const Copy& copy : f.groups.front()) arrive(copy);
      f.groups.pop_front();
    }
  }

  // A warp's 32 lanes meet; the last one calls `all` for everybody.
  void meet(const char* what, void* mine, const std::function<void(void* const*)>& all) {
    Fibre& f = fibre();
    f.state = State::at_meeting, f.what = what, f.mine = mine;
    const auto first = static_cast<size_t>(current_ / 32 * 32);
    std::vector<Fibre>& fibres_ = block_->fibres;
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
  enum class State { ready, at_barrier, at_meeting, at_meeting_of_all, done };
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

  struct Block {
    Block(int block, int threads, uint32_t shared) : number(block), words(shared), fibres(static_cast<size_t>(threads)) {}
    int number, epoch = 0;
    std::vector<Word> words;
    std::vector<Fibre> fibres;
  };
  struct Exchanged {
    int writer = -1, write_meeting = -1, reader = -1, read_meeting = -1;
  };

  Fibre& fibre() { return block_->fibres[static_cast<size_t>(current_)]; }

  Word& word(uint32_t address) {
    static Word nowhere;
    std::vector<Word>& words = block_->words;
    if (address % 4 == 0 && address / 4 < words.size()) return words[address / 4];
    fail("an access outside shared memory", address);
    return nowhere;
  }

  // Nobody else may have touched a word since the last barrier when it is written.
  void claim(const Word& w, const char* what) {
    const std::string by = what;
    if (w.write_epoch == block_->epoch && w.writer != current_) fail((by + " with no barrier after another thread's write").c_str(), 0);
    if (w.read_epoch == block_->epoch && w.reader != current_) fail((by + " with no barrier after another thread's read").c_str(), 0);
  }

  void arrive(const Copy& copy) {
    for (uint32_t i = 0; i < 4; ++i) {
      Word& w = word(copy.to + 4 * i);
      w.value = 0;
      if (copy.real) memcpy(&w.value, static_cast<const char*>(copy.from) + 4 * i, 4);
      w.state = Content::written, w.writer = current_, w.write_epoch = block_->epoch;
    }
  }

  void fail(const char* what, uint32_t address) {
    if (!error_.empty()) return;
    std::ostringstream text;
    text << what << " (block " << block_->number << ", thread " << current_ << ", after barrier " << block_->epoch << ", address " << address << ")";
    error_ = text.str();
  }

  static void enter() {
    Emulator& e = *current_emulator();
    Fibre& f = e.fibre();
    if (_setjmp(f.place) == 0) _longjmp(e.scheduler_, 1);
    (*e.body_)();
    e.fibre().state = State::done;
    _longjmp(e.scheduler_, 1);
  }

  void leave() {
    if (_setjmp(fibre().place) == 0) _longjmp(scheduler_, 1);
  }

  void start(Fibre& f) {
    constexpr size_t kStack = 64 * 1024;
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
    makecontext(&f.context, &Emulator::enter, 0);
    if (_setjmp(scheduler_) == 0) setcontext(&f.context);
    f.started = true;
  }

  void resume(int thread) {
    current_ = thread;
    Fibre& f = fibre();
    if (!f.started) start(f);
    if (_setjmp(scheduler_) == 0) _longjmp(f.place, 1);
  }

  // A warp runs as far as it comes before another has its turn.
  bool run_warp(int warp) {
    bool ran = false;
    for (bool again = true; again && error_.empty();) {
      again = false;
      for (int thread = 32 * warp; thread < 32 * warp + 32 && error_.empty(); ++thread) {
        if (block_->fibres[static_cast<size_t>(thread)].state != State::ready) continue;
        resume(thread);
        ran = again = true;
      }
    }
    return ran;
  }

  // Lets the threads go on that all wait in one state.
  static bool release(std::vector<Fibre>& fibres, State from) {
    for (const Fibre& f : fibres)
      if (f.state != from) return false;
    for (Fibre& f : fibres) f.state = State::ready;
    return true;
  }

  bool release_meeting() {
    for (const auto& block : blocks_)
      for (const Fibre& f : block->fibres)
        if (f.state != State::at_meeting_of_all) return false;
    ++meetings_;
    for (const auto& block : blocks_) ++block->epoch, release(block->fibres, State::at_meeting_of_all);
    return true;
  }

  bool all_done() const {
    for (const auto& block : blocks_)
      for (const Fibre& f : block->fibres)
        if (f.state != State::done) return false;
    return true;
  }

  void run_blocks() {
    const int warps = threads_ / 32;
    std::vector<int> order(static_cast<size_t>(warps) * blocks_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    while (error_.empty()) {
      std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (const int warp : order) {
        block_ = blocks_[static_cast<size_t>(warp / warps)].get();
        moved = run_warp(warp % warps) || moved;
        if (!error_.empty()) return;
      }
      if (all_done()) return;
      for (const auto& block : blocks_)
        if (release(block->fibres, State::at_barrier)) ++block->epoch, moved = true;
      moved = release_meeting() || moved;
      if (!moved) fail("threads wait for each other for ever", 0);
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
  int threads_;
  uint32_t words_of_a_block_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::unordered_map<uintptr_t, Exchanged> exchanged_;
  std::vector<std::pair<const unsigned char*, const unsigned char*>> ranges_;
  const std::function<void()>* body_ = nullptr;
  Block* block_ = nullptr;
  int count_ = 0, current_ = 0, meetings_ = 0;
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

template <class T>
T exchange_load(T* p) {
  for (size_t i = 0; i < sizeof(T); i += 2) emulator().exchange(reinterpret_cast<char*>(p) + i, false);
  return *p;
}
template <class T>
void exchange_store(T* p, T value) {
  for (size_t i = 0; i < sizeof(T); i += 2) emulator().exchange(reinterpret_cast<char*>(p) + i, true);
  *p = value;
}
inline void meet_all(uint32_t*, uint32_t number) { emulator().meet_all(number); }
inline void load_shared4(uint32_t (&r)[4], uint32_t address) {
  if (address % 16 != 0) emulator().read_word(~0u, thread());
  for (uint32_t i = 0; i < 4; ++i) r[i] = load_shared(address + 4 * i);
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
inline uint16_t round_to_bits(float x) { return static_cast<uint16_t>(round_to_16(x)); }
inline float silu(float x) { return x / (1.0f + expf(-x)); }
inline float inverse_root(float x) { return 1.0f / sqrtf(x); }

}  // namespace seda::machine
