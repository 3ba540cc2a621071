"""Quantization-aware training with fake quantization in the forward pass, in one process: an oracle for the shard step.

Written from the method's formulas alone: LSQ with learned scales at every site of a DeiT, oscillation-aware bin
regularization as a term of the loss, AdamW on the weights, Adam on the scales, on those of weights by the gradient of the step
before. It shares no arithmetic with dsquant.
Sums over the elements of a scale's gradient and over bins are float64: at 2 bits a rounding that differs flips codes, and
one flipped code is seen in every later loss. Codes are decided in float32, which is part of the method's definition.
"""

import math
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FakeQuantize(torch.autograd.Function):
    """Return `s * round(clip((x - o) / s)) + o` of x (groups, elements), s and o (groups, 1). Gradients: LSQ, LSQ+."""

    @staticmethod
    def forward(ctx, x, scale, offset, qmin, qmax, grad_scale):
        ctx.save_for_backward(x, scale, offset)
        ctx.rest = qmin, qmax, grad_scale
        return torch.round(torch.clip((x - offset) / scale, qmin, qmax)) * scale + offset

    @staticmethod
    def backward(ctx, grad):
        x, scale, offset = ctx.saved_tensors
        qmin, qmax, grad_scale = ctx.rest
        v = (x - offset) / scale
        inside = (v >= qmin) & (v <= qmax)
        per_element = torch.where(inside, v.round() - v, v.clip(qmin, qmax))
        d_scale = (grad.double() * per_element.double()).sum(dim=1, keepdim=True) * grad_scale
        d_offset = (grad.double() * ~inside).sum(dim=1, keepdim=True) * grad_scale
        return grad * inside, d_scale.float(), d_offset.float(), None, None, None


class Quantizer(nn.Module):
    """Quantize a tensor whose elements fall into `groups` equal runs, each with a learned scale (and offset)."""

    def __init__(self, n_bits, signed, scale, offset=None, share=1):
        """share: how many elements share a scale, for LSQ's gradient factor 1 / sqrt(share * qmax)."""
        super().__init__()
        self.n_bits, self.groups = n_bits, scale.numel()
        self.qmin, self.qmax = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
        self.scales = nn.ParameterList(s.clone().view(1) for s in scale)
        self.offset = None if offset is None else nn.Parameter(offset.clone().view(1))
        self.grad_scale = 1 / math.sqrt(share * self.qmax)

    def stacked(self) -> Tensor:
        return torch.cat(list(self.scales)).unsqueeze(1)

    def forward(self, x):
        scale = self.stacked()
        offset = torch.zeros_like(scale) if self.offset is None else self.offset.view(1, 1)
        rows = x.reshape(self.groups, -1)
        return FakeQuantize.apply(rows, scale, offset, self.qmin, self.qmax, self.grad_scale).view(x.shape)

    def regularization(self, weight) -> Tensor:
        """Return ||sg[w_q] - w_c||^2 summed, plus the variance of w_c in every bin of every group; scales are constants."""
        scale, rows = self.stacked().detach(), weight.view(self.groups, -1)
        clipped = torch.clamp(rows, self.qmin * scale, self.qmax * scale).double()
        codes = torch.round(torch.clip(rows / scale, self.qmin, self.qmax)).detach()
        loss = (codes * scale - clipped).square().sum()
        for row, row_codes in zip(clipped, codes, strict=True):
            for code in range(self.qmin, self.qmax + 1):
                members = row[row_codes == code]
                if members.numel() > 1:
                    loss = loss + members.var(unbiased=True)
        return loss


class Quantized(nn.Module):
    """Apply a linear layer or a convolution to quantized input and weight."""

    def __init__(self, layer, input_quantizer, weight_quantizer):
        super().__init__()
        self.layer, self.input_quantizer, self.weight_quantizer = layer, input_quantizer, weight_quantizer

    def forward(self, x):
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Conv2d):
            return F.conv2d(x, weight, self.layer.bias, stride=self.layer.stride)
        product = F.linear(x, weight, self.layer.bias)
        with torch.no_grad():
            exact = F.linear(x.double(), weight.double(), self.layer.bias.double()).float()
        return product + (exact - product).detach()  # a product of codes is exact, and rounded once


def attend(self, x, **_):
    """Be the forward of an attention block with quantized q, k, v and probabilities."""
    batch, tokens, width = x.shape
    q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = self.q_quantizer(q), self.k_quantizer(k), self.v_quantizer(v)
    probabilities = self.probs_quantizer((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
    return self.proj((probabilities @ v).transpose(1, 2).reshape(batch, tokens, width))


def mse_scale(weight: Tensor, groups: int, n_bits: int) -> Tensor:
    """Return (groups,) float32: s <- <w, q> / <q, q> from max|w| / qmax until it rests; float64 sums."""
    qmin, qmax = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    found = []
    for row in weight.reshape(groups, -1).double():
        scale, before = row.abs().max() / qmax, torch.tensor(0.0)
        while abs(scale - before) >= 1e-5 * before:
            before, q = scale, torch.round(torch.clip(row / scale, qmin, qmax))
            scale = (row @ q) / (q @ q)
        found.append(scale)
    return torch.stack(found).float()


def insert_quantizers(model: nn.Module, n_bits: int, values: dict[str, Tensor]) -> nn.Module:
    """Quantize every site of a timm VisionTransformer in place: ends at 8 bits, the rest at n_bits.

    values: "site:scale" and "site:offset" of the activations; weight scales are found here.
    """
    embed, tokens = model.patch_embed, model.pos_embed.shape[1]

    def activation(name, share, bits=n_bits, signed=True):
        return Quantizer(bits, signed, values[f"{name}:scale"], values.get(f"{name}:offset"), share)

    def layer(name, module, share, bits=n_bits, signed=True, groups=1):
        weight = module.weight.detach()
        weight_quantizer = Quantizer(bits, True, mse_scale(weight, groups, bits), None, weight.numel() // groups)
        return Quantized(module, activation(f"{name}.input", share, bits, signed), weight_quantizer)

    pixels = embed.proj.in_channels * embed.img_size[0] * embed.img_size[1]
    embed.proj = layer("patch_embed.proj", embed.proj, pixels, 8)
    for index, block in enumerate(model.blocks):
        name, attention, mlp = f"blocks.{index}", block.attn, block.mlp
        width, heads = attention.qkv.in_features, attention.num_heads
        for part in ("q", "k", "v"):
            setattr(attention, f"{part}_quantizer", activation(f"{name}.attn.{part}", tokens * width))
        attention.probs_quantizer = activation(f"{name}.attn.probs", heads * tokens * tokens, signed=False)
        attention.qkv = layer(f"{name}.attn.qkv", attention.qkv, tokens * width, groups=3)
        attention.proj = layer(f"{name}.attn.proj", attention.proj, tokens * width)
        attention.forward = MethodType(attend, attention)
        mlp.fc1 = layer(f"{name}.mlp.fc1", mlp.fc1, tokens * width)
        mlp.fc2 = layer(f"{name}.mlp.fc2", mlp.fc2, tokens * mlp.fc2.in_features, signed=False)
    model.head = layer("head", model.head, model.head.in_features, 8)
    return model


def weight_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW over all that is no scale; matrices decay, vectors and the position embedding do not."""
    own = {n: p for n, p in model.named_parameters() if "quantizer" not in n}
    decayed = [p for n, p in own.items() if p.ndim >= 2 and n != "pos_embed"]
    rest = [p for n, p in own.items() if p.ndim < 2 or n == "pos_embed"]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999))


def scale_optimizer(model: nn.Module, scale_lr: float) -> torch.optim.Optimizer:
    """Return Adam with a rate of its own for every scale and offset: scale_lr times the first scale of the site."""
    groups = []
    for quantizer in (m for m in model.modules() if isinstance(m, Quantizer)):
        groups += [{"params": [scale], "share": scale.item()} for scale in quantizer.scales]
        if quantizer.offset is not None:
            groups.append({"params": [quantizer.offset], "share": quantizer.scales[0].item()})
    for group in groups:
        group["base"] = scale_lr * group.pop("share")
    return torch.optim.Adam(groups, betas=(0.9, 0.999))


def with_blocks(model, images):
    """Return the logits of timm's VisionTransformer and the output of each of its blocks, taken apart by hand."""
    x, outputs = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))), []
    for block in model.blocks:
        x = block(x)
        outputs.append(x)
    return model.forward_head(model.norm(x)), outputs


def train(model, teacher, batches, rates, *, scale_lr, weight_decay, obr_weight, hidden):
    """Train on `batches` at the learning rates `rates`, and return the distillation loss of each step before it.

    hidden weighs the squared error of each block's output relative to the teacher's. obr_weight rises from 0 by a cosine
    over the steps. The rates' largest is that at which scales move at scale_lr.
    """
    weights, scales = weight_optimizer(model, weight_decay), scale_optimizer(model, scale_lr)
    quantized = [m for m in model.modules() if isinstance(m, Quantized)]
    regularized = [m for m in quantized if m.weight_quantizer.n_bits <= 4]
    late = {scale: torch.zeros_like(scale) for m in quantized for scale in m.weight_quantizer.scales}
    losses = []
    for step, (images, rate) in enumerate(zip(batches, rates["steps"], strict=True)):
        with torch.no_grad():
            wanted, taught = with_blocks(teacher, images)
        logits, outputs = with_blocks(model, images)
        loss = -(wanted.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        for own, target in zip(outputs, taught, strict=True):
            loss = loss + hidden * sum(
                (a - b).norm() ** 2 / b.norm() ** 2 for a, b in zip(own, target, strict=True)
            ) / len(own)
        losses.append(loss.item())
        strength = obr_weight * 0.5 * (1 - math.cos(math.pi * step / len(batches)))
        if strength:
            loss = loss + strength * sum(m.weight_quantizer.regularization(m.layer.weight) for m in regularized)
        for group in weights.param_groups:
            group["lr"] = rate
        for group in scales.param_groups:
            group["lr"] = group["base"] * rate / rates["base"]
        model.zero_grad()
        loss.backward()
        weights.step()
        for scale, before in late.items():
            late[scale], scale.grad = scale.grad, before
        scales.step()
    return losses
