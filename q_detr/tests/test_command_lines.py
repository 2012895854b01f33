"""Wrong command lines of many kinds: each ends in one clear line, and leaves nothing behind."""

from pathlib import Path

import pytest

PAPER = Path(__file__).resolve().parents[1]
WRONG = [
    ("train", ["optim.lr=abc"], "optim.lr=abc must be a finite number"),
    ("train", ["optim.quant_lr=-1"], "optim.quant_lr=-1, allowed: >= 0"),
    ("train", ["train.epochs=ten"], "train.epochs=ten must be a whole number"),
    ("train", ["train.clip_norm=0"], "train.clip_norm=0, allowed: > 0"),
    ("train", ["train.save_every=0"], "train.save_every=0, allowed: >= 1"),
    ("train", ["train.accumulation=3"], "multiple of"),
    ("train", ["seed=null"], "seed"),
    ("train", ["force=maybe"], "force=maybe must be true or false"),
    ("train", ["method=qdetr"], "method=qdetr, allowed: baseline"),
    ("train", ["method.quant.bits=33"], "bits=33, allowed: 2 to 8"),
    ("train", ["method.quant.parts=[head]"], "parts=['head'], allowed: backbone"),
    ("train", ["+method.quant.bit=3"], "bit"),
    ("train", ["method.drd.tau=1.5"], "tau=1.5: must lie in 0..1"),
    ("train", ["method.drd.weight=-1"], "method.drd.weight=-1 must be >= 0"),
    ("train", ["method.drd.partner=same"], "partner='same', allowed: boxes, index"),
    ("train", ["method.drd.lambda_for_layers=0"], "lambda_for_layers=0"),
    ("train", ["method.start=stage2"], "method.start='stage2', allowed: teacher, stage1"),
    ("train", ["method.start=weights"], "needs start.weights="),
    ("train", ["method.da_init=two"], "method.da_init='two', allowed: ones, calibrated"),
    ("train", ["method.percentile=3.0"], "method.percentile=3.0, allowed"),
    ("train", ["method=teacher", "method.drd.weight=1.0"], "has no teacher to learn from"),
    ("train", ["teacher.weights=/none.ckpt"], "no checkpoint at /none.ckpt (teacher.weights)"),
    ("train", ["+teacher.model.dim=32", "method.start=random"], "the teacher 32 and 2"),
    ("train", ["model.kind=yolo"], "model.kind='yolo', allowed: detr, smca"),
    ("train", ["model.dim=50"], "dim=50"),
    (
        "train",
        ["model=detr_r50", "method=teacher", "model.weights=IMAGENET9"],
        "model.weights=IMAGENET9 is no file and no weights",
    ),
    ("train", ["schedule.kind=cosine"], "kind='cosine'"),
    ("train", ["data.augment=mosaic"], "augment='mosaic', allowed: plain, detr"),
    ("train", ["data.root=/somewhere"], "scenes are generated, no folder is read"),
    ("train", ["data=coco"], "data.root is not set"),
    ("train", ["data=coco", "data.root=/nowhere"], "no folder /nowhere"),
    ("train", ["data.test_side=0"], "data.test_side=0, allowed"),
    ("train", ["evaluate.batch_size=0"], "evaluate.batch_size=0, allowed: >= 1"),
    ("train", ["evaluate.statistics_images=0"], "evaluate.statistics_images=0"),
    ("train", ["evaluate.difficult=maybe"], "evaluate.difficult='maybe', allowed: ignore, count"),
    ("train", ["scale=mini"], "no teacher at runs/mini/teacher/seed0/last.ckpt: train it first"),
    ("train", ["scale=../x"], "scale=../x must stay below run_root"),
    ("train", ["fabric.precision=16-mixed"], "16-mixed needs a GPU"),
    ("evaluate", [], "give either weights=<checkpoint> or perfect=true"),
    ("evaluate", ["weights=/none.pth"], "no checkpoint at /none.pth"),
    ("evaluate", ["weights=/none.pth", "claim=best"], "claim=best, allowed"),
    ("evaluate", ["perfect=true"], "perfect=true needs a data set"),
    ("predict", ["weights=/none.pth"], "no value given for images"),
    ("predict", ["weights=/none.pth", "images=a.jpg", "threshold=3"], "threshold=3"),
    ("predict", ["weights=/none.pth", "images=a.jpg", "top=0"], "top=0, allowed"),
    ("export", ["weights=/none.pth", "out=model.pt"], "out=model.pt must end in .onnx"),
    ("bench", ["side=[8,8]"], "side=[8, 8]"),
    ("queries", [], "no checkpoint at"),
    ("counts", ["seed=x"], "seed=x must be a whole number"),
]


@pytest.mark.parametrize(("script", "overrides", "message"), WRONG, ids=lambda v: str(v)[:60])
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(script, overrides, message, refused):
    assert message in refused(PAPER, script, overrides)
