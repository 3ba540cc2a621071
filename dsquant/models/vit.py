"""Quantization sites of timm's VisionTransformer (ViT, DeiT): those of "Quantization Variation", method table of DeiT.

Signed: LayerNorm outputs, q, k, v, attention output. Unsigned: softmax probabilities; GELU output with a learned
offset. Patch embedding and head are sites like any other; the recipe's rules give them 8 bits.
"""

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dsquant.errors import ConfigError
from dsquant.models.attention import AttentionSites, insert_attention, insert_mlp, split_heads
from dsquant.models.sites import Sites


class QuantAttention(AttentionSites, Attention):
    """Attend with quantized q, k, probabilities and v; parameters and names are those of timm's Attention."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ConfigError("quantized attention of a VisionTransformer takes no mask")
        batch, tokens, _ = x.shape
        q, k, v = split_heads(self.qkv(x), self.num_heads, batch)
        x = self.attend(self.q_norm(q), self.k_norm(k), v, self.scale)
        x = x.transpose(1, 2).reshape(batch, tokens, -1)
        return self.proj_drop(self.proj(self.norm(x)))


def insert_sites(model: VisionTransformer, sites: Sites) -> None:
    """Quantize every site of a VisionTransformer in place. Raises ConfigError for a variant whose sites are not known."""
    _check_variant(model, sites.policy.qk_reparam)
    embed = model.patch_embed
    tokens = embed.num_patches + model.num_prefix_tokens
    height, width = embed.img_size
    sites.conv("patch_embed.proj", embed.proj, features=embed.proj.in_channels * height * width)
    for index, block in enumerate(model.blocks):
        insert_attention(f"blocks.{index}.attn", block.attn, QuantAttention, sites, tokens=tokens, length=tokens)
        insert_mlp(f"blocks.{index}.mlp", block.mlp, tokens, sites)
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            sites.linear(name, head, features=head.in_features)


def _check_variant(model: VisionTransformer, qk_reparam: bool) -> None:
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        mlp = getattr(block, "mlp", None)
        plain = type(attention) is Attention and getattr(attention, "gate", None) is None
        if not plain or type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity):
            raise ConfigError(
                f"blocks.{index} is not a plain ViT block (timm Attention and Mlp); its sites are not known"
            )
        if qk_reparam and not isinstance(attention.q_norm, nn.Identity):
            raise ConfigError(
                f"blocks.{index} normalizes q and k: no product of their weights gives its scores; set quant.qk_reparam: false"
            )
        if attention.attn_drop.p > 0:
            raise ConfigError("attn_drop_rate must be 0: quantized attention never holds the probabilities to drop")
