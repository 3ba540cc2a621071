// The operator packed_linear_int_cuda on CPU tensors.
#include "packed_linear.h"

#include "in_turn.h"

extern "C" bool backwards;
bool backwards = false;

void on_cpu(const dsq::Problem& p, int64_t a_bits, int64_t w_bits, int32_t) { run_in_turn(p, a_bits, w_bits, backwards); }

STABLE_TORCH_LIBRARY_IMPL(dsquant, CPU, m) {
  m.impl("packed_linear_int_cuda", TORCH_BOX(&dsq::packed_linear_int<on_cpu>));
}
