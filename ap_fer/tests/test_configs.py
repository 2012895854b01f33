"""Every sweep composes; every claim names arms that are run; every experiment is the recipe it says."""

import itertools

import pytest
import yaml
from omegaconf import OmegaConf

from ap_fer.attentive_patch_pooling import SCORES as APP_SCORES
from ap_fer.attentive_token_pooling import SCORES as ATP_SCORES
from ap_fer.expressions import FERPLUS
from ap_fer.tests.helpers import CONFIGS, config, write_image
from ap_fer.train import fit
from common import reproduce, scripts
from common.metrics.claims import load_claims, load_document

PAPER = CONFIGS.parent
SCALES = ("mini", "full", "gpu_faces112", "paper")


def sweep_cells(scale):
    """(sweep file, its content, the chosen overrides) of every cell, read from the YAML alone."""
    for file in sorted((CONFIGS / "reproduce" / scale).glob("*.yaml")):
        sweep = yaml.safe_load(file.read_text())
        choices = [
            [(k, v) for v in str(values).split(",")] for k, values in sweep["hydra"]["sweeper"]["params"].items()
        ]
        for chosen in itertools.product(*choices):
            yield file, sweep, dict(chosen)


def arm_name(file, sweep, chosen):
    """The directory of the cell between scale and seed."""
    if "_counts" in file.stem:
        return "counts"
    if "_tradeoff" in file.stem:
        return "tradeoff"
    suffix = sweep.get("arm", "").removeprefix("${hydra:runtime.choices.method}")
    experiment = f"_{chosen['experiment']}" if "experiment" in chosen else ""
    others = ",".join(sorted(f"{k}={v}" for k, v in chosen.items() if k not in ("method", "seed", "experiment")))
    return scripts.arm_name("/".join([chosen["method"] + suffix + experiment, *([others] if others else [])]))


def test_all_scales_are_here_and_say_what_they_can_show():
    assert {p.name for p in (CONFIGS / "reproduce").iterdir()} == set(SCALES)
    for scale in SCALES:
        text = (CONFIGS / "reproduce" / scale / "README.md").read_text()
        assert "Can show" in text and "Cannot show" in text


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_names_arms_that_its_scale_runs_on_evidence_seeds(scale):
    seeds: dict[str, set[int]] = {}
    for file, sweep, chosen in sweep_cells(scale):
        arm, seed = arm_name(file, sweep, chosen), int(chosen["seed"])
        assert seed not in seeds.setdefault(arm, set()), f"{arm}/seed{seed} twice"
        seeds[arm].add(seed)
        assert seed >= 100 or arm in ("counts", "tradeoff")
    claims = [c for c in load_claims(PAPER) if scale in c["scale"] and c["kind"] != "released_weights"]
    assert claims
    for claim in claims:
        assert set(claim["arms"]) <= seeds.keys(), claim["id"]
        if claim["kind"] in ("ordering", "property"):
            assert len(set.intersection(*(seeds[a] for a in claim["arms"]))) >= 3, claim["id"]


@pytest.mark.parametrize("scale", SCALES)
def test_sweeps_compose_as_hydra_will_run_them(scale, monkeypatch):
    first = {}
    for cell in sweep_cells(scale):
        first.setdefault(cell[0].stem, cell)
    monkeypatch.setattr(reproduce, "_choices", lambda override: [override.split(",")[0]])  # one cell of every sweep
    extra = ("data.root=/datasets",) if scale == "paper" else ()
    cells = {c.stage: c for c in reproduce.cells(PAPER, scale, extra)}
    assert list(cells) == sorted(first)
    for stage, cell in cells.items():
        assert cell.arm == arm_name(*first[stage]) and cell.seed == int(first[stage][2]["seed"]), stage
        assert cell.dir.is_relative_to(PAPER / "runs" / scale)
    for _, sweep, chosen in sweep_cells("paper"):
        assert "experiment" not in chosen or sweep["data"] == {"partial": False}, (
            "a published number is of the whole set"
        )


def test_the_miniature_has_three_seeds_of_five_arms_and_their_stems():
    cells = [(arm_name(*cell), cell[1].get("after")) for cell in sweep_cells("mini")]
    wanted = {"none", "app", "app_atp", "random", "worst"}
    arms = {arm for arm, _ in cells}
    assert arms == {"counts", "face_net", "stem", "tradeoff"} | wanted
    assert all(sum(arm == a for arm, _ in cells) == 3 for a in arms - {"counts", "tradeoff"})
    assert all(after == ["11_train_stem"] for arm, after in cells if arm in wanted)


def test_full_runs_every_score_of_both_poolings():
    app, atp = set(), set()
    for method in {chosen.get("method") for _, _, chosen in sweep_cells("full")} - {None}:
        cfg = OmegaConf.to_container(config("config", f"method={method}", "arm=x"), resolve=True)
        if cfg["model"]["depth"] and cfg["method"]["app"]["keep"]:
            app.add(cfg["method"]["app"]["score"])
        if cfg["model"]["depth"] and cfg["method"]["atp"]["rate"] < 1:
            atp.add((cfg["method"]["atp"]["score"], cfg["method"]["atp"]["source"]))
    assert app == set(APP_SCORES) and atp == {(score, "logits") for score in ATP_SCORES} | {("sum", "softmax")}


def test_controls_cost_as_much_as_what_they_control():
    """Equal poolings in everything but the score."""

    def sizes(method):
        cfg = OmegaConf.to_container(config("config", f"method={method}", "arm=x"), resolve=True)["method"]
        return cfg["app"]["keep"], cfg["atp"]["rate"], cfg["atp"]["start"]

    for method in ("random", "worst", "la", "app_channel", "app_sum", "app_sum_abs_2", "app_max", "app_max_abs_1"):
        assert sizes(method) == sizes("app") == (32, 1.0, 2), method
    assert sizes("app_atp") == sizes("random_both") == sizes("app_random_atp") == (32, 0.8, 2)
    for method in ("atp_random", "atp_softmax", "atp_max", "atp_sum_abs_1"):
        assert sizes(method) == sizes("atp") == (None, 0.8, 2), method


def test_the_recipe_of_raf_db():
    composed = config("config", "experiment=raf_db", "arm=x", "data.root=/d")
    parts = ("train", "optim", "schedule", "data", "method", "start")
    cfg = {key: OmegaConf.to_container(composed[key], resolve=True) for key in parts}
    assert cfg["train"] | {"epochs": 40, "batch_size": 128, "clip": 10.0, "eval_every": 1} == cfg["train"]
    assert cfg["optim"] == {"name": "sgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "no_decay_tokens": False,
                            "stem": 1.0}  # fmt: skip
    assert (
        cfg["schedule"] == {"kind": "cosine_epoch"} and cfg["data"]["size"] == 112 and cfg["data"]["augment"] == "raf"
    )
    assert cfg["method"]["app"] == {"keep": 160, "score": "sum_abs_1", "lowest": False, "when": "both"}
    atp = {"rate": 0.9, "start": 4, "score": "sum", "source": "logits", "lowest": False, "when": "both"}
    assert cfg["method"]["atp"] == atp and cfg["start"]["arm"] is None and cfg["start"]["ir50"].startswith("weights/")


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")))
def test_experiments_open_with_command_and_published_number(name):
    text = (CONFIGS / f"experiment/{name}.yaml").read_text()
    assert f"experiment={name} " in text and "GPU" in text and "Published: " in text
    cfg = config("config", f"experiment={name}", "arm=x", "data.root=/d")
    assert cfg.data.num_classes == (8 if name in ("ferplus", "affectnet8") else 7)
    if name not in ("raf_db", "faces112"):
        assert "not published" in text and cfg.optim.lr == 1e-3 and cfg.model.keep == 160


def test_numbers_from_memory_are_never_compared():
    document = load_document(PAPER)
    sources = {p["id"]: p["source"] for p in document["published"]}
    assert sources["apvit_ferplus"] == "memory" and sources["apvit_raf_db"] == "code"
    assert all(
        c["published"] is None or c["published"]["source"] in ("code", "cited", "ours") for c in document["claims"]
    )


SMALL = [
    "arm=x", "preflight=true", "start.ir50=null", "start.vit=null", "data.workers=0", "train.batch_size=4", "model.units=[1,1,1]",
    "model.widths=[4,4,8]", "model.dim=16", "model.depth=2", "model.heads=2", "model.start=1", "model.keep=100",
]  # fmt: skip


def test_preflight_of_raf_db(raf, fabric, capsys, tmp_path):
    """The released recipe (augmentation, SGD, clipping, 112 pixels) makes a step on a tiny folder in the real layout."""
    fit(config("config", "experiment=raf_db", f"data.root={raf}", *SMALL), fabric, tmp_path / "run")
    assert "preflight: data found, 4 images" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["sfew", "expw", "affectnet8", "ferplus", "affwild2"])
def test_preflight_of_the_other_sets(name, fabric, capsys, tmp_path):
    write_tiny(name, tmp_path / config("config", f"experiment={name}", "arm=x", "data.root=/d").data.folder)
    fit(config("config", f"experiment={name}", f"data.root={tmp_path}", *SMALL), fabric, tmp_path / "run")
    assert "preflight: data found, 4 images" in capsys.readouterr().out


def write_tiny(name, root):
    """One image of every class in both splits."""
    if name == "sfew":
        for split, label in itertools.product(
            ("Train", "Val"), ("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")
        ):
            write_image(root / split / label / "0.png")
    elif name == "expw":
        images = [f"{i:02d}.jpg" for i in range(8)]
        rows = [f"{image} 0 0 0 40 40 9.0 {label}" for image in images for label in range(7)]
        for image in images:
            write_image(root / "origin" / image)
        (root / "label.lst").write_text("\n".join(rows))
    elif name == "affectnet8":
        write_image(root / "Manually_Annotated_Images/1/x.jpg")
        for split in ("training", "validation"):
            rows = [f"1/x.jpg,{label}" for label in range(11)]
            (root / f"{split}.csv").write_text("\n".join(["subDirectory_filePath,expression", *rows]))
    elif name == "ferplus":
        columns = ["Usage", "Image name", *FERPLUS, "unknown", "NF"]
        rows = []
        for (usage, folder), c in itertools.product((("Training", "Train"), ("PrivateTest", "Test")), range(8)):
            write_image(root / f"FER2013{folder}/{c}.png", mode="L", size=(48, 48))
            rows.append(",".join([usage, f"{c}.png", *("10" if i == c else "0" for i in range(10))]))
        (root / "fer2013new.csv").write_text("\n".join([",".join(columns), *rows]))
    else:
        names = "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise"
        frames = [str(i % 7) for i in range(70)]  # every tenth frame is taken: labels 0, 3, 6, 2, 5, 1, 4
        for split in ("Train_Set", "Validation_Set"):
            file = root / f"annotations/{split}/{split}.txt"
            file.parent.mkdir(parents=True)
            file.write_text("\n".join([names, *frames]))
            for frame in range(1, 71, 10):
                write_image(root / f"cropped_aligned/{split}/{frame:05d}.jpg")
