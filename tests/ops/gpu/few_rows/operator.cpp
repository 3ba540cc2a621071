// The operator packed_linear_cuda on CPU tensors.
#include "packed_linear.h"

#include "in_turn.h"

extern "C" bool backwards;
bool backwards = false;

void on_cpu(const dsq::FewRows& p, int64_t n_bits, bool halves, bool brain, int32_t) {
  run_in_turn(p, n_bits, halves, brain, backwards);
}

STABLE_TORCH_LIBRARY_IMPL(dsquant, CPU, m) { m.impl("packed_linear_cuda", TORCH_BOX(&dsq::packed_linear<on_cpu>)); }
