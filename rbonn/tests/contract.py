"""How ci/test_loop.py trains this paper."""

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from common import runs
from rbonn.tests.layouts import config as short
from rbonn.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "KEYS", "RELOADED", "TEACHER", "config", "fit", "rates"]

TEACHER = ["method=drelu_fixed", "teacher.arm=real", "init.arm=activations"]


@lru_cache(maxsize=1)
def stages():
    """A folder of runs with a teacher and a first stage of two epochs."""
    root = Path(tempfile.mkdtemp(prefix="rbonn_stages_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    for arm in ("real", "activations"):
        fit(short("data.train=96", f"method={arm}", f"arm={arm}"), fabric, root / "default" / arm / "seed0")
    return root


def config(*overrides):
    more = [f"run_root={stages()}"] if any(o.endswith((".arm=real", ".arm=activations")) for o in overrides) else []
    return short("data.train=96", *more, *overrides)


def rates(cfg, step, steps):
    """Linear over the epochs, from the full rate; u at a tenth."""
    lr = cfg.optim.lr * (1 - (step // steps) / cfg.train.epochs)
    return [0.1 * lr, lr, lr]


ACCUMULATES = ["method=drelu_fixed"]
CLIPS = "not here: the published recipes do not clip (detect.py does, see test_detection.py)"
RELOADED = ["method.const=0.5", "optim.lr=0.05"]

FAST = ["optim.lr=0.05"]  # signs must flip within an epoch for small differences to show
KEYS = {
    "weights": ("xnor", ["method.recurrent=none"]), "activations": ("real", FAST), "recurrent": ("all", FAST),
    "lam": (0.1, FAST), "tau": (0.2, FAST), "u_init": (0.9, FAST), "const": (0.5, FAST),
}  # fmt: skip
