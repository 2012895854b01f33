"""Folders, annotations and pictures as people have them: own boxes from training to COCO results, broken annotations named."""

import csv
import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from common import runs
from q_detr.evaluate import evaluate
from q_detr.predict import predict
from q_detr.tests.contract import CONFIGS, SHORT
from q_detr.train import fit

OWN = [
    "data=coco",
    "data.train=train",
    "data.test=val",
    "data.labels=contiguous",
    "data.augment=plain",
    "data.test_side=null",
    "data.workers=0",
]


def config(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, ["fabric.accelerator=cpu", *(str(o) for o in overrides)])


def training(root, *overrides):
    short = [o for o in SHORT if not o.startswith(("data.", "fabric."))]
    return config(
        "config",
        *short,
        *OWN,
        "model=tiny",
        f"data.root='{root}'",
        "arm=own",
        "train.batch_size=2",
        "train.epochs=1",
        *overrides,
    )


def edit(root, split, change):
    path = root / f"annotations/instances_{split}.json"
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def test_own_boxes_train_evaluate_and_predict_with_names(folder, tmp_path, fabric, capsys):
    """In a folder whose name has blanks, brackets, a comma and an equals sign; a byte order mark; hidden files."""
    root = folder.rename(folder.parent / "my [own], boxes=2 é")
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        (root / split / ".DS_Store").write_bytes(b"\0")
        (root / split / "._hidden.png").write_bytes(b"\0")
    fit(training(root, "method=teacher", "run_root='r'"), fabric, root / "run")
    about = runs.load_checkpoint(root / "run/last.ckpt")["about"]
    assert about["classes"] == ["rectangle", "ellipse", "triangle"] and about["category_ids"] == [3, 7, 90]
    fit(training(root, "method=drd", f"teacher.weights='{root / 'run/last.ckpt'}'"), fabric, root / "student")
    weights, out = f"weights='{root / 'student/last.ckpt'}'", root / "results.json"
    metrics = evaluate(config("evaluate", weights, f"results='{out}'"), fabric, grouped=False)
    assert "AP50" in metrics and "AR100" in metrics and "6 images" in capsys.readouterr().out
    assert {r["category_id"] for r in json.loads(out.read_text())} <= {3, 7, 90}
    options = [weights, f"images='{root / 'val'}'", "threshold=0", f"out='{root / 'rows.csv'}'"]
    predict(config("predict", *options), fabric)
    rows = list(csv.DictReader((root / "rows.csv").open()))
    assert len(rows) == 6 * 8 and {r["label"] for r in rows} <= {"rectangle", "ellipse", "triangle"}


def test_a_finished_run_is_not_taken_for_one_on_other_annotations(folder, tmp_path, fabric):
    cfg = training(folder, "method=teacher")
    fit(cfg, fabric, tmp_path / "run")
    edit(folder, "train", lambda c: c["annotations"][0].update(bbox=[1, 1, 20, 20]))
    with pytest.raises(runs.RunError, match="on other data"):
        fit(cfg, fabric, tmp_path / "run")


def test_a_split_without_objects_is_one_clear_error(folder, tmp_path, fabric):
    edit(folder, "val", lambda c: c.update(annotations=[]))
    with pytest.raises(ValueError, match=r"split val of coco has no object"):
        evaluate(
            config("evaluate", "perfect=true", "data=coco", f"data.root={folder}", "data.test=val"),
            fabric,
            grouped=True,
        )
    with pytest.raises(ValueError, match="test split val of coco has no object"):
        fit(training(folder, "method=teacher"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def broken(**what):
    return lambda c: c["annotations"][0].update(what)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken(bbox=[1, 2, 3]), "bbox must be four finite numbers"),
        (broken(category_id=5), "category 5"),
        (broken(image_id=999), "names image 999"),
        (lambda c: c["categories"].append(dict(c["categories"][0])), "stands there twice"),
        (lambda c: c["images"].append(dict(c["images"][0])), "stands there twice"),
        (lambda c: c["images"][0].update(width=c["images"][0]["width"] + 9), "annotated as"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png"),
        (lambda c: c.pop("categories"), "not a COCO instances file"),
    ],
)
def test_broken_annotations_are_named_before_training(change, message, folder, fabric):
    edit(folder, "val", change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(
            config("evaluate", "perfect=true", "data=coco", f"data.root={folder}", "data.test=val"),
            fabric,
            grouped=True,
        )
        fit(training(folder, "method=teacher"), fabric, folder / "run")


def test_missing_sizes_null_areas_and_boxes_beyond_the_image_are_taken_as_they_must_be(folder, fabric):
    def change(c):
        for i in c["images"]:
            i["width"] = None
        for a in c["annotations"]:
            a.update(area=None, iscrowd=None if not a["iscrowd"] else 1)

    edit(folder, "val", change)
    found = evaluate(
        config("evaluate", "perfect=true", "data=coco", f"data.root={folder}", "data.test=val"), fabric, grouped=True
    )
    assert found["AP"] == pytest.approx(100)


def test_a_checkpoint_of_other_classes_is_refused_by_name(folder, tmp_path, fabric):
    fit(training(folder, "method=teacher"), fabric, tmp_path / "run")
    edit(folder, "val", lambda c: c["categories"][0].update(name="cat"))
    with pytest.raises(ValueError, match="knows rectangle, ellipse, triangle; coco has cat, ellipse, triangle"):
        evaluate(config("evaluate", f"weights={tmp_path / 'run/last.ckpt'}"), fabric, grouped=False)


def test_pictures_of_every_kind_are_seen_alike(folder, tmp_path, fabric):
    """16 bits, palette, transparency, CMYK and an orientation: the same grey picture gives the same boxes."""
    fit(training(folder, "method=teacher"), fabric, tmp_path / "run")
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    grey = np.kron(rng.integers(0, 255, (8, 8)), np.ones((8, 8))).astype(np.uint8)
    Image.fromarray(grey).save(photos / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(photos / "sixteen.png")
    Image.fromarray(np.stack([grey] * 3, -1)).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(
        photos / "palette.png"
    )
    Image.fromarray(np.stack([grey] * 3 + [np.full_like(grey, 9)], -1)).save(photos / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(grey)).save(photos / "turned.png", exif=exif)
    out = tmp_path / "rows.csv"
    predict(
        config("predict", f"weights={tmp_path / 'run/last.ckpt'}", f"images={photos}", "threshold=0", f"out={out}"),
        fabric,
    )
    rows = list(csv.DictReader(out.open()))
    by_file = {p: [tuple(v for k, v in r.items() if k != "path") for r in rows if r["path"].endswith(p)] for p in
               ("grey.png", "sixteen.png", "palette.png", "alpha.png", "turned.png")}  # fmt: skip
    assert len(by_file["grey.png"]) == 8 and all(found == by_file["grey.png"] for found in by_file.values())


def test_own_torchvision_weights_start_the_backbone_and_no_network_is_needed(tmp_path, monkeypatch):
    import torchvision

    from q_detr.detr import ResNetBody

    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no route to host"))
    )
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    body = ResNetBody("resnet18", weights=str(tmp_path / "resnet18.pth"))
    assert torch.equal(body.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    assert torch.equal(body.bn1.running_var, source.bn1.running_var)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit resnet18"):
        ResNetBody("resnet18", weights=str(tmp_path / "other.pth"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", torch.hub.load_state_dict_from_url)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(no route to host\).*model.weights=<file>"):
        ResNetBody("resnet18", weights="IMAGENET1K_V1")
