"""Wrong command lines of many kinds: each ends in one clear line, and leaves nothing behind."""

from pathlib import Path

import pytest

PAPER = Path(__file__).resolve().parents[1]
SURF = ["data=casia_surf", "data.root=/nowhere", "data.size=24"]
WRONG = [
    ("train", ["optim.lr=abc"], "optim.lr=abc must be a finite number"),
    ("train", ["optim.backbone_lr=-1e-5"], "optim.backbone_lr=-1e-05, allowed: >= 0"),
    ("train", ["optim.clip=-1"], "optim.clip=-1, allowed: >= 0"),
    ("train", ["optim.warmup=1"], "optim.warmup=1"),
    ("train", ["optim.schedule=linear"], "schedule='linear'"),
    ("train", ["train.epochs=ten"], "train.epochs=ten must be a whole number"),
    ("train", ["train.save_every=0"], "train.save_every=0, allowed: >= 1"),
    ("train", ["train.accumulation=3"], "multiple of"),
    ("train", ["seed=-1"], "seed=-1, allowed"),
    ("train", ["force=maybe"], "force=maybe must be true or false"),
    ("train", ["method=fmvitt"], "method=fmvitt, allowed: all_paths"),
    ("train", ["methd=fmvit"], "there is no key methd; did you mean method?"),
    ("train", ["method.options.cmtb.shar=0.1"], "did you mean method.options.cmtb.share?"),
    ("train", ["method.options.cmtb.share=0"], "share=0"),
    ("train", ["method.options.cmtb.mma=both"], "mma='both'"),
    ("train", ["method.options.cmtb.mfa=1"], "mfa=1 must be true or false"),
    ("train", ["method.options.after=[3]"], "cmtb after blocks [3]"),
    ("train", ["method.loss.paths=[]"], "method.loss.paths=[]"),
    ("train", ["method.loss.weights.single=-1"], "method.loss.weights={'single': -1}"),
    ("train", ["+method.loss.cmfl=0.5"], "cmfl"),
    ("train", ["method=cmfl", "method.modalities=[rgb]"], "cmfl joins two modalities"),
    ("train", ["method.modalities=[thermal]"], "thermal is not in the data"),
    ("train", ["evaluate.threshold=best"], "threshold='best', allowed: eer"),
    ("train", ["evaluate.batch_size=0"], "evaluate.batch_size=0, allowed"),
    ("train", ["data.root=/somewhere"], "these faces are generated"),
    ("train", ["data.size=28"], "images are (28, 28), the network was made for (24, 24)"),
    ("train", ["model.vit.patch_size=5"], "no multiple of patches of 5 x 5"),
    ("train", ["data=casia_surf", "data.size=24"], "data.root is not set"),
    ("train", SURF, "no folder /nowhere"),
    ("train", [*SURF, "data.live_label=2"], "data.live_label=2"),
    ("train", [*SURF, "data.lists.validation=null"], "no list for validation"),
    ("train", [*SURF, "data.subject='CLKJ'"], "has no group"),
    ("train", [*SURF, "data.format=frames"], "data.format='frames'"),
    ("train", [*SURF, "data.workers=-1"], "data.workers=-1, allowed"),
    ("train", ["run_root=null"], "run_root=null must be a text"),
    ("train", ["fabric.precision=16-mixed"], "16-mixed needs a GPU"),
    ("evaluate", [], "no value given for weights"),
    ("evaluate", ["weights=/none.ckpt"], "no checkpoint at /none.ckpt"),
    ("evaluate", ["weights=/none.ckpt", "level=clip"], "level='clip'"),
    ("evaluate", ["weights=/none.ckpt", "claim=best"], "claim=best, allowed"),
    ("predict", ["weights=/none.ckpt"], "no value given for images"),
    ("predict", ["weights=/none.ckpt", "images=a", "missing=ask"], "missing='ask', allowed: skip, use"),
    ("predict", ["weights=/none.ckpt", "images=a", "folders.rgb=b"], "there is no key folders.rgb"),
    ("export", ["weights=/none.ckpt", "modalities=rgb"], "no checkpoint at /none.ckpt"),
    ("aggregate", ["runs=[/none]"], "no run in /none"),
    ("bench", ["rounds=many"], "rounds=many must be a whole number"),
    ("counts", ["seed=x"], "seed=x must be a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "overrides", "message"), WRONG, ids=lambda v: str(v)[:60])
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(script, overrides, message, refused):
    assert message in refused(PAPER, script, overrides)
