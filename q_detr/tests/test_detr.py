"""DETR and SMCA-DETR against the numbers of the official code."""

import zlib

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from q_detr.detr import DETR, Attention, EncoderLayer, ResNetBody, pad_images, sine_positions
from q_detr.smca import SMCADETR, SMCALayer


def filled(model: nn.Module) -> nn.Module:
    """Weights that depend on the names alone, so that a renamed key changes the result."""
    state = {}
    for k, v in model.state_dict().items():
        r = np.random.default_rng(zlib.crc32(k.encode())).standard_normal(tuple(v.shape))
        if v.ndim > 1:
            r = r / np.sqrt(np.prod(v.shape[1:]))
        elif k.endswith("running_var"):
            r = 1 + 0.1 * np.abs(r)
        else:
            r = 0.1 * r + (1 if k.endswith("weight") else 0)
        state[k] = torch.from_numpy(r).float()
    model.load_state_dict(state)
    return model.eval()


def two_images():
    rng = np.random.default_rng(7)
    return pad_images([torch.from_numpy(rng.standard_normal(s)).float() for s in ((3, 64, 96), (3, 80, 64))])


def small(cls=DETR, **options):
    torch.manual_seed(0)
    settings = {"num_classes": 3, "backbone": "tiny", "queries": 5, "dim": 16, "heads": 2, "ffn": 24}
    return cls(**{**settings, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0, **options})


def official_keys(depths=(3, 4, 6, 3), bottleneck=True) -> set[str]:
    """The names in the published checkpoints, written out a second time."""
    norm = ("weight", "bias", "running_mean", "running_var")
    body = {"conv1.weight", *(f"bn1.{p}" for p in norm)}
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            at = f"layer{stage}.{block}"
            for i in range(1, 4 if bottleneck else 3):
                body |= {f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{p}" for p in norm)}
            if block == 0 and (bottleneck or stage > 1):
                body |= {f"{at}.downsample.0.weight", *(f"{at}.downsample.1.{p}" for p in norm)}
    keys = {f"backbone.0.body.{k}" for k in body}
    for side, attentions, norms in (("encoder", ["self_attn"], 2), ("decoder", ["self_attn", "multihead_attn"], 3)):
        for i in range(6):
            at = f"transformer.{side}.layers.{i}"
            for a in attentions:
                keys |= {
                    f"{at}.{a}.{p}" for p in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
                }
            names = ["linear1", "linear2", *(f"norm{k}" for k in range(1, norms + 1))]
            keys |= {f"{at}.{n}.{p}" for n in names for p in ("weight", "bias")}
    heads = ["transformer.decoder.norm", "input_proj", "class_embed", *(f"bbox_embed.layers.{i}" for i in range(3))]
    return keys | {f"{n}.{p}" for n in heads for p in ("weight", "bias")} | {"query_embed.weight"}


@pytest.mark.parametrize(
    ("cls", "backbone", "classes", "total", "trainable", "entries"),
    [
        (DETR, "resnet50", 91, 41_524_768, 41_302_368, 458),
        (DETR, "resnet101", 91, 60_464_672, 60_242_272, 713),
        (DETR, "resnet18", 91, 28_843_552, 28_686_688, 293),
        (DETR, "resnet50", 20, 41_506_521, None, 458),
        (SMCADETR, "resnet50", 91, 41_760_482, 41_538_082, 500),
    ],
)
def test_parameters_and_entries_are_those_of_the_official_models(cls, backbone, classes, total, trainable, entries):
    with torch.device("meta"):
        model = cls(num_classes=classes, backbone=backbone)
    assert sum(p.numel() for p in model.parameters()) == total
    assert trainable is None or sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert len(model.state_dict()) == entries


def test_the_keys_and_shapes_are_those_of_the_published_checkpoints():
    with torch.device("meta"):
        state = DETR(num_classes=91).state_dict()
        r101 = DETR(num_classes=91, backbone="resnet101").state_dict()
    assert set(state) == official_keys()
    assert set(r101) == official_keys((3, 4, 23, 3))
    for key, shape in {
        "input_proj.weight": (256, 2048, 1, 1), "query_embed.weight": (100, 256), "class_embed.weight": (92, 256),
        "transformer.decoder.layers.5.multihead_attn.in_proj_weight": (768, 256),
        "transformer.encoder.layers.0.linear1.weight": (2048, 256), "bbox_embed.layers.2.weight": (4, 256),
    }.items():  # fmt: skip
        assert tuple(state[key].shape) == shape, key


def test_the_parts_have_the_measured_sizes():
    with torch.device("meta"):
        model = DETR(num_classes=91)
    sizes = {
        name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children() if name != "transformer"
    }
    sizes |= {name: sum(p.numel() for p in m.parameters()) for name, m in model.transformer.named_children()}
    assert sizes == {
        "backbone": 23_454_912, "encoder": 7_890_432, "decoder": 9_473_024, "input_proj": 524_544, "class_embed": 23_644,
        "bbox_embed": 132_612, "query_embed": 25_600,
    }  # fmt: skip


@torch.no_grad()
def test_the_forward_pass_is_numerically_the_official_one():
    images, mask = two_images()
    out = filled(DETR(num_classes=91))(images, mask)
    expected = torch.tensor([0.36218742, 1.0738798, -1.7287964, 0.34100455])
    assert_close(out["pred_logits"][0, 0, :4], expected, atol=2e-4, rtol=0)
    expected = torch.tensor([0.40556493, 0.596557, 0.4196054, 0.63374245])
    assert_close(out["pred_boxes"][1, 3], expected, atol=2e-4, rtol=0)
    assert len(out["aux_outputs"]) == 5 and out["co_attended"].shape == (6, 2, 100, 256)


@torch.no_grad()
def test_the_smca_forward_pass_is_numerically_the_official_one():
    out = filled(SMCADETR(num_classes=91))(*two_images())
    expected = torch.tensor([0.5055384, 0.34145722, 0.3921972, 0.6188131])
    assert_close(out["pred_boxes"][0, 0], expected, atol=2e-4, rtol=0)


def test_the_feature_mask_marks_the_padded_column():
    model = small()
    model.backbone[0].body = ResNetBody("resnet18")
    model.input_proj = nn.Conv2d(512, 16, 1)
    _, _, mask, size = model.encode(*two_images())
    assert size == (3, 3) and mask.view(2, 3, 3)[1].tolist() == [[False, False, True]] * 3
    assert mask.view(2, 3, 3)[0].sum() == 0  # row 64..79 is nearest to pixel row 53, which is inside


def test_positions_follow_the_formula():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :, 5] = True
    pos = sine_positions(mask, 8)
    y, x = 2 * np.pi * 2 / (4 + 1e-6), 2 * np.pi * 3 / (5 + 1e-6)  # cell (1, 2), counted from 1, of 4 x 5
    t = 10000 ** (2 / 4)
    expected = [f(v / d) for v in (y, x) for d in (1, t) for f in (np.sin, np.cos)]
    assert_close(pos[0, :, 1, 2], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs_multi_head_attention(masked):
    torch.manual_seed(0)
    own, other = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    own.load_state_dict(other.state_dict())
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]]) if masked else None
    out, d = own(q, k, v, mask)
    assert_close(out, other(q, k, v, key_padding_mask=mask)[0])
    assert_close(own.out_proj(d), out)


def test_padded_tokens_change_nothing_in_the_transformer():
    model = small().eval()
    layer: EncoderLayer = model.transformer["encoder"].layers[0]
    decoder = model.transformer["decoder"].layers[0]
    x, pos, q = torch.randn(1, 6, 16), torch.randn(1, 6, 16), torch.randn(1, 5, 16)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    wide, wide_pos = torch.cat([x, torch.randn(1, 3, 16)], 1), torch.cat([pos, torch.randn(1, 3, 16)], 1)
    wide_mask = torch.tensor([[False] * 6 + [True] * 3])
    memory, wide_memory = layer(x, pos, mask), layer(wide, wide_pos, wide_mask)
    assert_close(wide_memory[:, :6], memory, atol=1e-5, rtol=0)
    ours = decoder(q, q, memory, pos, mask)[0]
    assert_close(decoder(q, q, wide_memory, wide_pos, wide_mask)[0], ours, atol=1e-5, rtol=0)


def test_a_batch_is_its_images_one_by_one():
    model = small().eval()
    images = torch.randn(2, 3, 48, 48)
    mask = torch.zeros(2, 48, 48, dtype=torch.bool)
    together = model(images, mask)["pred_boxes"]
    assert_close(together, torch.cat([model(images[i : i + 1], mask[i : i + 1])["pred_boxes"] for i in range(2)]))


def test_the_backbone_is_torchvisions_resnet_and_its_first_part_is_frozen():
    torch.manual_seed(0)
    body = ResNetBody("resnet18")
    net = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    net.load_state_dict(body.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    features = nn.Sequential(*list(net.children())[:-2])(x)
    assert_close(body(x), features)
    model = DETR(num_classes=2, backbone="resnet18", encoder_layers=1, decoder_layers=1)
    frozen = {n.split(".")[3] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    with torch.device("meta"):
        assert ResNetBody("resnet50", dilation=True)(torch.empty(1, 3, 64, 64)).shape == (1, 2048, 4, 4)


def test_the_gaussian_bias_is_the_formula_and_peaks_at_the_point():
    torch.manual_seed(0)
    layer = SMCALayer(16, 2, 24, 0.0, first=True)
    out, centre = torch.randn(1, 3, 16), torch.rand(1, 3, 2) * 3
    grid = torch.tensor([[x, y] for y in range(4) for x in range(5)], dtype=torch.float32)
    bias = layer.gaussian(out, centre, grid)
    offset, scale = layer.point2(out), layer.point3(out)
    for head in range(2):
        s = slice(2 * head, 2 * head + 2)
        point = centre[0, 1] + offset[0, 1, s]
        expected = -(((point - grid[7]) ** 2 * scale[0, 1, s] ** 2).sum()).abs() / 8
        assert_close(bias[0, head, 1, 7], expected)
    nn.init.zeros_(layer.point2.weight), nn.init.zeros_(layer.point2.bias)
    nn.init.zeros_(layer.point3.weight), nn.init.ones_(layer.point3.bias)
    assert layer.gaussian(out, torch.tensor([[[3.0, 1.0]]]).expand(1, 3, 2), grid)[0, 0, 0].argmax() == 8  # x 3, y 1


def test_smca_learned_content_and_padding_aware_reference():
    model = small(SMCADETR, learned_content=True).eval()
    assert model.query_embed.weight.shape == (5, 32)
    for layer in model.transformer["decoder"].layers:
        assert layer.point3.weight.abs().sum() == 0 and (layer.point3.bias == 1).all()
    assert_close(model.class_embed.bias, torch.full((4,), -4.59512))
    first = model.transformer["decoder"].layers[0]
    for p in first.point1.parameters():
        nn.init.zeros_(p)  # the reference is the middle of the image without its padding, in cells of 8 pixels
    seen = []
    plain = first.gaussian
    first.gaussian = lambda out, centre, grid: seen.append(centre) or plain(out, centre, grid)
    out = model(*pad_images([torch.randn(3, 48, 64), torch.randn(3, 32, 16)]))
    assert seen[0][:, 0].tolist() == [[4.0, 3.0], [1.0, 2.0]]
    assert torch.isfinite(out["pred_boxes"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet99"}, "backbone='resnet99', allowed: resnet18"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"dim": 18}, "dim=18"),
        ({"heads": 3}, "heads=3"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="mask"):
        small()(torch.zeros(1, 3, 48, 48), torch.zeros(1, 6, 6, dtype=torch.bool))
