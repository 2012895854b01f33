"""Networks: published counts, gate, shapes, heads that grow, timm backbones, ONNX parity."""

from pathlib import Path

import pytest
import torch

from common.metrics.claims import load_document
from lifelong import counts
from lifelong.model import SpatialAttention, build_model, grow_head

SMALL = [
    {"name": "rps_net", "widths": (4, 6, 8, 10)}, {"name": "mlp", "size": 16, "hidden": 12},
    {"name": "resnet18", "small_images": True}, {"name": "timm", "backbone": "test_resnet"},
]  # fmt: skip


def test_every_exact_number_is_the_declared_one():
    document, measured = load_document(Path(counts.__file__).parent), counts.measure()
    exact = [c for c in document["claims"] if c["kind"] == "exact"]
    assert len(exact) >= 10
    for claim in exact:
        assert abs(measured[claim["metric"]] - claim["published"]["value"]) <= claim["tol"], claim["id"]


def test_the_gate_by_hand():
    gate = SpatialAttention(double=False)
    with torch.no_grad():
        gate.conv.weight.zero_()
        gate.conv.weight[0, 0, 3, 3], gate.conv.weight[0, 1, 3, 3] = 1.0, 2.0
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(gate(x)[:, 0], (x.mean(1) + 2 * x.amax(1)).sigmoid())


def test_the_double_sigmoid_follows_a_batch_norm():
    gate = SpatialAttention()
    x = torch.randn(16, 3, 8, 8)
    once = gate.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
    expected = ((once - once.mean()) / (once.var(correction=0) + 1e-5).sqrt()).sigmoid()
    torch.testing.assert_close(gate(x), expected, rtol=1e-4, atol=1e-5)
    gate.eval()  # with untouched statistics, mean 0 and variance 1, the second sigmoid of 0..1 lies in .5 .. .74
    gate.norm.reset_running_stats()
    a = gate(x)
    assert a.min() > 0.49 and a.max() < 0.74


@pytest.mark.parametrize("options", SMALL, ids=lambda o: o["name"])
def test_shapes_batches_and_saving(options):
    model = build_model(num_classes=7, **options).eval()
    channels = 3
    x = torch.rand(3, channels, 16, 16)
    logits, attention = model(x, return_attention=True)
    assert logits.shape == (3, 7) and attention.shape == (3, 1, 16, 16) and ((attention > 0) & (attention < 1)).all()
    torch.testing.assert_close(torch.cat([model(v[None]) for v in x]), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head(model.features(x)), logits)
    other = build_model(num_classes=7, **options).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), logits)


def test_the_gate_multiplies_the_features():
    model = build_model(num_classes=7, **SMALL[0]).eval()
    x = torch.rand(1, 3, 16, 16)
    first = model.conv(x)
    gated = model.groups(torch.relu(model.norm(model.attention(first) * first)))
    pooled = (gated.clamp(min=1e-6) ** 3).mean((2, 3)) ** (1 / 3)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T)
    assert gated.shape[-1] == 4, "two poolings, none after the last group"
    mlp = build_model(num_classes=7, **SMALL[1]).eval()  # whose gate lies on the image itself
    x = torch.rand(2, mlp.conv.in_channels, 16, 16)
    torch.testing.assert_close(mlp(x), mlp.head(mlp.body((mlp.attention(mlp.conv(x)) * x).flatten(1))))
    resnet = build_model(num_classes=7, **SMALL[2]).eval()
    x = torch.rand(2, 3, 16, 16)
    first = resnet.conv(x)
    torch.testing.assert_close(resnet(x), resnet.head(resnet.backbone(resnet.attention(first) * first)))


@pytest.mark.parametrize("options", SMALL[:3:2], ids=lambda o: o["name"])
def test_a_grown_head_keeps_its_rows(options):
    model = build_model(num_classes=3, **options).eval()
    x = torch.rand(2, 3, 16, 16)
    before = model(x)
    grow_head(model, 5)
    after = model(x)
    assert after.shape == (2, 5)
    torch.testing.assert_close(after[:, :3], before)
    assert (model.head.bias is None) == (options["name"] != "resnet18")
    with pytest.raises(ValueError, match="cannot shrink"):
        grow_head(model, 4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": "vgg"}, r"'vgg', allowed: rps_net, mlp"),
        ({"name": "timm", "backbone": "resnet_51"}, "resnet_51"),
        ({"name": "rps_net", "widths": (1, 2)}, "four numbers"),
        ({"name": "mlp", "num_classes": 0}, "num_classes=0"),
        ({"name": "resnet18", "pretrained": True, "small_images": True}, "RGB"),
    ],
)
def test_bad_models(options, error):
    with pytest.raises(ValueError, match=error):
        build_model(**{"num_classes": 3, **options})
