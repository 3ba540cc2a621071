// Runs the kernels of bit_serial.h without a GPU: every thread of a block does a phase before any does the next.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "bit_serial.h"

template <class Kernel>
struct InTurn {
  bool backwards;  // no phase may depend on the order of its threads
  std::vector<typename Kernel::Own> own = std::vector<typename Kernel::Own>(Kernel::kThreads);

  template <class Phase>
  void operator()(const Phase& phase) {
    for (int i = 0; i < Kernel::kThreads; ++i) {
      const int thread = backwards ? Kernel::kThreads - 1 - i : i;
      phase(thread, own[thread]);
    }
  }
};

inline void run_in_turn(const dsq::Problem& p, int64_t a_bits, int64_t w_bits, bool backwards) {
  dsq::each_kernel(p, a_bits, w_bits, [&](auto kernel) {
    using Kernel = decltype(kernel);
    const auto shared = std::make_unique<typename Kernel::Shared>();
    for (int64_t block = 0; block < Kernel::blocks(p); ++block) {
      InTurn<Kernel> phase{backwards};
      std::memset(shared.get(), 0x5a, sizeof(*shared));  // as on a GPU, memory begins with anything
      std::memset(phase.own.data(), 0x5a, sizeof(typename Kernel::Own) * Kernel::kThreads);
      Kernel::run(p, block, *shared, phase);
    }
  });
}
