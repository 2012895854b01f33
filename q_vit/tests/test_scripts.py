"""Packing to bits, prediction of single files."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import runs
from q_vit import predict
from q_vit.data import build_data
from q_vit.export import pack, quantised_weights, unpack
from q_vit.model import build_float, build_student

MINI = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}


def student(bits, seed=0, preset="deployable"):
    torch.manual_seed(seed)
    x = next(build_data(name="cued_digits", train_images=32, test_images=4).source.batches(0, 1, [slice(0, 32)]))[0]
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


def test_predict_names_the_class_that_evaluation_finds(tmp_path, capsys):
    model, _ = student(4)
    config = {"model": {"name": "vit_distilled", "pretrained": False, **MINI}, "data": {"name": "cued_digits"}}
    quant = {"preset": "deployable"}
    config["method"] = {"bits": 4, "irm": True, "quant": quant}
    torch.save(
        {"model": model.state_dict(), "config": config, "data": {"classes": 10, "channels": 1}}, tmp_path / "a.ckpt"
    )
    Image.new("L", (20, 16), 128).save(tmp_path / "x.png")
    for c in "abcdefghij":
        (tmp_path / "names" / c).mkdir(parents=True)
    assert predict.main([str(tmp_path / "a.ckpt"), str(tmp_path / "x.png"), "--names", str(tmp_path / "names")]) == 0
    expected = model((torch.full((1, 1, 16, 16), 128 / 255) - 0.3) / 0.3).argmax().item()
    assert f"x.png: {'abcdefghij'[expected]} " in capsys.readouterr().out


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
