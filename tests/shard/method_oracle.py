"""Every weight method and every cure of oscillation, written out in the forward pass of one process: an oracle for shards.

Weights are parametrizations that fake-quantize; regularizers are terms of the loss, for autograd; freezing and CGA change
gradients and weights around plain AdamW. Written from the papers' formulas: it shares no arithmetic with dsquant.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

FREE = math.inf


def half_integers(u, n_bits):
    half = 2 ** (n_bits - 1)
    return torch.floor(torch.clip(u, -half, half - 1e-6)) + 0.5


def lsq_level(u, n_bits):
    half = 2 ** (n_bits - 1)
    return torch.round(torch.clip(u, -half, half - 1))


# method -> (level of u = w / s, limits of u that pass the gradient, boundaries between levels)
METHODS = {
    "lsq": (lsq_level, lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1), lambda b: [k + 0.5 for k in halves(b)]),
    "seq": (half_integers, lambda b: (-(2 ** (b - 1)), 2 ** (b - 1)), lambda b: [k + 1 for k in halves(b)]),
    "ternary": (lambda u, b: (u > 0.5).float() - (u < -0.5).float(), lambda b: (-1.5, 1.5), lambda b: [-0.5, 0.5]),
    "elastic": (lambda u, b: torch.where(u >= 0, 0.5, -0.5), lambda b: (-0.5, 0.5), lambda b: [0.0]),
    "statsq": (half_integers, lambda b: (-FREE, FREE), lambda b: [k + 1 for k in halves(b)]),
    "bwn": (lambda u, b: torch.where(u >= 0, 0.5, -0.5), lambda b: (-FREE, FREE), lambda b: [0.0]),
}


def halves(n_bits):
    return range(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)


class Rounded(torch.autograd.Function):
    """Return level * scale; the gradient passes to w where it may, and to the scale as sum G * slope * factor."""

    @staticmethod
    def forward(ctx, rows, scale, level, passes, slope, factor):
        ctx.save_for_backward(passes, slope, torch.as_tensor(factor))
        return level * scale

    @staticmethod
    def backward(ctx, grad):
        passes, slope, factor = ctx.saved_tensors
        d_scale = (grad.double() * slope.double()).sum(dim=1, keepdim=True) * factor
        return grad * passes, d_scale.float(), None, None, None, None


class FakeWeight(nn.Module):
    """Quantize a weight whose rows fall into `groups` runs by one method; `scale` (groups, 1) is learned or a statistic."""

    def __init__(self, weight, groups, method, n_bits, init="mse", grad_scale="lsq"):
        super().__init__()
        self.groups, self.method, self.n_bits, self.grad_scale = groups, method, n_bits, grad_scale
        self.level_of, limits, boundaries = METHODS[method]
        self.limits, self.boundaries = limits(n_bits), boundaries(n_bits)
        self.learned = method not in ("statsq", "bwn")
        self.frozen = self.frozen_level = None
        if self.learned:
            self.scale = nn.Parameter(self.first_scale(weight.detach().double().view(groups, -1), init))

    def first_scale(self, rows, init):
        if init == "lsq_plus":
            mean, sigma = rows.mean(1, keepdim=True), rows.std(1, unbiased=False, keepdim=True)
            return (torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 2 ** (self.n_bits - 1)).float()
        scale = rows.abs().amax(1, keepdim=True) / self.limits[1]
        while True:  # least squares: s <- <w, q> / <q, q>
            q = self.level_of(rows / scale, self.n_bits).double()
            new = (rows * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True)
            if ((new - scale).abs() < 1e-7 * scale).all():
                return new.float()
            scale = new

    def decide(self, weight):
        """Return rows around their centre, scale, level, what passes, slope of the scale; all but rows without gradient."""
        rows = weight.view(self.groups, -1)
        with torch.no_grad():
            if self.learned:
                scale = self.scale.detach()
            else:
                scale = (2 * rows.double().abs().mean(1, keepdim=True) / 2 ** (self.n_bits - 1)).float()
            centre = rows.double().mean(1, keepdim=True).float() if self.method == "bwn" else torch.zeros_like(scale)
            u = (rows - centre) / scale
            level = self.level_of(u, self.n_bits)
            passes = (u >= self.limits[0]) & (u <= self.limits[1])
            slope = level if self.method == "elastic" else torch.where(passes, level - u, level)
            if self.frozen is not None:
                level = torch.where(self.frozen, self.frozen_level, level)
                passes, slope = passes & ~self.frozen, torch.where(self.frozen, level, slope)
        return rows - centre, scale, level, passes, slope

    def forward(self, weight):
        _, scale, level, passes, slope = self.decide(weight)
        rows, qmax = weight.view(self.groups, -1), max(1, 2 ** (self.n_bits - 1) - 1)
        if self.grad_scale == "mdq":
            factor = (qmax * rows.detach().double().abs().sum(1, keepdim=True)).rsqrt()
        else:
            factor = 1 / math.sqrt(rows.shape[1] * qmax)
        source = self.scale if self.learned else scale
        return Rounded.apply(rows, source, level, passes, slope, factor).view(weight.shape)

    def codes(self, weight):
        level = self.decide(weight)[2].view(weight.shape)
        return level.floor() if self.method not in ("lsq", "ternary") else level

    def distance(self, weight):
        """Return sum over output channels of mean ((sg[w_hat] - w_c)^2): dampening, and the first term of OBR."""
        rows, scale, level, _, _ = self.decide(weight)
        clipped = torch.clip(rows, self.limits[0] * scale, self.limits[1] * scale)
        return (level * scale - clipped).double().view(weight.shape[0], -1).square().mean(1).sum()

    def variances(self, weight):
        rows, scale, level, _, _ = self.decide(weight)
        clipped = torch.clip(rows, self.limits[0] * scale, self.limits[1] * scale).double()
        total = clipped.new_zeros(())
        for row, row_level in zip(clipped, level, strict=True):
            for value in row_level.unique():
                members = row[row_level == value]
                total = total + (members.var(unbiased=True) if members.numel() > 1 else 0.0)
        return total

    def near(self, weight, reach):
        """Return which weights lie within `reach` scales of a boundary between two levels."""
        rows, scale, *_ = self.decide(weight)
        distance = (rows.detach() / scale).unsqueeze(-1) - torch.tensor(self.boundaries)
        return (distance.abs().amin(-1) <= reach).view(weight.shape)


class Freezing:
    """Follow the oscillations of one weight and freeze what oscillates too often at its mean level."""

    def __init__(self, fake, weight, momentum):
        self.fake, self.momentum = fake, momentum
        self.level = fake.decide(weight)[2].clone()
        self.direction, self.frequency = torch.zeros_like(self.level), torch.zeros_like(self.level)
        self.mean = self.level.clone()
        fake.frozen, fake.frozen_level = torch.zeros_like(self.level, dtype=torch.bool), self.level.clone()

    def after_step(self, weight, threshold):
        m, level = self.momentum, self.fake.decide(weight)[2]
        sign = (level - self.level).sign()
        self.frequency = m * (sign * self.direction == -1) + (1 - m) * self.frequency
        self.direction = torch.where(sign == 0, self.direction, sign)
        self.mean, self.level = m * level + (1 - m) * self.mean, level
        if threshold is not None:
            newly = (self.frequency > threshold) & ~self.fake.frozen
            low, high = self.fake.level_of(torch.tensor([-1e9, 1e9]), self.fake.n_bits)
            settled = ((self.mean - low).round() + low).clip(low, high)
            self.fake.frozen_level = torch.where(newly, settled, self.fake.frozen_level)
            self.fake.frozen = self.fake.frozen | newly
            self.level = torch.where(newly, settled, self.level)
        image = self.fake.frozen_level * self.fake.scale.detach()
        rows = weight.data.view(self.fake.groups, -1)
        rows.copy_(torch.where(self.fake.frozen, image, rows))


class ScaleSteps:
    """Step a scale by Adam or by SGD with momentum, at `share` of its first value a step, by the gradient of the step before."""

    def __init__(self, scale, share, kind):
        self.scale, self.rate, self.kind = scale, share * scale.detach().clone(), kind
        self.m, self.v, self.t = torch.zeros_like(scale), torch.zeros_like(scale), 0
        self.late = torch.zeros_like(scale)

    def step(self):
        g, self.t = self.late, self.t + 1
        self.late = self.scale.grad.clone()
        if self.kind == "sgd":
            self.m = 0.9 * self.m + g
            self.scale.data -= self.rate * self.m
            return
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        root = (self.v / (1 - 0.999**self.t)).sqrt() + 1e-8
        self.scale.data -= self.rate * (self.m / (1 - 0.9**self.t)) / root


def rise(weight, progress):
    return weight * 0.5 * (1 - math.cos(math.pi * progress))


def quantize_weights(model, quant):
    """Put a FakeWeight on every linear layer of the blocks; return {name: (layer, fake)}."""
    tensor, found = quant["weight"], {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            rows = layer.out_features if tensor.get("granularity") == "per_channel" else 1
            groups = max(rows, 3) if name.endswith("qkv") else rows
            fake = FakeWeight(
                layer.weight, groups, tensor.get("method", "lsq"), tensor["n_bits"],
                quant.get("weight_init", "mse"), quant.get("grad_scale", "lsq"),
            )  # fmt: skip
            parametrize.register_parametrization(layer, "weight", fake)
            found[f"{name}.weight"] = layer, fake
    return found


class Trainer:
    """Train a model as a stage of a recipe does, and remember what the shards are asked for."""

    def __init__(self, model, quant, *, lr, weight_decay):
        self.quant, self.model = quant, model
        self.weights = quantize_weights(model, quant)
        self.latents = {name: layer.parametrizations.weight.original for name, (layer, _) in self.weights.items()}
        self.fakes = {name: fake for name, (_, fake) in self.weights.items()}
        scales = {id(fake.scale) for fake in self.fakes.values() if fake.learned}
        own = [(n, p) for n, p in model.named_parameters() if id(p) not in scales]
        decays = [p for n, p in own if p.ndim >= 2 and n not in ("pos_embed", "cls_token")]
        rest = [p for n, p in own if not (p.ndim >= 2 and n not in ("pos_embed", "cls_token"))]
        groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr)
        kind = quant.get("scale_optimizer", "adam")
        self.steps = [ScaleSteps(f.scale, quant["scale_lr"], kind) for f in self.fakes.values() if f.learned]
        cures = quant.get("oscillation", {})
        self.dampening, self.cga, freeze = (cures.get(key, {}) for key in ("dampening", "cga", "freeze"))
        self.freeze, self.freezing = freeze, {}
        if freeze:
            self.freezing = {n: Freezing(self.fakes[n], w, cures["momentum"]) for n, w in self.latents.items()}
        self.losses, self.ratios = [], {}

    def regularization(self, name, progress):
        fake, weight, obr = self.fakes[name], self.latents[name], self.quant.get("obr", {})
        strength = rise(obr.get("weight", 0.0), progress)
        loss = rise(self.dampening.get("weight", 0.0), progress) * fake.distance(weight)
        return loss + strength * (fake.distance(weight) + fake.variances(weight)) if strength else loss

    def step(self, images, labels, progress):
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        self.model.zero_grad()
        loss.backward()
        for name, weight in self.latents.items():
            (found,) = torch.autograd.grad(self.regularization(name, progress), weight)
            self.ratios[name] = (found.double().norm() / weight.grad.double().norm()).item()
            weight.grad += found
        held = {}
        if self.cga:
            for name, weight in self.latents.items():
                free = self.fakes[name].near(weight, self.cga["boundary_range"])
                weight.grad *= free
                held[name] = free, weight.detach().clone()
        self.optimizer.step()
        for scale in self.steps:
            scale.step()
        for name, (free, before) in held.items():
            self.latents[name].data.copy_(torch.where(free, self.latents[name].data, before))
        for name, freezing in self.freezing.items():
            freezing.after_step(self.latents[name], self.threshold(progress))

    def threshold(self, progress):
        first, last = self.freeze["first"], self.freeze["last"]
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))
