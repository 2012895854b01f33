"""evaluate.py, predict.py and queries.py: the route of released weights, the check of annotations, bad input, figures."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from common import reproduce, runs
from common.data.shapes import coco_to_voc
from common.reproduce import stages
from q_detr.building import build_real, build_student, cross_attention_statistics
from q_detr.checkpoint import about, load
from q_detr.distribution_alignment import DistributionAlignment
from q_detr.evaluate import annotations_as_detections, class_ap50, evaluate
from q_detr.held_out import held_out_batch, held_out_set
from q_detr.queries import cross_attention_queries, measure

HERE = Path(__file__).parents[1]
SMALL = {"backbone": "resnet18", "queries": 7, "dim": 16, "ffn": 24, "encoder_layers": 1, "decoder_layers": 1}


def config(*overrides, name="evaluate"):
    with initialize_config_dir(str(HERE / "configs"), version_base="1.3"):
        return compose(name, ["fabric.accelerator=cpu", *overrides])


def run(*overrides):
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    return evaluate(config(*overrides), fabric, grouped=any(o.startswith("data=") for o in overrides))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A small DETR with the keys of the official checkpoints and COCO's 91 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("official") / "small.pth"
    torch.save({"model": build_real("detr", num_classes=91, **SMALL).state_dict()}, path)
    return path


def test_make_evaluates_official_weights_on_a_coco_folder_and_records(
    official, folder, started, tmp_path, monkeypatch, capsys
):
    """The line of the Makefile and the script that it comes to, both in this process."""
    (folder / "annotations/instances_train.json").unlink()  # the training set need not be there
    options = f"data.test=val data.test_side=64 record=true claim=released_detr_r50 record_to={tmp_path / 'records'}"
    make = [
        "make",
        "--just-print",
        "--no-print-directory",  # said where make runs the tests
        "evaluate-q_detr",
        f"PY={sys.executable}",
        f"WEIGHTS={official}",
        f"DATA={folder}",
        f"ARGS={options}",
    ]
    line = subprocess.run(make, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    start, module, *arguments = shlex.split(line)[1:]
    assert (start, module) == ("-m", "common.reproduce")

    def call(command, cwd):
        assert command[0] == sys.executable
        monkeypatch.chdir(cwd)
        return started(Path(command[1]), command[2:])

    monkeypatch.setattr(reproduce, "_call", call)
    monkeypatch.setattr(reproduce.signal, "signal", lambda *_: None)  # those of this process stay
    assert reproduce.main(arguments) == 0
    out = capsys.readouterr().out
    rows = dict(line.split() for line in out.splitlines() if line.startswith(("AP", "AR", "map")))
    assert 8 <= len(rows) <= 12 and {"AP", "AR1", "AR10", "AR100"} <= rows.keys() and 0 <= float(rows["AP"]) < 20
    assert "6 images" in out and "1 boxes without extent" in out
    (file,) = (tmp_path / "records").iterdir()
    record = json.loads(file.read_text())
    assert record["claim"] == "released_detr_r50" and record["n"] == 6 and record["data"] == "coco"
    assert record["value"] == record["metrics"]["AP"] == pytest.approx(float(rows["AP"]), abs=0.005)
    assert file.name.startswith(record["weights_sha256"][:12])


@pytest.mark.parametrize("layout", ["ids", "contiguous", "voc"])
def test_annotations_fed_back_give_100_unless_boxes_leave_their_image(layout, folder, tmp_path, capsys):
    root, options = folder, ["data=coco", "data.test=val", f"data.labels={layout}"]
    if layout == "voc":
        root = coco_to_voc(folder, tmp_path / "voc", "val")
        options = ["data=voc", "data.test=val", "data.voc_test=.", "data.classes=[rectangle,ellipse,triangle]"]
    metrics = run("perfect=true", f"data.root={root}", *options)
    assert metrics["AP"] == pytest.approx(100) and ("map50" in metrics) == (layout != "ids")
    out = capsys.readouterr().out
    assert f"num_classes={91 if layout == 'ids' else 3}" in out and "1 boxes without extent dropped" in out
    if layout != "voc":
        path = folder / "annotations/instances_val.json"
        coco = json.loads(path.read_text())
        coco["annotations"][0]["bbox"][2] += 500
        path.write_text(json.dumps(coco))
        with pytest.raises(ValueError, match="not 100: boxes reach beyond their image"):
            run("perfect=true", f"data.root={root}", *options)


def test_ap50_of_every_class_knows_gaps_and_crowds(folder):
    held_out = held_out_set({"name": "coco", "seed": 0, "root": str(folder), "test": "val", "labels": "ids"})
    found = annotations_as_detections(held_out)
    names = ["rectangle", "ellipse", "triangle"]
    assert class_ap50(held_out, found, "ignore") == dict.fromkeys(names, 1.0)  # the crowd region is not missed
    first = held_out.infos[0]["id"]
    crowd = {"boxes": torch.tensor([[1.0, 1, 11, 11]]), "labels": torch.tensor([3]), "scores": torch.tensor([2.0])}
    gap = {"boxes": torch.tensor([[1.0, 1, 11, 11]]), "labels": torch.tensor([50]), "scores": torch.tensor([2.0])}
    found[first] = {k: torch.cat([v, crowd[k], gap[k]]) for k, v in found[first].items()}
    assert class_ap50(held_out, found, "ignore") == dict.fromkeys(names, 1.0)
    without = {i: {k: v[p["labels"] != 7] for k, v in p.items()} for i, p in found.items()}
    assert class_ap50(held_out, without, "ignore") == {"rectangle": 1.0, "ellipse": 0.0, "triangle": 1.0}


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ([], ValueError, "either weights=<checkpoint> or perfect=true"),
        (["perfect=true"], ValueError, "perfect=true needs a data set: data=coco"),
        (["perfect=true", "data=coco"], ValueError, "data.root is not set"),
        (["perfect=true", "data=voc", "data.root={root}"], FileNotFoundError, "no folder .*VOC2007"),
        (["weights={root}/none.pth", "data.root={root}"], FileNotFoundError, "none.pth"),
        (["weights={weights}"], ValueError, "data.root is not set"),
        (["weights={weights}", "data.root={root}"], FileNotFoundError, "instances_val2017.json"),
        (
            ["weights={weights}", "data.root={root}", "data.test=val", "+data.labels=contiguous"], ValueError,
            "91 classes, coco .* needs 3",
        ),
        (["weights={weights}", "claim=released_detr"], ValueError, "claim=released_detr, allowed: .*released_detr_r50"),
    ],
)  # fmt: skip
def test_errors_of_evaluate_are_clear(overrides, error, message, official, folder):
    with pytest.raises(error, match=message):
        run(*(o.format(root=folder, weights=official) for o in overrides))


def test_a_corrupt_image_is_named(official, folder):
    held_out = held_out_set({"name": "coco", "seed": 0, "root": str(folder), "test": "val", "labels": "ids"})
    file = folder / "val" / held_out.infos[1]["file_name"]
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"cannot decode image .*{file.name}"):
        run(f"weights={official}", f"data.root={folder}", "data.test=val", "data.test_side=64")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{name: file} of an untrained tiny teacher and its 2-bit students with and without DA, as train.py saves them."""
    root, cfg = tmp_path_factory.mktemp("checkpoints"), config("data.test=6", "model.kind=detr", name="config")
    torch.manual_seed(0)
    real = build_real(**cfg.model, num_classes=3)
    images, mask = torch.randn(4, 3, 48, 48), torch.zeros(4, 48, 48, dtype=torch.bool)
    quant = OmegaConf.to_container(cfg.method.quant, resolve=True)
    common = {k: OmegaConf.to_container(cfg[k]) for k in ("data", "model")} | {"seed": 0}
    files = {}
    for name, da in (("teacher", None), ("baseline", "none"), ("drd", "co_attn")):
        own = {**quant, "da": da or "none"}
        model = real if da is None else build_student(real, images, mask, quant=own)
        for m in model.modules():
            if isinstance(m, DistributionAlignment):
                torch.nn.init.constant_(m.gamma, 2.0)
                torch.nn.init.constant_(m.beta, 0.5)
        known = about(held_out_set({**common["data"], "seed": 0}), loss="softmax", side=None)
        files[name] = root / f"{name}.ckpt"
        torch.save(
            {
                "model": model.state_dict(),
                "about": known,
                "config": {**common, "method": {"quantised": da is not None, "quant": own}},
            },
            files[name],
        )
    return files


def test_the_figures_show_the_queries_as_they_enter_the_quantiser(checkpoints, tmp_path):
    chosen = [f"checkpoints.{n}={checkpoints.get(n, 'null')}" for n in ("teacher", "baseline", "da", "drd")]
    cfg = config(*chosen, "images=6", "shown=2", name="queries")
    found = measure(cfg, tmp_path)
    assert {k.split("_", 2)[2] for k in found if k.startswith("query_mean")} == {
        f"{n}_{i}" for n in checkpoints for i in (1, 2)
    }
    for i in (1, 2):  # gamma 2 and beta 0.5 after unit variance
        assert found[f"query_variance_drd_{i}"] == pytest.approx(4, rel=0.01)
        assert found[f"query_mean_drd_{i}"] == pytest.approx(0.5, abs=1e-3)
    network, trained, _ = load(checkpoints["drd"])
    held_out = held_out_set({"seed": 0, **trained["data"]})
    images, mask, _ = held_out_batch(held_out, range(6), torch.device("cpu"), None)
    same = cross_attention_statistics(network, images, mask)
    assert same["query_entropy"] == pytest.approx(sum(found[f"query_entropy_drd_{i}"] for i in (1, 2)) / 2)
    for _, before in cross_attention_queries(network, images, mask)[0]:
        assert before is not None
        variance, mean = torch.var_mean(before, dim=-1, correction=1)
        assert float(mean.abs().max()) < 1e-4 and float((variance - 1).abs().max()) < 0.05
    assert all(
        before is None for _, before in cross_attention_queries(load(checkpoints["baseline"]).model, images, mask)[0]
    )
    rows = list(csv.DictReader((tmp_path / "queries.csv").open()))
    for name in checkpoints:
        own = [r for r in rows if r["checkpoint"] == name and r["layer"] == "2"]
        width = float(own[1]["q"]) - float(own[0]["q"])
        assert sum(float(r["density"]) for r in own) * width == pytest.approx(1, abs=1e-3)
    for name in ("queries.png", "matches.png"):
        with Image.open(tmp_path / name) as figure:
            assert min(figure.size) > 200


@pytest.mark.parametrize("scale", ["real_bccd", "gpu_scenes", "gpu_bccd", "paper"])
def test_sweeps_start_from_what_earlier_stages_write(scale):
    """The last cell of every sweep composes; weights under runs/ are those of a stage that it names."""
    written = {}

    def any_bits(path):
        return re.sub(r"bits-\d", "bits-*", str(Path(path)))

    for file in stages(HERE, scale):
        script = file.stem.split("_")[1]
        name = "config" if script == "train" else script
        sweep = [f"+reproduce/{scale}={file.stem}", *([] if scale == "gpu_scenes" else ["data.root=/datasets"])]
        params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
        swept = [OverridesParser.create().parse_override(f"{k}={v}") for k, v in params.items()]
        last = [
            f"{o.key_or_group}={list(o.sweep_string_iterator())[-1]}" if o.is_sweep_override() else o.input_line
            for o in swept
        ]
        with initialize_config_dir(str(HERE / "configs"), version_base="1.3"):
            cfg = compose(name, [*sweep, *last], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
        folder = any_bits(Path(cfg.run_root) / cfg.scale / cfg.hydra.sweep.subdir)
        assert folder not in written.values(), file.stem
        read = [] if script != "train" else [cfg.start.weights, cfg.teacher.weights]
        for path in (p for p in read if p and p.startswith("runs/")):
            assert any_bits(Path(path).parent) in [written[stage] for stage in cfg.after], (file.stem, path)
        written[file.stem] = folder
        if script == "train" and cfg.method.quantised and cfg.teacher.weights is None:
            teacher = f"{cfg.run_root}/{cfg.scale}/teacher/seed{cfg.teacher.seed}"
            assert teacher in [written[stage] for stage in cfg.after], file.stem
