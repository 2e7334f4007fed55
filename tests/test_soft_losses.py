"""Losses against a teacher, by hand-written formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.training.losses import cross_entropy, soft_dice
from sparserefine.training.soft_losses import dice_to_soft, soft_cross_entropy, teacher_loss

CLASSES = [2, 3, 19]


def pair(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    student, teacher = 2 * torch.randn(2, 40, k, generator=generator)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", CLASSES)
def test_soft_cross_entropy_by_its_formula(k: int, temperature: float) -> None:
    student, teacher = pair(k)
    loss = soft_cross_entropy(student, teacher, temperature)
    total = 0.0
    for s, t in zip(student.detach().double(), teacher.double(), strict=True):
        q, p = (s / temperature).exp(), (t / temperature).exp()
        q, p = q / q.sum(), p / p.sum()
        total += -float((p * q.log()).sum())
    assert float(loss.detach()) == pytest.approx(temperature**2 * total / 40, rel=1e-5)
    loss.backward()
    # d/ds of T^2 * CE(p, softmax(s / T)) is T * (softmax(s / T) - p).
    p, q = (teacher / temperature).softmax(1), (student.detach() / temperature).softmax(1)
    torch.testing.assert_close(student.grad, temperature * (q - p) / 40, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", CLASSES)
def test_a_certain_teacher_is_a_label(k: int) -> None:
    student, teacher = pair(k)
    truth = teacher.argmax(1)
    certain = 1e4 * F.one_hot(truth, k).float()
    torch.testing.assert_close(soft_cross_entropy(student, certain), cross_entropy(student, truth))
    torch.testing.assert_close(dice_to_soft(student, certain), soft_dice(student, truth))


@pytest.mark.parametrize("loss", [soft_cross_entropy, dice_to_soft])
@pytest.mark.parametrize("k", CLASSES)
def test_the_teacher_itself_is_the_optimum(k: int, loss: object) -> None:
    assert callable(loss)
    student, teacher = pair(k)
    least = loss(teacher, teacher)
    for other in (student.detach(), 2 * teacher, 0.5 * teacher, 100 * teacher):
        assert loss(other, teacher) > least
    if loss is dice_to_soft:
        assert float(least) == pytest.approx(0, abs=1e-6)


def test_dice_of_two_classes_by_hand() -> None:
    p, t = torch.tensor([0.9, 0.2, 0.6]), torch.tensor([0.7, 0.3, 0.6])
    logits, teacher = (torch.stack([(1 - x).log(), x.log()], 1) for x in (p, t))
    overlap = 0.7 + 0.2 + 0.6
    assert float(dice_to_soft(logits, teacher)) == pytest.approx(1 - (2 * overlap + 1) / (1.7 + 1.6 + 1))


def test_the_teachers_loss_is_the_sum() -> None:
    sparse, teacher = pair(4)
    refined = sparse.detach().flip(0)
    ce = soft_cross_entropy(sparse, teacher, 2.0) + soft_cross_entropy(refined, teacher, 2.0)
    torch.testing.assert_close(teacher_loss(sparse, refined, teacher, 2.0), ce)
    dice = dice_to_soft(sparse, teacher) + dice_to_soft(refined, teacher)
    torch.testing.assert_close(teacher_loss(sparse, refined, teacher, 2.0, dice=0.3), ce + 0.3 * dice)


def test_without_sites_the_loss_is_0_and_so_is_its_gradient() -> None:
    sparse = torch.zeros(0, 3, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    loss = teacher_loss(sparse * weight, sparse * weight, torch.zeros(0, 3), 2.0, dice=1.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()
