"""Backbones and weights by name, the stressed teacher, released checkpoints, the counts, data, metrics and schedule."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import nn

from common.data.batches import Plan
from common.metrics.claims import load_document
from q_vit.checkpoint import load
from q_vit.counts import count
from q_vit.data import build_data
from q_vit.metrics import accuracy, query_key_statistics
from q_vit.model import (
    PAPER,
    build_float,
    build_student,
    first_forward,
    load_weights,
    parameter_groups,
    prefix_tokens,
    stress,
)
from q_vit.ops import layers
from q_vit.quantized_vit import Tapped, quantize_vit
from q_vit.released import is_released, load_released, translate, translate_key
from q_vit.schedule import lr_at

MINI = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def mini(seed=0, name="vit_distilled", **kwargs):
    torch.manual_seed(seed)
    model = build_float(name, num_classes=10, in_channels=1, **{**MINI, **kwargs})
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def batch():
    return build_data(name="cued_digits", train_images=64, test_images=8).first(32, 0)


# -------------------------------------------------------------------------------------------------------------- counts
def test_counts_equal_the_numbers_of_the_claims():
    found = count()
    exact = [c for c in load_document(Path(__file__).parents[1])["claims"] if c["kind"] == "exact"]
    assert len(exact) > 70 and {c["metric"] for c in exact} <= set(found)
    wrong = [c["id"] for c in exact if abs(found[c["metric"]] - c["published"]["value"]) > c["tol"] * (1 + 1e-9)]
    assert not wrong
    assert not any(abs(found[f"{c}_4_ratio"] - 6.14) < 0.1 for c in ("lane", "bops64", "bops1024", "lane_fp_attention"))


def test_macs_follow_the_closed_form():
    d, n = 192, 197
    own = {x.name: x.macs for x in layers("deit_tiny_patch16_224", 4)}
    assert own["patch_embed.proj"] == 196 * 768 * d and own["head"] == 1000 * d
    assert own["blocks.3.attn"] == 2 * n * n * d and own["blocks.3.mlp.fc1"] == 4 * n * d * d
    assert {(x.weight_bits, x.name) for x in layers("deit_tiny_patch16_224", 4) if "blocks" not in x.name} == {
        (8, "patch_embed.proj"), (8, "head"),
    }  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_every_model_of_the_paper_builds_and_is_quantised(name):
    with torch.device("meta"):
        model = build_float(name, num_classes=1000)
        student = quantize_vit(model, bits=2, preset="official")
    assert {q.bits for q in student.modules() if hasattr(q, "bits")} == {2, 8}
    assert prefix_tokens(student) == (0 if "swin" in name else 2 if "distilled" in name else 1)


# ---------------------------------------------------------------------------------------------------- teacher, student
def test_stress_changes_q_and_k_but_not_the_function(batch):
    teacher = mini().eval()
    for block in teacher.blocks:
        nn.init.normal_(block.attn.qkv.bias)
    stressed = copy.deepcopy(teacher)
    stress(stressed, batch)
    torch.testing.assert_close(stressed(batch), teacher(batch), atol=1e-5, rtol=1e-5)
    (q, k), (q0, k0) = (Tapped(m, "raw")(batch)[1][0] for m in (stressed, teacher))
    torch.testing.assert_close(q[:, 0] * 3, q0[:, 0], atol=1e-5, rtol=1e-5)
    shift = 3 * k0[:, 1].std() / 3
    torch.testing.assert_close(k[:, 1] * 3, k0[:, 1] + 3 * shift, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(k[:, 0].mean() - 3 * k0[:, 0].mean(), 9 * k0[:, 0].std(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="timm ViT"):
        stress(timm.create_model("resnet10t"), batch)


def test_a_student_starts_from_the_teacher_with_every_step_set(batch):
    teacher = mini()
    student = build_student(teacher, batch, irm=True, bits=2, preset="official")
    own = student.state_dict()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=0)
    assert all(bool(v) for k, v in own.items() if k.endswith(".calibrated"))
    again = build_student(teacher, batch, irm=True, bits=2, preset="official")
    torch.testing.assert_close(again.state_dict(), own, rtol=0, atol=0)
    with pytest.raises(ValueError, match="irm_init='zero'"):
        build_student(teacher, batch, irm=True, irm_init="zero", bits=2)


def test_calibration_is_not_disturbed_by_drop_path(batch):
    states = [build_student(mini(drop_path_rate=0.5), batch, irm=False, bits=4).state_dict() for _ in range(2)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_steps_and_rectification_never_decay():
    student = quantize_vit(mini(), irm_form="paper")
    groups = parameter_groups(student, 0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in student.named_parameters() if id(p) in decayed}
    assert "blocks.0.attn.qkv.weight" in names
    assert not any(n.endswith((".step", ".zero_point", ".bias", ".gamma", ".beta")) for n in names)
    assert sum(len(g["params"]) for g in groups) == len(list(student.parameters()))


def test_lamb_without_decay_does_not_adapt_the_steps():
    p = [nn.Parameter(torch.tensor([1e-3])), nn.Parameter(torch.tensor([10.0]))]
    moved = {}
    for adapt in (False, True):
        q = [nn.Parameter(t.detach().clone()) for t in p]
        optimizer = create_optimizer_v2(q, opt="lamb", lr=0.1, weight_decay=0.0, always_adapt=adapt)
        for t in q:
            t.grad = torch.ones_like(t) * 0.1
        optimizer.step()
        moved[adapt] = [(a - b).abs().item() for a, b in zip(q, p, strict=True)]
    assert moved[False][0] == pytest.approx(
        moved[False][1], rel=1e-4
    )  # Adam's step, whatever the size of the parameter
    assert moved[True][0] < 0.01 * moved[True][1]  # the trust ratio nearly stops a small step


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"name": "deit_smal"}, "deit_smal.*allowed"),
        ({"name": "vit", "pretrained": True}, "no published weights"),
    ],
)
def test_wrong_model_names(kwargs, error):
    with pytest.raises(ValueError, match=error):
        build_float(num_classes=10, **kwargs)


def test_weights_that_do_not_fit_say_why(tmp_path, batch):
    student = build_student(mini(), batch, irm=True, bits=2)
    torch.save({"model": student.state_dict()}, tmp_path / "q.ckpt")
    with pytest.raises(ValueError, match="quantised model, a float one is needed"):
        load_weights(mini(), tmp_path / "q.ckpt")
    torch.save(mini(embed_dim=32).state_dict(), tmp_path / "wide.ckpt")
    with pytest.raises(ValueError, match="of another shape"):
        load_weights(mini(), tmp_path / "wide.ckpt")
    torch.save(mini(seed=1).state_dict(), tmp_path / "ok.ckpt")
    model = mini()
    load_weights(model, tmp_path / "ok.ckpt")
    torch.testing.assert_close(model.state_dict(), mini(seed=1).state_dict(), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "no.ckpt")


# ------------------------------------------------------------------------------------------------- released checkpoints
OURS_TO_RELEASED = [
    (".weight_quantizer.", "."), (".input_quantizer.", ".act."), (".q_quantizer.", ".q_act."), (".k_quantizer.", ".k_act."),
    (".v_quantizer.", ".v_act."), (".p_quantizer.", ".attn_act."), (".q_norm.", ".norm_q."), (".k_norm.", ".norm_k."),
    (".step", ".alpha"), (".calibrated", ".init_state"), (".is_signed", ".signed"),
]  # fmt: skip


def in_released_format(model):
    """A state dict under the released code's names, without the sign flag that its weights do not have."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("weight_quantizer.is_signed"):
            continue
        for a, b in OURS_TO_RELEASED:
            key = key.replace(a, b)
        state[key] = value.float().reshape(1) if value.dtype == torch.bool else value
    return state


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """DeiT-T in the released format with random weights, 4 bit, and the network that it is."""
    torch.manual_seed(0)
    model = quantize_vit(build_float("deit_tiny_distilled_patch16_224", num_classes=7), bits=4, preset="official")
    first_forward(model, torch.randn(2, 3, 224, 224))
    path = tmp_path_factory.mktemp("released") / "best_checkpoint.pth"
    torch.save({"model": in_released_format(model), "epoch": 299}, path)
    return path, model.eval()


def test_released_checkpoints_load_by_key(released):
    path, model = released
    state = torch.load(path, weights_only=True)
    assert is_released(state) and "blocks.11.attn.attn_act.zero_point" in state["model"]
    assert translate_key("head_dist.act.zero_point") == "head_dist.input_quantizer.zero_point"
    assert translate_key("blocks.0.attn.norm_k.bias") == "blocks.0.attn.k_norm.bias"
    torch.testing.assert_close(translate(state["model"]), dict(model.state_dict()), rtol=0, atol=0)
    loaded, _, about = load(path, bits=4)
    assert about["classes"] == [str(c) for c in range(7)] and about["size"] == 224
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_released_checkpoints_that_do_not_fit(released, tmp_path):
    path, _ = released
    with pytest.raises(ValueError, match="steps fit 4 bit"):
        load_released(path, bits=2)
    assert load_released(path, bits=3, check=False) is not None
    state = torch.load(path, weights_only=True)["model"]
    for name, change, error in (
        ("missing", lambda s: s.pop("norm.weight"), "1 keys do not correspond"),
        (
            "raw",
            lambda s: s.update({"head.act.init_state": torch.zeros(1)}),
            "never initialised, e.g. head.input_quantizer",
        ),
        ("fp", lambda s: s.pop("patch_embed.proj.act.alpha"), "has not the keys of the released code"),
    ):
        other = dict(state)
        change(other)
        torch.save(other, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=error):
            load_released(tmp_path / f"{name}.pth", bits=4)


# ------------------------------------------------------------------------------------------------ data, metrics, schedule
def epochs(data, size, epoch, **kwargs):
    plan = Plan(data.images, size, seed=3, repeats=data.repeats, **kwargs)
    return list(data.batches(plan, torch.device("cpu")).epoch(epoch))


def test_batches_depend_on_seed_and_epoch_alone_and_ranks_share_them():
    data = build_data(name="cued_digits", train_images=40, test_images=4)
    whole = epochs(data, 16, 2)
    assert len(whole) == 2 and whole[0][0].shape == (16, 1, 16, 16)
    torch.testing.assert_close(whole[1][0], epochs(data, 16, 2)[1][0], rtol=0, atol=0)
    assert not torch.equal(whole[0][0], epochs(data, 16, 3)[0][0])
    parts = [epochs(data, 16, 2, rank=r, world=2) for r in (0, 1)]
    for step in (0, 1):
        torch.testing.assert_close(torch.cat([p[step][0] for p in parts]), whole[step][0], rtol=0, atol=0)
    assert torch.equal(data.first(8, 3), epochs(data, 16, 1)[0][0][:8])
    with pytest.raises(ValueError, match=r"fewer than train\.batch_size=64"):
        epochs(data, 64, 1)


def folder(root, n=4):
    for split in ("train", "val"):
        for c, name in enumerate(("a", "b")):
            for i in range(n):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 36), tuple(60 * i + 50 if k == c else 20 for k in range(3))).save(path)
    return root


def test_folders_are_augmented_from_seed_epoch_and_position(tmp_path):
    root = folder(tmp_path)
    data = build_data(name="folder", root=str(root), size=32, augment="deit", repeats=3)
    assert data.names == ["a", "b"] and data.look["channels"] == 3 and data.test[0][0].shape == (3, 32, 32)
    a, b = (epochs(data, 6, 1) for _ in range(2))
    torch.testing.assert_close(data.first(6, 3), a[0][0], rtol=0, atol=0)
    torch.testing.assert_close(a[0][0], b[0][0], rtol=0, atol=0)
    assert a[0][1].view(2, 3).eq(a[0][1].view(2, 3)[:, :1]).all(), "three augmentations of an image stand together"
    assert not torch.equal(a[0][0][0], a[0][0][1])
    (root / "val/c").mkdir()
    Image.new("RGB", (40, 36)).save(root / "val/c/0.png")
    with pytest.raises(ValueError, match="different classes: c"):
        build_data(name="folder", root=str(root), size=32)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"name": "imagenet"}, "allowed: cued_digits, mnist"),
        ({"name": "cued_digits", "crop_pct": 0.0}, "crop_pct=0"),
        ({"name": "folder", "root": None}, "data.root is not set"),
        ({"name": "folder", "root": ".", "augment": "cutmix"}, "augment='cutmix', allowed"),
    ],
)
def test_wrong_data(kwargs, error):
    with pytest.raises(ValueError, match=error):
        build_data(**kwargs)


def test_accuracy_counts_top1_and_top5():
    logits = torch.eye(7)[[0, 1, 2, 3]] * 2 + torch.arange(7) * 0.01
    assert accuracy(logits, torch.tensor([0, 1, 0, 6])) == {"top1": 50.0, "top5": 75.0}
    assert "top5" not in accuracy(torch.eye(3), torch.tensor([0, 1, 2]))


def test_query_key_statistics_on_a_network_that_uses_one_code(batch):
    student = build_student(mini(), batch, irm=True, bits=2)
    stats = query_key_statistics(student, batch)
    assert 0.5 < stats["qk_entropy"] < 2 and 0 < stats["qk_clipped"] < 0.5
    with torch.no_grad():
        for block in student.blocks:
            block.attn.q_quantizer.step.fill_(1e6)
            block.attn.k_quantizer.step.fill_(1e6)
    stats = query_key_statistics(student, batch)
    assert stats["qk_entropy"] == 0 and stats["qk_clipped"] == 0
    assert query_key_statistics(mini(), batch) == {} and student.training


def test_schedules():
    rates = [lr_at(s, base_lr=1.0, steps=100, epochs=10, kind="onecycle") for s in range(100)]
    assert rates[0] == pytest.approx(1 / 25) and max(rates) == rates[10] == 1 and rates[-1] < 1e-3
    rates = [lr_at(s, base_lr=1.0, steps=100, epochs=10, min_lr=0.1) for s in range(100)]
    assert rates[0] == rates[9] == 1 and rates[10] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 10)))
    for bad in ({"kind": "linear"}, {"warmup": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            lr_at(0, base_lr=1.0, steps=10, epochs=1, **bad)


def test_counts_follow_the_size_of_the_image():
    """A dead argument once: shapes for another size than 224 could not be built."""
    own = {x.name: x.macs for x in layers("deit_tiny_patch16_224", 4, size=384)}
    assert own["patch_embed.proj"] == 576 * 768 * 192 and own["blocks.0.attn"] == 2 * 577 * 577 * 192
    assert sum(x.macs for x in layers("swin_tiny_patch4_window7_224", 4, size=448)) > 4 * 4.3e9


def test_weights_start_by_a_rule_of_their_own(batch):
    """Activations as released (one number for all channels), weights with a step per row."""
    student = build_student(
        mini(), batch, irm=False, bits=2, preset="official", init="official", weight_init="per_group"
    )
    fc1 = student.blocks[0].mlp.fc1
    torch.testing.assert_close(fc1.weight_quantizer.step, 2 * fc1.weight.abs().mean(1))
    assert len(fc1.input_quantizer.step.unique()) == 1
    both = build_student(mini(), batch, irm=False, bits=2, preset="official", init="per_group").blocks[0].mlp.fc1
    torch.testing.assert_close(both.weight_quantizer.step, fc1.weight_quantizer.step, rtol=0, atol=0)
    assert len(both.input_quantizer.step.unique()) > 1
    released = build_student(mini(), batch, irm=False, bits=2, preset="official").blocks[0].mlp.fc1
    assert len(released.weight_quantizer.step.unique()) == 1
    with pytest.raises(ValueError, match="weight_init='mean', allowed: official, per_group, max"):
        build_student(mini(), batch, irm=False, bits=2, weight_init="mean")


def test_k_goes_through_k_norm_whose_calibrated_start_keeps_no_offset(batch):
    teacher = mini()
    for block in teacher.blocks:
        nn.init.normal_(block.attn.qkv.bias, std=2.0)
    student = build_student(teacher, batch, irm=True, bits=8)
    for block in student.blocks:
        assert block.attn.k_norm.bias.abs().max() == 0 and block.attn.q_norm.bias.abs().max() > 0
    taps = Tapped(student.eval(), "pre_quant")
    with torch.no_grad():
        before = taps(batch)[1][0]
        student.blocks[0].attn.k_norm.bias.fill_(5.0)
        after = taps(batch)[1][0]
    torch.testing.assert_close(after[1], before[1] + 5)
    torch.testing.assert_close(after[0], before[0])


def test_pretrained_weights_that_cannot_be_fetched_end_at_once_and_name_the_file_option(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("q_vit.model.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"cannot fetch the pretrained weights of deit_tiny.*model\.file="):
        build_float("deit_tiny_patch16_224", num_classes=3, pretrained=True)
    own = build_float("deit_tiny_patch16_224", num_classes=1000)
    torch.save({"model": own.state_dict()}, tmp_path / "deit.pth")
    loaded = build_float("deit_tiny_patch16_224", num_classes=3, pretrained=True, file=str(tmp_path / "deit.pth"))
    torch.testing.assert_close(loaded.pos_embed, own.pos_embed, rtol=0, atol=0)
    assert loaded.head.out_features == 3
    with pytest.raises(ValueError, match=r"model\.file="):
        build_float("deit_tiny_patch16_224", num_classes=3, pretrained=True, file=str(tmp_path / "no.pth"))
