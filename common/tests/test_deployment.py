"""What is timed beside a network on bits."""

import copy

import torch
from torch import nn

from common.metrics import deployment
from common.metrics.timing import Timing
from common.quant.packed_conv import PackedConv2d


def test_without_its_packed_layers_a_network_and_its_copies_compute_the_rest(monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layers = [PackedConv2d.of(torch.where(torch.rand_like(conv.weight) < 0.5, -1.0, 1.0), conv) for _ in range(2)]
    network, x = nn.Sequential(layers[0], nn.PReLU(), layers[1]), torch.randn(1, 8, 5, 5)
    expected = network(x)
    answers = deployment._Answers(network)
    seen = []
    inner = PackedConv2d._in_numba, PackedConv2d.twin
    monkeypatch.setattr(PackedConv2d, "_in_numba", lambda *a: seen.append(1) or inner[0](*a))
    monkeypatch.setattr(PackedConv2d, "twin", lambda *a: seen.append(1) or inner[1](*a))
    for other in (network, copy.deepcopy(network)):
        found: list = []
        answers.replay(lambda other=other, found=found: found.append(other(x)))
        seen.clear()
        answers.replay(lambda other=other, found=found: found.append(other(x).add_(1)))
        answers.replay(lambda other=other, found=found: found.append(other(x)))
        assert not seen, "a packed layer computes in the rest"
        assert torch.equal(found[0], expected) and torch.equal(found[2], expected)
        assert torch.equal(other(x), expected) and seen


def test_the_limit_is_that_of_the_form_that_wins(monkeypatch, tmp_path):
    ms = {"packed": 9.0, "packed compiled": 6.0, "fp32 eager": 20.0, "bf16 compiled": 12.0, "whole": 8.0, "rest": 4.0}

    def timed(calls, **_):
        return {name: Timing(ms[name], ms[name], ms[name], 3) for name in calls}

    class Forms(deployment.Forms):
        def __init__(self):
            self.skipped, self.answers, self.replayed = {}, self, []

        def calls(self, images, *, threads):
            return {name: name for name in ms if name not in ("whole", "rest")}

        def layers(self, x):
            return []

        def replay(self, call):
            self.replayed.append(call)

    monkeypatch.setattr(deployment, "interleaved", timed)
    table, forms = deployment.Bench(tmp_path / "b.json"), Forms()
    deployment.time_network(table, "net", forms, torch.zeros(1, 3, 4, 4), batches=[1], threads=[1], rounds=3)
    (row,) = table.rows
    assert (row["ours"], row["ours_is"], row["baseline_is"], row["ratio"]) == (
        6.0,
        "packed compiled",
        "bf16 compiled",
        2.0,
    )
    assert (row["rest"], row["limit"]) == (3.0, 4.0) and forms.replayed == ["packed compiled"]
