"""Losses of a stage: labels, and an earlier stage's probabilities and hidden states."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.config import DistillConfig
from dsquant.errors import ConfigError


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `-T^2 * mean_batch sum_c softmax(teacher / T) * log_softmax(logits / T)` in float32.

    Both are (B, C). The factor T^2 keeps the gradient's size as T grows. Source: Hinton et al. 2015, section 2;
    "Quantization Variation" (TMLR 2024) uses T = 1.
    """
    teacher = (teacher_logits.float() / temperature).softmax(dim=-1)
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    return -(teacher * log_probs).sum(dim=-1).mean() * temperature**2


def hidden_loss(hidden: tuple[Tensor, ...], teacher_hidden: tuple[Tensor, ...], real: Tensor) -> Tensor:
    """Return `sum_layers mean_{real tokens, features} (hidden - teacher_hidden)^2` in float32.

    Each is the embedding output and every layer's output, (B, N, C); real is (B, N), 0 at padding, which has no part in the
    means. Source: BiT (2022), the distillation of hidden representations.
    """
    weight = (real / real.sum()).float().unsqueeze(-1)
    total = torch.zeros((), device=real.device)
    for own, taught in zip(hidden, teacher_hidden, strict=True):
        total = total + ((own.float() - taught.float()).square() * weight).sum() / own.shape[-1]
    return total


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy to classes (labels int64), or the squared error to scores (labels float, one logit).

    Raises ConfigError where the labels are of the other kind than the model.
    """
    if labels.is_floating_point() != (logits.shape[-1] == 1):
        kind = "scores" if labels.is_floating_point() else "classes"
        raise ConfigError(f"the shards hold {kind} and the model has {logits.shape[-1]} outputs; see model.num_classes")
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(-1), labels)
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def stage_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, distill: DistillConfig | None, smoothing: float
) -> Tensor:
    """Return the loss of a training step: that of the labels, or the distillation mixture where there is a teacher.

    For scores, the mixture's soft part is the squared distance to the teacher's.
    """
    if distill is None or teacher_logits is None:
        return label_loss(logits, labels, smoothing)
    if labels.is_floating_point():
        loss = distill.soft * F.mse_loss(logits.float(), teacher_logits.float())
    else:
        loss = distill.soft * soft_cross_entropy(logits, teacher_logits, distill.temperature)
    if distill.hard:
        loss = loss + distill.hard * label_loss(logits, labels, smoothing)
    return loss
