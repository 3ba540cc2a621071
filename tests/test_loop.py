"""What the training loop hands on from the recipe."""

from types import SimpleNamespace

import pytest
import torch

from dsquant.config import StageConfig
from dsquant.loop import Run
from dsquant.preemption import StopRequest
from dsquant.quant.modules import ActivationQuantizer
from dsquant.quant.state import QuantState
from dsquant.spec import ActivationSite, QuantSpec


@pytest.mark.parametrize(("init", "factor"), [("lsq", 4 / 15**0.5), ("qv", 2 / 7**0.5)])
def test_the_rule_of_the_recipe_finds_the_first_activation_scales(init, factor):
    """On an engine that is one site, unsigned and of 4 bits, and on the first batches of the stream alone."""
    site = ActivationQuantizer(ActivationSite("site", QuantSpec(4, signed=False)))
    state, batches = QuantState([], [site.site]), [(torch.rand(3, 5) * k, None) for k in (1, 2, 50)]
    sites = SimpleNamespace(quantizers={"site": site}, bind=lambda s: site.bind({"scale": s.leaf("site")}))
    done = []
    engine = SimpleNamespace(
        sites=sites, state=state, evaluate_logits=site, eval=lambda: done.append("eval"),
        train=lambda: done.append("train"), inherit_biases=set, finish_calibration=lambda: done.append("finish"),
    )  # fmt: skip
    rules = {"batches": 2, "rounds": 1, "init": init}
    quant = {"weight": {"n_bits": 2}, "activation": {"n_bits": 4}, "calibration": rules}
    stage = StageConfig(steps=1, batch_size=3, lr=1e-3, quant=quant)
    run = Run.__new__(Run)
    run.console = SimpleNamespace(message=lambda text: None)
    run.stop = StopRequest()
    run._calibrate(engine, stage, SimpleNamespace(batches=lambda: iter(batches)), {})
    mean = torch.cat([images for images, _ in batches[:2]]).double().mean()
    torch.testing.assert_close(state.get("site").double(), (factor * mean).view(1), rtol=1e-6, atol=0)
    assert done == ["eval", "train", "finish"]
