"""Distillation: a student learns from what a teacher says about every class, not only from the right one.

    loss = soft * T**2 * KL(teacher || student, both at temperature T)  +  (1 - soft) * cross entropy with the labels

Divided by T, the scores give softer probabilities, which show what the teacher thinks is similar.  Their gradient
shrinks as 1 / T**2, and the factor T**2 makes up for it: the mix `soft` then means the same at every temperature.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

__all__ = ["distillation_loss", "feature_loss", "soft_loss"]


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T**2 times the mean KL divergence of the student's softened probabilities from the teacher's.

    Logits [B, classes] -> one number, 0 where the two agree; the teacher gets no gradient.  For large T its gradient
    tends to that of half the squared distance of the logits, each row less its mean, over the number of classes
    (Hinton et al. 2015, section 2.1, arXiv 1503.02531).
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2 or not student_logits.numel():
        got = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise ValueError(f"student_logits and teacher_logits must have the same shape [B, classes], got {got}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1).mean()


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, temperature: float, soft: float = 0.9
) -> Tensor:
    """soft * soft_loss + (1 - soft) * cross entropy: logits [B, classes], targets int64 [B] -> one number.

    Run the teacher in eval mode and without gradients (Hinton et al. 2015, section 2, arXiv 1503.02531).
    """
    if not 0 <= soft <= 1:
        raise ValueError(f"soft must be between 0 (labels only) and 1 (teacher only), got {soft}")
    if targets.is_floating_point() or targets.shape != student_logits.shape[:1]:
        want, got = list(student_logits.shape[:1]), f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"targets must be class numbers (int64) of shape {want}, got {got}")
    hard = F.cross_entropy(student_logits, targets)
    return soft * soft_loss(student_logits, teacher_logits, temperature=temperature) + (1 - soft) * hard


def feature_loss(
    student_features: Tensor, teacher_features: Tensor, *, projection: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The mean squared distance of the student's hidden features [B, ...] from the teacher's, which get no gradient.

    Where the two have different widths, `projection` (a linear layer, trained with the student and thrown away) maps
    the student's to the teacher's shape (Romero et al. 2015, FitNets, equation 3, arXiv 1412.6550).
    """
    features = projection(student_features) if projection else student_features
    if features.shape != teacher_features.shape:
        got = f"{list(features.shape)} and {list(teacher_features.shape)}"
        raise ValueError(f"student and teacher features must have the same shape, got {got}: give a projection")
    return F.mse_loss(features, teacher_features.detach())
