"""Losses of a stage: labels, an earlier stage's probabilities and hidden states, and stored soft labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.config import SOFT_LABELS, DistillConfig
from dsquant.errors import ConfigError


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `-T^2 * mean_batch sum_c softmax(teacher / T) * log_softmax(logits / T)` in float32.

    Both are (B, C). The factor T^2 keeps the gradient's size as T grows. Source: Hinton et al. 2015, section 2;
    "Quantization Variation" (TMLR 2024) uses T = 1.
    """
    teacher = (teacher_logits.float() / temperature).softmax(dim=-1)
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    return -(teacher * log_probs).sum(dim=-1).mean() * temperature**2


def rest_share(probabilities: Tensor, num_classes: int) -> Tensor:
    """Return what each class that is not stored gets, `r = (1 - sum_k p) / (C - k)`, (B, k) -> (B,).

    0 where all classes are stored, and where the stored probabilities, rounded to float16, sum to more than 1.
    Source: marginal smoothing (FKD, Shen and Xing 2022).
    """
    others = num_classes - probabilities.shape[-1]
    return (1 - probabilities.sum(dim=-1)).clamp_min(0) / others if others else torch.zeros_like(probabilities[..., 0])


def sparse_soft_cross_entropy(
    logits: Tensor, indices: Tensor, probabilities: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return soft cross-entropy to the top-k probabilities of a teacher, without forming the dense (B, C) target.

    With z = log_softmax(logits / T) and r = rest_share: `-T^2 * mean_batch (sum_k (p_k - r) z_k + r sum_c z_c)`, which is
    `-T^2 * mean_batch sum_c p_c z_c` for p_c = p_k where c is stored and r elsewhere. logits (B, C), indices int64 (B, k),
    none twice in a row, probabilities (B, k); computed in float32 or wider.
    Source: "Quantization Variation" (TMLR 2024), multi-crop distillation, with T = 1; labels as in FKD.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = (logits.to(wide) / temperature).log_softmax(dim=-1)
    probabilities = probabilities.to(wide)
    rest = rest_share(probabilities, logits.shape[-1])
    stored = ((probabilities - rest[:, None]) * log_probs.gather(-1, indices)).sum(dim=-1)
    return -(stored + rest * log_probs.sum(dim=-1)).mean() * temperature**2


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


def block_loss(outputs: tuple[Tensor, ...], teacher_outputs: tuple[Tensor, ...]) -> Tensor:
    """Return `sum_blocks mean_samples |output - teacher_output|^2 / |teacher_output|^2` in float32.

    Both are the outputs of the same blocks, of any shape (B, ...); norms are over a sample, so that the mean does not depend on
    how ranks share a batch. Relative, since the residual stream of an image model grows with depth, unlike the normalized one
    of BERT that `hidden_loss` is for.
    """
    total = torch.zeros((), device=outputs[0].device)
    for own, taught in zip(outputs, teacher_outputs, strict=True):
        own, taught = own.flatten(1).float(), taught.flatten(1).float()
        total = total + ((own - taught).square().sum(1) / taught.square().sum(1)).mean()
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
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, distill: DistillConfig | None, smoothing: float,
    soft_labels: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """Return the loss of a training step: that of the labels, or the distillation mixture where there is a teacher.

    For scores, the mixture's soft part is the squared distance to the teacher's. soft_labels: (indices, probabilities) of
    a batch that has them; they teach where `distill.teacher` names them.
    """
    if distill is None or (teacher_logits is None and distill.teacher != SOFT_LABELS):
        return label_loss(logits, labels, smoothing)
    if distill.teacher == SOFT_LABELS:
        loss = distill.soft * sparse_soft_cross_entropy(logits, *soft_labels, distill.temperature)
    elif labels.is_floating_point():
        loss = distill.soft * F.mse_loss(logits.float(), teacher_logits.float())
    else:
        loss = distill.soft * soft_cross_entropy(logits, teacher_logits, distill.temperature)
    if distill.hard:
        loss = loss + distill.hard * label_loss(logits, labels, smoothing)
    return loss
