"""Quantization sites of timm's SwinTransformer and SwinTransformerV2, tiny to large: those of DeiT, and patch merging.

Per block, as in "Quantization Variation" (TMLR 2024): what enters qkv, q, k, v, the attention's output and what enters
fc1 signed; probabilities unsigned; GELU output unsigned with a learned offset. Swin normalizes before each part of a
block, SwinV2 after it: there the residual stream itself enters qkv, fc1 and the patch merging. SwinV2's q and k are
quantized once they have length 1. Relative position biases, their MLP and the logit scale stay float.

The image and the inputs of the patch mergings are sites too. The paper's weights have 8 bits in the mergings:

    rules: [{match: "patch_embed.*", n_bits: 8}, {match: "*.downsample.reduction.*", n_bits: 8}, {match: "head*", n_bits: 8}]
"""

import math

import torch
from timm.layers import Mlp
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn

from dsquant.errors import ConfigError
from dsquant.models.attention import AttentionSites, insert_attention, insert_mlp, split_heads
from dsquant.models.sites import Sites

MAX_LOGIT_SCALE = math.log(1.0 / 0.01)  # SwinV2, section 3.2: the temperature is at least 0.01
NO_LENGTH = 1e-5  # sums of codes that cancel leave about this much in float32; the step of such sums is far above it
MAX_POSITION_BIAS = 16  # of timm's SwinV2: 16 * sigmoid keeps continuous position biases in range


class QuantWindowAttention(AttentionSites, v1.WindowAttention):
    """Attend in windows with quantized q, k, probabilities and v; parameters and names are those of timm's class."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention's output (windows * B, N, C); `mask` (windows, N, N) is added to the scores."""
        if self.is_float():
            return super().forward(x, mask)
        q, k, v = split_heads(self.qkv(x), self.num_heads, len(x))
        x = self.attend(q, k, v, self.scale, bias=self._get_rel_pos_bias(), mask=_for_all_heads(mask))
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class QuantWindowAttentionV2(AttentionSites, v2.WindowAttention):
    """Attend by cosine in windows with quantized unit q and k, probabilities and v; names are those of timm's class.

    scores = (Q_q(q / |q|) * exp(min(logit_scale, ln 100))) Q_k(k / |k|)^T + bias + mask: the learned temperature multiplies
    q after its quantizer, which thereby sees entries in [-1, 1] whatever the temperature. SwinV2 (Liu et al. 2022), eq. 2.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention's output (windows * B, N, C); `mask` (windows, N, N) is added to the scores."""
        if self.is_float(self.qkv.input_quantizer):  # timm's forward passes the module qkv by
            return super().forward(x, mask)
        q, k, v = split_heads(self.qkv(x, self._qkv_bias()), self.num_heads, len(x))
        q, k = _unit(q), _unit(k)
        scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        x = self.attend(q, k, v, scale, bias=self._position_bias(), mask=_for_all_heads(mask))
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _qkv_bias(self) -> Tensor | None:
        """Return the bias that lies beside the fused weight: learned for q and v, zero for k."""
        return None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def _position_bias(self) -> Tensor:
        """Return the continuous relative position bias (heads, N, N)."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return MAX_POSITION_BIAS * table[self.relative_position_index].permute(2, 0, 1).sigmoid()


def _unit(x: Tensor) -> Tensor:
    """Return x / |x| along the last dimension; zero, and no gradient, where |x| is zero up to rounding.

    A token whose quantized input has only codes of 0 makes a key of exactly 0, SwinV2's keys having no bias. Through a
    division by a tiny constant in place of |x|, as in `F.normalize`, its gradient would be that many times too large.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= NO_LENGTH, math.inf)


def _for_all_heads(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(1)


QUANT_CLASSES = {v1.WindowAttention: QuantWindowAttention, v2.WindowAttention: QuantWindowAttentionV2}
MERGINGS = (v1.PatchMerging, v2.PatchMerging)


def insert_sites(model: v1.SwinTransformer | v2.SwinTransformerV2, sites: Sites) -> None:
    """Quantize every site of a Swin in place. Raises ConfigError for a variant whose sites are not known."""
    _check_variant(model)
    if sites.policy.qk_reparam and isinstance(model, v2.SwinTransformerV2):
        raise ConfigError(
            "SwinV2 attends by cosine: no product of q and k weights gives its scores; set quant.qk_reparam: false"
        )
    embed = model.patch_embed
    height, width = embed.img_size
    sites.conv("patch_embed.proj", embed.proj, features=embed.proj.in_channels * height * width)
    for index, layer in enumerate(model.layers):
        name = f"layers.{index}"
        positions = math.prod(layer.output_resolution)
        if isinstance(layer.downsample, MERGINGS):
            merge = layer.downsample.reduction  # its input is a map (B, H, W, C): no per_token scales
            sites.linear(f"{name}.downsample.reduction", merge, features=positions * merge.in_features, tokens=1)
        for number, block in enumerate(layer.blocks):
            inside = f"{name}.blocks.{number}"
            quant_class = QUANT_CLASSES[type(block.attn)]
            tokens, length = _padded_tokens(block), block.window_area
            insert_attention(f"{inside}.attn", block.attn, quant_class, sites, tokens=tokens, length=length)
            insert_mlp(f"{inside}.mlp", block.mlp, positions, sites)
    if isinstance(model.head.fc, nn.Linear):
        sites.linear("head.fc", model.head.fc, features=model.head.fc.in_features)


def _padded_tokens(block: nn.Module) -> int:
    """Return the tokens of an image that the windows of a block cover; windows at the edge are filled with zeros."""
    sides = zip(block.input_resolution, block.window_size, strict=True)
    return math.prod(-(-side // window) * window for side, window in sides)


def _check_variant(model: nn.Module) -> None:
    if not isinstance(model.patch_embed.proj, nn.Conv2d):
        raise ConfigError("patch_embed is not timm's PatchEmbed; the sites of this Swin are not known")
    for index, layer in enumerate(model.layers):
        if not isinstance(layer.downsample, (nn.Identity, *MERGINGS)):
            raise ConfigError(f"layers.{index}.downsample is not timm's PatchMerging; its sites are not known")
        for number, block in enumerate(layer.blocks):
            name = f"layers.{index}.blocks.{number}"
            if type(block.attn) not in QUANT_CLASSES or type(block.mlp) is not Mlp:
                raise ConfigError(f"{name} is not a plain Swin block (timm's); its sites are not known")
            if block.attn.attn_drop.p > 0:
                raise ConfigError("attn_drop_rate must be 0: quantized attention never holds the probabilities to drop")
