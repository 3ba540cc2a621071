"""Quantize weights that lie whole in memory, by the very code that quantizes shards: for analysis, checks and calibration."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dsquant.quant.state import SCALE_FLOOR
from dsquant.shard.fragments import Fragment
from dsquant.shard.weight_quantizers import ShardedWeight, moment_scales, mse_scales
from dsquant.spec import WeightSite


def weight_images(model: nn.Module, sites: Iterable[WeightSite]) -> dict[str, Tensor]:
    """Return w_hat of each quantized weight of a model, as `images_of` finds it."""
    return images_of((site, site.of(model.get_parameter(site.name))) for site in sites)


@torch.no_grad()
def images_of(pairs: Iterable[tuple[WeightSite, Tensor]]) -> dict[str, Tensor]:
    """Return w_hat of each weight, with the scales that training would start from: learned ones of least squared error.

    A method whose scale is a statistic (StatsQ, BWN) takes its statistic. All in float32, in the shape of the site.
    """
    weights = {site.name: _whole(site, weight) for site, weight in pairs}
    learned = [weight for weight in weights.values() if weight.learned]
    if learned:
        for weight, scale in zip(learned, mse_scales(learned, _alone, _alone, SCALE_FLOOR), strict=True):
            weight.replicated_scale.copy_(scale)
    images = {}
    for name, weight in weights.items():
        if not weight.learned:
            scale, mean = moment_scales(weight, weight.moment_sums().cpu(), "statistic")
            weight.replicated_scale.copy_(scale.clamp(min=SCALE_FLOOR))
            if weight.replicated_centre is not None:
                weight.replicated_centre.copy_(mean)
        image, scales = torch.empty(weight.site.numel, device=weight.device), weight.scales()
        for tile in weight.tiles:
            latent = tile.of(weight.fragment.values)
            tile.of(image).copy_(weight.image_tile(tile, latent, scales[tile.groups].unsqueeze(1))[1])
        images[name] = image.view(weight.site.shape)
    return images


def _whole(site: WeightSite, weight: Tensor) -> ShardedWeight:
    """View a whole weight as the only shard of it."""
    flat = weight.detach().float().reshape(-1)
    fragment = Fragment(site.name, flat, 0, site.numel, 0, site.shape)
    scale = torch.zeros(site.grouping.n_groups)
    centre = torch.zeros_like(scale) if site.spec.has_centre else None
    return ShardedWeight(site, scale, fragment, centre)


def _alone(values: Tensor) -> Tensor:
    """Reduce over one rank."""
    return values
