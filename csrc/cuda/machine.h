// What the chain's kernel asks of the machine: one thread's view of shared memory, copies, matrix units and barriers.
// On the host the same names come from an emulator on the include path, which runs the kernel's own text thread by
// thread and checks each access; this file is then not read.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#define SEDA_KERNEL __device__ __forceinline__

namespace seda::machine {

SEDA_KERNEL int thread() { return static_cast<int>(threadIdx.x); }
SEDA_KERNEL int block() { return static_cast<int>(blockIdx.x); }
SEDA_KERNEL int blocks() { return static_cast<int>(gridDim.x); }

SEDA_KERNEL uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// All threads of the block, and what they wrote to shared memory.
SEDA_KERNEL void barrier() { __syncthreads(); }

SEDA_KERNEL void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

SEDA_KERNEL uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

SEDA_KERNEL void store_shared2(uint32_t address, uint32_t first, uint32_t second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(first), "r"(second) : "memory");
}
SEDA_KERNEL void load_shared2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
SEDA_KERNEL void store_shared4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// The same value, of which the compiler no longer knows that it is the same.
SEDA_KERNEL void forget(int& value) { asm volatile("" : "+r"(value)); }
SEDA_KERNEL void forget(unsigned char*& value) { asm volatile("" : "+l"(value)); }

SEDA_KERNEL void load_shared4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <class T>
SEDA_KERNEL T load(const T* p) {
  return *p;
}

template <class T>
SEDA_KERNEL void store(T* p, T value) {
  *p = value;
}

// Words that blocks of threads exchange through the cache that all share: each is sent once, and holds kNothing before.
constexpr uint32_t kNothing = 0xFFFFFFFFu;

SEDA_KERNEL void send(uint32_t* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
SEDA_KERNEL void send2(uint32_t* to, uint32_t first, uint32_t second) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(first), "r"(second) : "memory");
}

// The first `count` of kMost times four words, `stride` words apart, once all of them have been sent. No word says anything
// of another, so no order among them is asked for.
template <int kMost>
SEDA_KERNEL void receive(uint32_t (&words)[kMost][4], const uint32_t* from, int stride, int count) {
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (i < count)
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i][0]), "=r"(words[i][1]), "=r"(words[i][2]), "=r"(words[i][3])
                     : "l"(from + i * stride)
                     : "memory");
#pragma unroll
    for (int i = 0; i < kMost; ++i)
#pragma unroll
      for (int v = 0; v < 4; ++v) missing = missing || (i < count && words[i][v] == kNothing);
  } while (missing);
}

// 16 bytes from global to shared memory, or 16 zero bytes; there after the wait for the group that they were put in.
SEDA_KERNEL void copy16(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

SEDA_KERNEL void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups of this thread but the newest kNewest have arrived.
template <int kNewest>
SEDA_KERNEL void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Four 8x8 matrices of bfloat16; lane 8 i + j gives the address of row j of matrix i.
SEDA_KERNEL void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8), both bfloat16, a warp together.
SEDA_KERNEL void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

SEDA_KERNEL float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }

// Two floats as two bfloat16, rounded to nearest even, the first in the low half.
SEDA_KERNEL uint32_t pack(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

SEDA_KERNEL uint16_t round_to_bits(float x) { return static_cast<uint16_t>(pack(x, 0.0f)); }

SEDA_KERNEL float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
SEDA_KERNEL float inverse_root(float x) { return rsqrtf(x); }

// ---- compute capability 9.0: clusters, the copy engine, warpgroups ---------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The first 256 threads.
SEDA_KERNEL void consumers_barrier() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

SEDA_KERNEL void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Registers change hands between warpgroups: 2 x 232 + 40 for 3 x 168.
SEDA_KERNEL void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
SEDA_KERNEL void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }

SEDA_KERNEL void start_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(barrier),
               "r"(arrivals)
               : "memory");
}

SEDA_KERNEL void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// At the barrier in the same place of a block of the cluster. What is handed over by these barriers was read and written by
// matrix units and the copy engine, and was waited for: at the scope of the cluster each arrival would in addition wait for
// the thread's own stores to reach the whole GPU (MEMBAR.ALL.GPU), and each wait empty its cache (CCTL.IVALL), every tile.
SEDA_KERNEL void arrive_at_rank(uint32_t barrier, int rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

SEDA_KERNEL void wait_phase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\tagain:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of 64 columns by 64 rows to the same place of both blocks of the cluster, whose barriers count its bytes.
SEDA_KERNEL void copy_to_cluster(uint32_t to, const void* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<unsigned short>(3))
      : "memory");
}

SEDA_KERNEL void publish_to_matrix_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

SEDA_KERNEL void group_products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SEDA_KERNEL void group_products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// c (64 x 64, float32) += a (64 x 16) times b (64 x 16) turned, a warpgroup together, both in shared memory and
// given by their descriptors (schedule.h).
SEDA_KERNEL void group_multiply_add(float (&c)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 0, 0;\n\t}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
        "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
        "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "l"(a), "l"(b));
}

#endif

}  // namespace seda::machine
