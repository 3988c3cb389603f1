"""The distillation loss is 0 where the two agree, is torch's KL divergence, and keeps its scale at any temperature."""

import pytest
import torch
import torch.nn.functional as F

from bigmodel_course.compression.distillation import distillation_loss, feature_loss, soft_loss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(seed, scale=3.0, rows=32):
    return scale * torch.randn(rows, 10, generator=generator(seed), dtype=torch.float64)


LABELS = torch.randint(10, (32,), generator=generator(9))


@pytest.mark.verifies(
    "compression.distillation.distillation_loss",
    "compression.distillation.soft_loss",
    kind="parity",
    against="T*T*F.kl_div(log_target=True, batchmean)*soft + (1-soft)*F.cross_entropy",
    on="value and gradient, 4 temperatures and 4 mixes, float64",
    bound=1e-13,
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("soft", [0.0, 0.3, 0.9, 1.0])
def test_equals_torchs_kl_divergence(temperature, soft, seen):
    ours, theirs = logits(0).requires_grad_(), logits(0).requires_grad_()
    teacher, t = logits(1), temperature
    loss = distillation_loss(ours, teacher, LABELS, temperature=t, soft=soft)
    kl = F.kl_div(F.log_softmax(theirs / t, 1), F.log_softmax(teacher / t, 1), log_target=True, reduction="batchmean")
    want = t * t * kl * soft + (1 - soft) * F.cross_entropy(theirs, LABELS)
    loss.backward()
    want.backward()
    seen((loss - want).abs().item())
    seen((ours.grad - theirs.grad).abs().max().item())


@pytest.mark.verifies(
    "compression.distillation.soft_loss",
    kind="invariant",
    against="0 with gradient 0 where student = teacher, above 0 elsewhere",
    on="random logits, and a shift of every score that changes no probability",
    bound=1e-12,
)
def test_is_zero_when_the_student_says_what_the_teacher_says(seen):
    student = (logits(0) + 7.0).requires_grad_()
    loss = soft_loss(student, logits(0), temperature=3.0)
    loss.backward()
    seen(loss.abs().item())
    seen(student.grad.abs().max().item())
    assert soft_loss(student, logits(1), temperature=3.0) > 0.01


@pytest.mark.verifies(
    "compression.distillation.soft_loss",
    kind="invariant",
    against="the gradient of matched logits, (z_s - z_t) / (N B), z less its mean (Hinton et al., eq. 4)",
    on="T = 16 to 4096: relative gap times T / 16",
    bound=0.2,
)
def test_the_gradient_keeps_its_scale_and_tends_to_the_difference_of_the_logits(seen):
    teacher, sizes, gaps = logits(1, scale=1.0), [], []
    for temperature in (1, 4, 16, 64, 256, 1024, 4096):
        student = logits(0, scale=1.0).requires_grad_()
        soft_loss(student, teacher, temperature=temperature).backward()
        limit = student.detach() - teacher
        limit = (limit - limit.mean(1, keepdim=True)) / limit.numel()
        sizes.append(student.grad.norm().item())
        gaps.append(((student.grad - limit).norm() / limit.norm()).item())
        if temperature >= 16:
            seen(gaps[-1] * temperature / 16)
    assert max(sizes) / min(sizes) < 1.6, "without T**2 it would fall by 16 million"
    assert gaps == sorted(gaps, reverse=True)


def test_the_teacher_gets_no_gradient_and_extreme_scores_stay_finite():
    student = torch.tensor([[0.0, 2000.0]], requires_grad=True)
    teacher = torch.tensor([[2000.0, 0.0]], requires_grad=True)
    loss = distillation_loss(student, teacher, torch.tensor([0]), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert teacher.grad is None


@pytest.mark.verifies(
    "compression.distillation.feature_loss",
    kind="parity",
    against="F.mse_loss of the projected features",
    on="value and gradients of student and projection, float64",
    bound=0.0,
)
def test_features_are_compared_after_the_projection(seen):
    student, teacher = logits(0).requires_grad_(), torch.randn(32, 6, dtype=torch.float64, generator=generator())
    weight = torch.randn(6, 10, dtype=torch.float64, generator=generator(1)).requires_grad_()
    loss = feature_loss(student, teacher, projection=lambda x: x @ weight.T)
    want = F.mse_loss(student @ weight.T, teacher)
    seen((loss - want).abs().item())
    ours, theirs = torch.autograd.grad(loss, (student, weight)), torch.autograd.grad(want, (student, weight))
    seen(max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)))
    assert feature_loss(teacher, teacher) == 0


WRONG = [
    (lambda: soft_loss(logits(0), logits(1)[:, :9], temperature=1.0), r"got \[32, 10\] and \[32, 9\]"),
    (lambda: soft_loss(logits(0), logits(1), temperature=0.0), "temperature must be above 0, got 0.0"),
    (lambda: soft_loss(logits(0), logits(1), temperature=float("nan")), "temperature must be above 0"),
    (lambda: soft_loss(logits(0)[:0], logits(1)[:0], temperature=1.0), r"\[0, 10\]"),
    (lambda: distillation_loss(logits(0), logits(1), LABELS, temperature=1.0, soft=1.5), "soft must be between 0"),
    (lambda: distillation_loss(logits(0), logits(1), logits(1), temperature=1.0), "targets must be class numbers"),
    (lambda: distillation_loss(logits(0), logits(1), LABELS[:5], temperature=1.0), r"of shape \[32\], got .* \[5\]"),
    (lambda: feature_loss(logits(0), logits(0)[:, :4]), "give a projection"),
]


@pytest.mark.verifies(
    "compression.distillation.distillation_loss",
    "compression.distillation.feature_loss",
    kind="message",
    against="ValueError that names the argument and what came",
    on="8 wrong calls of the module",
)
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
