"""Checkpoints in the published formats, written here with random numbers, load by key into the right places."""

import pytest
import torch

from ap_fer.build import build
from ap_fer.checkpoint import data_options, load
from ap_fer.ir50 import IR50, Unit
from ap_fer.model import APViT
from ap_fer.tests.helpers import config, small_model
from ap_fer.weights import load_ir50, load_released, load_vit_small, read_state, resize_position
from common import runs


def random_like(state):
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture(scope="module")
def face_network():
    """face.evoLVe's state dict of IR-50: 24 units numbered through, a fourth stage and an output layer."""
    with torch.device("meta"):
        stages = [[(64, 64)] + [(64, 64)] * 2, [(64, 128)] + [(128, 128)] * 3, [(128, 256)] + [(256, 256)] * 13,
                  [(256, 512)] + [(512, 512)] * 2]  # fmt: skip
        units = [Unit(a, b, 2 if i == 0 else 1) for stage in stages for i, (a, b) in enumerate(stage)]
        first = IR50(units=[1], widths=[64]).input_layer
    names = {f"input_layer.{k}": v for k, v in first.state_dict().items()}
    names |= {f"body.{i}.{k}": v for i, u in enumerate(units) for k, v in u.state_dict().items()}
    state = {k: torch.full(v.shape, float(i % 97)) for i, (k, v) in enumerate(names.items())}
    return state | {"output_layer.3.weight": torch.zeros(512, 8)}


def test_ir50_units_go_to_their_stages(face_network, capsys):
    stem = IR50()
    load_ir50(stem, face_network)
    taken = len([k for k in face_network if k.startswith("input_layer") or k.split(".")[1] in map(str, range(21))]) - 1
    report = f"{taken} tensors, {len(face_network) - taken} of the file not used"
    assert f"loaded face.evoLVe IR-50 (input_layer.*, body.<0..23>.*): {report}" in capsys.readouterr().out
    for flat, (stage, unit) in {0: (0, 0), 2: (0, 2), 3: (1, 0), 6: (1, 3), 7: (2, 0), 20: (2, 13)}.items():
        for key in ("res_layer.0.weight", "res_layer.3.weight", "res_layer.4.running_var"):
            assert torch.equal(stem.state_dict()[f"body.{stage}.{unit}.{key}"], face_network[f"body.{flat}.{key}"])
    assert torch.equal(stem.state_dict()["input_layer.2.weight"], face_network["input_layer.2.weight"])


def test_an_incomplete_or_foreign_face_network_is_named(face_network):
    short = {k: v for k, v in face_network.items() if not k.startswith("body.5.")}
    with pytest.raises(ValueError, match=r"not those of face.evoLVe IR-50.*missing \['body.1.2"):
        load_ir50(IR50(), short)
    with pytest.raises(ValueError, match="this model's stem is Identity"):
        load_ir50(small_model().extractor, face_network)
    with pytest.raises(ValueError, match="other shapes"):
        load_ir50(IR50(units=[3, 4, 14], widths=[64, 128, 192]), face_network)


def vit_small(dim=16, depth=3, n=36):
    vit = small_model(dim=dim, depth=depth).vit
    state = {k: v for k, v in random_like(vit.state_dict()).items() if k.startswith(("blocks", "norm"))}
    table = torch.arange((n + 1) * dim).view(1, n + 1, dim).float()
    return state | {
        "cls_token": torch.randn(1, 1, dim), "pos_embed": table, "patch_embed.proj.weight": torch.randn(dim, 3, 16, 16),
        "head.weight": torch.randn(1000, dim), "head.bias": torch.randn(1000),
    }  # fmt: skip


def test_vit_small_gives_blocks_norm_class_token_and_a_split_position_table(capsys):
    vit, state = small_model().vit, vit_small()
    projection = vit.projs[0].weight.clone()
    load_vit_small(vit, state)
    assert "3 of the file not used; from random weights: projs.0.weight, projs.0.bias" in capsys.readouterr().out
    assert torch.equal(vit.cls_pos_embed[0, 0], state["pos_embed"][0, 0]), "row 0 is the class token's"
    assert torch.equal(vit.patch_pos_embed, state["pos_embed"][:, 1:]), "the same grid is not resized"
    assert torch.equal(vit.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"]) and torch.equal(
        vit.norm.bias, state["norm.bias"]
    )
    assert torch.equal(vit.cls_token, state["cls_token"]) and torch.equal(vit.projs[0].weight, projection), (
        "the projection is new"
    )


def test_todays_vit_small_is_refused_with_the_difference():
    with pytest.raises(ValueError, match="24 wide with 3 blocks, the model 16 with 3.*another network"):
        load_vit_small(small_model().vit, vit_small(dim=24))
    with pytest.raises(ValueError, match="16 wide with 4 blocks"):
        load_vit_small(small_model().vit, vit_small(depth=4))
    with pytest.raises(ValueError, match="lacks cls_token, pos_embed"):
        load_vit_small(small_model().vit, {"a": torch.zeros(1)})


def test_position_tables_resize_bilinearly_and_only_where_the_grid_differs():
    ramp = torch.arange(4.0).repeat(4).view(1, 16, 1)  # value = column
    assert resize_position(ramp, (4, 4)) is ramp
    wide = resize_position(ramp, (4, 8)).view(4, 8)
    torch.testing.assert_close(wide[0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))
    assert (wide == wide[0]).all()
    with pytest.raises(ValueError, match="12 rows, not those of a square grid"):
        resize_position(torch.zeros(1, 12, 1), (4, 4))


def test_released_apvit_loads_by_key_and_predicts_the_same(tmp_path):
    """A file in the released format (state_dict, extractor.*, vit.*, head.fc.*), evaluated by name of its data set."""
    torch.manual_seed(3)
    model = APViT().eval()
    for p in (model.head["fc"].weight, model.head["fc"].bias):
        torch.nn.init.normal_(p)
    torch.save(
        {"meta": {"epoch": 40}, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
        tmp_path / "a.pth",
    )
    again, config, about = load(tmp_path / "a.pth")
    assert config == {} and about["size"] == 112 and about["classes"][:2] == ["anger", "disgust"] and not about["drawn"]
    assert data_options(load(tmp_path / "a.pth"), "raf_db", {})["name"] == "raf_db"
    with pytest.raises(ValueError, match="name their set, e.g. set=raf_db"):
        data_options(load(tmp_path / "a.pth"), None, {})
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        logits, kept = again(x, details=True)
        assert torch.equal(logits, model(x))
    assert [k.shape[1] for k in kept.blocks] == [160] * 4 + [144, 129, 116, 104]
    assert {k.split(".")[0] for k in model.state_dict()} == {"extractor", "vit", "head"}
    assert "vit.blocks.7.attn.qkv.bias" not in model.state_dict()
    with pytest.raises(ValueError, match="7 classes, the data set 8"):
        load_released(small_model(num_classes=8), model.state_dict())
    with pytest.raises(ValueError, match="other shapes"):
        load_released(
            small_model(stem="conv", widths=[4], strides=[4], kernels=[3]),
            small_model(stem="conv", widths=[4], strides=[4], kernels=[3], dim=32).state_dict(),
        )


def test_broken_files(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(runs.RunError, match="truncated or not a checkpoint"):
        read_state(tmp_path / "cut.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_state(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_state(tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="not a released APViT"):
        load_released(small_model(), {"fc.weight": torch.zeros(2)})


def test_start_of_the_recipe_reads_both_files(tmp_path, face_network, monkeypatch):
    """experiment=raf_db start.ir50=... start.vit=...: the stem and the transformer of the built model are those files."""
    torch.save(face_network, tmp_path / "ir50.pth")
    cfg = config(
        "config", "experiment=raf_db", f"start.ir50={tmp_path / 'ir50.pth'}", f"start.vit={tmp_path / 'vit.pth'}",
        "model.dim=16", "model.depth=2", "model.heads=2", "model.start=1", "data.root=none", "arm=test",
    )  # fmt: skip
    torch.save({"state_dict": vit_small(depth=2, n=196)}, tmp_path / "vit.pth")
    model = build(cfg, 7)
    assert torch.equal(
        model.extractor.state_dict()["body.1.0.res_layer.1.weight"], face_network["body.3.res_layer.1.weight"]
    )
    cfg.start.vit = "nowhere.pth"
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere.pth \(start.vit\).*start.vit=null"):
        build(cfg, 7)
    assert model.vit.cls_pos_embed[0, 0, 5] == 5 and model.vit.patch_pos_embed[0, 0, 0] == 16
