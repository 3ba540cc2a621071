"""Quantization sites of timm's VisionTransformer (ViT, DeiT): those of "Quantization Variation", method table of DeiT.

Signed: LayerNorm outputs, q, k, v, attention output. Unsigned: softmax probabilities; GELU output with a learned
offset. Patch embedding and head are sites like any other; the recipe's rules give them 8 bits.
"""

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dsquant.errors import ConfigError
from dsquant.models.sites import Sites
from dsquant.ops.quant_attention import quant_attention
from dsquant.quant.modules import ActivationQuantizer, become


class QuantAttention(Attention):
    """Attend with quantized q, k, probabilities and v; parameters and names are those of timm's Attention."""

    q_quantizer: ActivationQuantizer | None
    k_quantizer: ActivationQuantizer | None
    probs_quantizer: ActivationQuantizer | None
    v_quantizer: ActivationQuantizer | None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ConfigError("quantized attention of a VisionTransformer takes no mask")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = self._observed(q, k, v) if self._is_observed() else self._fused(q, k, v)
        x = x.transpose(1, 2).reshape(batch, tokens, -1)
        return self.proj_drop(self.proj(self.norm(x)))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sites = (self.q_quantizer, self.k_quantizer, self.probs_quantizer, self.v_quantizer)
        args = (None if site is None else site.args(q) for site in sites)
        return quant_attention(q, k, v, self.scale, *args)

    def _observed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Form the probabilities for calibration to see; the fused op never holds them whole."""
        q, k, v = _through(self.q_quantizer, q), _through(self.k_quantizer, k), _through(self.v_quantizer, v)
        probabilities = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return _through(self.probs_quantizer, probabilities) @ v

    def _is_observed(self) -> bool:
        sites = (self.q_quantizer, self.k_quantizer, self.probs_quantizer, self.v_quantizer)
        return any(site is not None and site.observer is not None for site in sites)


def _through(site: ActivationQuantizer | None, x: Tensor) -> Tensor:
    return x if site is None else site(x)


def insert_sites(model: VisionTransformer, sites: Sites) -> None:
    """Quantize every site of a VisionTransformer in place. Raises ConfigError for a variant whose sites are not known."""
    _check_variant(model)
    embed = model.patch_embed
    tokens = embed.num_patches + model.num_prefix_tokens
    height, width = embed.img_size
    sites.conv("patch_embed.proj", embed.proj, features=embed.proj.in_channels * height * width)
    for index, block in enumerate(model.blocks):
        _insert_attention(f"blocks.{index}.attn", block.attn, tokens, sites)
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        sites.linear(f"blocks.{index}.mlp.fc1", fc1, features=tokens * fc1.in_features)
        sites.linear(f"blocks.{index}.mlp.fc2", fc2, features=tokens * fc2.in_features, signed=False, offset=True)
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            sites.linear(name, head, features=head.in_features)


def _insert_attention(name: str, attention: Attention, tokens: int, sites: Sites) -> None:
    heads, features = attention.num_heads, tokens * attention.qkv.in_features
    sites.linear(f"{name}.qkv", attention.qkv, features=features, out_blocks=3, out_heads=heads)
    per_head = {"heads": heads, "heads_first": True, "tokens": tokens}
    quantizers = {
        f"{part}_quantizer": sites.activation(f"{name}.{part}", tokens * attention.proj.in_features, **per_head)
        for part in ("q", "k", "v")
    }
    quantizers["probs_quantizer"] = sites.activation(f"{name}.probs", heads * tokens * tokens, signed=False, **per_head)
    sites.linear(f"{name}.proj", attention.proj, features=tokens * attention.proj.in_features, heads=heads)
    become(attention, QuantAttention, **quantizers)


def _check_variant(model: VisionTransformer) -> None:
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        mlp = getattr(block, "mlp", None)
        plain = type(attention) is Attention and getattr(attention, "gate", None) is None
        if not plain or type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity):
            raise ConfigError(
                f"blocks.{index} is not a plain ViT block (timm Attention and Mlp); its sites are not known"
            )
        if attention.attn_drop.p > 0:
            raise ConfigError("attn_drop_rate must be 0: quantized attention never holds the probabilities to drop")
