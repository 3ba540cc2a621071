// The passes of the shard step and of fake_quantize in plain C++.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fake_quantize.h"
#include "shard_step.h"
#include "shard_step_runs.h"
#include "fake_quantize_runs.h"

namespace dsq {
const StepKernels kStepPortable{gather, update, adamw, moments, image, scales};
const QuantizeKernels kQuantizePortable{quantize_run, backward_run, quantize_each, backward_each};
}  // namespace dsq
