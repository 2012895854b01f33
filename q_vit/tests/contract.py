"""How ci/test_loop.py trains this paper."""

import atexit
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path

from common import runs
from q_vit.tests.conftest import config as short
from q_vit.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "KEYS", "RELOADED", "TEACHER", "config", "fit", "rates"]


@cache
def teacher():
    """A float teacher of the small network, trained once for all tests."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    fit(short("method=fp", "arm=fp"), runs.launch({"accelerator": "cpu", "devices": 1}), root)
    return root / "last.ckpt"


def config(*overrides):
    given = [] if any(o.startswith("method=fp") for o in overrides) else [f"teacher.weights={teacher()}"]
    return short("train.epochs=2", *given, *overrides)


def rates(cfg, step, steps):
    """One cycle for both groups, with and without decay: a tenth of all steps up from 1/25, then down to 0, by half cosines."""
    total = steps * cfg.train.epochs
    rise = cfg.schedule.warmup * total
    up, down = step / rise, (step - rise) / (total - rise)
    if step < rise:
        return [cfg.optim.lr * (1 / 25 + 24 / 25 * 0.5 * (1 - math.cos(math.pi * up)))] * 2
    return [cfg.optim.lr * 0.5 * (1 + math.cos(math.pi * down))] * 2


# The released rule counts the images of a micro-batch in the gradient of a step: there a part is no share of the whole.
ACCUMULATES = ["method.quant.grad_scale=per_group"]
CLIPS = "not here: neither the paper's recipe nor the released command clips; the norm is computed for the finite check"
TEACHER = ["method=both"]
RELOADED = ["method.quant.edge_bits=4", "method.quant.gelu_clip=0.01"]

PAPER_FORM = ["method.quant.irm_form=paper"]
KEYS = {
    "bits": 3, "irm": False, "irm_init": "unit", "start": "random", "distill": "none", "percentile": 99.0,
    "dgd.weight": 0.5, "dgd.reduction": "mean", "dgd.norm": "row", "dgd.student_tap": "post_quant", "dgd.tokens": "patches",
    "dgd.teacher_normalise": True,
    "quant.preset": "deployable", "quant.edge_bits": 4, "quant.parts": "mlp", "quant.gelu_clip": 0.01,
    "quant.irm_form": "paper", "quant.irm_stats": ("head", PAPER_FORM), "quant.symmetric": True, "quant.init": "per_group",
    "quant.weight_init": "official", "quant.zp_init": "zero", "quant.grad_scale": "none",
}  # fmt: skip
