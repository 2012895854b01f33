"""The verbs on a checkpoint: evaluate, predict, export, counts, bench, and the lines of the README."""

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import runs
from q_vit.bench import bench
from q_vit.checkpoint import load
from q_vit.data import build_data
from q_vit.diagnose import run as diagnose
from q_vit.evaluate import evaluate
from q_vit.export import export
from q_vit.metrics import attention_distance, attention_divergence, imitation
from q_vit.model import build_float, build_student
from q_vit.packing import pack, quantised_weights, unpack
from q_vit.predict import class_names, classify
from q_vit.quantized_vit import Tapped
from q_vit.tests.conftest import class_folders, config, result
from q_vit.train import fit

MINI = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}


def student(bits, seed=0, preset="deployable"):
    torch.manual_seed(seed)
    x = build_data(name="cued_digits", train_images=32, test_images=4).first(32, 0)
    model = build_float("vit_distilled", num_classes=10, in_channels=1, **MINI)
    return build_student(model, x, irm=True, bits=bits, preset=preset).eval(), x


@pytest.mark.parametrize(("bits", "preset"), [(2, "official"), (3, "deployable"), (4, "deployable"), (8, "official")])
def test_a_packed_network_is_the_same_network_bit_for_bit(bits, preset, tmp_path):
    model, x = student(bits, preset=preset)
    torch.save(pack(model), tmp_path / "packed.pt")
    file = runs.load_checkpoint(tmp_path / "packed.pt")
    for name, (m, q) in quantised_weights(model).items():
        assert len(file["packed"][name]) == math.ceil(m.weight.numel() * q.bits / 8)
    other, _ = student(bits, seed=1, preset=preset)
    assert not torch.equal(other(x), model(x))
    torch.testing.assert_close(unpack(other, file)(x), model(x), rtol=0, atol=0)


def test_packed_files_of_another_width_or_network_are_refused():
    file = pack(student(4)[0])
    with pytest.raises(ValueError, match="4 bit, the model has 3"):
        unpack(student(3)[0], file)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack(build_float("vit", num_classes=3, **MINI))


def rows(path):
    return list(csv.DictReader(path.open()))


def test_predict_sees_an_image_as_training_does(fabric, checkpoint, tmp_path):
    """Canvases are not normalised, so neither is a picture of one. In batches as singly, from the packed file as well."""
    model, _, about = load(checkpoint)
    assert about["normalise"] == {"mean": [0.0], "std": [1.0]} and about["classes"] == [str(c) for c in range(10)]
    for i in range(3):
        grey = torch.arange(256).view(16, 16).roll(40 * i).to(torch.uint8).numpy()
        Image.fromarray(grey).save(tmp_path / f"{i}.png")
    export(config(f"weights={checkpoint}", f"out={tmp_path / 'packed.pt'}", name="export"))
    for name, weights in (("a", checkpoint), ("b", tmp_path / "packed.pt")):
        cfg = config(f"weights={weights}", f"images={tmp_path}", f"out={tmp_path / name}.csv", "top=10", name="predict")
        classify(cfg, fabric)
    found = rows(tmp_path / "a.csv")
    assert found == rows(tmp_path / "b.csv") and len(found) == 30
    for i in range(3):
        x = torch.arange(256).view(1, 1, 16, 16).roll(40 * i).float() / 255
        p = model(x).softmax(-1)[0]
        own = {r["label"]: float(r["probability"]) for r in found if r["path"].endswith(f"{i}.png")}
        assert [own[str(c)] for c in range(10)] == pytest.approx(p.tolist(), abs=1e-5)


def test_names_of_a_user_are_counted_and_hidden_folders_are_none(fabric, checkpoint, tmp_path):
    Image.new("L", (16, 16), 90).save(tmp_path / "a.png")
    for c in ("cat", "dog", ".ipynb_checkpoints"):
        (tmp_path / "two" / c).mkdir(parents=True)
    for c in [*"abcdefghij", ".git", "__MACOSX"]:
        (tmp_path / "ten" / c).mkdir(parents=True)
    (tmp_path / "names.txt").write_bytes(
        "\ufeffzéro\r\none\r\n\r\n".encode() + b"\n".join(b"x%d" % i for i in range(8))
    )
    assert class_names(str(tmp_path / "ten"), ["0"] * 10) == list("abcdefghij")
    assert class_names(str(tmp_path / "names.txt"), ["0"] * 10)[:2] == ["zéro", "one"]
    common = [f"weights={checkpoint}", f"images={tmp_path / 'a.png'}", f"out={tmp_path / 'o.json'}"]
    with pytest.raises(ValueError, match="holds 2 class folders, the model has 10 classes"):
        classify(config(*common, f"names={tmp_path / 'two'}", name="predict"), fabric)
    assert not (tmp_path / "o.json").exists()
    classify(config(*common, f"names={tmp_path / 'ten'}", name="predict"), fabric)
    assert json.loads((tmp_path / "o.json").read_text())[0]["label"] in "abcdefghij"


def test_evaluate_finds_the_accuracy_of_the_run_and_writes_a_record(fabric, checkpoint, tmp_path):
    found = evaluate(
        config(f"weights={checkpoint}", "batch_size=7", "record=true", f"record_to={tmp_path}", name="evaluate"), fabric
    )
    assert found["top1"] == result(checkpoint.parent)["metrics"]["top1"]
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert (
        record["n"] == 40
        and record["bits"] == 4
        and record["data"] == "cued_digits"
        and record["value"] == found["top1"]
    )


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["data.root=/tmp"], "cued_digits is embedded"),
        (["bits=3"], "trained with 4 bit"),
        (["claim=best"], "claim=best, allowed: released_deit_s_2"),
        (["data.name=imagenet", "data.root=/tmp"], "data.name='imagenet'"),
        (["data.name=folder", "data.root=/nowhere"], "no folder /nowhere"),
    ],
)
def test_evaluate_ignores_nothing(fabric, checkpoint, overrides, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        evaluate(config(f"weights={checkpoint}", *overrides, name="evaluate"), fabric)


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="lacks about, config"):
        load(tmp_path / "other.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match="holds a Tensor"):
        load(tmp_path / "tensor.ckpt")
    (tmp_path / "text.ckpt").write_text("{}")
    with pytest.raises(runs.RunError, match=r"refused|cannot read"):
        load(tmp_path / "text.ckpt")


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.quant.preset=deployable", "method.quant.edge_bits=4", "method.quant.gelu_clip=0.02"],
        ["method.quant.irm_form=paper", "method.quant.irm_stats=tensor"],
        ["method.quant.parts=mhsa_acts", "method=baseline"], ["method.bits=32", "method=irm"],
        ["method.quant.symmetric=true", "method.quant.preset=deployable"],
    ],
)  # fmt: skip
def test_a_reload_keeps_every_option_of_the_model(overrides, fabric, arm, tmp_path):
    cfg = arm("train.epochs=1", *overrides)
    fit(cfg, fabric, tmp_path)
    found = evaluate(config(f"weights={tmp_path / 'last.ckpt'}", "statistics_images=500", name="evaluate"), fabric)
    metrics = result(tmp_path)["metrics"]
    assert {k: metrics[k] for k in found} == found


def test_own_class_folders_from_training_to_names(fabric, tmp_path):
    """fp on a person's folders, evaluated on another copy of the test images, predicted with the names of the folders."""
    root = class_folders(tmp_path / "data", n=8)
    cfg = config(
        "method=fp", "data=folder", f"data.root={root}", "data.size=16", "data.workers=0", "data.augment=none",
        "train.batch_size=8", "train.epochs=6", "optim.lr=5e-3",
    )  # fmt: skip
    fit(cfg, fabric, tmp_path / "run")
    weights = tmp_path / "run/last.ckpt"
    only_test = class_folders(tmp_path / "moved", splits=("val",), n=8)
    found = evaluate(config(f"weights={weights}", f"data.root={only_test}", name="evaluate"), fabric)
    assert found["top1"] == result(tmp_path / "run")["metrics"]["top1"]
    cfg = config(f"weights={weights}", f"images={only_test / 'val'}", f"out={tmp_path / 'p.csv'}", name="predict")
    labels = rows(classify(cfg, fabric))
    right = sum(Path(r["path"]).parent.name == r["label"] for r in labels)
    assert len(labels) == 24 and 100 * right / 24 == pytest.approx(found["top1"])
    os.rename(only_test / "val/red", only_test / "val/violet")
    with pytest.raises(ValueError, match="different: red, violet"):
        evaluate(config(f"weights={weights}", f"data.root={only_test}", name="evaluate"), fabric)


def test_attention_distance_and_divergence_in_closed_form():
    own = torch.eye(4).expand(1, 1, 4, 4)
    even = torch.full((1, 1, 4, 4), 0.25)
    assert attention_distance(own, (2, 2)) == 0
    assert attention_distance(even, (2, 2)) == pytest.approx((2 + math.sqrt(2)) / 4)
    padded = torch.zeros(1, 1, 6, 6)
    padded[..., 2:, 2:], padded[..., :2] = even / 2, 0.25  # attention to tokens that are no patches does not count
    assert attention_distance(padded, (2, 2), prefix=2) == pytest.approx((2 + math.sqrt(2)) / 4)
    with pytest.raises(ValueError, match="6 patches for a grid of 2 x 2"):
        attention_distance(padded, (2, 2))
    assert attention_divergence(even, even) == pytest.approx(0) and attention_divergence(own, even) == pytest.approx(
        math.log(4)
    )


@pytest.mark.parametrize("preset", ["official", "deployable"])
def test_imitation_is_the_mean_over_images_blocks_heads_queries_and_keys(preset):
    torch.manual_seed(1)
    x = build_data(name="cued_digits", train_images=70, test_images=4).first(70, 0)  # two parts of unequal size
    teacher = build_float("vit_distilled", num_classes=10, in_channels=1, **MINI | {"depth": 2}).eval()
    model = build_student(teacher, x, irm=True, bits=2, preset=preset).eval()
    found = imitation(model, teacher, x, prefix=(2, 2))
    ours, theirs = Tapped(model, "pre_quant")(x)[1], Tapped(teacher, "raw")(x)[1]
    gram = lambda t: (g := t @ t.mT) / torch.linalg.matrix_norm(g, keepdim=True)  # noqa: E731
    pairs = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    distances = torch.stack([torch.linalg.matrix_norm(gram(b) - gram(a)) for a, b in pairs])
    assert found["similarity_distance"] == pytest.approx(distances.mean().item(), abs=1e-5) and distances.mean() > 0.01
    coded = [
        (block.attn.q_quantizer(q), block.attn.k_quantizer(k)) for block, (q, k) in zip(model.blocks, ours, strict=True)
    ]
    maps = [[(q @ k.mT / math.sqrt(12)).softmax(-1).double() for q, k in qk] for qk in (theirs, coded)]
    kl = torch.stack([(p * (p / s).log()).sum(-1).mean() for p, s in zip(*maps, strict=True)]).mean()
    assert found["attention_kl"] == pytest.approx(kl.item(), rel=1e-4) and kl > 1e-6
    plain = build_float("vit", num_classes=10, in_channels=1, **MINI | {"depth": 2})  # a token less: no maps to compare
    assert imitation(model, plain, x[:2], prefix=(2, 1)).keys() == {"similarity_distance"}


def test_diagnose_sets_networks_side_by_side(fabric, root, checkpoint, tmp_path):
    teacher = root / "mini/fp/seed0/last.ckpt"
    found = diagnose(
        config(
            f"weights=[{teacher},{checkpoint}]", f"out={tmp_path / 'd.png'}", "statistics_images=8", name="diagnose"
        ),
        fabric,
    )
    assert list(found) == ["fp", "test"] and json.loads((tmp_path / "d.json").read_text()) == found
    assert found["fp"]["q_entropy"] == [] and 0 < found["test"]["q_entropy"][0] <= 4
    assert found["fp"]["attention_distance"][0] > 0 and found["test"]["attention_divergence"][0] > 0
    assert (tmp_path / "d.png").stat().st_size > 5000
    deep = tmp_path / "deep"
    fit(config("method=fp", "arm=deep", "model.depth=2", "train.epochs=1"), fabric, deep)
    both = f"weights=[{teacher},{deep / 'last.ckpt'}]"
    with pytest.raises(ValueError, match=r"networks of \[1, 2\] blocks"):
        diagnose(config(both, f"out={tmp_path / 'e.png'}", name="diagnose"), fabric)
    assert not (tmp_path / "e.png").exists()


def test_bench_writes_its_rows(tmp_path):
    found = bench(config(f"out={tmp_path / 'b.json'}", "rounds=1", "batch_size=1", name="bench"))
    assert len(found) == 4 and found == json.loads((tmp_path / "b.json").read_text())
    assert found[-1]["unit"] == "MB" and found[-1]["ratio"] > 6


def test_the_lines_of_the_readme():
    teacher = build_float("vit", num_classes=5, in_channels=1, **MINI)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    scope = {"teacher": teacher, "images": torch.randn(4, 1, 16, 16), "labels": torch.tensor([0, 1, 2, 3])}
    exec(code, scope)
    scope["loss"].backward()
    gradient = scope["student"].blocks[0].attn.q_norm.weight.grad
    assert scope["loss"].isfinite() and gradient is not None and gradient.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters()), "neither loss reaches the teacher"
    assert not teacher.training
