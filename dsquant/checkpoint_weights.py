"""An earlier stage as the source of a partitioned model: each rank reads its own slices (`models.weights.Weights`)."""

import torch
from torch import Tensor, nn

from dsquant.checkpoint import Checkpoint, Images, insert_images
from dsquant.models.weights import skeleton, slice_bounds


class CheckpointWeights:
    """Give each rank its part of a checkpoint's latents or, of what is quantized in a model to serve, of its images."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._images: Images | None = None

    @classmethod
    def to_serve(cls, checkpoint: Checkpoint, device: torch.device) -> tuple[nn.Module, "CheckpointWeights"]:
        """Return a skeleton of the model a stage ends with, its sites bound, and the weights to fill it with."""
        model, weights = skeleton(checkpoint.config.model), cls(checkpoint)
        weights._images = insert_images(model, checkpoint, device)
        return model, weights

    def part(self, name: str, numel: int, part: int) -> Tensor:
        start, length = slice_bounds(numel, part)
        if not length:
            return torch.empty(0)
        site = self._images.sites.get(name) if self._images else None
        if site is None:
            return self.checkpoint.read("weight", name, start, length)
        whole = self.checkpoint.read("weight", name, 0, numel).view(self.checkpoint.manifest["shapes"][name])
        self._images.write(site, whole)  # one weight at a time: groups may cross slices
        return whole.view(-1)[start : start + length]

    def buffers(self) -> dict[str, Tensor]:
        return self.checkpoint.buffers
