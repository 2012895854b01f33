"""The distribution loss: its other formulations, its gradient, its minimum."""

import pytest
import torch

from rbonn.distillation import distribution_loss


def logits(seed, shape=(5, 7)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_the_sum_over_classes_and_the_mean_over_images():
    s, t = logits(0), logits(1)
    expected = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(distribution_loss(s, t), expected)


def test_gradient_is_the_difference_of_probabilities_over_the_batch():
    s, t = logits(0).requires_grad_(), logits(1)
    distribution_loss(s, t).backward()
    torch.testing.assert_close(s.grad, (s.detach().softmax(1) - t.softmax(1)) / 5)


def test_minimum_is_the_entropy_of_the_teacher():
    t = logits(1)
    entropy = -(t.softmax(1) * t.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(distribution_loss(t, t), entropy)
    assert distribution_loss(logits(2), t) > entropy


def test_a_teacher_with_other_classes_or_with_gradients_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 7\).*\(5, 6\).*same classes"):
        distribution_loss(logits(0), logits(1, (5, 6)))
    with pytest.raises(ValueError, match="require a gradient"):
        distribution_loss(logits(0), logits(1).requires_grad_())
