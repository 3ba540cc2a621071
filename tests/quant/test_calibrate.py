"""First scales of activations: the published rules by direct formulas, and least squares against exhaustive search."""

import math

import pytest
import torch
from torch import nn

from dsquant.errors import ConfigError, TrainingError
from dsquant.quant.calibrate import calibrate
from dsquant.quant.modules import ActivationQuantizer, Mode, QuantLinear, become
from dsquant.quant.state import QuantState
from dsquant.spec import ActivationSite, QuantSpec

HEADS, TOKENS, WIDTH = 2, 5, 6
SPECS = {
    "signed 2": QuantSpec(2),
    "signed 8": QuantSpec(8),
    "unsigned 2": QuantSpec(2, signed=False),
    "unsigned 4 with offset": QuantSpec(4, signed=False, offset=True),
    "elastic": QuantSpec(1, method="elastic"),
    "elastic unsigned": QuantSpec(1, signed=False, method="elastic"),
}
# scale / mean|x|: 2 / sqrt(qmax) or 4 / sqrt(qmax), qmax of the site's own codes; the two levels of 1 signed bit are apart
# by twice alpha = 2 mean|x|. Quantization Variation: 2 / sqrt(2^(b-1) - 1), whatever the sign.
FACTORS = {
    "lsq": {"signed 2": 2 / 1, "signed 8": 2 / math.sqrt(127), "unsigned 2": 4 / math.sqrt(3),
            "unsigned 4 with offset": 4 / math.sqrt(15), "elastic": 4, "elastic unsigned": 4},
    "qv": {"signed 2": 2 / 1, "signed 8": 2 / math.sqrt(127), "unsigned 2": 2 / 1,
           "unsigned 4 with offset": 2 / math.sqrt(7), "elastic": 4, "elastic unsigned": 2},
}  # fmt: skip


def quantizer(spec, groups=1, **options):
    return ActivationQuantizer(ActivationSite("site", spec, groups), **options)


def values(*shape, salt=0):
    """Return numbers that lean to one side, so that a mean of x would not pass for one of |x|."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(salt)) * (1 + torch.arange(shape[-1])) - 0.5


def calibrated(found, batches, rounds=1, init="mse"):
    """Calibrate one quantizer on batches and return its state."""
    state = QuantState([], [found.site])

    def bind():
        found.bind({role: state.get("site", role) for role in found.site.values})

    calibrate({"site": found}, state, found, batches, rounds, bind, init=init)
    return state


@pytest.mark.parametrize("init", FACTORS)
@pytest.mark.parametrize("name", SPECS)
def test_a_rule_gives_its_multiple_of_the_mean_and_no_offset(init, name):
    batches = [values(3, TOKENS, WIDTH), values(2, TOKENS, WIDTH, salt=1)]
    state = calibrated(quantizer(SPECS[name]), batches, init=init)
    mean = torch.cat([b.double() for b in batches]).abs().mean()
    torch.testing.assert_close(state.get("site").double(), (FACTORS[init][name] * mean).view(1), rtol=1e-6, atol=0)
    offset = state.get("site", "offset")
    assert (offset is not None) == SPECS[name].offset
    assert offset is None or offset.tolist() == [0.0]


@pytest.mark.parametrize("init", FACTORS)
def test_a_rule_holds_in_every_group(init):
    x = values(3, HEADS, TOKENS, WIDTH)
    cases = {
        "heads first": (quantizer(QuantSpec(2, granularity="per_head"), HEADS, heads_first=True), (0, 2, 3)),
        "tokens": (quantizer(QuantSpec(2, granularity="per_token"), TOKENS), (0, 1, 3)),
    }
    for name, (site, dims) in cases.items():
        expected = FACTORS[init]["signed 2"] * x.double().abs().mean(dim=dims)
        torch.testing.assert_close(calibrated(site, [x], init=init).get("site").double(), expected, msg=name)
    side_by_side = quantizer(QuantSpec(2, granularity="per_head"), HEADS)
    flat = x.transpose(1, 2).flatten(2)
    expected = 2 * flat.double().unflatten(-1, (HEADS, WIDTH)).abs().mean(dim=(0, 1, 3))
    torch.testing.assert_close(calibrated(side_by_side, [flat], init=init).get("site").double(), expected)


def test_a_second_round_sees_what_quantizing_sites_pass_on():
    """The second site's input is the first's output: float in round one, two levels in round two."""
    first, x = quantizer(QuantSpec(1, method="elastic")), values(4, TOKENS, WIDTH)
    sites = {"site": first, "next": ActivationQuantizer(ActivationSite("next", QuantSpec(2)))}
    state = QuantState([], [site.site for site in sites.values()])

    def bind():
        for name, site in sites.items():
            site.bind({"scale": state.get(name)})

    def forward(batch):
        return sites["next"](first(batch))

    for rounds, seen in ((1, x.abs().mean()), (2, 2 * x.abs().mean())):  # alpha = 2 mean|x| wherever x lies
        for site in sites.values():
            site.mode = Mode.FLOAT
        calibrate(sites, state, forward, [x], rounds, bind, init="lsq")
        torch.testing.assert_close(state.get("next"), (2 * seen).view(1))


def linear(spec):
    """Return a quantized linear layer, and its calibration on batches: its state."""
    torch.manual_seed(0)
    layer, site = nn.Linear(WIDTH, 3), ActivationSite("site", spec, features=WIDTH)
    become(layer, QuantLinear, input_quantizer=ActivationQuantizer(site))

    def calibrate_on(batches, init="mse", state=None, given=frozenset()):
        state = QuantState([], [site]) if state is None else state
        found = {"site": layer.input_quantizer}

        def bind():
            layer.input_quantizer.bind({role: state.get("site", role) for role in site.values})

        calibrate(found, state, layer, batches, 1, bind, init=init, given=given)
        return state

    return layer, calibrate_on


def test_biases_around_a_signed_site_start_at_its_features_means():
    """An outlier that is a constant of its feature costs the others no resolution, and float outputs do not change."""
    x = torch.randn(64, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    x[..., 2] = x[..., 2] * 0.5 + 40.0
    layer, calibrate_on = linear(QuantSpec(2, bias="around"))
    wanted = layer(x)
    state = calibrate_on([x[:24], x[24:]])
    torch.testing.assert_close(state.get("site", "before"), -x.mean(dim=(0, 1)))
    assert torch.equal(state.get("site", "after"), -state.get("site", "before"))
    assert state.get("site") < 1.5  # of values around 0 with a spread of 1, not of 40
    assert (layer(x) - wanted).square().mean() < 0.3 * (wanted - wanted.mean(dim=(0, 1))).square().mean()
    layer.input_quantizer.mode = Mode.FLOAT
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "init"), [(QuantSpec(2, bias="before"), "mse"), (QuantSpec(2, signed=False, bias="around"), "mse"),
                       (QuantSpec(2, bias="around"), "lsq")]
)  # fmt: skip
def test_other_biases_start_at_zero(spec, init):
    _, calibrate_on = linear(spec)
    state = calibrate_on([values(8, TOKENS, WIDTH).abs()], init)
    assert all(
        not state.get("site", role).any() for role in ("before", "after") if (role != "after" or spec.bias == "around")
    )


@pytest.mark.parametrize("init", ["mse", "lsq"])
def test_given_biases_stay_and_scales_are_fitted_to_what_they_leave(init):
    x = values(16, TOKENS, WIDTH) + 5.0
    biases = {"before": -torch.arange(WIDTH).float(), "after": torch.linspace(-1, 1, WIDTH)}
    layer, calibrate_on = linear(QuantSpec(2, bias="around"))
    state = QuantState([], [layer.input_quantizer.site])
    for role, bias in biases.items():
        state.get("site", role).copy_(bias)
    calibrate_on([x], init, state, given={"site"})
    assert all(torch.equal(state.get("site", role), bias) for role, bias in biases.items())
    plain = calibrated(quantizer(QuantSpec(2)), [x + biases["before"]], init=init)
    assert torch.equal(state.get("site"), plain.get("site"))


class TwoLayers(nn.Module):
    """Two quantized linear layers with biases around, after one another, and the calibration of both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.sites = {}
        for name, layer in self.named_children():
            site = ActivationSite(name, QuantSpec(2, bias="around"), features=WIDTH)
            self.sites[name] = ActivationQuantizer(site)
            become(layer, QuantLinear, input_quantizer=self.sites[name])
        self.state = QuantState([], [quantizer.site for quantizer in self.sites.values()])

    def forward(self, x):
        return self.second(self.first(x).relu())

    def bind(self):
        for name, quantizer in self.sites.items():
            quantizer.bind({role: self.state.get(name, role) for role in quantizer.site.values})

    def calibrate_on(self, batches, rounds=1):
        with torch.no_grad():
            calibrate(self.sites, self.state, self, batches, rounds, self.bind, sequential=True)


def test_sites_in_turn_are_fitted_to_what_quantized_sites_before_them_pass_on():
    model, batches = TwoLayers(), [values(4, TOKENS, WIDTH), values(3, TOKENS, WIDTH, salt=1)]
    model.calibrate_on(batches)
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in model.sites.values())
    with torch.no_grad():
        seen = model.first(torch.cat(batches)).relu()  # the first layer quantizes by now
    torch.testing.assert_close(model.state.get("second", "before"), -seen.mean(dim=(0, 1)))
    alone = ActivationQuantizer(ActivationSite("site", QuantSpec(2)))
    wanted = calibrated(alone, [seen + model.state.get("second", "before")]).get("site")
    torch.testing.assert_close(model.state.get("second"), wanted)
    refitted = TwoLayers()
    refitted.calibrate_on(batches, rounds=2)  # nothing is left to find
    torch.testing.assert_close(refitted.state.get("second"), model.state.get("second"))


def test_sentences_of_several_lengths_make_one_batch_without_counting_padding():
    short = {"x": torch.tensor([[1.0, 2.0]]), "attention_mask": torch.tensor([[1, 1]])}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batches = [short, {"x": torch.tensor([[3.0, 4.0, 5.0], [6.0, 9.0, 9.0]]), "attention_mask": mask}]
    site = quantizer(QuantSpec(8))
    state, shapes = QuantState([], [site.site]), []

    def forward(batch):
        shapes.append(tuple(batch["x"].shape))
        site(batch["x"].unsqueeze(-1))

    def bind():
        site.bind({"scale": state.get("site")})

    calibrate({"site": site}, state, forward, batches, 1, bind, init="lsq", sequential=True)
    assert shapes == [(3, 3)]
    torch.testing.assert_close(state.get("site"), torch.tensor([2 * 21 / 6 / math.sqrt(127)]))


def test_a_site_that_no_sample_reaches_in_its_turn_is_named():
    model = TwoLayers()
    with pytest.raises(TrainingError, match="no image reached second"):
        calibrate(model.sites, model.state, model.first, [values(2, TOKENS, WIDTH)], 1, model.bind, sequential=True)


def calibrate_rank(init):
    """Calibrate on this rank's own images and return the scales."""
    rank = torch.distributed.get_rank()
    x = values(2 + rank, TOKENS, WIDTH, salt=rank)
    if init == "sequential":
        model = TwoLayers()
        model.calibrate_on([x])
        return model.state.values.clone()
    per_token = quantizer(QuantSpec(2, granularity="per_token"), TOKENS)
    return calibrated(per_token, [x], init=init).get("site").clone()


def test_ranks_agree_on_sites_fitted_in_turn(run_ranks):
    found = run_ranks(2, "tests.quant.test_calibrate:calibrate_rank", init="sequential")
    assert torch.equal(found[0], found[1])
    model = TwoLayers()
    model.calibrate_on([values(2 + rank, TOKENS, WIDTH, salt=rank) for rank in range(2)])
    torch.testing.assert_close(found[0], model.state.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", FACTORS)
def test_ranks_agree_on_the_mean_over_all_of_their_images(run_ranks, init):
    """The second rank has more of them: a mean of means would be another."""
    found = run_ranks(2, "tests.quant.test_calibrate:calibrate_rank", init=init)
    assert torch.equal(found[0], found[1])
    together = torch.cat([values(2 + rank, TOKENS, WIDTH, salt=rank) for rank in range(2)]).double()
    torch.testing.assert_close(found[0].double(), 2 * together.abs().mean(dim=(0, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("init", ["mse", *FACTORS])
def test_a_site_without_images_or_with_a_value_that_is_not_finite_is_named(init):
    for batches, said in (([], "no image reached site"), ([torch.tensor([[1.0, math.inf]])], "site saw a value")):
        with pytest.raises(TrainingError, match=said):
            calibrated(quantizer(QuantSpec(2)), batches, init=init)


@pytest.mark.parametrize("init", ["mse", *FACTORS])
def test_another_number_of_tokens_is_refused_also_where_it_would_divide(init):
    per_token = quantizer(QuantSpec(2, granularity="per_token"), TOKENS)
    with pytest.raises(ConfigError, match=f"site has a scale for each of {TOKENS} tokens and got {2 * TOKENS}"):
        calibrated(per_token, [values(3, 2 * TOKENS, WIDTH)], init=init)


@pytest.mark.parametrize("name", ["signed 2", "unsigned 2", "elastic", "elastic unsigned"])
def test_least_squares_finds_no_worse_than_a_search_of_all_scales(name):
    spec, x = SPECS[name], values(40, TOKENS, WIDTH).double()
    grid = spec.levels

    def error(scale):
        level = (x / scale - grid.shift).clamp(grid.qmin, grid.qmax).round() + grid.shift
        return (level * scale - x).square().sum()

    found = calibrated(quantizer(spec), [x.float()]).get("site").double()
    best = min(error(scale) for scale in torch.linspace(0.01, 2.5, 2000, dtype=torch.float64) * x.abs().max())
    assert error(found) <= 1.002 * best  # histograms have 1024 bins
