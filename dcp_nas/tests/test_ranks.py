"""Two ranks with half of every batch each equal one process with all of it: every rule, the whole algorithm, the script."""

import itertools
import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import runs
from dcp_nas import search
from dcp_nas.child_parent import ChildParentSearch
from dcp_nas.operations import Bits
from dcp_nas.ranks import BatchStatistics, average_gradients, over_ranks
from dcp_nas.supernet import Supernet
from dcp_nas.tangent_propagation import child_gradient, flatten, parent_tangent
from dcp_nas.tests.layouts import search_config

RULES = [
    {"hessian": "exact"}, {"hessian": "ggn"}, {"hessian": "ggn", "product": "double_vjp"}, {"hessian": "ggn_rank1"},
    {"hessian": "ggn", "distance": "l1"}, {"hessian": "exact", "distance": "cosine"},
]  # fmt: skip


def supernet(**bits):
    """With real-valued activations: a channel of signs that is constant is zero up to rounding after its norm, and rounding would
    decide the next sign."""
    shape = {"num_classes": 4, "in_channels": 1, "channels": 2, "cells": 2, "nodes": 1, "reductions": [1]}
    return Supernet(**shape, bits=Bits(**bits, affine=False))


def batch(seed, rank=0, world=1):
    """The rank's share of a batch whose halves differ in their mean and spread."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 1, 4, 4, generator=g)
    images[4:] = 2 * images[4:] + 1
    labels, part = torch.randint(0, 4, (8,), generator=g), slice(8 * rank // world, 8 * (rank + 1) // world)
    return images[part], labels[part]


def by_rule(rank, world):
    """{rule: every number of a step on alpha} on the rank's share."""
    torch.manual_seed(0)
    parent, child = supernet(), supernet(weights="beta")
    alphas = [torch.randn(2, 8).requires_grad_() for _ in range(2)]
    images, labels = batch(1, rank, world)
    target = parent(images, tuple(alphas)).softmax(1).detach()
    found = {}
    for rule, reduction in [*itertools.product(RULES, ("mean",)), *itertools.product(RULES[:2], ("sum",))]:
        t = parent_tangent(parent(images, tuple(alphas)), labels, alphas, reduction=reduction)
        step = child_gradient(
            lambda a: child(images, tuple(a)), alphas, target, t, lam=1.0, reduction=reduction, **rule
        )
        found |= {f"{rule} {reduction} {name}": value for name, value in step.items()}
        found[f"{reduction} t"] = t
    return found


def by_algorithm(rank, world):
    """alpha, weights and what was logged after a Parent round, a Child round and half of the next."""
    torch.manual_seed(0)
    decoupled = {"eta": 0.1, "psi": 0.2, "psi_lr_mult": 0.1, "tau": 0.6, "granularity": "operation"}
    s = ChildParentSearch(
        supernet(), supernet(weights="beta"), generator=torch.Generator().manual_seed(0), rounds=2,
        steps=2, lam=1.0, w={"lr": 0.05, "lr_min": 0.01, "momentum": 0.9, "weight_decay": 3e-4, "clip": 0.5},
        alpha={"lr": 3e-3, "betas": (0.5, 0.999), "weight_decay": 1e-3}, decoupled=decoupled,
    )  # fmt: skip
    for phase in range(3):
        s.begin(phase)
        for k in range(2):
            row = s.step(phase, batch(10 * phase + k, rank, world), batch(100 + 10 * phase + k, rank, world))
        s.end(phase)
    tensors = {f"{n} {k}": v for n, net in s.nets.items() for k, v in net.state_dict().items()}
    tensors |= {name: flatten([a.detach() for a in arch.alphas]) for name, arch in s.arch.items()}
    return tensors | {"gradient norm": row["gradient norm"]}


def both(rank, world):
    torch.set_default_dtype(torch.float64)
    try:
        return by_rule(rank, world) | by_algorithm(rank, world)
    finally:
        torch.set_default_dtype(torch.float32)


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(both(rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    one = both(0, 1)
    mp.start_processes(one_rank, args=(tmp_path,), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert len(one) > 8 * 4
    for name, value in one.items():
        for found in ranks:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# The real-valued network: in float32 a sign or a kink at zero is decided by rounding, and Adam makes a step of any gradient.
OPTIONS = ["method=parent", "search.rounds=2", "search.batch_size=20", "fabric.accelerator=cpu"]


def torchrun(rank, folder, port):
    os.environ |= {
        "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    cfg = search_config(*OPTIONS)
    search.fit(cfg, runs.launch({"accelerator": "cpu", "devices": cfg.fabric.devices}), folder)
    dist.destroy_process_group()


def test_the_script_finds_on_two_ranks_what_it_finds_on_one(tmp_path, fabric):
    search.fit(search_config(*OPTIONS), fabric, tmp_path / "one")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(torchrun, args=(tmp_path / "two", port), nprocs=2, start_method="fork")
    one, two = (runs.load_checkpoint(tmp_path / name / "last.ckpt")["algorithm"]["arch"] for name in ("one", "two"))
    torch.testing.assert_close(one["parent"]["alphas"], two["parent"]["alphas"], rtol=1e-3, atol=1e-4)
    cells = [json.loads((tmp_path / name / "genotype.json").read_text()) for name in ("one", "two")]
    assert cells[0]["normal"] == cells[1]["normal"] and cells[0]["reduce"] == cells[1]["reduce"]
    rows = [runs.read_json(tmp_path / name / "result.json")["metrics"] for name in ("one", "two")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-2, abs=1e-3)


def test_in_one_process_nothing_is_exchanged():
    x = torch.randn(3)
    assert over_ranks(x) is x and over_ranks(x, "sum") is x
    leaf = torch.ones(2, requires_grad=True)
    leaf.grad = torch.tensor([1.0, 2.0])
    average_gradients([leaf, torch.ones(1, requires_grad=True)])
    assert leaf.grad.tolist() == [1.0, 2.0]
    images = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(BatchStatistics(3, eps=1e-3)(images), torch.nn.BatchNorm2d(3, eps=1e-3)(images).detach())


@pytest.mark.parametrize("overrides", [["method=cp_nas"], ["model.order=control"], ["search.batch_size=21"]])
def test_what_several_devices_cannot_do_is_said(overrides, fabric):
    class Two:
        world_size = 2

    with pytest.raises(ValueError, match=r"run on one device|must be a multiple of the 2 devices"):
        search.check(search_config(*overrides), Two())  # type: ignore[arg-type]
