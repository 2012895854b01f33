"""FM-ViT and the baselines: every subset, independence of absent branches, counts, losses, weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from common.metrics.claims import load_claims
from fm_vit import counts
from fm_vit.baselines import ConcatFusion, CrossAttentionFusion, SharedViT, TwoBranchCMFL, cross_modal_focal
from fm_vit.fusion_attention import FusionAttention
from fm_vit.losses import path_losses, subsets, training_paths
from fm_vit.model import FMViT, build_trunk
from fm_vit.mutual_attention import MutualAttention
from fm_vit.tests.helpers import PAPER

NAMES = ["rgb", "depth", "ir"]
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def images(names=NAMES, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = {m: torch.randn(batch, 3, 16, 16, generator=g) for m in NAMES}
    return {m: made[m] for m in names}


def model(**options):
    torch.manual_seed(0)
    return FMViT(NAMES, vit=VIT, **options).eval()


def test_subsets_of_three_are_seven():
    assert [len(s) for s in subsets(NAMES)] == [1, 1, 1, 2, 2, 2, 3]
    assert training_paths(NAMES, ["single", "cross"]) == [
        ("single", ("rgb",)), ("single", ("depth",)), ("single", ("ir",)), ("cross", ("rgb", "depth", "ir")),
    ]  # fmt: skip
    assert training_paths(["rgb"], ["single", "cross"]) == [("cross", ("rgb",))]
    every = ["single", "partial", "cross"]
    assert [s for _, s in training_paths(NAMES, every)] == subsets(NAMES)
    assert [k for k, _ in training_paths(NAMES, every)] == ["single"] * 3 + ["partial"] * 3 + ["cross"]
    assert len(training_paths([*NAMES, "thermal"], every)) == 15 and len(training_paths(NAMES[:2], every)) == 3
    with pytest.raises(ValueError, match="of 2 modalities there is no such subset"):
        training_paths(NAMES[:2], ["partial"])
    with pytest.raises(ValueError, match="triple"):
        training_paths(NAMES, ["triple"])
    with pytest.raises(ValueError, match="one or more"):
        training_paths(NAMES, [])


@pytest.mark.parametrize("after", [None, [1], [1, 2], []])
def test_paths_share_the_trunk_and_equal_separate_passes(after):
    net, x = model(after=after), images()
    paths = subsets(NAMES)
    together = net(x, paths)
    for path, out in zip(paths, together, strict=True):
        alone = net({m: x[m] for m in path})
        assert list(out) == list(alone) == list(path)
        for m in path:
            torch.testing.assert_close(out[m], alone[m])
    one = net({"ir": x["ir"]})["ir"]
    assert torch.equal(net({"ir": x["ir"]}, [["ir"]])[0]["ir"], one)
    reordered = net(dict(reversed(x.items())))
    assert list(reordered) == NAMES and torch.equal(reordered["rgb"], net(x)["rgb"])


def test_one_modality_depends_on_its_branch_only():
    net = model()
    net({"depth": images()["depth"]})["depth"].sum().backward()
    for name, p in net.named_parameters():
        used = name.startswith("branches.depth.")
        assert (p.grad is not None) == used, name


def test_in_the_cross_path_every_branch_sees_the_others():
    net, x = model(), {m: v.requires_grad_() for m, v in images().items()}
    net(x)["rgb"].sum().backward()
    assert all(v.grad.abs().sum() > 0 for v in x.values())
    late, x = model(after=[]), {m: v.requires_grad_() for m, v in images().items()}
    late(x)["rgb"].sum().backward()
    assert x["ir"].grad is None or not x["ir"].grad.any()


def test_grey_images_are_repeated_and_bad_input_is_named():
    net, x = model(), images(["ir"])
    grey = x["ir"][:, :1]
    assert torch.equal(net({"ir": grey})["ir"], net({"ir": grey.repeat(1, 3, 1, 1)})["ir"])
    for bad, message in (
        ({}, "no modality"),
        ({"thermal": x["ir"]}, "thermal"),
        ({"rgb": x["ir"][:2], "ir": x["ir"]}, "batch and image size"),
        ({"ir": x["ir"][:, :2]}, r"\(3, 2, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            net(bad)
    with pytest.raises(ValueError, match="needs one or more"):
        net(x, [["rgb"]])
    with pytest.raises(ValueError, match="different names"):
        FMViT(["a", "a"], vit=VIT)
    with pytest.raises(ValueError, match="after blocks"):
        model(after=[3])
    for other in (net, *(k(NAMES, vit=VIT) for k in (SharedViT, ConcatFusion)), TwoBranchCMFL(["rgb", "ir"], vit=VIT)):
        with pytest.raises(ValueError, match=r"images are \(20, 20\), the network was made for \(16, 16\)"):
            other({"ir": torch.zeros(1, 3, 20, 20)})


def test_any_names_and_one_state_dict_for_every_subset():
    net = FMViT(["swir", "thermal"], vit=VIT)
    assert [*net({"thermal": images()["ir"]})] == ["thermal"]
    torch.testing.assert_close(
        net.score({"a": torch.tensor([[0.0, math.log(3)]]), "b": torch.zeros(1, 2)}), torch.tensor([0.625])
    )


def test_counts_are_those_of_the_claims_of_the_formulas_and_of_what_a_row_lacks():
    found = counts.count()
    published = {c["metric"]: c for c in load_claims(PAPER) if c["kind"] == "exact"}
    assert published
    for size, (dim, _) in counts.SIZES.items():
        assert found[f"params_cmtb_{size}"] == counts.cmtb_parameters(dim)
        assert found[f"macs_cmtb_single_{size}"] == counts.cmtb_macs(dim, 1)
        assert found[f"macs_cmtb_fused_{size}"] == counts.cmtb_macs(dim, 3)
    assert found["params_branch_small"] == 24_033_794 and found["macs_cmtb_fused_small"] == 233_878_272
    assert set(published) <= set(found)

    # The rows of the table differ by what they lack.
    dim, whole = 384, found["params_three_small"]
    attention = 4 * (dim**2 + dim) + 2 * dim  # projections and one norm
    assert whole - found["params_row_no_mma"] == 3 * attention
    assert whole - found["params_row_no_mfa"] == 3 * (attention + 2 * dim)  # two norms
    assert whole - found["params_row_late_fusion"] == 3 * found["params_cmtb_small"]
    assert found["params_row_shared"] == found["params_trunk_small"] + 2 * dim + 2
    assert found["params_row_concat"] == 3 * found["params_trunk_small"] + 6 * dim + 2


def test_trunk_from_a_file_and_wrong_architectures(tmp_path):
    trunk = VisionTransformer(num_classes=10, **VIT)
    torch.save(trunk.state_dict(), tmp_path / "vit.pth")
    net = FMViT(["rgb"], vit={**VIT, "weights": str(tmp_path / "vit.pth")})
    assert torch.equal(net.branches["rgb"].trunk.pos_embed, trunk.pos_embed)
    with pytest.raises(ValueError, match="does not fit"):
        build_trunk(**{**VIT, "depth": 3}, weights=str(tmp_path / "vit.pth"))
    for name in ("resnet18", "deit_tiny_distilled_patch16_224"):
        with pytest.raises(ValueError, match="one class token"):
            build_trunk(name=name)


# ------------------------------------------------------------------------------------------------------------ baselines
def test_shared_vit_is_one_network():
    torch.manual_seed(0)
    net, x = SharedViT(NAMES, vit=VIT).eval(), images()
    out = net(x)
    torch.testing.assert_close(out["ir"], net({"rgb": x["ir"]})["rgb"])
    assert [*net(x, [["rgb"], ["rgb", "ir"]])[1]] == ["rgb", "ir"]


@pytest.mark.parametrize("kind", [ConcatFusion, CrossAttentionFusion])
def test_zero_filled_fusion(kind):
    torch.manual_seed(0)
    net, x = kind(NAMES, vit=VIT).eval(), images()
    zeros = torch.zeros_like(x["rgb"])
    torch.testing.assert_close(
        net({"rgb": x["rgb"]})["fused"], net({"rgb": x["rgb"], "depth": zeros, "ir": zeros})["fused"]
    )
    many = net(x, [["rgb"], ["rgb", "depth", "ir"]])
    torch.testing.assert_close(many[1]["fused"], net(x)["fused"])
    black = kind(NAMES, vit=VIT, fill="black")
    black.load_state_dict(net.state_dict())
    black.eval()
    torch.testing.assert_close(
        black({"rgb": x["rgb"]})["fused"], net({"rgb": x["rgb"], "depth": zeros - 1, "ir": zeros - 1})["fused"]
    )
    with pytest.raises(ValueError, match="grey"):
        kind(NAMES, vit=VIT, fill="grey")


def test_modality_dropout_spares_the_first_modality_and_evaluation():
    torch.manual_seed(0)
    net = ConcatFusion(NAMES, vit=VIT, dropout=1.0)
    x = images()
    rgb = net.train()({"rgb": x["rgb"]})["fused"]
    torch.testing.assert_close(net(x)["fused"], rgb)
    assert not torch.allclose(net({"rgb": x["rgb"] + 1})["fused"], rgb), "the first modality is never dropped"
    assert not torch.allclose(net.eval()(x)["fused"], rgb)
    mismatch = ConcatFusion(NAMES, vit=VIT, train_fill="black")
    assert not torch.allclose(mismatch.train()({"rgb": x["rgb"]})["fused"], mismatch.eval()({"rgb": x["rgb"]})["fused"])


def test_cross_attention_is_over_channels():
    torch.manual_seed(0)
    net, x = CrossAttentionFusion(["rgb", "ir"], vit=VIT).eval(), images(["rgb", "ir"])
    a, b = (net.trunks[m].forward_features(x[m])[:, 1:] for m in ("rgb", "ir"))
    attended = torch.einsum("bij,bnj->bni", torch.einsum("bni,bnj->bij", b, a).softmax(2), a)
    conv, norm, relu = net.mix["ir"]
    mixed = b + relu(norm(conv(attended.mT))).mT
    expected = net.head(torch.cat([a.mean(1), mixed.mean(1)], 1))
    torch.testing.assert_close(net(x)["fused"], expected)


def test_cmfl():
    """w at (p, q) = (.5, .8) is .8 * .8 / 1.3; alpha (1 - w)^gamma -log p, by hand."""
    p, q = 0.5, 0.8
    logits = torch.tensor([[0.0, 0.0]])
    other = torch.tensor([[math.log(1 - q), math.log(q)]])
    w = q * 2 * p * q / (p + q)
    value = cross_modal_focal(logits, other, torch.tensor([1]), alpha=2.0, gamma=3.0)
    assert value.item() == pytest.approx(2 * (1 - w) ** 3 * -math.log(p), rel=1e-5)
    torch.testing.assert_close(
        cross_modal_focal(logits, other, torch.tensor([1]), gamma=0.0), F.cross_entropy(logits, torch.tensor([1]))
    )
    net = TwoBranchCMFL(["rgb", "depth"], vit=VIT)
    x = images(["rgb", "depth"])
    out = net(x, [["rgb"], ["rgb", "depth"]])
    assert [*out[0]] == ["rgb"] and [*out[1]] == ["rgb", "depth", "joint"]
    torch.testing.assert_close(net.score(out[1]), out[1]["joint"].softmax(-1)[:, 1])
    labels = torch.tensor([0, 1, 1])
    terms = path_losses(net, out[1:], ["cross"], labels, cmfl=0.0)
    torch.testing.assert_close(terms["loss_cross"], F.cross_entropy(out[1]["joint"], labels))
    for wrong in (2, -100):
        with pytest.raises(ValueError, match=rf"1 live or 0 attack, got \[{wrong}\]"):
            path_losses(net, out[1:], ["cross"], torch.tensor([0, 1, wrong]))
    with pytest.raises(ValueError, match="two modalities"):
        TwoBranchCMFL(NAMES, vit=VIT)
    with pytest.raises(ValueError, match="cmfl=1.5"):
        path_losses(net, out[1:], ["cross"], labels, cmfl=1.5)
    with pytest.raises(ValueError, match=r"paths \[cross\]"):
        path_losses(net, out[:1], ["single"], labels)
    with pytest.raises(TypeError, match="cmfl"):  # of another model it would say nothing
        path_losses(model(), model()(images(), [NAMES]), ["cross"], labels, cmfl=0.5)


def test_gradients_of_cmfl_flow_through_both_probabilities():
    def by_hand(z, other):
        p, q = 1 / (1 + math.exp(-z)), 1 / (1 + math.exp(-other))
        return -((1 - q * 2 * p * q / (p + q)) ** 3) * math.log(p)

    z, other = torch.tensor([[0.0, 0.4]], requires_grad=True), torch.tensor([[0.0, 1.1]], requires_grad=True)
    cross_modal_focal(z, other, torch.tensor([1])).backward()
    h = 1e-5
    slopes = (
        (by_hand(0.4 + h, 1.1) - by_hand(0.4 - h, 1.1)) / (2 * h),
        (by_hand(0.4, 1.1 + h) - by_hand(0.4, 1.1 - h)) / (2 * h),
    )
    assert (z.grad[0, 1].item(), other.grad[0, 1].item()) == pytest.approx(slopes, rel=1e-3)


def test_losses_are_sums_over_heads_and_means_over_images():
    net, x, labels = model(), images(), torch.tensor([0, 1, 1])
    paths = training_paths(NAMES, ["single", "cross"])
    outputs = net(x, [names for _, names in paths])
    terms = path_losses(net, outputs, [kind for kind, _ in paths], labels, weights={"cross": 0.5})
    single = sum(F.cross_entropy(net({m: x[m]})[m], labels) for m in NAMES)
    cross = sum(F.cross_entropy(z, labels) for z in net(x).values())
    torch.testing.assert_close(terms["loss_single"], single)
    torch.testing.assert_close(terms["loss_cross"], 0.5 * cross)
    for wrong in ({"singel": 1.0}, {"cross": -1.0}):
        with pytest.raises(ValueError, match="method.loss.weights"):
            path_losses(net, outputs, [kind for kind, _ in paths], labels, weights=wrong)


def test_every_position_has_a_block_of_its_own():
    """With the same CMTB at both positions the second call would use the first one's weights."""
    net, x = model(after=[1, 2], cmtb={"share": 0.2}), images()
    before = net(x)["rgb"]
    for depth in (0, 1):
        changed = model(after=[1, 2], cmtb={"share": 0.2})
        with torch.no_grad():
            for p in changed.branches["rgb"].cmtb[depth].parameters():
                p.add_(0.3)
        assert not torch.allclose(changed(x)["rgb"], before, atol=1e-4), f"the block after {depth + 1} is not used"
    seen = []
    for branch in net.branches.values():
        for k, block in enumerate(branch.cmtb):
            block.mlp.register_forward_hook(lambda *_, k=k: seen.append(k))
    net(x)
    assert sorted(seen) == [0, 0, 0, 1, 1, 1]


def test_between_trunk_blocks_a_block_changes_class_tokens_only():
    net, seen = model(after=[1]), {}
    first, second = net.branches["ir"].trunk.blocks
    first.register_forward_hook(lambda _, args, out: seen.update(out=out))
    second.register_forward_pre_hook(lambda _, args: seen.setdefault("paths", []).append(args[0]))
    net(images(), [["ir"], NAMES])
    for z in seen["paths"]:
        assert torch.equal(z[:, 1:], seen["out"][:, 1:]) and not torch.equal(z[:, 0], seen["out"][:, 0])
    assert not torch.equal(seen["paths"][0], seen["paths"][1])


def test_without_cross_modal_blocks_every_branch_is_its_vision_transformer():
    net, x = model(after=[]), images()
    for m, logits in net(x).items():
        branch = net.branches[m]
        torch.testing.assert_close(logits, branch.head(branch.trunk(x[m])))


def test_paths_share_what_a_branch_sees_of_a_modality(monkeypatch):
    calls = {"mma": 0, "mfa": 0}
    net = model()
    for name, kind in (("mma", MutualAttention), ("mfa", FusionAttention)):
        look = kind.look
        monkeypatch.setattr(
            kind, "look", lambda self, z, n=name, f=look: (calls.update({n: calls[n] + 1}), f(self, z))[1]
        )
    net(images(), subsets(NAMES))
    assert calls == {"mma": 3, "mfa": 9}


def test_masks_are_returned_by_path_and_position():
    net, x = model(after=[1, 2], cmtb={"share": 0.25}), images()
    outputs, masks = net(x, [["rgb"], NAMES], with_masks=True)
    assert [len(m) for m in masks] == [2, 2] and [*masks[0][0]] == ["rgb"] and [*masks[1][1]] == NAMES
    assert masks[0][0]["rgb"].shape == (3, 16) and (masks[0][0]["rgb"].sum(1) == 4).all()
    assert (masks[1][0]["rgb"] >= masks[0][0]["rgb"]).all()  # the union holds the own mask
    torch.testing.assert_close(outputs[1]["ir"], net(x)["ir"])
    assert net.selects and not model(after=[]).selects and not model(cmtb={"mma": None}).selects
    assert "kept" not in vars(net)


def test_positions_of_another_grid_are_resized_and_a_line_says_so(tmp_path, capsys):
    trunk = VisionTransformer(num_classes=0, **{**VIT, "img_size": 24})
    torch.save(trunk.state_dict(), tmp_path / "large.pth")
    made = build_trunk(**VIT, weights=str(tmp_path / "large.pth"))
    assert made.pos_embed.shape == (1, 17, 24) and "36 patches are resized to 16" in capsys.readouterr().out
    assert torch.equal(made.pos_embed[:, 0], trunk.pos_embed[:, 0])  # the class token's


def test_pretrained_weights_that_cannot_be_had_name_the_option(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"\+model.vit.weights=<file>, or model.vit.pretrained=false"):
        build_trunk(name="vit_small_patch16_224", pretrained=True)
    with pytest.raises(ValueError, match="timm has no such network"):
        build_trunk(name="vit_smal_patch16_224")
