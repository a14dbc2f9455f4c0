// The machine of csrc/cuda/machine.h on the host: runs a kernel's own text, every thread of a block as a fibre, and
// checks each access to shared memory as a state machine.
//
// - A word of shared memory is unwritten, pending (a copy into it is under way) or written. Reading the first two is
//   an error. A copy's bytes arrive only when the thread that started it waits for it: as late as the machine may.
// - Between two barriers no word may be touched by two threads if one of them writes it.
// - A word that blocks of threads exchange through global memory is sent once, and read when it is there.
// - With clusters (`pairs`) threads wait at barriers of their own choice, so each carries a vector of clocks: what one
//   thread did is before what another does only if barriers led from the one to the other. The copy engine is a further
//   agent, whose bytes arrive at a random time; products of warpgroups read when they are waited for. Where their operands
//   lie is read off the descriptor's bits as PTX defines them, and must fit what the copy engine's swizzle asks of a place.
// - No block of threads may send anything to one that has left.
// - Eight rows that a matrix is loaded from at a time must lie on different banks.
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
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#define SEDA_KERNEL inline

namespace seda::machine {

// A box of a weight: rows of 64 columns in the 128-byte swizzle, zeros beyond the ends.
struct WeightBox {
  const uint16_t* data;
  int rows, columns, row, column, height;
  uint32_t bytes() const { return static_cast<uint32_t>(height) * 128; }
  // The 32 bits at `offset` of the box as the copy engine lays it out.
  uint32_t word(uint32_t offset) const {
    const int r = static_cast<int>(offset / 128), chunk = static_cast<int>(offset % 128 / 16) ^ (r & 7);
    uint32_t value = 0;
    for (int k = 0; k < 2; ++k) {
      const int c = column + 8 * chunk + static_cast<int>(offset % 16 / 2) + k;
      if (row + r < rows && c < columns) value |= uint32_t{data[int64_t{row + r} * columns + c]} << (16 * k);
    }
    return value;
  }
};

struct Faults {
  int dropped_barrier = -1;    // its number, counted by the block; no thread waits there
  bool early_arrival = false;  // a wait for copies lets one more group be under way
  bool no_waiting_for_words = false;  // of other blocks
  int dropped_consumers_barrier = -1;  // its number, counted by the thread
  bool no_publishing = false, no_waiting_for_empty = false, no_waiting_for_full = false;
  bool no_word_to_the_neighbour = false;  // that a slot is empty: it is said to one's own block twice
  bool no_beginning = false;              // of products
  int dropped_cluster_meeting = -1;       // its number, counted by the thread
};

// What a word that is exchanged holds before it is sent.
constexpr uint32_t kNothing = 0xFFFFFFFFu;

// Where a block's own shared memory begins; below lies what the system keeps, on GPUs from compute capability 8.0 on.
constexpr uint32_t kSharedBase = 1024;

class Emulator {
 public:
  Emulator(int threads, uint32_t shared_bytes, unsigned seed, Faults faults)
      : faults_(faults), random_(seed), threads_(threads), words_of_a_block_(shared_bytes / 4) {}

  void announce(const void* begin, int64_t bytes) {
    const auto* start = static_cast<const unsigned char*>(begin);
    ranges_.push_back({start, start + bytes});
  }

  // Runs `body` as every thread of the blocks: one block after the other, all at once, or in clusters of two.
  void run(int blocks, bool together, const std::function<void()>& body, bool pairs = false) {
    pairs_ = pairs;
    count_ = blocks, body_ = &body, current_emulator() = this;
    const int step = pairs ? 2 : together ? blocks : 1;
    for (int first = 0; first < blocks && error_.empty(); first += step) {
      blocks_.clear();
      for (int i = 0; i < step; ++i) blocks_.emplace_back(new Block(first + i, threads_, words_of_a_block_));
      start_clocks();
      run_blocks();
    }
  }

  // The first error, or nothing.
  const std::string& error() const { return error_; }
  int barriers() const { return block_->epoch; }
  int consumers_barriers() const { return blocks_.front()->fibres.front().consumers_barriers; }

  int thread() const { return current_; }
  int block() const { return block_->number; }
  int blocks() const { return count_; }

  void barrier() {
    Fibre& f = fibre();
    if (f.barriers++ == faults_.dropped_barrier) return;
    f.state = State::at_barrier;
    leave();
  }

  // Words that blocks of threads exchange: each is sent once, to a place that holds nothing.
  void send(uint32_t* to, uint32_t word) {
    check_global(to, 4);
    if (word == kNothing) fail("nothing is sent", 0);
    if (*to != kNothing) fail("a word is sent to a place that is taken", 0);
    *to = word, ++words_sent_;
  }

  // Whether the word is there; the thread has waited for others to send one where it is not.
  bool await_word(const uint32_t* from) {
    check_global(from, 4);
    if (*from != kNothing || faults_.no_waiting_for_words) return true;
    fibre().state = State::at_words, fibre().words_seen = words_sent_;
    leave();
    return !error_.empty();
  }

  // ---- clusters of two ---------------------------------------------------------------------------------------------

  using Clocks = std::vector<int>;

  void consumers_barrier(int threads) {
    Fibre& f = fibre();
    if (f.consumers_barriers++ == faults_.dropped_consumers_barrier) return;
    consumers_ = threads;
    f.state = State::at_consumers;
    leave();
  }

  void cluster_meet() {
    if (fibre().cluster_meetings++ == faults_.dropped_cluster_meeting) return;
    fibre().state = State::at_cluster;
    leave();
  }

  void start_barrier(uint32_t address, int arrivals) {
    Barrier& b = barriers_in_memory_[{block_->number, address}];
    b = Barrier{};
    b.count = b.pending = arrivals, b.gathered.assign(agents(), 0), b.done = b.gathered;
  }

  // A warpgroup's products are begun before the first of them, and again after they have been waited for.
  void begin_products() { fibre().products_begun = !faults_.no_beginning; }
  void end_products() { fibre().products_begun = false; }
  void check_begun() {
    if (!fibre().products_begun) fail("a product that was not begun", 0);
  }

  void arrive_at_rank(uint32_t address, int rank) {
    const int own = block_->number % 2;
    arrive(address, block_->number - own + (faults_.no_word_to_the_neighbour ? own : rank), 0);
  }

  void arrive(uint32_t address, int block, int64_t expected) {
    check_present(block, address);
    Barrier& b = barrier_at(block, address);
    b.bytes += expected;
    join(b.gathered, clocks_of(me()));
    ++clocks_of(me())[static_cast<size_t>(me())];
    if (--b.pending < 0) fail("more arrivals at a barrier than it was made for", address);
    turn(b);
  }

  void wait_phase(uint32_t address, uint32_t parity) {
    Fibre& f = fibre();
    const bool empty = address % 16 != 0;
    if (empty ? faults_.no_waiting_for_empty : faults_.no_waiting_for_full) return;
    f.state = State::at_phase, f.phase = {address, parity};
    if (passed(*block_, f)) go_on(*block_, f);
    else leave();
  }

  // What the driver asks of a map, and the engine of a box: the swizzle follows the address, not the place in the box.
  void check_box(uint32_t to, const WeightBox& box, uint32_t barrier) {
    if (to % 1024 != 0) fail("a box that does not start where the swizzle's pattern does", to);
    if (barrier % 8 != 0) fail("a misaligned barrier", barrier);
    if (reinterpret_cast<uintptr_t>(box.data) % 16 != 0 || box.columns % 8 != 0) fail("a weight that no map describes", to);
    if (box.column < 0 || box.row < 0 || box.column >= box.columns) fail("a box beyond the weight", to);
  }

  void copy_box(uint32_t to, const WeightBox& box, uint32_t barrier) {
    check_box(to, box, barrier);
    for (int rank = 0; rank < 2; ++rank) {
      const int block = block_->number / 2 * 2 + rank;
      const int agent = static_cast<int>(blocks_.size()) * threads_ + (block - blocks_.front()->number);
      Clocks now = clocks_of(me());
      now[static_cast<size_t>(agent)] = ++engine_clock_;
      for (uint32_t i = 0; i < box.bytes(); i += 4) {
        own_word(to + i, block, agent, clocks_of(me()), "a copy", engine_clock_);
        word_of(block, to + i).state = Content::pending;
      }
      flying_.push_back({to, block, box, barrier, now});
    }
  }

  void publish() {
    Fibre& f = fibre();
    if (faults_.no_publishing) return;
    for (const uint32_t address : f.unpublished) owned(address, block_->number).published = true;
    f.unpublished.clear();
  }

  // For a matrix unit: the word must be there, and have been published.
  uint32_t matrix_word(uint32_t address, int reader) {
    const uint32_t value = read_word(address, reader);
    if (!owned(address, block_->number).published) fail("a matrix unit reads what was not published to it", address);
    return value;
  }

  // Eight rows of 16 bytes, loaded together.
  void check_matrix(const uint32_t (&rows)[8]) {
    unsigned banks = 0;
    for (const uint32_t row : rows) {
      if (row % 16 != 0) fail("a misaligned row of a matrix", row);
      banks |= 1u << row / 16 % 8;
    }
    if (banks != 0xFFu) fail("rows of a matrix on the same banks", rows[0]);
  }

  // What a warp's matrix unit has read, each of its lanes knows to be over.
  void finish_reads(int first_lane) {
    const auto first = static_cast<size_t>(local(block_->number) * threads_ + first_lane);
    for (size_t lane = first; lane < first + 32; ++lane) clocks_[lane][first] = std::max(clocks_[lane][first], clocks_[first][first]);
  }

  // A warpgroup's 128 threads meet.
  void meet_group(const char* what, void* mine, const std::function<void(void* const*)>& all) { meet(what, mine, all, 128); }

  // ------------------------------------------------------------------------------------------------------------------

  void write_word(uint32_t address, uint32_t value) {
    Word& w = word(address);
    if (pairs_) {
      own_word(address, block_->number, me(), clocks_of(me()), "a write");
      w.value = value, w.state = Content::written;
      Owned& o = owned(address, block_->number);
      o.published = false;
      fibre().unpublished.push_back(address);
      return;
    }
    claim(w, "a write");
    w.value = value, w.state = Content::written, w.writer = current_, w.write_epoch = block_->epoch;
  }

  uint32_t read_word(uint32_t address, int reader) {
    Word& w = word(address);
    if (w.state == Content::unwritten) fail("a read of shared memory before any write", address);
    if (w.state == Content::pending) fail("a read of shared memory while a copy into it is under way", address);
    if (pairs_) {
      see_word(address, block_->number * threads_ + reader);
      return w.value;
    }
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
  void meet(const char* what, void* mine, const std::function<void(void* const*)>& all, int size = 32) {
    Fibre& f = fibre();
    f.state = State::at_meeting, f.what = what, f.mine = mine;
    const auto first = static_cast<size_t>(current_ / size * size), count = static_cast<size_t>(size);
    std::vector<Fibre>& fibres_ = block_->fibres;
    void* lanes[128];
    for (size_t i = 0; i < count; ++i) {
      if (fibres_[first + i].state != State::at_meeting) return leave();
      if (strcmp(fibres_[first + i].what, what) != 0) fail("lanes of a warp meet at different instructions", 0);
      lanes[i] = fibres_[first + i].mine;
    }
    all(lanes);
    for (size_t i = 0; i < count; ++i) fibres_[first + i].state = State::ready;
  }

  void refuse(const char* what) { fail(what, 0); }

  void check_global(const void* p, int64_t bytes) {
    const auto* begin = static_cast<const unsigned char*>(p);
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) fail("a misaligned access to global memory", 0);
    for (const auto& range : ranges_)
      if (begin >= range.first && begin + bytes <= range.second) return;
    fail("an access outside the tensors", 0);
  }

 private:
  static constexpr int kMany = -2;
  enum class State { ready, at_barrier, at_meeting, at_words, at_consumers, at_cluster, at_phase, done };
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
    int barriers = 0, consumers_barriers = 0, cluster_meetings = 0;
    bool products_begun = false;
    int64_t words_seen = 0;
    std::pair<uint32_t, uint32_t> phase;
    std::vector<uint32_t> unpublished;
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
  // Who wrote a word last and at which of its clocks, and who read it since.
  struct Owned {
    int writer = -1, clock = 0;
    bool published = true;
    std::vector<std::pair<int, int>> readers;
  };
  struct Barrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    Clocks gathered, done;
  };
  struct Flying {
    uint32_t to;
    int block;
    WeightBox box;
    uint32_t barrier;
    Clocks clocks;
  };

  size_t agents() const { return blocks_.size() * static_cast<size_t>(threads_) + blocks_.size(); }
  int local(int block) const { return block - blocks_.front()->number; }
  int me() const { return local(block_->number) * threads_ + current_; }
  Clocks& clocks_of(int thread) { return clocks_[static_cast<size_t>(thread)]; }

  void start_clocks() {
    if (!pairs_) return;
    clocks_.assign(blocks_.size() * static_cast<size_t>(threads_), Clocks(agents(), 0));
    for (size_t i = 0; i < clocks_.size(); ++i) clocks_[i][i] = 1;
    owned_.assign(blocks_.size(), std::vector<Owned>(words_of_a_block_));
    barriers_in_memory_.clear(), flying_.clear();
  }

  static void join(Clocks& to, const Clocks& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
  }

  Owned& owned(uint32_t address, int block) { return owned_[static_cast<size_t>(local(block))][(address - kSharedBase) / 4 % words_of_a_block_]; }
  Word& word_of(int block, uint32_t address) { return blocks_[static_cast<size_t>(local(block))]->words[(address - kSharedBase) / 4 % words_of_a_block_]; }

  // All that was done to a word must be before what `clocks` know.
  void own_word(uint32_t address, int block, int agent, const Clocks& clocks, const char* what, int clock = 0) {
    Owned& o = owned(address, block);
    const std::string by = what;
    if (o.writer >= 0 && clocks[static_cast<size_t>(o.writer)] < o.clock)
      fail((by + " with no barrier after another's write").c_str(), address);
    for (const auto& [reader, when] : o.readers)
      if (reader != agent && clocks[static_cast<size_t>(reader)] < when)
        fail((by + " with no barrier after another's read").c_str(), address);
    o.readers.clear(), o.published = true;
    o.writer = agent, o.clock = clock ? clock : clocks[static_cast<size_t>(agent)];
  }

  void see_word(uint32_t address, int reader_number) {
    const int reader = reader_number - blocks_.front()->number * threads_;
    Owned& o = owned(address, block_->number);
    const Clocks& clocks = clocks_of(reader);
    if (o.writer >= 0 && o.writer != reader && clocks[static_cast<size_t>(o.writer)] < o.clock)
      fail("a read with no barrier after another's write", address);
    for (auto& [who, when] : o.readers)
      if (who == reader) {
        when = clocks[static_cast<size_t>(reader)];
        return;
      }
    o.readers.push_back({reader, clocks[static_cast<size_t>(reader)]});
  }

  void check_present(int block, uint32_t address) {
    for (const Fibre& f : blocks_[static_cast<size_t>(local(block))]->fibres)
      if (f.state != State::done) return;
    fail("something is sent to a block of threads that has left", address);
  }

  Barrier& barrier_at(int block, uint32_t address) {
    const auto found = barriers_in_memory_.find({block, address});
    if (found != barriers_in_memory_.end()) return found->second;
    fail("a barrier that was not started", address);
    static Barrier nowhere;
    return nowhere = Barrier{1, 1, 0, 0, Clocks(agents(), 0), Clocks(agents(), 0)};
  }

  static void turn(Barrier& b) {
    if (b.pending != 0 || b.bytes != 0) return;
    b.pending = b.count, ++b.phase, b.done = b.gathered;
  }

  bool passed(Block& block, const Fibre& f) {
    return (barrier_at(block.number, f.phase.first).phase & 1u) != f.phase.second;
  }
  void go_on(Block& block, Fibre& f) {
    f.state = State::ready;
    const auto thread = static_cast<int>(&f - block.fibres.data()) + local(block.number) * threads_;
    join(clocks_of(thread), barrier_at(block.number, f.phase.first).done);
  }

  // A copy's bytes arrive, one that is under way drawn at random.
  bool land() {
    if (flying_.empty()) return false;
    const size_t i = random_() % flying_.size();
    const Flying copy = flying_[i];
    flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(i));
    check_present(copy.block, copy.to);
    for (uint32_t at = 0; at < copy.box.bytes(); at += 4) {
      Word& w = word_of(copy.block, copy.to + at);
      w.value = copy.box.word(at), w.state = Content::written;
    }
    Barrier& b = barrier_at(copy.block, copy.barrier);
    join(b.gathered, copy.clocks);
    b.bytes -= copy.box.bytes();
    turn(b);
    return true;
  }

  // Threads that wait in one state, all of those that are meant, go on with what the others knew.
  bool release_together(State from, int threads_of_a_block, bool all_blocks) {
    bool any = false;
    for (size_t first = 0; first < blocks_.size(); first += all_blocks ? blocks_.size() : 1) {
      const size_t last = all_blocks ? blocks_.size() : first + 1;
      Clocks known(agents(), 0);
      bool all = true;
      const auto each = [&](const auto& f) {
        for (size_t b = first; b < last; ++b)
          for (int t = 0; t < threads_of_a_block; ++t)
            f(blocks_[b]->fibres[static_cast<size_t>(t)], static_cast<int>(b) * threads_ + t);
      };
      each([&](Fibre& f, int) { all = all && f.state == from; });
      if (!all) continue;
      each([&](Fibre&, int t) { join(known, clocks_of(t)); });
      each([&](Fibre& f, int t) {
        clocks_of(t) = known, ++clocks_of(t)[static_cast<size_t>(t)];
        f.state = State::ready;
      });
      any = true;
    }
    return any;
  }

  bool release_pairs() {
    bool moved = release_together(State::at_consumers, consumers_, false);
    moved = release_together(State::at_cluster, threads_, true) || moved;
    if (random_() % 2 == 0 || !moved) moved = land() || moved;
    for (const auto& block : blocks_)
      for (Fibre& f : block->fibres)
        if (f.state == State::at_phase && passed(*block, f)) go_on(*block, f), moved = true;
    return moved;
  }

  Fibre& fibre() { return block_->fibres[static_cast<size_t>(current_)]; }

  Word& word(uint32_t address) {
    static Word nowhere;
    std::vector<Word>& words = block_->words;
    const uint32_t place = address - kSharedBase;
    if (place % 4 == 0 && place / 4 < words.size()) return words[place / 4];
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

  // Threads that wait for words look again after some were sent.
  bool release_words() {
    bool any = false;
    for (const auto& block : blocks_)
      for (Fibre& f : block->fibres)
        if (f.state == State::at_words && f.words_seen != words_sent_) f.state = State::ready, any = true;
    return any;
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
      moved = release_words() || moved;
      if (pairs_) moved = release_pairs() || moved;
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
  bool pairs_ = false;
  int consumers_ = 0, engine_clock_ = 0;
  std::vector<Clocks> clocks_;
  std::vector<std::vector<Owned>> owned_;
  std::map<std::pair<int, uint32_t>, Barrier> barriers_in_memory_;
  std::vector<Flying> flying_;
  int threads_;
  uint32_t words_of_a_block_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::pair<const unsigned char*, const unsigned char*>> ranges_;
  const std::function<void()>* body_ = nullptr;
  Block* block_ = nullptr;
  int count_ = 0, current_ = 0;
  int64_t words_sent_ = 0;
  std::string error_;
  jmp_buf scheduler_;
};

inline Emulator& emulator() { return *Emulator::current_emulator(); }

inline int thread() { return emulator().thread(); }
inline int block() { return emulator().block(); }
inline int blocks() { return emulator().blocks(); }
inline uint32_t shared_base() { return kSharedBase; }
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

inline void send(uint32_t* to, uint32_t word) { emulator().send(to, word); }
inline void send2(uint32_t* to, uint32_t first, uint32_t second) {
  emulator().check_global(to, 8);
  emulator().send(to, first), emulator().send(to + 1, second);
}
template <int kMost>
void receive(uint32_t (&words)[kMost][4], const uint32_t* from, int stride, int count) {
  for (int i = 0; i < count && i < kMost; ++i) {
    emulator().check_global(from + i * stride, 16);
    for (int v = 0; v < 4; ++v) {
      while (!emulator().await_word(from + i * stride + v)) continue;
      words[i][v] = from[i * stride + v];
    }
  }
}
inline void store_shared2(uint32_t address, uint32_t first, uint32_t second) {
  if (address % 8 != 0) emulator().refuse("a misaligned access to shared memory");
  store_shared(address, first), store_shared(address + 4, second);
}
inline void load_shared2(uint32_t (&r)[2], uint32_t address) {
  if (address % 8 != 0) emulator().refuse("a misaligned access to shared memory");
  r[0] = load_shared(address), r[1] = load_shared(address + 4);
}
inline void store_shared4(uint32_t address, const uint32_t (&r)[4]) {
  if (address % 16 != 0) emulator().refuse("a misaligned access to shared memory");
  for (uint32_t i = 0; i < 4; ++i) store_shared(address + 4 * i, r[i]);
}
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
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t rows[8];
      for (int row = 0; row < 8; ++row) rows[row] = static_cast<Mine*>(lanes[8 * matrix + row])->address;
      emulator().check_matrix(rows);
      for (int lane = 0; lane < 32; ++lane) {
        const int giver = 8 * matrix + lane / 4;
        const uint32_t row = static_cast<Mine*>(lanes[giver])->address;
        static_cast<Mine*>(lanes[lane])->r[matrix] =
            emulator().read_word(row + 4 * static_cast<uint32_t>(lane % 4), first + giver);
      }
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

// ---- clusters of two -------------------------------------------------------------------------------------------------

inline void consumers_barrier() { emulator().consumers_barrier(256); }
inline void cluster_meet() { emulator().cluster_meet(); }
inline void take_registers() {}
inline void give_registers() {}
inline void start_barrier(uint32_t barrier, int arrivals) { emulator().start_barrier(barrier, arrivals); }
inline void arrive_expecting(uint32_t barrier, uint32_t bytes) { emulator().arrive(barrier, block(), bytes); }
inline void arrive_at_rank(uint32_t barrier, int rank) { emulator().arrive_at_rank(barrier, rank); }
inline void wait_phase(uint32_t barrier, uint32_t parity) { emulator().wait_phase(barrier, parity); }
inline void publish_to_matrix_units() { emulator().publish(); }

// A tensor map here is the weight itself: data, rows, columns.
struct EmulatedMap {
  const uint16_t* data;
  int rows, columns;
};
inline void copy_to_cluster(uint32_t to, const void* map, int column, int row, uint32_t barrier) {
  const auto* weight = static_cast<const EmulatedMap*>(map);
  emulator().copy_box(to, {weight->data, weight->rows, weight->columns, row, column, 64}, barrier);
}

// Products that a warpgroup has begun; they read shared memory when they begin and, for good, when they are waited for.
struct GroupProduct {
  float (*c)[4];
  uint64_t a, b;
};
inline std::vector<GroupProduct>& begun() {
  static std::map<int, std::vector<GroupProduct>> all;
  return all[block() * 1024 + thread()];
}

inline void group_products_begin() {
  begun().clear();
  emulator().begin_products();
}

// A descriptor's fields, in bytes (PTX ISA, "Matrix Descriptor Format" of wgmma): the address in bits 0-13, the offset of
// the next eight rows in 32-45, the base offset in 49-51, the swizzle in 62-63, where 1 is that of 128 bytes. The leading
// offset in 16-29 is not used by that swizzle where K is the inner dimension.
struct Descriptor {
  uint32_t start, eight_rows, base, swizzle;
  bool other_bits;
  explicit Descriptor(uint64_t d)
      : start(static_cast<uint32_t>(d & 0x3FFF) << 4),
        eight_rows(static_cast<uint32_t>(d >> 32 & 0x3FFF) << 4),
        base(static_cast<uint32_t>(d >> 49 & 7)),
        swizzle(static_cast<uint32_t>(d >> 62)),
        other_bits((d & (uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3FF} << 52)) != 0) {}
  // The pattern repeats every 1024 bytes from an address that is a multiple of them, or of which `base` says the rest.
  bool sound() const { return swizzle == 1 && !other_bits && base == (start >> 7 & 7); }
};

// Row `row` and column k of an operand: the swizzle turns bits 4-6 of an address by its bits 7-9.
inline float operand(uint64_t described, int row, int k, int reader) {
  const Descriptor d(described);
  const uint32_t plain = d.start + static_cast<uint32_t>(row / 8) * d.eight_rows + static_cast<uint32_t>(128 * (row % 8) + 2 * k);
  const uint32_t address = plain ^ (plain >> 3 & 0x70u);
  const uint32_t two = emulator().matrix_word(address & ~3u, reader);
  return as_float(address % 4 ? two & 0xFFFF0000u : two << 16);
}

inline void group_multiply_add(float (&c)[8][4], uint64_t a, uint64_t b) {
  GroupProduct mine{c, a, b};
  emulator().check_begun();
  if (!Descriptor(a).sound() || !Descriptor(b).sound()) emulator().refuse("a descriptor that the matrix unit reads otherwise");
  begun().push_back(mine);
  emulator().meet_group("group_multiply_add", &mine, [](void* const* threads) {
    const GroupProduct& first = *static_cast<GroupProduct*>(threads[0]);
    for (int i = 1; i < 128; ++i) {
      const GroupProduct& other = *static_cast<GroupProduct*>(threads[i]);
      if (other.a != first.a || other.b != first.b) emulator().refuse("a warpgroup's threads give different operands");
    }
  });
}

inline void group_products_end() {
  const int group = thread() / 128 * 128;
  emulator().end_products();
  emulator().meet_group("group_products_end", &begun(), [group](void* const* threads) {
    const auto& products = *static_cast<std::vector<GroupProduct>*>(threads[0]);
    for (size_t n = 0; n < products.size(); ++n) {
      float left[64][16], right[64][16];
      for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 16; ++k) {
          left[row][k] = operand(products[n].a, row, k, group + 32 * (row / 16));
          // Each warp reads all of the right operand.
          for (int warp = 0; warp < 4; ++warp) right[row][k] = operand(products[n].b, row, k, group + 32 * warp);
        }
      for (int warp = 0; warp < 4; ++warp) emulator().finish_reads(group + 32 * warp);
      for (int t = 0; t < 128; ++t) {
        float(*c)[4] = (*static_cast<std::vector<GroupProduct>*>(threads[t]))[n].c;
        for (int j = 0; j < 8; ++j)
          for (int v = 0; v < 4; ++v) {
            const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (v / 2), column = 8 * j + 2 * (t % 4) + v % 2;
            for (int k = 0; k < 16; ++k) c[j][v] += left[row][k] * right[column][k];
          }
      }
    }
  });
}

}  // namespace seda::machine
