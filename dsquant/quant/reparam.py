"""A fused q, k, v layer whose q and k weights are quantized as one, their product a head: OFQ's QKR."""

import torch
from torch import Tensor

from dsquant.ops.qk_product import ProductArgs, qk_linear, qk_product, quantize_product
from dsquant.quant.modules import QuantLinear
from dsquant.spec import WeightSite


class QuantQkv(QuantLinear):
    """Give attention its quantized input, keys through the quantized product of q and k weights, and values.

    `product` is the site of the product (H * C, C); set by `become`, as is `heads`. `boundary_range` holds the gradient of
    entries further than that from a boundary between two codes (CGA); an engine sets it.
    """

    product: WeightSite
    heads: int
    boundary_range: float | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_hat (..., C), keys (..., H * C) and values (..., H * D) of x (..., C).

        A bias behind the quantizer is part of x_hat, which stands on both sides of the product.
        """
        quantizer = self.input_quantizer
        if quantizer is not None:
            x = quantizer.moved(quantizer(quantizer.shifted(x)))
        return x, *self.project(x)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the quantized input."""
        return qk_linear(x, self.weight, self.bias, self.heads, product_args(self.product, self.boundary_range))


def product_args(site: WeightSite, boundary_range: float | None = None) -> ProductArgs:
    """Return how the op quantizes a product site."""
    return ProductArgs(site.grouping.n_groups, site.spec.levels, site.spec.has_centre, boundary_range)


@torch.no_grad()
def encode_product(weight: Tensor, site: WeightSite) -> tuple[Tensor, Tensor]:
    """Return int8 codes (H * C, C) and float32 scales (n_groups,) of the product in a fused q, k, v weight (3 * H * D, C).

    They are those of a forward pass whose parameter is `weight`, dtype included: give the bf16 weight of a bf16 run.
    """
    heads = site.shape[0] // site.shape[1]
    codes, scale, _ = quantize_product(qk_product(weight, heads), product_args(site))
    return codes.to(torch.int8).view(site.shape), scale
