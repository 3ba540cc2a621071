"""Models whose masks and coordinates are buffers train in bf16, float and quantized: DeepSpeed casts parameters alone."""

from functools import partial

import pytest

from dsquant.benchmarks import step
from dsquant.config import ModelConfig
from dsquant.engine import init_world

SWIN, SWIN_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SMALL = {"embed_dim": 24, "depths": [2, 2], "num_heads": [1, 2]}
# Four windows: half of the blocks shift theirs, and have masks.
SIZES = {SWIN: {"img_size": 56}, SWIN_V2: {"img_size": 64}}


def losses(model, quantized):
    """Return the loss of two steps on one batch, and the dtypes of buffers."""
    step.ModelConfig = partial(ModelConfig, kwargs=SMALL | SIZES[model])  # in this process, which is forked
    world = init_world()
    world.use_precision("bf16")
    engine = step._engine(model, 1, step.full_method(2) if quantized else None, world)
    images, labels = step._images(engine.module, 1, world)
    if quantized:
        step._calibrate(engine, images)
    found = []
    for _ in range(2):
        logits = engine.forward(images)
        found.append(float(logits.float().log_softmax(-1)[0, labels[0]]))
        step.train_step(engine, images, labels)
    return found, [str(buffer.dtype) for buffer in engine.module.buffers()]


@pytest.mark.parametrize(("model", "quantized"), [(SWIN, False), (SWIN, True), (SWIN_V2, True)])
def test_windows_train_in_bf16(model, quantized, run_ranks):
    [(found, dtypes)] = run_ranks(1, "tests.models.test_bf16:losses", model=model, quantized=quantized)
    assert found[1] > found[0]
    assert set(dtypes) == {"torch.bfloat16", "torch.int64"}
