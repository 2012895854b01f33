"""Exact products in float32, and codes that are made again when they must be."""

import copy

import pytest
import torch
from torch import nn

from common.quant.integer import LARGEST, centred_codes, exact_linear, reach, scaled, weight_codes
from common.tests.test_integer_onnx import quantizer


@pytest.mark.parametrize("largest", [255 * 128, 255 * 127 // 2, 1023 * 512])
def test_no_part_of_a_sum_can_pass_two_to_the_24(largest, monkeypatch):
    widths, linear = [], torch.nn.functional.linear

    def watched(x, w):
        widths.append(x.shape[-1])
        return linear(x, w)

    monkeypatch.setattr("common.quant.integer.F.linear", watched)
    exact_linear(torch.ones(2, 1100), torch.ones(3, 1100), largest)
    assert sum(widths) == 1100 and max(widths) * largest <= LARGEST


@pytest.mark.parametrize(
    ("largest", "parts"), [(128 * 128, 1), (255 * 128, 2), (1023 * 512, 32), (2**13 * 2**12, None)]
)
def test_sums_beyond_two_to_the_24_are_exact_and_rounded_once(largest, parts):
    a_max = 2 ** (largest.bit_length() // 2)
    g, terms = torch.Generator().manual_seed(0), 1000
    x = torch.randint(a_max // 2, a_max, (2, 3, terms), generator=g)  # of one sign, so that sums are large
    w = torch.randint(0, largest // a_max + 1, (4, terms), generator=g) | 1
    assert parts is None or -(-terms // (LARGEST // largest)) == parts
    exact = x @ w.T  # int64
    assert largest < 2**15 or int(exact.max()) > LARGEST
    torch.testing.assert_close(exact_linear(x.float(), w.float(), largest), exact.float(), rtol=0, atol=0)
    heads = w.expand(2, 4, terms).float()
    torch.testing.assert_close(exact_linear(x.float(), heads, largest), exact.float(), rtol=0, atol=0)


def test_reach_counts_the_zero_point():
    assert reach(quantizer(8)) == 128 and reach(quantizer(8, zero=100)) == 228
    assert (
        reach(quantizer(4, signed=False)) == 15
        and reach(quantizer(4, signed=False, step=(1, 1), zero=(0, 20), axis=1)) == 20
    )


def layer():
    made = nn.Linear(6, 3)
    return made, quantizer(4, step=(0.1, 0.2, 0.3), axis=0, kind="weight")


def step_of_an_optimizer(m, q):
    m.weight.grad = torch.ones_like(m.weight)
    torch.optim.SGD(m.parameters(), lr=1.0).step()


def another_parameter(m, q):
    m.weight = nn.Parameter(m.weight.detach().clone() + 1)


def in_place(m, q):
    with torch.no_grad():
        m.weight.add_(1)


@pytest.mark.parametrize(
    "change",
    [
        step_of_an_optimizer, another_parameter, in_place,
        lambda m, q: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        lambda m, q: q.load_state_dict(q.state_dict() | {"step": torch.ones(3)}),
        lambda m, q: nn.ModuleList([m, q]).half().float(),
        lambda m, q: nn.ModuleList([m, q])._apply(lambda t: t.data.mul_(2) if t.is_floating_point() else t),  # no version
    ],
)  # fmt: skip
def test_codes_of_a_weight_are_kept_until_something_changes(change):
    m, q = layer()
    first = weight_codes(m, q, m.weight)
    assert weight_codes(m, q, m.weight) is first
    change(m, q)
    found = weight_codes(m, q, m.weight)
    assert found is not first
    torch.testing.assert_close(found, centred_codes(q, m.weight.detach()), rtol=0, atol=0)
    assert weight_codes(m, q, m.weight) is found


def test_a_copy_has_codes_of_its_own_and_inference_mode_keeps_none_that_autograd_could_not_use():
    m, q = layer()
    with torch.inference_mode():
        first = weight_codes(m, q, m.weight)
    assert not first.is_inference()
    other = copy.deepcopy(m)
    in_place(other, q)
    assert not torch.equal(weight_codes(other, q, other.weight), first) and weight_codes(m, q, m.weight) is first
    with torch.inference_mode():
        made = nn.Linear(6, 3)
        one = weight_codes(made, q, made.weight)
        made.weight.add_(1)  # such a weight has no version
        assert not torch.equal(weight_codes(made, q, made.weight), one)


def test_a_step_that_moves_changes_the_codes_of_activations():
    q, x = quantizer(8), torch.linspace(-2, 2, 9)
    before = centred_codes(q, x)
    with torch.no_grad():
        q.step.mul_(2)
        q.zero_point.fill_(3)
    torch.testing.assert_close(centred_codes(q, x), (x / 0.5).round())
    assert not torch.equal(before, centred_codes(q, x)) and reach(q) == 131


def test_scaling_leaves_what_a_gradient_needs():
    scale = torch.tensor([2.0], requires_grad=True)
    y = torch.ones(3)
    scaled(y, scale, torch.ones(3)).sum().backward()
    assert scale.grad.item() == 3 and y.tolist() == [1, 1, 1]
    with torch.no_grad():
        assert scaled(y, scale, torch.ones(3)).tolist() == [3, 3, 3] and y.tolist() == [3, 3, 3]
