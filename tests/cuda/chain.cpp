// The reverse chain's kernel on the emulated machine, for Python: tensors are addresses, sizes are integers.
#include "machine.h"
// The kernel's text.
#include "reverse_chain.h"
#include "hopper_chain.h"
#include "split_chain.h"

#include <algorithm>

namespace {

using namespace seda;

template <class Thread>
std::string run(ChainLaunch launch, machine::Emulator& emulator, int blocks, int64_t bytes, bool together,
                bool pairs = false) {
  std::vector<Four> scratch(static_cast<size_t>(bytes / 16));
  memset(scratch.data(), 0xFF, static_cast<size_t>(bytes));  // as float32 and as bfloat16 not a number
  launch.scratch = reinterpret_cast<unsigned char*>(scratch.data());
  emulator.announce(launch.scratch, bytes);
  emulator.run(blocks, together, [&launch] {
    Thread thread(launch);
    thread.run();
  }, pairs);
  return emulator.error();
}

// The kernel for clusters, whose "tensor maps" are the weights.
struct HopperThread {
  explicit HopperThread(const ChainLaunch& launch) : a(launch) {
    for (int i = 0; i < kBlockWeights + 2 * launch.shape.blocks; ++i) {
      const machine::EmulatedMap map{launch.weights[i].data, launch.weights[i].rows, launch.weights[i].columns};
      memcpy(&maps.of[i], &map, sizeof map);
    }
  }
  void run() { run_hopper(a, maps.of); }
  const ChainLaunch& a;
  TensorMaps maps{};
};

// Rows and columns of a weight by its number.
WeightMatrix sizes_of(const ChainShape& s, int weight) {
  switch (weight) {
    case kConditionWeight: return {nullptr, s.width, s.condition_dim};
    case kGateWeight: return {nullptr, s.blocks * s.hidden, s.width};
    case kInputWeight: return {nullptr, s.width, s.dim};
    case kOutputWeight: return {nullptr, s.dim, s.width};
    default: return (weight - kBlockWeights) % 2 == 0 ? WeightMatrix{nullptr, s.hidden, s.width}
                                                      : WeightMatrix{nullptr, s.width, s.hidden};
  }
}

std::string last_error;
int last_barriers = 0, last_consumers_barriers = 0;

}  // namespace

extern "C" {

// sizes: rows, dim, condition_dim, width, hidden, blocks, steps, stream, noisy, thread blocks, kernel (0 wide, 1 tall,
// 2 split, 3 hopper), seed of the order, dropped barrier, early arrival, no waiting for words, dropped barrier of consumers,
// what is forgotten (1 publishing, 2 waiting for an empty slot, 3 for a full one, 4 telling the neighbour, 5 to begin
// products), dropped meeting of the cluster, shared memory that a block may have. pointers: initial, source, condition, result, coefficients, modulation,
// seed, step, sample_ids, then w_x, b_x, w_c, b_c, w_g, b_g, w_y, b_y, then w_h, b_h, w_o, b_o of each block.
const char* emulate_chain(const int64_t* sizes, void* const* p) {
  ChainLaunch a{};
  a.rows = sizes[0];
  const auto at = [sizes](int i) { return static_cast<int>(sizes[i]); };
  a.shape = {at(1), at(2), at(3), at(4), at(5), at(6)};
  const ChainShape& s = a.shape;
  a.stream = sizes[7], a.noisy = sizes[8] != 0;
  constexpr ChainKernel kKernels[] = {ChainKernel::wide, ChainKernel::tall, ChainKernel::split, ChainKernel::hopper};
  const ChainPlan plan{kKernels[sizes[10]], at(9), at(18)};
  const int64_t bytes = complete(a, plan);
  const bool hopper = plan.kernel == ChainKernel::hopper;
  const auto forgotten = [sizes](int what) { return sizes[16] == what; };
  const machine::Faults faults{at(12),       sizes[13] != 0, sizes[14] != 0, at(15),       forgotten(1),
                               forgotten(2), forgotten(3),   forgotten(4), forgotten(5), at(17)};
  machine::Emulator emulator(hopper ? kHopperThreads : 256, a.shared.bytes, static_cast<unsigned>(sizes[11]), faults);
  const auto tensor = [&emulator](void* q, int64_t elements, int64_t size) {
    emulator.announce(q, elements * size);
    return q;
  };
  const auto bits = [&tensor](void* q, int64_t n) { return static_cast<Bits16*>(tensor(q, n, 2)); };
  const auto integers = [&tensor](void* q, int64_t n) { return static_cast<int64_t*>(tensor(q, n, 8)); };
  const auto floats = [&tensor](void* q, int64_t n) { return static_cast<float*>(tensor(q, n, 4)); };
  a.initial = bits(p[0], a.rows * s.dim), a.source = bits(p[1], a.rows * s.dim);
  a.condition = bits(p[2], a.rows * s.condition_dim), a.result = bits(p[3], a.rows * s.dim);
  a.initial_stride = a.source_stride = s.dim, a.condition_stride = s.condition_dim;
  a.coefficients = floats(p[4], 5 * s.steps);
  a.modulation = floats(p[5], int64_t{3} * s.steps * s.blocks * s.width);
  a.seed = integers(p[6], 1), a.step = integers(p[7], 1), a.sample_ids = integers(p[8], a.rows);
  const auto weight = [&](int number, void* data, int rows, int columns) {
    a.weights[number] = {bits(data, int64_t{rows} * columns), rows, columns};
  };
  weight(kInputWeight, p[9], s.width, s.dim), a.b_x = bits(p[10], s.width);
  weight(kConditionWeight, p[11], s.width, s.condition_dim), a.b_c = bits(p[12], s.width);
  weight(kGateWeight, p[13], s.blocks * s.hidden, s.width), a.b_g = bits(p[14], s.blocks * s.hidden);
  weight(kOutputWeight, p[15], s.dim, s.width), a.b_y = bits(p[16], s.dim);
  for (int l = 0; l < s.blocks; ++l) {
    weight(kBlockWeights + 2 * l, p[17 + 4 * l], s.hidden, s.width), a.b_h[l] = bits(p[18 + 4 * l], s.hidden);
    weight(kBlockWeights + 2 * l + 1, p[19 + 4 * l], s.width, s.hidden), a.b_o[l] = bits(p[20 + 4 * l], s.width);
  }
  if (plan.kernel == ChainKernel::split) last_error = run<SplitThread>(a, emulator, plan.blocks, bytes, true);
  else if (hopper) last_error = run<HopperThread>(a, emulator, plan.blocks, bytes, false, true);
  else if (plan.kernel == ChainKernel::tall) last_error = run<TallChain>(a, emulator, plan.blocks, bytes, false);
  else last_error = run<WideChain>(a, emulator, plan.blocks, bytes, false);
  last_barriers = emulator.barriers();
  last_consumers_barriers = emulator.consumers_barriers();
  return last_error.c_str();
}

// Barriers that the last block of threads passed.
int barriers_passed() { return last_barriers; }

// Barriers of the warps that multiply, in the last cluster.
int consumers_barriers_passed() { return last_consumers_barriers; }

// What choose_plan says: kernel (-1 none, else as above) and blocks of threads.
void plan_for(const int64_t* sizes, int processors, int room, int hopper, int* answer) {
  const auto at = [sizes](int i) { return static_cast<int>(sizes[i]); };
  const ChainPlan plan = choose_plan({at(1), at(2), at(3), at(4), at(5), at(6)}, sizes[0], processors, room, hopper != 0);
  const ChainKernel kernels[] = {ChainKernel::none, ChainKernel::wide, ChainKernel::tall, ChainKernel::split, ChainKernel::hopper};
  answer[0] = static_cast<int>(std::find(kernels, kernels + 5, plan.kernel) - kernels) - 1, answer[1] = plan.blocks;
}

// Tiles of one pass of the weight stream, as counted and as the stream gives them; -1 where they differ or where one
// begins outside its weight, of which so many columns are missing.
int count_tiles(const int64_t* sizes, int missing) {
  const auto at = [sizes](int i) { return static_cast<int>(sizes[i]); };
  const ChainShape s{at(1), at(2), at(3), at(4), at(5), at(6)};
  TileStream stream(s, 1);
  int64_t given = 0;
  while (!stream.done()) {
    const WeightTile tile = stream.next();
    const bool first = tile.weight == kConditionWeight;
    if (tile.row < 0 || tile.column < 0 || (given == 0) != (first && tile.row == 0 && tile.column == 0)) return -1;
    const WeightMatrix of = sizes_of(s, tile.weight);
    if (tile.row >= of.rows || tile.column >= of.columns - missing) return -1;
    ++given;
  }
  return given == tiles_of_a_pass(s) ? static_cast<int>(given) : -1;
}

// Eight lanes that load 16 bytes each at a time, four of a row: how many of them wait for another's bank.
int lanes_on_the_same_banks(const int64_t* sizes) {
  const auto at = [sizes](int i) { return static_cast<int>(sizes[i]); };
  const uint32_t stride = split_stride({at(1), at(2), at(3), at(4), at(5), at(6)});
  int waiting = 0;
  for (int first = 0; first < 32; first += 8) {
    unsigned banks = 0;
    for (int lane = first; lane < first + 8; ++lane) {
      const unsigned bank = 1u << split_place(stride, lane / 4, lane % 4) / 16 % 8;
      waiting += (banks & bank) != 0;
      banks |= bank;
    }
  }
  return waiting;
}

// Normals of features 0 .. 3 of each of n counters' rows, as the kernels draw them: two ways.
void draw_normals(int64_t seed, int64_t step, int64_t id, int64_t stream, int64_t quads, float* four, float* two) {
  const PhiloxRow row(seed, step, id, stream);
  for (int64_t q = 0; q < quads; ++q) {
    float eps[4];
    four_normals(row, static_cast<uint32_t>(q), eps);
    std::copy(eps, eps + 4, four + 4 * q);
    two_normals(row, static_cast<uint32_t>(4 * q), two[4 * q], two[4 * q + 1]);
    two_normals(row, static_cast<uint32_t>(4 * q + 2), two[4 * q + 2], two[4 * q + 3]);
  }
}

// Box-Muller of n pairs of words.
void transform(const uint32_t* words, int64_t n, float* normals) {
  for (int64_t i = 0; i < n; ++i) box_muller(words[2 * i], words[2 * i + 1], normals[2 * i], normals[2 * i + 1]);
}

}
