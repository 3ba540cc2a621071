"""Losses of a stage: labels, and an earlier stage's probabilities."""

import torch.nn.functional as F
from torch import Tensor

from dsquant.config import DistillConfig


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `-T^2 * mean_batch sum_c softmax(teacher / T) * log_softmax(logits / T)` in float32.

    Both are (B, C). The factor T^2 keeps the gradient's size as T grows. Source: Hinton et al. 2015, section 2;
    "Quantization Variation" (TMLR 2024) uses T = 1.
    """
    teacher = (teacher_logits.float() / temperature).softmax(dim=-1)
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    return -(teacher * log_probs).sum(dim=-1).mean() * temperature**2


def stage_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, distill: DistillConfig | None, smoothing: float
) -> Tensor:
    """Return the loss of a training step: cross-entropy to labels, or the distillation mixture where there is a teacher."""
    if distill is None or teacher_logits is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    loss = distill.soft * soft_cross_entropy(logits, teacher_logits, distill.temperature)
    if distill.hard:
        loss = loss + distill.hard * F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    return loss
