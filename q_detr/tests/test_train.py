"""The script: every config builds, arms train, a run resumes to the same numbers, errors are clear."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common import runs
from common.quant.lsq import LSQQuantizer
from q_detr.building import build_real, parameter_groups
from q_detr.checkpoint import label_names, load
from q_detr.distribution_alignment import DistributionAlignment
from q_detr.quantized_detr import quantize_detr
from q_detr.schedule import lr_factor
from q_detr.train import fit

HERE = Path(__file__).parents[1]
METHODS = sorted(p.stem for p in (HERE / "configs/method").glob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (HERE / "configs/experiment").glob("*.yaml"))
SMALL = ["data.train=32", "data.test=8", "train.epochs=1", "evaluate.statistics_images=8", "train.batch_size=8"]
ONE_STAGE = "method.start=teacher"


def config(tmp_path, *overrides):
    one_stage = [] if "method=teacher" in overrides else [ONE_STAGE]
    with initialize_config_dir(str(HERE / "configs"), version_base="1.3"):
        cfg = compose("config", [*SMALL, *one_stage, f"run_root={tmp_path}", "fabric.accelerator=cpu", *overrides])
    arm = next((o.split("=")[1] for o in overrides if o.startswith("method=")), "drd")
    cfg.arm = arm
    return cfg


def run(cfg, out):
    fit(cfg, runs.launch(cfg.fabric), out)
    return runs.read_json(out / "result.json")["metrics"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run(config(root, "method=teacher"), root / "teacher")
    return root / "teacher/last.ckpt"


@pytest.mark.parametrize("method", METHODS)
def test_every_arm_trains_from_the_teacher_and_is_rebuilt(method, teacher, tmp_path):
    start = [f"teacher.weights={teacher}", "train.epochs=1" if method != "percentile" else "train.epochs=0"]
    metrics = run(config(tmp_path, f"method={method}", *start), tmp_path / "run")
    assert 0 <= metrics["AP"] <= 100
    if method == "teacher":
        return
    assert metrics["held_out_drd"] > 0 and ("last_drd" in metrics) == (
        method in ("fqm", "drd", "imitation", "tau0", "stage1")
    )
    aligned = method in ("da", "drd", "imitation", "tau0")
    assert (metrics["query_spread"] < 0.05) == aligned
    network = load(tmp_path / "run/last.ckpt").model
    state = runs.load_checkpoint(tmp_path / "run/last.ckpt")
    assert all(torch.equal(v, state["model"][k]) for k, v in network.state_dict().items())


def test_full_imitation_distils_every_query_and_tau_zero_fewer(teacher, tmp_path):
    pairs = {}
    for method in ("imitation", "tau0", "drd"):
        cfg = config(tmp_path, f"method={method}", f"teacher.weights={teacher}")
        pairs[method] = run(cfg, tmp_path / method)["last_pairs"]
    assert pairs["imitation"] == 8 > pairs["tau0"] > pairs["drd"] > 0


def test_the_second_stage_starts_from_the_first(teacher, tmp_path):
    run(config(tmp_path, "method=stage1", f"teacher.weights={teacher}"), tmp_path / "one")
    first = load(tmp_path / "one/last.ckpt").model.state_dict()
    start = ["method.start=stage1", f"start.weights={tmp_path / 'one/last.ckpt'}", "train.epochs=0"]
    run(config(tmp_path, f"teacher.weights={teacher}", *start), tmp_path / "two")
    second = load(tmp_path / "two/last.ckpt").model.state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.items()) and len(second) > len(first)


def test_equal_seeds_give_equal_numbers_and_resumed_is_uninterrupted(teacher, tmp_path):
    options = ["method=drd", f"teacher.weights={teacher}", "train.epochs=2", "model.dropout=0.1"]
    whole = run(config(tmp_path, *options), tmp_path / "whole")
    cut = config(tmp_path, *options)

    class Stop(Exception):
        pass

    fabric, save = runs.launch(cut.fabric), runs.Run.save_checkpoint
    try:

        def stop_after_the_first(self, *args, **kwargs):
            save(self, *args, **kwargs)
            raise Stop

        runs.Run.save_checkpoint = stop_after_the_first
        with pytest.raises(Stop):
            fit(cut, fabric, tmp_path / "cut")
    finally:
        runs.Run.save_checkpoint = save
    assert run(cut, tmp_path / "cut") == whole


def test_the_loss_falls_on_one_batch(tmp_path):
    cfg = config(
        tmp_path, "method=teacher", "data.train=8", "train.epochs=60", "train.log_every=60", "train.save_every=60"
    )
    run(cfg, tmp_path / "one")
    rows = [runs.json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    first, last = (sum(r[k] for k in ("ce", "bbox", "giou")) for r in (rows[0], rows[-1]))
    assert last < 0.7 * first


RECIPES = {  # arm, start, classes, epochs, epoch of the drop
    "coco_stage1": ("stage1", "weights", 91, 500, 400),
    "coco_stage2": ("drd", "stage1", 91, 500, 400),
    "coco_finetune50": ("drd", "weights", 91, 50, 40),
    "voc_teacher": ("teacher", "weights", 20, 50, 40),
    "voc_stage1": ("stage1", "weights", 20, 300, 200),
    "voc_stage2": ("drd", "stage1", 20, 300, 200),
    "voc_finetune50": ("drd", "weights", 20, 50, 40),
    "smca_stage1": ("stage1", "weights", 91, 50, 40),
    "smca_stage2": ("drd", "stage1", 91, 50, 40),
    "released": ("drd", "weights", 91, 50, 40),
}


def recipe(name, *overrides):
    with initialize_config_dir(str(HERE / "configs"), version_base="1.3"):
        cfg = compose("config", [f"experiment={name}", *overrides], return_hydra_config=True)
    return cfg, cfg.hydra.runtime.choices.method


def test_every_recipe_composes_and_its_networks_build():
    assert sorted(RECIPES) == EXPERIMENTS
    for name, (arm, start, classes, epochs, drop) in RECIPES.items():
        cfg, choice = recipe(name)
        assert (choice, cfg.method.start, cfg.train.epochs) == (arm, start, epochs), name
        assert cfg.schedule.kind == "step" and cfg.schedule.drop * epochs == pytest.approx(drop, abs=0.1)
        assert (cfg.train.batch_size, cfg.train.clip_norm) == (16, 0.1)
        assert cfg.data.name == ("voc" if classes == 20 else "coco")
        assert cfg.data.labels == ("contiguous" if classes == 20 else "ids")
        assert cfg.start.new_classes == (classes == 20 and start == "weights"), name  # official weights have 91
        with torch.device("meta"):
            model = build_real(**{**cfg.model, "weights": None}, num_classes=classes)
            other = build_real(**{**cfg.model, **cfg.teacher.model, "weights": None}, num_classes=classes)
        assert [g["lr"] for g in parameter_groups(model, **cfg.optim)] == [1e-4, 1e-5]
        if arm == "teacher":
            assert cfg.model.backbone == "resnet101" and not cfg.method.quantised
            continue
        assert len(other.state_dict()) > len(model.state_dict())  # the teacher has a ResNet-101
        method = OmegaConf.to_container(cfg.method, resolve=True)
        assert method["drd"]["weight"] == 2.5 and method["quant"]["bits"] == 4
        student = quantize_detr(model, **method["quant"])
        quantised = [n for n, m in student.named_modules() if isinstance(m, LSQQuantizer)]
        assert any(n.startswith("backbone") for n in quantised)
        assert any(n.startswith("transformer") for n in quantised) == (arm != "stage1")
        assert any("downsample" in n for n in quantised) == (name != "released")


def test_a_recipe_takes_another_arm_and_the_released_one_is_the_released_code():
    cfg, choice = recipe("coco_stage2", "method=baseline")
    assert choice == "baseline" and cfg.method.drd.weight == 0 and cfg.method.quant.da == "none"
    assert (cfg.method.start, cfg.method.quant.bits) == ("stage1", 4)
    quant = OmegaConf.to_container(recipe("released")[0].method, resolve=True)["quant"]
    with torch.device("meta"):
        layer = (
            quantize_detr(build_real("smca", num_classes=1, decoder_layers=1), **quant).transformer["decoder"].layers[0]
        )
    assert isinstance(layer.self_attn.align, DistributionAlignment) and isinstance(
        layer.multihead_attn.align, torch.nn.Identity
    )
    assert isinstance(layer.self_attn.input_q, torch.nn.Identity)
    q = layer.linear1.act_quant
    assert (q.zero_point_form, q.zp_init, q.groups, layer.linear1.weight_quant.init) == (
        "integer",
        "official",
        256,
        "official",
    )


def test_the_learning_rate():
    assert [lr_factor(s, steps=10, drop=0.8) for s in (0, 7, 8)] == [1, 1, 0.1]
    rates = [lr_factor(s, steps=100, kind="onecycle") for s in range(100)]
    assert rates[0] == 1 / 25 and rates[10] == 1 and rates[-1] < 1e-3
    with pytest.raises(ValueError, match="kind='cosine'"):
        lr_factor(0, steps=1, kind="cosine")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["method.quant.bits=1"], ValueError, "bits=1, allowed: 2 to 8"),
        (["method.drd.tau=1.5"], ValueError, "tau=1.5"),
        (["method.start=weights"], ValueError, "needs start.weights="),
        (["method.start=stage2"], ValueError, "method.start='stage2', allowed: teacher, stage1"),
        (
            ["method.start=random", "+teacher.model.dim=32"],
            ValueError,
            "width 48 and 2 decoder layers, the teacher 32 and 2",
        ),
        (["model.kind=yolo"], ValueError, "model.kind='yolo'"),
        (["train.batch_size=64"], ValueError, "fewer than train.batch_size=64"),
        (["schedule.kind=cosine"], ValueError, "kind='cosine'"),
        (["data.augment=mosaic"], ValueError, "augment='mosaic'"),
        (["data=coco", "data.root=nowhere"], FileNotFoundError, "nowhere"),
        (["teacher.weights=missing.ckpt"], FileNotFoundError, "missing.ckpt"),
        (["scale=mini", "teacher.weights=null"], FileNotFoundError, "train it first, python train.py method=teacher"),
    ],
)
def test_errors_are_clear(overrides, error, message, teacher, tmp_path):
    cfg = config(tmp_path, f"teacher.weights={teacher}", *overrides)
    with pytest.raises(error, match=message):
        fit(cfg, runs.launch(cfg.fabric), tmp_path / "bad")


def test_the_scripts_run_from_inside_the_folder(started, tmp_path, monkeypatch, capsys):
    """In this process; test_faults.py starts train.py as one of its own, command_lines.yaml has what is wrong."""
    monkeypatch.chdir(HERE)
    assert started(Path("train.py"), ["method=teacher", *SMALL, f"run_root={tmp_path}", "threads=1"]) == 0
    (weights,) = tmp_path.rglob("last.ckpt")
    assert started(Path("evaluate.py"), [f"weights='{weights}'"]) == 0
    assert "8 images" in capsys.readouterr().out


def test_official_weights_are_recognised_and_know_coco(tmp_path):
    for kind, more in (("detr", {}), ("smca", {"learned_content": True})):
        options = {"backbone": "resnet18", "queries": 7, "dim": 16, "ffn": 24, "encoder_layers": 1, "decoder_layers": 2}
        model = build_real(kind, num_classes=91, **options, **more)
        path = tmp_path / f"{kind}.pth"
        torch.save({"model": model.state_dict()}, path)
        network, config, about = load(path)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in network.state_dict().items())
        assert about["loss"] == {"detr": "softmax", "smca": "focal"}[kind] and config == {}
        names = label_names(about)
        assert len(names) == 80 and (names[1], names[13], names[90]) == ("person", "stop sign", "toothbrush")
        assert 12 not in names and (about["labels"], about["size"]) == ("ids", 800)
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="neither a checkpoint"):
        load(tmp_path / "other.pth")
