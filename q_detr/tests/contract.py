"""How ci/test_loop.py trains this paper."""

import atexit
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir

from common import runs
from q_detr.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "FRESH", "KEYS", "RELOADED", "TEACHER", "config", "fit", "rates"]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHORT = [
    "data.train=16", "data.test=4", "train.batch_size=8", "train.epochs=2", "train.save_every=1", "evaluate.statistics_images=4",
    "fabric.accelerator=cpu", "data.side=32", "optim.backbone_lr=9e-4", "optim.quant_lr=11e-4", "model.kind=detr",
]  # fmt: skip


def short_config(*overrides):
    """The embedded default on 16 scenes, two epochs of two steps, in one stage: a first one would be trained by the way."""
    one_stage = [] if "method=teacher" in overrides else ["method.start=teacher"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", [*SHORT, *one_stage, "arm=test", *overrides])


@cache
def trained(arm, *overrides):
    """last.ckpt of an arm, trained once per process."""
    folder = Path(tempfile.mkdtemp(prefix="q_detr"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fit(short_config(f"method={arm}", *overrides), runs.launch({"accelerator": "cpu", "devices": 1}), folder)
    return folder / "last.ckpt"


def config(*overrides):
    """Q-DETR under a teacher of seed 5."""
    if any(o in overrides for o in ("method=teacher",)):
        return short_config(*overrides)
    return short_config(f"teacher.weights={trained('teacher', 'seed=5', 'train.epochs=1')}", *overrides)


def rates(cfg, step, steps):
    """From 1/25 up to 1 over the first tenth, then half a cosine down to 0; main, backbone and quantisers each times its own."""
    whole, optim = steps * cfg.train.epochs, cfg.optim
    rise = cfg.schedule.warmup * whole
    if step < rise:
        factor = 1 / 25 + 24 / 25 * (0.5 - 0.5 * math.cos(math.pi * step / rise))
    else:
        factor = 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (whole - rise))
    return [rate * factor for rate in (optim.lr, optim.backbone_lr, optim.quant_lr)]


# With the focal loss every term is a sum over the number of targets of the whole batch. The weighted mean of DETR's
# cross-entropy, the mean of L_DRD and LSQ's gradient scale are means over what a device computes at once, as in the published
# codes.
ACCUMULATES = ["method=teacher", "model.kind=smca"]
CLIPS = (["train.clip_norm=0.05"], 0.05)
TEACHER = []
FRESH = ["method=teacher"]  # a student's steps are calibrated on images, which another seed has others of
RELOADED = [
    "method.quant.bits=3",
    "method.quant.attention_bits=4",
    "method.quant.da=both",
    "method.quant.quantizer=lsq",
]

PARTS = "[backbone,encoder,decoder_attention]"
KEYS = {
    "quantised": (False, ["method=baseline", "method.start=random"]), "start": "random", "da_init": "ones",
    "percentile": 99.0,
    "drd.weight": 1.0, "drd.lambda_for_layers": 3, "drd.tau": 0.2, "drd.select": "all", "drd.partner": "index",
    "drd.distance": "cosine", "drd.layers": "last", "drd.feature": "post_proj",
    "drd.one_to_one": (True, ["method.drd.select=all"]),
    "quant.bits": 3, "quant.attention_bits": 4, "quant.quantizer": "lsq", "quant.parts": PARTS, "quant.da": "both",
    "quant.backbone_act": "relu", "quant.slope": 0.25, "quant.stem_bits": 4, "quant.act_granularity": "per_tensor",
    "quant.weight_init": "per_channel", "quant.zp_init": "lsqplus", "quant.quantize_proj_inputs": False,
    "quant.quantize_downsample": "not here: the tiny backbone has no down-sampling convolution; tests/test_quantized.py",
}  # fmt: skip
