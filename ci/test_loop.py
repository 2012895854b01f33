"""The contract of every train loop, tested on all ten by the same tests. `<paper>/tests/contract.py` says how to run a short
training of that paper, and gives a second, plain formulation of its schedule:

    config(*overrides) -> DictConfig      the configuration of a training of seconds: two epochs, at least two steps in each,
                                          train.save_every=1, arm=test
    fit(cfg, fabric, out)                 the train loop
    rates(cfg, step, steps) -> [floats]   learning rate of every parameter group at a step counted from 0; steps: of an epoch
    KEYS = {"loss.hard": 0.5, ...}        for every key of the node `method` another value, one that must change the training;
                                          or (value, overrides) where that needs more overrides; or a reason (a text that begins
                                          with "not ") why it changes no weight
    ACCUMULATES = [overrides]             under which micro-batches must give the gradient of the whole batch; or a reason
    CLIPS = (overrides, norm)             that clip the gradient to that norm; or a reason
    TEACHER = [overrides]                 of an arm with a teacher; or a reason
    observe(cfg, fabric, out) -> tensors  optional: what KEYS are compared by, default the weights after `fit`
"""

import importlib
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import runs
from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[1]

CHOSEN = [p for p in PAPERS if os.environ.get("PAPER", p) == p and (ROOT / p / "tests/contract.py").exists()]
HOOKS = {p: importlib.import_module(f"{p}.tests.contract") for p in CHOSEN}
pytestmark = pytest.mark.parametrize("paper", CHOSEN)


@contextmanager
def watched():
    """Records, of everything trained inside: each optimizer step (rates of the groups, gradients of the first one, gradient
    norm), and after the first step each module that ran without gradients. A hook's config() may train a teacher: call it
    before."""
    seen = SimpleNamespace(steps=[], gradients=None, frozen={}, training=[])

    def before_step(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([g.detach().norm() for g in grads]).norm().item()
        if not seen.steps:
            seen.gradients = [g.detach().clone() for g in grads]
        seen.steps.append(SimpleNamespace(rates=[g["lr"] for g in optimizer.param_groups], norm=norm))

    def before_forward(module, *_):
        if torch.is_grad_enabled() or not seen.steps:
            return
        if module.training:
            seen.training.append(type(module).__name__)
        own = list(module.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            seen.frozen.setdefault(id(module), (module, [p.detach().clone() for p in own]))

    handles = [
        register_optimizer_step_pre_hook(before_step),
        torch.nn.modules.module.register_module_forward_pre_hook(before_forward),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def weights(out):
    state = runs.load_checkpoint(out / "last.ckpt")
    return list(_leaves({k: v for k, v in state.items() if k not in ("optimizer", "run", "config")}))


def _leaves(node):
    if isinstance(node, torch.Tensor):
        yield torch.nan_to_num(node) if node.is_floating_point() else node  # what is not measured yet equals itself
    elif isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _leaves(child)


def overrides_of(value):
    if isinstance(value, str):
        pytest.skip(value)
    return value


def test_the_optimizer_has_the_scheduled_rate_times_each_groups_multiplier(paper, fabric, tmp_path):
    hook = HOOKS[paper]
    cfg = hook.config()
    with watched() as seen:
        hook.fit(cfg, fabric, tmp_path)
    steps = len(seen.steps) // cfg.train.epochs
    assert steps >= 2 and cfg.train.epochs >= 2, "the hook's training is too short to see a schedule"
    expected = [hook.rates(cfg, step, steps) for step in range(len(seen.steps))]
    assert len({tuple(e) for e in expected}) > 1, "the hook's training must have a schedule that moves"
    for step, (found, wanted) in enumerate(zip(seen.steps, expected, strict=True)):
        assert found.rates == pytest.approx(wanted, rel=1e-6, abs=1e-12), f"step {step}"


def test_accumulated_gradients_are_those_of_the_whole_batch(paper, fabric, tmp_path, monkeypatch):
    hook = HOOKS[paper]
    overrides = overrides_of(hook.ACCUMULATES)
    norm = F.batch_norm

    # Statistics of a batch are no sum over its images: with the running ones everything is.
    def running(input, running_mean, running_var, weight=None, bias=None, training=False, *rest, **more):
        return norm(input, running_mean, running_var, weight, bias, running_mean is None, *rest, **more)

    monkeypatch.setattr(F, "batch_norm", running)
    clip = Fabric.clip_gradients

    # A clipped gradient has lost the scale that a forgotten division would give it.
    def unclipped(self, *args, **options):
        return clip(self, *args, **{**options, "max_norm": math.inf})

    monkeypatch.setattr(Fabric, "clip_gradients", unclipped)
    found = []
    for k in (1, 2):
        cfg = hook.config(*overrides, f"train.accumulation={k}", "train.epochs=1")
        with watched() as seen:
            hook.fit(cfg, fabric, tmp_path / str(k))
        found.append(seen)
    assert len(found[0].steps) == len(found[1].steps), "a step per global batch, whatever its micro-batches"
    for a, b in zip(found[0].gradients, found[1].gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + 1e-9)


def test_gradients_are_clipped(paper, fabric, tmp_path):
    hook = HOOKS[paper]
    overrides, norm = overrides_of(hook.CLIPS)
    cfg = hook.config(*overrides, "train.epochs=1")
    with watched() as seen:
        hook.fit(cfg, fabric, tmp_path)
    assert max(s.norm for s in seen.steps) <= norm * (1 + 1e-3)
    assert max(s.norm for s in seen.steps) >= 0.5 * norm, "clipped to it, not away"


def test_whatever_runs_without_gradients_is_in_evaluation_mode(paper, fabric, tmp_path):
    """Teachers during training, and the network during evaluation."""
    hook = HOOKS[paper]
    overrides = [] if isinstance(hook.TEACHER, str) else hook.TEACHER
    cfg = hook.config(*overrides)
    with watched() as seen:
        hook.fit(cfg, fabric, tmp_path)
    assert not seen.training


def test_the_teacher_is_frozen_and_unchanged(paper, fabric, tmp_path):
    hook = HOOKS[paper]
    cfg = hook.config(*overrides_of(hook.TEACHER))
    with watched() as seen:
        hook.fit(cfg, fabric, tmp_path)
    assert seen.frozen, "no frozen network was used while training"
    for module, before in seen.frozen.values():
        torch.testing.assert_close([p.detach() for p in module.parameters(recurse=False)], before, rtol=0, atol=0)


def test_resumed_equals_uninterrupted(paper, fabric, tmp_path, monkeypatch):
    hook = HOOKS[paper]
    cfg = hook.config()
    hook.fit(cfg, fabric, tmp_path / "whole")
    save = runs.Run.save_checkpoint

    def killed(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        hook.fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    hook.fit(cfg, fabric, tmp_path / "parts")
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=0, equal_nan=True)
    whole, parts = (json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("whole", "parts"))
    assert {k: v for k, v in whole.items() if "second" not in k} == {
        k: v for k, v in parts.items() if "second" not in k
    }


def test_every_key_of_the_method_changes_the_training(paper, fabric, tmp_path):
    hook = HOOKS[paper]
    method = runs.flatten(OmegaConf.to_container(hook.config().method, resolve=True))
    assert set(method) == set(hook.KEYS), "KEYS must name every key of configs/method, and no other"

    def observed(name, *overrides):
        out = tmp_path / name
        if hasattr(hook, "observe"):
            return list(hook.observe(hook.config(*overrides), fabric, out))
        hook.fit(hook.config("train.epochs=1", *overrides), fabric, out)
        return weights(out)

    base, silent = {}, []
    for key, value in hook.KEYS.items():
        if isinstance(value, str) and value.startswith("not "):
            continue
        value, more = value if isinstance(value, tuple) else (value, [])
        more = tuple(more)
        if more not in base:
            base[more] = observed(f"base{len(base)}", *more)
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        changed = observed(key, *more, f"method.{key}={text}")
        same = len(changed) == len(base[more]) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(changed, base[more], strict=True)
        )
        silent += [key] * same
    assert not silent, f"nothing reads {', '.join(silent)}"


def test_compile_translates_the_trained_network_only_when_it_is_asked_to(paper, fabric, tmp_path, monkeypatch):
    hook = HOOKS[paper]
    if "compile" not in hook.config():
        pytest.skip(
            "no switch: inner loops on copies of the network, small regressors, or a graph that dynamo does not take"
        )
    translated, trained = [], set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: translated.append(self))
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: trained.update(id(p) for g in optimizer.param_groups for p in g["params"])
    )
    try:
        hook.fit(hook.config(), fabric, tmp_path / "plain")
        assert not translated
        hook.fit(hook.config("compile=true"), fabric, tmp_path / "compiled")
    finally:
        handle.remove()
    (network,) = translated
    assert {id(p) for p in network.parameters()} & trained, "another network was translated"
    for a, b in zip(weights(tmp_path / "plain"), weights(tmp_path / "compiled"), strict=True):
        assert torch.equal(a, b), "names, state and start are those of the plain run"
