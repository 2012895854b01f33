"""The bench of students on integers: its rows, its parts, and the table they make."""

import json

import torch

from common.metrics.integer_deployment import render
from common.metrics.timing import Bench
from q_detr.deployment import add_deployment, parts, students
from q_detr.export import Deployed, example
from q_detr.tests.test_export import real


@torch.no_grad()
def test_the_parts_in_a_row_are_the_network():
    images = example(((64, 96),))[0]
    network = real(backbone="resnet18")
    found = parts(network)
    assert list(found) == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "encoder", "decoder"]
    x = images
    for name, part in list(found.items())[:5]:
        x = part(x)
        assert x.ndim == 4, name
    torch.testing.assert_close(x, network.backbone[0].body(images), rtol=0, atol=0)
    memory = found["encoder"](x)
    mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
    torch.testing.assert_close(memory, network.encode(images, mask)[0])
    logits, boxes = found["decoder"](memory.transpose(1, 2).unflatten(2, x.shape[-2:]))
    expected = network(images, mask)
    torch.testing.assert_close((logits, boxes), (expected["pred_logits"], expected["pred_boxes"]))
    assert list(parts(real())) == ["backbone", "encoder", "decoder"]


def test_students_of_the_bench_have_slopes_and_shifts_as_training_leaves_them():
    (student,) = students(real(backbone="resnet18"), torch.randn(1, 3, 64, 96), [3]).values()
    act = student.backbone[0].body.layer1[0].act1
    assert all(t.count_nonzero() == t.numel() for t in (act.shift_in, act.slope, act.shift_out))
    assert Deployed(student, form="integer").products > 20


def test_the_rows_of_the_bench_make_the_table(tmp_path, monkeypatch):
    def layers(m):  # two parts, of a layer each: what the parts are is tested above
        return {"backbone": m.backbone[0].body.layers[0], "decoder": m.backbone[0].body.layers[1]}

    monkeypatch.setattr("q_detr.deployment.parts", layers)
    table, images = Bench(tmp_path / "bench.json"), torch.randn(1, 3, 64, 64)
    add_deployment(table, "DETR", real(encoder_layers=0), images, tmp_path, widths=[4], rounds=1, compiled=False)
    rows = json.loads(json.dumps(table.write()))
    (whole,) = (r for r in rows if r.get("kind") == "integer")
    assert whole["ours_is"] == "4 bit" and whole["forms"].keys() == {
        "fp32 eager", "bf16 eager", "fp32 channels_last", "bf16 channels_last", "onnxruntime fp32", "onnxruntime int8 dynamic",
        "4 bit",
    }  # fmt: skip
    layers = [r["name"] for r in rows if r.get("kind") == "integer layer"]
    assert [n.split(", ")[1] for n in layers] == ["backbone", "decoder"]
    sizes = {r["form"]: r["ours"] for r in rows if r.get("kind") == "bytes"}
    assert sizes["4 bit packed"] < sizes["onnxruntime fp32"] and all(
        r["ours"] > 0 for r in rows if r.get("kind") == "memory"
    )
    lines = render(rows).splitlines()
    assert len(lines) > 6 and len({line.count("|") for line in lines[:6]}) == 1
