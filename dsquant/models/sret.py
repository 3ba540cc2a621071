"""Sliced Recursive Transformer (Shen, Liu, Xing 2022, arXiv 2111.05297), registered with timm as `sret_tiny`, and its sites.

A stage applies each of its blocks several times with the same weights, and a small MLP of its own after each time. The
first time tokens attend within slices of the map, as they lie; later within fewer groups of tokens drawn at random over
the whole map. Every branch and every shortcut has a learned coefficient.

Which tokens form a group is random in training only, by torch's generator; in evaluation it is fixed, so that one image has
one output. The authors' code draws in evaluation as well.

Sites are those of "Quantization Variation" (TMLR 2024): blocks as in DeiT, whose quantizers serve every time a block is
applied; both layers of the MLPs in between; the three convolutions of the stem and those that shrink the map, which have
8 bits in the paper. Outputs of the stem's ReLUs are unsigned. BatchNorm and the coefficients stay float.

    rules: [{match: "patch_embed.*", n_bits: 8}, {match: "pools.*", n_bits: 8}, {match: "head*", n_bits: 8}]
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsquant.errors import CheckpointError, ConfigError
from dsquant.models.attention import AttentionSites, insert_attention, insert_mlp, split_heads
from dsquant.models.sites import Sites

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Coefficient(nn.Module):
    """Multiply by one learned number, `bias`, named as the authors' checkpoints name it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.bias


class SlicedAttention(nn.Module):
    """Attend within equal groups of tokens: `groups[0]` slices the first time, `groups[1]` random groups after that."""

    def __init__(self, dim: int, heads: int, groups: tuple[int, int], attn_drop: float, drop: float):
        super().__init__()
        self.num_heads, self.groups, self.scale = heads, groups, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, time: int) -> Tensor:
        """Return the output (B, N, C) of the application number `time` of a block, from 0."""
        batch, tokens, _ = x.shape
        groups = self.groups[min(time, 1)]
        mixed = time > 0 and groups > 1
        if mixed:
            order = self.order(tokens, x.device)
            x = x[:, order]
        q, k, v = split_heads(self.qkv(x), self.num_heads, batch * groups)
        x = self.core(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        if mixed:
            x = x[:, order.argsort()]
        return self.proj_drop(self.proj(x))

    def order(self, tokens: int, device: torch.device) -> Tensor:
        """Return a permutation of the tokens: a random one in training, one and the same in evaluation.

        The latter sorts them by the fractional part of i / golden ratio, which spreads every group evenly over the map.
        """
        if self.training:
            return torch.randperm(tokens, device=device)
        return (torch.arange(tokens, device=device, dtype=torch.float64) * GOLDEN).frac().argsort()

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(D)) v of (B * groups, H, N / groups, D)."""
        probabilities = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.attn_drop(probabilities) @ v


class RecursiveBlock(nn.Module):
    """Apply attention and MLP, each a branch with a coefficient beside a shortcut with one."""

    def __init__(self, dim: int, heads: int, groups: tuple[int, int], ratio: float, attn_drop: float, drop: float,
                 drop_path: float):  # fmt: skip
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = SlicedAttention(dim, heads, groups, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * ratio), drop=drop)
        self.coefficient1, self.coefficient2, self.coefficient3, self.coefficient4 = (Coefficient() for _ in range(4))

    def forward(self, x: Tensor, time: int) -> Tensor:
        x = self.coefficient1(x) + self.coefficient2(self.drop_path(self.attn(self.norm1(x), time)))
        return self.coefficient3(x) + self.coefficient4(self.drop_path(self.mlp(self.norm2(x))))


class NonLinearProjection(nn.Module):
    """Apply an MLP beside a shortcut between two applications of a block, so that they need not be the same map."""

    def __init__(self, dim: int, ratio: float, drop: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * ratio), drop=drop)
        self.coefficient1, self.coefficient2 = Coefficient(), Coefficient()

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficient1(x) + self.coefficient2(self.mlp(self.norm1(x)))


class Stage(nn.Module):
    """Apply each block `times` times in a row, a projection after each."""

    def __init__(self, blocks: list[RecursiveBlock], projections: list[NonLinearProjection]):
        super().__init__()
        self.blocks, self.non_projs = nn.ModuleList(blocks), nn.ModuleList(projections)
        self.times = len(projections) // len(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        height = x.shape[2]
        x = x.flatten(2).transpose(1, 2)
        for index, projection in enumerate(self.non_projs):
            block, time = self.blocks[index // self.times], index % self.times
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, time, use_reentrant=False)
            else:
                x = block(x, time)
            x = projection(x)
        return x.transpose(1, 2).unflatten(2, (height, -1))


class ConvStem(nn.Module):
    """Shrink an image by 8 in three convolutions of stride 2, each with BatchNorm and ReLU."""

    def __init__(self, img_size: int, in_chans: int, dim: int):
        super().__init__()
        self.img_size = (img_size, img_size)
        self.conv1, self.bn1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2)
        self.conv2, self.bn2 = nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim)
        self.conv3, self.bn3 = nn.Conv2d(dim, dim, 3, 2, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.bn3(self.conv3(x)).relu()


class SReT(nn.Module):
    """Classify images with a convolutional stem and stages of recursive blocks, a strided convolution between stages.

    Args:
        img_size: side of a square image.
        head_dim: channels of a head, in every stage.
        depths, recursions: applications of blocks in each stage, and the distinct blocks among them.
        heads: of each stage; it has head_dim * heads channels.
        slices, groups: groups of tokens the first time a block is applied, and later.
        mlp_ratio, projection_ratio: hidden channels of the MLPs of blocks, and of those in between, per channel.

    Raises ConfigError where blocks do not divide a depth, groups the tokens of a stage, or its channels those of the next.
    """

    def __init__(
        self, *, num_classes: int = 1000, img_size: int = 224, in_chans: int = 3, head_dim: int = 32,
        depths: tuple[int, ...] = (4, 10, 6), recursions: tuple[int, ...] = (2, 5, 3), heads: tuple[int, ...] = (2, 4, 8),
        slices: tuple[int, ...] = (8, 4, 1), groups: tuple[int, ...] = (2, 1, 1), mlp_ratio: float = 3.6,
        projection_ratio: float = 1.0, drop_rate: float = 0.0, attn_drop_rate: float = 0.0, drop_path_rate: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        dims = [head_dim * count for count in heads]
        if any(b % a for a, b in pairwise(dims)):
            raise ConfigError(f"SReT: heads {tuple(heads)}: those of a stage do not divide those of the next")
        side = -(-img_size // 8)
        self.pos_embed = nn.Parameter(torch.empty(1, dims[0], side, side))
        self.patch_embed = ConvStem(img_size, in_chans, dims[0])
        self.pos_drop = nn.Dropout(drop_rate)
        stages, done = [], 0
        for i, dim in enumerate(dims):
            _check_stage(i, depths[i], recursions[i], (slices[i], groups[i]), side * side)
            # the authors number only the distinct blocks of a stage, from the depth that lies before it
            rates = [drop_path_rate * (done + r) / sum(depths) for r in range(recursions[i])]
            blocks = [
                RecursiveBlock(dim, heads[i], (slices[i], groups[i]), mlp_ratio, attn_drop_rate, drop_rate, rate)
                for rate in rates
            ]
            stages.append(
                Stage(blocks, [NonLinearProjection(dim, projection_ratio, drop_rate) for _ in range(depths[i])])
            )
            done, side = done + depths[i], -(-side // 2)
        self.stages = nn.ModuleList(stages)
        self.pools = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, groups=a) for a, b in pairwise(dims))
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, S, S)."""
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else self.pools[index - 1](x))
        return self.head(self.norm(x.mean((2, 3))))


def _check_stage(index: int, depth: int, blocks: int, groups: tuple[int, int], tokens: int) -> None:
    if depth % blocks:
        raise ConfigError(f"stage {index} of SReT: {blocks} blocks do not divide a depth of {depth}")
    for count in groups:
        if tokens % count:
            raise ConfigError(
                f"stage {index} of SReT: {count} groups do not divide {tokens} tokens; set slices and groups"
            )


@register_model
def sret_tiny(pretrained: bool = False, **kwargs: Any) -> SReT:
    """Build SReT-T: 4.8 million parameters at 1,000 classes."""
    if pretrained:
        raise ConfigError("sret_tiny has no weights to fetch; set model.checkpoint to those of its authors")
    for of_timm in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(of_timm, None)
    return SReT(**kwargs)


def from_authors(model: SReT, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name weights of the authors' checkpoints as this model does; others are returned as they are.

    They list a block once for each application, projections in between. Raises CheckpointError for copies that differ.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "transformers" and len(parts) > 4 and parts[1].isdigit() and parts[3].isdigit():
            stage, position = int(parts[1]), int(parts[3])
            times = model.stages[stage].times if stage < len(model.stages) else 1
            own = f"non_projs.{position // 2}" if position % 2 else f"blocks.{position // 2 // times}"
            parts = ["stages", parts[1], own, *parts[4:]]
        elif parts[0] == "pools" and parts[2:3] == ["conv"]:
            del parts[2]
        own = ".".join(parts)
        if own in renamed and not torch.equal(renamed[own], tensor):
            raise CheckpointError(f"{name} differs from the same weight at another application of its block")
        renamed[own] = tensor
    return renamed


class QuantSlicedAttention(AttentionSites, SlicedAttention):
    """Attend with quantized q, k, probabilities and v, the same quantizers every time."""

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().core(q, k, v) if self.is_float() else self.attend(q, k, v, self.scale)


def insert_sites(model: SReT, sites: Sites) -> None:
    """Quantize every site of a SReT in place. Raises ConfigError where attention drops probabilities."""
    if any(block.attn.attn_drop.p > 0 for stage in model.stages for block in stage.blocks):
        raise ConfigError("attn_drop_rate must be 0: quantized attention never holds the probabilities to drop")
    stem, side = model.patch_embed, model.patch_embed.img_size[0]
    for name in ("conv1", "conv2", "conv3"):
        conv = stem.get_submodule(name)
        features = conv.in_channels * side * side
        sites.conv(f"patch_embed.{name}", conv, features=features, signed=name == "conv1")
        side = -(-side // 2)
    for index, stage in enumerate(model.stages):
        if index:
            pool = model.pools[index - 1]
            sites.conv(f"pools.{index - 1}", pool, features=pool.in_channels * side * side)
            side = -(-side // 2)
        _insert_stage(f"stages.{index}", stage, side * side, sites)
    if isinstance(model.head, nn.Linear):
        sites.linear("head", model.head, features=model.head.in_features)


def _insert_stage(name: str, stage: Stage, tokens: int, sites: Sites) -> None:
    for number, block in enumerate(stage.blocks):
        groups = block.attn.groups if stage.times > 1 else block.attn.groups[:1]
        insert_attention(
            f"{name}.blocks.{number}.attn", block.attn, QuantSlicedAttention, sites, tokens=tokens,
            length=tokens // min(groups), projected=tokens, one_length=len(set(groups)) == 1,
        )  # fmt: skip
        insert_mlp(f"{name}.blocks.{number}.mlp", block.mlp, tokens, sites)
        for turn in range(number * stage.times, (number + 1) * stage.times):
            insert_mlp(f"{name}.non_projs.{turn}.mlp", stage.non_projs[turn].mlp, tokens, sites)
