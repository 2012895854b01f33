"""The contract of every train loop, tested on all ten by the same tests. `<paper>/tests/contract.py` says how to run a short
training of that paper, and gives a second, plain formulation of its schedule:

    config(*overrides) -> DictConfig      the configuration of a training of seconds: two epochs, at least two steps in each,
                                          train.save_every=1, arm=test
    fit(cfg, fabric, out)                 the train loop
    rates(cfg, step, steps) -> [floats]   learning rate of every parameter group at a step counted from 0; steps: of an epoch
    KEYS = {"loss.hard": 0.5, ...}        for every key of the node `method` another value, one that must change the training;
                                          or (value, overrides) where that needs more overrides; or a reason (a text that begins
                                          with "not ") why it changes no weight
    FRESH = [overrides]                   optional: under which a training begins with weights of its own draw
    RELOADED = [overrides]                optional: values of options that the shapes of the weights do not tell
    reloaded(model) -> module             optional: what is called in evaluation, around what checkpoint.load gives
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

from common import loop, runs
from common.data.batches import Plan
from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[1]

CHOSEN = [p for p in PAPERS if os.environ.get("PAPER", p) == p and (ROOT / p / "tests/contract.py").exists()]
HOOKS = {p: importlib.import_module(f"{p}.tests.contract") for p in CHOSEN}
pytestmark = [pytest.mark.parametrize("paper", CHOSEN), pytest.mark.usefixtures("unpainted")]


@contextmanager
def watched():
    """Records, of everything trained inside: each optimizer step (rates of the groups, gradients of the first one, gradient
    norm), and after the first step each module that ran without gradients, or that learned in evaluation mode. A hook's
    config() may train a teacher: call it before."""
    seen = SimpleNamespace(steps=[], gradients=None, frozen={}, training=[], asleep=[])

    def before_step(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([g.detach().norm() for g in grads]).norm().item()
        if not seen.steps:
            seen.gradients = [g.detach().clone() for g in grads]
        rates = [g["lr"] for g in optimizer.param_groups]
        seen.steps.append(SimpleNamespace(rates=rates, norm=norm, chance=torch.initial_seed()))

    def before_forward(module, *_):
        if not seen.steps:
            return
        own = list(module.parameters(recurse=False))
        if torch.is_grad_enabled():
            if not module.training and any(p.requires_grad for p in own):
                seen.asleep.append(type(module).__name__)
            return
        if module.training:
            seen.training.append(type(module).__name__)
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
    return _weights(runs.load_checkpoint(out / "last.ckpt"))


def _weights(state):
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
    assert len({s.chance for s in seen.steps}) >= cfg.train.epochs, "dropout and its kin draw anew in every epoch"


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
    rates = [[step.rates for step in seen.steps] for seen in found]
    assert rates[0] == rates[1], "a step per global batch, whatever its micro-batches, and a rate per step"
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


def test_what_learns_is_in_training_mode_and_what_only_runs_in_evaluation_mode(paper, fabric, tmp_path):
    """What only runs: teachers during training, and the network during evaluation."""
    hook = HOOKS[paper]
    overrides = [] if isinstance(hook.TEACHER, str) else hook.TEACHER
    cfg = hook.config(*overrides)
    with watched() as seen:
        hook.fit(cfg, fabric, tmp_path)
    assert not seen.training and not seen.asleep


def test_the_teacher_is_frozen_and_unchanged(paper, fabric, tmp_path):
    hook = HOOKS[paper]
    cfg = hook.config(*overrides_of(hook.TEACHER))
    with watched() as seen:
        hook.fit(cfg, fabric, tmp_path)
    assert seen.frozen, "no frozen network was used while training"
    for module, before in seen.frozen.values():
        torch.testing.assert_close([p.detach() for p in module.parameters(recurse=False)], before, rtol=0, atol=0)


class _Begun(Exception):
    """The first step is about to be made, and enough is known."""


def begun(hook, seed, fabric, out, monkeypatch):
    """What a training has when it makes its first step: its weights, the seeds of its batches, and the images of the first one,
    all batches being those of seed 0."""
    seen = SimpleNamespace(start=[], seeds=[], images=None)
    init = Plan.__init__

    def planned(self, *args, **options):
        init(self, *args, **options)
        seen.seeds.append(self.seed)
        self.seed = 0

    def before_step(optimizer, *_):
        seen.start = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        raise _Begun

    def before_forward(module, args):
        if seen.images is None and torch.is_grad_enabled() and module.training:
            seen.images = next(
                (t.clone() for t in _leaves(args) if t.is_floating_point() and t.ndim == 4 and not t.is_meta), None
            )

    cfg = hook.config(f"seed={seed}", *getattr(hook, "FRESH", []))  # may train a teacher
    handles = [
        register_optimizer_step_pre_hook(before_step),
        torch.nn.modules.module.register_module_forward_pre_hook(before_forward),
    ]
    try:
        with monkeypatch.context() as patch, pytest.raises(_Begun):
            patch.setattr(Plan, "__init__", planned)
            hook.fit(cfg, fabric, out)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_the_seed_decides_the_start_the_batches_and_the_embedded_data(paper, fabric, tmp_path, monkeypatch):
    a, b = (begun(HOOKS[paper], seed, fabric, tmp_path / str(seed), monkeypatch) for seed in (0, 1))
    shapes = [[p.shape for p in seen.start] for seen in (a, b)]
    assert shapes[0] == shapes[1], "FRESH must name a network that is the same for every seed"
    assert any(not torch.equal(x, y) for x, y in zip(a.start, b.start, strict=True)), "the weights that it begins with"
    assert all(x != y for x, y in zip(a.seeds, b.seeds, strict=True)), "which images form a batch"
    if paper != "q_vit":  # whose canvases are drawn from the seed of the batches
        assert a.images.shape != b.images.shape or not torch.equal(a.images, b.images), "the images themselves"


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
    ends = zip(weights(tmp_path / "parts"), weights(tmp_path / "whole"), strict=True)
    assert any(not torch.equal(a, b) for a, b in ends), "the first checkpoint must not be the last one"
    hook.fit(cfg, fabric, tmp_path / "parts")
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=0, equal_nan=True)
    whole, parts = (json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("whole", "parts"))
    assert {k: v for k, v in whole.items() if "second" not in k} == {
        k: v for k, v in parts.items() if "second" not in k
    }


def test_a_checkpoint_gives_back_the_network_that_was_evaluated(paper, fabric, tmp_path):
    hook = HOOKS[paper]
    cfg, calls = hook.config("train.epochs=1", *getattr(hook, "RELOADED", [])), {}

    def after_forward(module, args, kwargs, output):
        if not torch.is_grad_enabled() and not module.training and type(module) not in calls:
            calls[type(module)] = args, kwargs, list(_leaves(output))

    def before_step(*_):
        calls.clear()  # a teacher's, or of weights that change once more

    handles = [
        register_optimizer_step_pre_hook(before_step),
        torch.nn.modules.module.register_module_forward_hook(after_forward, with_kwargs=True),
    ]
    try:
        hook.fit(cfg, fabric, tmp_path)
    finally:
        for handle in handles:
            handle.remove()
    model = importlib.import_module(f"{paper}.checkpoint").load(tmp_path / "last.ckpt").model
    model = getattr(hook, "reloaded", lambda m: m)(model)
    model = next(m for m in model.modules() if type(m) in calls)  # of several networks, the first
    args, kwargs, output = calls[type(model)]
    with torch.no_grad():
        again = list(_leaves(model(*args, **kwargs)))
    assert not model.training and len(again) == len(output) > 0
    torch.testing.assert_close(again, output, rtol=1e-5, atol=1e-6)


class _Everything(set):
    def __contains__(self, key):
        return True


def test_every_key_of_the_method_changes_the_training(paper, fabric, tmp_path, monkeypatch):
    hook, saved = HOOKS[paper], {}
    method = runs.flatten(OmegaConf.to_container(hook.config().method, resolve=True))
    assert set(method) == set(hook.KEYS), "KEYS must name every key of configs/method, and no other"

    def observed(name, *overrides):
        out = tmp_path / name
        if hasattr(hook, "observe"):
            return list(hook.observe(hook.config(*overrides), fabric, out))
        cfg = hook.config("train.epochs=1", *overrides)  # may train a teacher, and read it
        with monkeypatch.context() as patch:  # writing and reading every checkpoint would be a third of the time
            patch.setattr(runs.Run, "save_checkpoint", keep)
            hook.fit(cfg, fabric, out)
        return saved["last.ckpt"]

    def keep(run, state, name="last.ckpt"):
        saved[name] = [t.clone() for t in _weights(state)]

    monkeypatch.setattr(loop, "_DONE", _Everything())  # whether a step can be made at all is tested elsewhere
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
