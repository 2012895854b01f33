"""Two processes are one training, a killed run goes on as if nothing had happened, an image of crowds alone does no harm."""

import json
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from common import runs
from common.data.detection import coco_detection
from common.data.shapes import shape_scenes
from common.testing import process
from q_detr.building import build_real
from q_detr.data import Prepared
from q_detr.detr import pad_images
from q_detr.distribution_rectification import drd_loss
from q_detr.set_prediction import SetCriterion
from q_detr.train import fit

PAPER = Path(__file__).parents[1]
SMALL = ["data.train=16", "data.test=8", "evaluate.statistics_images=8", "train.batch_size=8", "threads=1"]

# Trains each configuration of the second argument on the ranks of torchrun. With plain gradient descent, because AdamW divides
# rounding errors by their own size.
RANKS = """
import json, sys
import torch
from hydra import compose, initialize_config_dir
from common import runs
from q_detr import train

paper, arms = sys.argv[1], json.loads(sys.argv[2])
torch.optim.AdamW = torch.optim.SGD
save = runs.Run.save_checkpoint
def keep(self, state, *args):
    torch.save(dict(state["model"]), self.dir / f"rank{self.fabric.global_rank}.pt")
    save(self, state, *args)
runs.Run.save_checkpoint = keep
fabric = None
for out, overrides in arms.items():
    with initialize_config_dir(f"{paper}/configs", version_base="1.3"):
        cfg = compose("config", overrides)
    cfg.arm = "two"
    fabric = fabric or runs.launch(cfg.fabric)
    train.fit(cfg, fabric, train.Path(out))
"""


def config(*overrides):
    with initialize_config_dir(str(PAPER / "configs"), version_base="1.3"):
        cfg = compose("config", list(overrides))
    cfg.arm = "two"
    return cfg


def test_two_ranks_are_one_process_at_the_same_global_batch(ranks, tmp_path, monkeypatch):
    """With the focal loss every term is a sum over the global number of targets. The weighted mean of DETR's cross-entropy, the
    mean of L_DRD and LSQ's gradient scale 1 / sqrt(n qp) belong to a device's share of the batch, as in the published codes."""
    base = [*SMALL, "scale=mini", f"run_root={tmp_path}", "fabric.accelerator=cpu", "model.kind=smca", "train.epochs=2"]
    base += ["optim.lr=0.05", "optim.backbone_lr=0.05", "optim.quant_lr=0.0", "schedule.kind=step"]
    student = [
        *base,
        "method=da",
        "method.start=teacher",
        "method.quant.bits=4",
        f"teacher.weights={tmp_path / 'one/last.ckpt'}",
    ]
    arms = {"one": [*base, "method=teacher", "optim.lr=0.05", "train.epochs=2"], "student": student}
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    for name, overrides in arms.items():
        cfg = config(*overrides)
        fit(cfg, runs.launch(cfg.fabric), tmp_path / name)
    (tmp_path / "ranks.py").write_text(RANKS)
    two = {str(tmp_path / f"two_{name}"): overrides for name, overrides in arms.items()}
    done = ranks(tmp_path / "ranks.py", [str(PAPER), json.dumps(two)])
    assert done.returncode == 0, done.stderr
    assert "global batch 8 = 2 devices" in done.stdout
    for name in arms:
        found = [torch.load(tmp_path / f"two_{name}/rank{r}.pt", weights_only=True) for r in (0, 1)]
        assert all(torch.equal(v, found[1][k]) for k, v in found[0].items()), name
        expected = runs.load_checkpoint(tmp_path / name / "last.ckpt")["model"]
        for key, value in expected.items():
            torch.testing.assert_close(found[0][key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        rows = [runs.read_json(tmp_path / f"{n}{name}/result.json")["metrics"] for n in ("", "two_")]
        assert rows[1] == pytest.approx(rows[0], rel=1e-2, abs=1e-3), rows
    steps = [k for k in expected if k.endswith(".step")]
    assert len(steps) > 40 and all(bool(expected[k.replace(".step", ".calibrated")]) for k in steps)


def test_a_killed_student_goes_on_to_the_numbers_of_an_uninterrupted_one(started, tmp_path, monkeypatch, capsys):
    base = [*SMALL, f"run_root={tmp_path}", "scale=mini", "fabric.accelerator=cpu", "data.train=32"]
    cfg = config(*base, "method=teacher", "train.epochs=1")
    fit(cfg, runs.launch(cfg.fabric), tmp_path / "teacher")
    overrides = [*base, "method.start=teacher", "train.epochs=8", f"teacher.weights={tmp_path / 'teacher/last.ckpt'}"]
    cfg = config(*overrides, "method=drd")
    fit(cfg, runs.launch(cfg.fabric), tmp_path / "whole")
    overrides += [f"hydra.run.dir={tmp_path / 'cut'}"]
    begun = process(PAPER / "train.py", overrides, tmp_path)
    checkpoint, deadline = tmp_path / "cut/last.ckpt", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    begun.kill()
    begun.join()
    reached = runs.load_checkpoint(checkpoint)["epoch"]
    assert reached < 8 and runs.read_json(tmp_path / "cut/result.json")["status"] == "running"
    monkeypatch.chdir(PAPER)
    capsys.readouterr()
    assert started(Path("train.py"), overrides) == 0 and f"epochs {reached + 1}..8" in capsys.readouterr().out
    cut, whole = (runs.read_json(tmp_path / n / "result.json")["metrics"] for n in ("cut", "whole"))
    assert cut == whole
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("cut", "whole"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_an_image_of_crowds_alone_trains_as_background(tmp_path):
    scenes = shape_scenes(2, seed=0, sizes=(48,), empty=0.0)
    path = scenes.write_coco(tmp_path, "train")
    coco = json.loads(path.read_text())
    first = coco["images"][0]["id"]
    for a in coco["annotations"]:
        a["iscrowd"] = int(a["image_id"] == first)
    path.write_text(json.dumps(coco))
    crowds = sum(a["iscrowd"] for a in coco["annotations"])
    data = coco_detection(tmp_path, "train", labels="contiguous")
    index = [i["id"] for i in data.infos].index(first)
    assert crowds > 0 and int(data[index][1]["iscrowd"].sum()) == crowds
    image, target = Prepared(data)[index]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    torch.manual_seed(0)
    options = {
        "backbone": "tiny",
        "queries": 5,
        "dim": 16,
        "heads": 2,
        "ffn": 24,
        "encoder_layers": 1,
        "decoder_layers": 2,
    }
    for kind, loss in (("detr", "softmax"), ("smca", "focal")):
        network = build_real(kind, num_classes=3, dropout=0.0, **options)
        images, mask = pad_images([image])
        out = network(images, mask)
        terms, log = SetCriterion(3, loss=loss)(out, [target])
        assert terms["bbox"] == terms["giou"] == 0 and terms["ce"] > 0 and log["class_error"] == 0
        value, pairs = drd_loss(out, network.eval()(images, mask), [target["boxes"]])
        assert value == 0 and pairs["pairs"] == 0
        (sum(terms.values()) + value).backward()
        gradients = [p.grad for p in network.class_embed.parameters()]
        assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
        assert all(p.grad is None or not p.grad.any() for p in network.bbox_embed.parameters())
