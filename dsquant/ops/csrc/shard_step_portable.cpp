// The shard step in plain C++.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "shard_step.h"
#include "shard_step_runs.h"

namespace dsq {
const StepKernels kStepPortable{gather, update, adamw, moments, image};
}  // namespace dsq
