// Runs the kernels of few_rows.h without a GPU: every thread of a block does a phase, its warps multiply, then comes the next.
#pragma once
#include "../bit_serial/in_turn.h"
#include "few_rows.h"

template <class Kernel>
struct WarpsInTurn : InTurn<Kernel> {
  template <class Phase>
  void alone(const Phase& phase) {
    (*this)(phase);
  }

  template <class Phase>
  void products(const Phase& phase) {
    (*this)(phase);
    for (int first = 0; first < Kernel::kThreads; first += 32)
      for (int group = 0; group < Kernel::kRows / 8; ++group) multiply(first, group);
  }

  // mma.m16n8k16: what each thread of a warp has of both operands makes matrices, and of their product it takes its part.
  void multiply(int first, int group) {
    using Format = typename Kernel::Numbers;
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const dsq::Fragments& now = this->own[first + lane].now[group];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
          const dsq::Place at = dsq::place_a(lane, i);
          a[at.row][at.column + j] = Format::value(now.a[i] >> 16 * j & 0xffff);
        }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
          const dsq::Place at = dsq::place_b(lane, i);
          b[at.row + j][at.column] = Format::value(now.b[i] >> 16 * j & 0xffff);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const dsq::Place at = dsq::place_sum(lane, i);
        for (int k = 0; k < 16; ++k) this->own[first + lane].sums[group][i] += a[at.row][k] * b[k][at.column];
      }
  }
};

inline void run_in_turn(const dsq::FewRows& p, int64_t n_bits, bool halves, bool brain, bool backwards) {
  dsq::with_kernel(p, n_bits, halves, brain, [&](auto kernel) {
    using Kernel = decltype(kernel);
    const auto shared = std::make_unique<typename Kernel::Shared>();
    for (int64_t block = 0; block < Kernel::blocks(p); ++block) {
      WarpsInTurn<Kernel> phase;
      phase.backwards = backwards;
      std::memset(shared.get(), 0x5a, sizeof(*shared));
      std::memset(phase.own.data(), 0x5a, sizeof(typename Kernel::Own) * Kernel::kThreads);
      Kernel::run(p, block, *shared, phase);
    }
  });
}
