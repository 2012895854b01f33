"""The whole model: timm parity, removal against masking, batch invariance, counts, limits, bad input."""

import copy
import itertools

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from adaptive_prune import lvvit, removal
from adaptive_prune.backbones import build_vit, cost_of
from adaptive_prune.calibrate import calibrate
from adaptive_prune.distillation import teacher_outputs
from adaptive_prune.model import PrunedViT, prune
from adaptive_prune.removal import padded_attention, ragged_attention
from common.metrics.ops import count_macs

REMOVALS = ("packed", "padded", "bucketed")


def vit(depth=12, prefix="none", **kwargs):
    """A small random ViT with attention far from uniform."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=24, patch_size=4, in_chans=1, num_classes=7, embed_dim=32, depth=depth, num_heads=4, mlp_ratio=2,
        **({"reg_tokens": 2} if prefix == "registers" else {}), **kwargs,
    )  # fmt: skip
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def images(n=5, seed=0, channels=1, size=24):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def pruned(model=None, locations=(4, 7, 10), budget=0.5, **kwargs):
    model = prune(model or vit(), locations=locations, budget=budget, **kwargs).eval()
    calibrate(model, [images()], budget, rounds=1)
    return model


# ---------------------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("inference", ["masked", *REMOVALS, "batch_topk"])
def test_nothing_pruned_is_the_timm_model_and_everything_pruned_works(inference):
    model = PrunedViT(vit(), thresholds=[-1, -1, -1], inference=inference).eval()
    logits, info = model(images(), details=True)
    torch.testing.assert_close(logits, model.vit(images()), rtol=1e-5, atol=1e-5)
    assert (info.kept == 36).all() and (info.macs == model.cost.dense).all()
    model.theta.data.fill_(1.0)
    logits, info = model(images(), details=True)
    assert logits.isfinite().all() and (info.kept == 0).all()
    assert info.macs.tolist() == pytest.approx([model.cost.floor((4, 7, 10)) * model.cost.dense] * 5)


@pytest.mark.parametrize("rule", ["threshold", "topk", "evit", "tome", "none"])
def test_an_empty_batch_has_logits_of_its_shape(rule):
    model = PrunedViT(vit(), rule=rule, budget=0.6)
    for mode in (True, False):
        logits, info = model.train(mode)(images(0), details=True)
        assert logits.shape == (0, 7) and info.macs.shape == (0,)
        assert info.kept.shape == (0, len(model.locations))
    assert model(images(0)).shape == (0, 7)


def test_one_surviving_token_works_everywhere():
    model = pruned()
    model.inference = "masked"
    best = model(images(), details=True)[1].scores[:, 0].topk(2, 1).values
    found = {}
    for inference in ("masked", *REMOVALS):
        model.inference = inference
        model.theta.data.copy_(torch.tensor([float(best.max(0).values.mean()), -1.0, -1.0]))
        found[inference], info = model(images(), details=True)
    assert info.kept[:, 0].min() == 0 and info.kept[:, 0].max() >= 1
    for inference in REMOVALS:
        torch.testing.assert_close(found[inference], found["masked"], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ masking equals removal
@pytest.mark.parametrize("prefix", ["none", "registers"])
@pytest.mark.parametrize("inference", REMOVALS)
def test_removal_equals_the_masked_training_pass(prefix, inference):
    model = pruned(vit(prefix=prefix))
    masked, seen = model.train()(images(), details=True)
    model.eval().inference = inference
    logits, info = model(images(), details=True)
    torch.testing.assert_close(logits, masked, rtol=1e-5, atol=1e-5)
    assert torch.equal(info.masks, seen.masks) and torch.equal(info.kept, seen.kept)
    torch.testing.assert_close(info.macs, seen.macs.detach())
    assert info.kept.std(0).max() > 0, "the test needs different counts"
    assert (info.masks[:, 1] <= info.masks[:, 0]).all() and (info.masks[:, 2] <= info.masks[:, 1]).all()


@pytest.mark.parametrize("inference", REMOVALS)
def test_no_image_depends_on_its_batch(inference):
    model, x = pruned(inference=inference), images(6)
    whole = model(x)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(model(x[order]), whole[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), whole, rtol=1e-5, atol=1e-5)


def test_the_released_batch_rule_does_depend_on_it():
    model, x = pruned(inference="batch_topk"), images(6)
    logits, info = model(x, details=True)
    assert (info.kept == info.kept[0]).all()
    alone = torch.cat([model(x[i : i + 1]) for i in range(6)])
    assert not torch.allclose(alone, logits, atol=1e-3)
    model.inference = "packed"
    torch.testing.assert_close(alone, model(x), rtol=1e-5, atol=1e-5)  # at batch 1 both are the paper's rule
    own = model(x, details=True)[1].kept[:, 0].mean()
    assert own % 1 > 0 and info.kept[0, 0] == own.floor(), "the mean of the batch, rounded down"


@pytest.mark.parametrize("rule", ["topk", "evit", "tome"])
def test_baselines_meet_the_budget_with_one_count_for_all(rule):
    model = PrunedViT(vit(), rule=rule, budget=0.6).eval()
    logits, info = model(images(), details=True)
    assert (info.macs == info.macs[0]).all() and float(info.macs[0]) / model.cost.dense == pytest.approx(0.6, abs=0.01)
    torch.testing.assert_close(model(images()[:1]), logits[:1], rtol=1e-5, atol=1e-5)
    everything = {"keep": [0] * 12} if rule == "tome" else {"keep": [36] * 3}
    dense = PrunedViT(vit(), rule=rule, **everything).eval()
    torch.testing.assert_close(dense(images()), dense.vit(images()), rtol=1e-5, atol=1e-5)
    if rule != "tome":
        PrunedViT(vit(), rule=rule, keep=[1, 0, 0]).eval()(images())


def test_the_flop_counter_on_the_packed_run_equals_the_formula():
    model = pruned()
    dense = sum(n for m, n in count_macs(model.vit, images()).items() if "head" not in m)
    assert dense == 5 * model.cost.dense
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, info = model(images(), details=True)
    counted = counter.get_total_flops() / 2
    assert counted == pytest.approx(float(info.macs.sum()), rel=0.01)


class Waits(TorchDispatchMode):
    """Notes the operations for which a host waits for its device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = [t for t in args[1] if t is not None] if name in ("index", "index_put", "index_put_") else []
        if name in ("nonzero", "masked_select", "_local_scalar_dense") or any(t.dtype == torch.bool for t in indices):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["timm", "lvvit"])
@pytest.mark.parametrize("inference", [*REMOVALS, "batch_topk"])
def test_one_synchronisation_per_threshold(inference, family, monkeypatch):
    model, x = (pruned(), images()) if family == "timm" else (lv_with_different_counts(), images(4, 0, 3, 64))
    model.inference = inference
    waits, tolist = Waits(), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (waits.seen.append("tolist"), tolist(t))[1])
    with waits:
        _, info = model(x, details=True)
    assert inference == "batch_topk" or info.kept.std(0).max() > 0
    assert waits.seen == ["_local_scalar_dense" if inference == "batch_topk" else "tolist"] * len(model.locations)
    waits.seen = []
    with waits:
        alone = model(x[:1])
    assert waits.seen == ["_local_scalar_dense" if inference == "batch_topk" else "nonzero"] * len(model.locations)
    torch.testing.assert_close(alone, model(x[:1], details=True)[0], rtol=0, atol=0)
    assert model._remove(x[:1], details=False)[1] is None, "costs that nobody asked for"


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "there", "kernel"),
    [
        ("cpu", torch.bfloat16, None, True, "loop"), ("cuda", torch.float16, (8, 0), True, "varlen"),
        ("cuda", torch.bfloat16, (9, 0), True, "varlen"), ("cuda", torch.float16, (7, 5), True, "padded"),
        ("cuda", torch.float32, (9, 0), True, "padded"), ("cuda", torch.float16, (9, 0), False, "padded"),
    ],
)  # fmt: skip
def test_the_kernel_follows_what_the_card_can(device, dtype, capability, there, kernel, monkeypatch):
    monkeypatch.setattr(removal, "_capability", lambda _: capability)
    monkeypatch.setattr(removal, "_has_varlen", lambda: there)
    assert removal.ragged_kernel(torch.device(device), dtype) == kernel


def test_attention_on_padded_queries_is_attention_per_image():
    q, k, v = torch.randn(3, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = ragged_attention(q, k, v, [2, 1, 6], scale=0.5)
    torch.testing.assert_close(padded_attention(q, k, v, [2, 1, 6], scale=0.5), expected)


# --------------------------------------------------------------------------------------------------------------- training
def test_thresholds_receive_gradients_from_cost_and_attention():
    model = pruned().train()
    model.temperature = 200.0  # wide enough that several scores feel the threshold
    logits, info = model(images(), details=True)
    (by_cost,) = torch.autograd.grad(
        model.cost.staged(info.macs[None] * 0, ()) + info.macs.sum(), model.theta, retain_graph=True
    )
    assert by_cost[2] < 0, "raising the last threshold lowers the cost"
    (by_attention,) = torch.autograd.grad(logits.square().sum(), model.theta)
    assert by_attention.abs().min() > 0


def test_cumulative_masks_are_forward_equal_with_another_gradient():
    model = pruned().train()
    model.temperature = 200.0
    found = []
    for cumulative in (True, False):
        model.cumulative, model.eps = cumulative, 0.0
        logits, info = model(images(), details=True)
        found.append((logits, *torch.autograd.grad(info.macs.sum(), model.theta)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_a_threshold_pays_for_the_later_stages_too(monkeypatch):
    """With scores that nothing moves: the cost is that of the product of all gates so far, and so is its gradient."""
    scores = torch.rand(5, 37, generator=torch.Generator().manual_seed(0)) * 0.05
    monkeypatch.setattr("adaptive_prune.model.token_score", lambda *_, **__: scores)
    model = prune(vit(), locations=(4, 7, 10), budget=0.5, thresholds=(0.01, 0.02, 0.03), temperature=100.0).train()
    (found,) = torch.autograd.grad(model(images(), details=True)[1].macs.sum(), model.theta)
    theta, alive, kept = model.theta.detach().clone().requires_grad_(), 1.0, []
    for threshold in theta:
        soft = torch.sigmoid(100 * (scores[:, 1:] - threshold))
        alive = alive * ((scores[:, 1:] > threshold).float() + soft - soft.detach())
        kept.append(alive.sum(1))
    (expected,) = torch.autograd.grad(model.cost.staged(kept, model.locations).sum(), theta)
    torch.testing.assert_close(found, expected)


def test_the_budget_alone_moves_thresholds_to_the_target():
    model = prune(vit(6), locations=(2, 3, 4), budget=0.5, temperature=200.0).train()
    for p in model.vit.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD([model.theta], lr=2e-4)
    for _ in range(60):
        loss = model.budget_loss(model(images(8), details=True)[1].macs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_activation_masks_leave_dropped_tokens_as_keys_of_value_zero():
    """Against the plain formula: attend to everything, then set dropped tokens to zero after every block."""
    model = pruned().train()
    attention, info = model(images(), details=True)
    model.mask = "activation"
    found, seen = model(images(), details=True)
    assert not torch.allclose(found, attention, atol=1e-3) and info.kept.min() < 36
    (grad,) = torch.autograd.grad(found.square().sum(), model.theta, retain_graph=True)
    assert grad.abs().sum() > 0, "the thresholds learn what their zeros do to the logits"
    x, s = model.embed(images()), -1
    for i, block in enumerate(model.vit.blocks):
        s += i in model.locations
        x = block(x)
        if s >= 0:
            x = x * torch.cat([torch.ones(len(x), 1), seen.masks[:, s].float()], 1)[..., None]
    torch.testing.assert_close(found, model.vit.forward_head(model.vit.norm(x)), rtol=1e-4, atol=1e-4)
    model.theta.data.fill_(-1.0)
    torch.testing.assert_close(model(images()), model.vit(images()), rtol=1e-5, atol=1e-5)


def test_autocast_computes_the_decision_in_float32():
    model = pruned().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, info = model(images(), details=True)
    assert info.scores.dtype == torch.float32 and info.macs.dtype == torch.float32 and logits.isfinite().all()


def test_thresholds_and_temperature_of_a_model_scale_with_its_tokens():
    model = prune(vit(), budget=0.5)
    assert model.temperature == pytest.approx(1e4 * 36 / 196)
    assert model.theta.tolist() == pytest.approx([0.001 * k * 196 / 36 for k in (1, 2, 3)])


def test_calibration_corrects_towards_the_budget():
    """The first guess is off, as counts that vary cost more than their mean: a correction comes nearer, none loses that."""
    x = [images(20) * torch.linspace(0.2, 3, 20).view(-1, 1, 1, 1)]
    off = [abs(calibrate(prune(vit(), budget=0.8), x, 0.8, rounds=r) - 0.8) for r in (1, 2)]
    assert off[0] > 0.003 and off[1] < off[0] / 2
    off = [abs(calibrate(prune(vit(), budget=0.7), x, 0.7, rounds=r) - 0.7) for r in (1, 2, 3)]
    assert off == sorted(off, reverse=True), "whole tokens: a correction can overshoot"


def test_calibration_meets_the_budget():
    model = prune(vit(), locations=(4, 7, 10), budget=0.5)
    assert calibrate(model, [images(20), images(20, 1)], 0.5) == pytest.approx(0.5, abs=0.02)
    assert model.training
    with pytest.raises(ValueError, match="rule is 'topk'"):
        calibrate(PrunedViT(vit(), rule="topk", budget=0.5), [images()], 0.5)


# ---------------------------------------------------------------------------------------------------------------- models
def test_state_dict_of_timm_loads_with_only_the_thresholds_missing():
    source = vit()
    model = prune(vit(), budget=0.5)
    torch.nn.init.zeros_(model.vit.head.weight)
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert missing == ["theta"] and not unexpected
    torch.testing.assert_close(model.vit.head.weight, source.head.weight)
    again = prune(vit(), budget=0.5)
    again.load_state_dict(model.state_dict())
    bad = copy.deepcopy(model.state_dict())
    bad["theta"][1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        again.load_state_dict(bad)


def test_wrapping_timm_by_name_with_registers_and_two_class_tokens():
    for name in ("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_224"):
        model = prune(
            timm.create_model(name, img_size=32, embed_dim=24, depth=4, num_heads=3), locations=(2,), budget=0.9
        ).eval()
        x = images(2, channels=3, size=32)
        model.theta.data.fill_(-1.0)
        torch.testing.assert_close(model(x), model.vit(x), rtol=1e-4, atol=1e-4)
        model.theta.data.fill_(1.0)
        assert model(x).isfinite().all()


def small_lv():
    torch.manual_seed(0)
    model = lvvit.LVViT(img_size=64, embed_dim=24, depth=4, num_heads=3, num_classes=5)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model


def lv_with_different_counts():
    """A small LV-ViT that keeps nothing of two of the images(4, channels=3, size=64), in masked inference."""
    model = prune(small_lv(), locations=(1, 2), budget=1.0).eval()
    model.inference = "masked"
    scores = model(images(4, channels=3, size=64), details=True)[1].scores[:, 0]
    model.theta.data.copy_(torch.tensor([scores.amax(1).sort().values[1:3].mean(), -1.0]))
    return model


def test_lvvit_halves_residuals_and_adds_the_best_token():
    model, x = small_lv().eval(), images(2, channels=3, size=64)
    block, tokens = model.blocks[0], torch.randn(2, 17, 24)
    half = tokens + block.attn(block.norm1(tokens)) / 2
    torch.testing.assert_close(block(tokens), half + block.mlp(block.norm2(half)) / 2)
    f = model.forward_features(x)
    expected = model.head(f[:, 0]) + 0.5 * model.aux_head(f[:, 1:]).max(1).values
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(teacher_outputs(model, x)[0], model.head(f[:, 0]))
    names = set(lvvit.lvvit("lvvit_s", depth=1).state_dict())
    stem = {"patch_embed.conv1.weight", "patch_embed.bn3.bias", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    block = {"blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias", "blocks.0.mlp.fc2.bias"}
    assert names >= stem | block | {"norm.weight", "head.weight", "aux_head.weight", "cls_token", "pos_embed"}
    assert "blocks.0.attn.qkv.bias" not in names
    with pytest.raises(ValueError, match="lvvit_l"):
        lvvit.lvvit("lvvit_l")


@pytest.mark.parametrize("inference", REMOVALS)
def test_lvvit_removal_equals_masking_and_an_image_without_survivors_has_class_logits(inference):
    model, x = lv_with_different_counts(), images(4, channels=3, size=64)
    masked = model(x)
    model.inference = inference
    logits, info = model(x, details=True)
    assert sorted((info.kept[:, 1] == 0).tolist()) == [False, False, True, True]
    torch.testing.assert_close(logits, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "params"), [("deit_tiny_patch16_224", 5717416), ("lvvit_s", 26151824)])
def test_counts_of_the_paper(name, params):
    with torch.device("meta"):
        model = build_vit(name=name, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == params
    code = {"deit_tiny_patch16_224": 1.24637184e9, "lvvit_s": 6.51892e9}[name]
    cost = cost_of(model, extended="lvvit" in name)
    assert cost.dense_without_prefix == pytest.approx(code, rel=1e-6)


def test_the_miniature():
    model = prune(vit(6), locations=(2, 3, 4), budget=0.5)
    head = 32 * 7 + 7
    assert sum(p.numel() for p in model.parameters()) - head == 53421 - (32 * 10 + 10)
    assert model.cost.dense == pytest.approx(2.363e6, abs=500)


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"locations": (0, 4)}, r"locations=\[0, 4\]"),
        ({"locations": (4, 4)}, "increase strictly"),
        ({"locations": (4, 12)}, r"1\.\.11"),
        ({"budget": 1.5}, r"budget 1\.5 must be in"),
        ({"budget": 0.1}, r"below the floor 0\.3"),
        ({"thresholds": [0.1] * 4}, "4 thresholds for 3"),
        ({"thresholds": [0.1, float("inf"), 0.2]}, "finite"),
        ({"rule": "random"}, "rule='random', allowed: none, threshold"),
        ({"score": "max"}, "score='max', allowed"),
        ({"mask": "zero"}, "mask='zero', allowed"),
        ({"inference": "sparse"}, "inference='sparse', allowed: packed"),
        ({"rule": "topk", "keep": [5, 9, 1]}, "not increasing"),
        ({"rule": "topk", "budget": None}, "needs a budget"),
        ({"rule": "tome", "keep": [1, 2]}, "one number of merges"),
        ({"keep": [1, 2, 3]}, "takes no token counts"),
    ],
)
def test_bad_options(kwargs, error):
    with pytest.raises(ValueError, match=error):
        PrunedViT(vit(), **{"budget": 0.5, **kwargs})


def test_models_that_cannot_be_pruned():
    with pytest.raises(ValueError, match="global_pool='avg'"):
        prune(vit(global_pool="avg"), budget=0.5)
    with pytest.raises(ValueError, match="Linear is no timm"):
        prune(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="attention dropout"):
        prune(vit(attn_drop_rate=0.1), budget=0.5)
    with pytest.raises(ValueError, match=r"deit_smal_.*allowed"):
        build_vit(name="deit_smal_patch16_224", num_classes=10)
    with pytest.raises(ValueError, match="no timm VisionTransformer"):
        build_vit(name="resnet18", num_classes=10)


def test_bad_images():
    model = pruned()
    with pytest.raises(ValueError, match=r"32 x 32.*24 x 24.*img_size=32"):
        model(images(size=32))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        model(torch.zeros(1, 24, 24))


def test_every_pair_of_layouts_agrees_on_unequal_lengths():
    model, x = pruned(), images(9, 3)
    found = []
    for inference in REMOVALS:
        model.inference = inference
        found.append(model(x))
    for a, b in itertools.combinations(found, 2):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
