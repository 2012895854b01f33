"""Operations, networks and supernets: published counts, shapes, what is binary, what is refused, the weight rule of step 2."""

import pytest
import torch
from torch import nn

from common.metrics.claims import load_claims
from common.quant.binary import binary_sign
from dcp_nas.counts import NETWORKS, measure
from dcp_nas.genotypes import PAPER
from dcp_nas.network import Features, Network, reduction_cells
from dcp_nas.operations import (
    BetaConv2d,
    BinaryConv2d,
    Bits,
    DilConv,
    FactorizedReduce,
    MConv2d,
    make_operation,
    reconstruction_error,
)
from dcp_nas.search_space import GENOTYPES, OPERATIONS, Genotype, random_genotype
from dcp_nas.supernet import Supernet, inherit

BINARY = Bits("beta", "binary")


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_are_the_published_ones(name):
    exact = {c["metric"]: c["published"]["value"] for c in load_claims(PAPER) if c["kind"] == "exact"}
    found = measure(name)
    compared = [k for k in found if f"{name}_{k}" in exact]
    assert len(compared) >= 8
    assert {k: found[k] for k in compared} == {k: exact[f"{name}_{k}"] for k in compared}


def test_parameters_of_one_dilated_convolution_by_hand():
    """Two norms of the body and one behind (2 C each), depth-wise 9 C + m, 1x1 C^2 + m, two PReLUs of C."""
    c = 6
    block = DilConv(c, 3, 1, 2, 2, Bits("m", "binary"))
    assert sum(p.numel() for p in block.parameters()) == 3 * 2 * c + (9 * c + c) + (c * c + c) + 2 * c
    convs = [m for m in block.modules() if isinstance(m, BinaryConv2d)]
    assert [(m.groups, m.act_bits) for m in convs] == [(c, 32), (1, 1)]
    strict = DilConv(c, 3, 1, 2, 2, Bits("m", "binary", strict_1bit=True))
    assert [m.act_bits for m in strict.modules() if isinstance(m, BinaryConv2d)] == [1, 1]


def test_binary_convolutions_see_binary_inputs_exactly_where_declared():
    for strict in (False, True):
        net = Network(
            GENOTYPES["DCP_NAS_L"], num_classes=3, channels=4, cells=3, bits=Bits("beta", "binary", strict_1bit=strict)
        )
        seen = {}
        for name, m in net.named_modules():
            if isinstance(m, BinaryConv2d):
                m.register_forward_pre_hook(
                    lambda mod, args, n=name, into=seen: into.__setitem__(n, (mod, args[0].unique().tolist()))
                )
        net(torch.randn(4, 3, 16, 16))
        assert seen
        for module, values in seen.values():
            assert (module.act_bits == 1) == (set(values) <= {-1.0, 1.0})
            w = module.binary_weight()
            assert all(
                len(row.abs().unique()) == 1 or (row.abs() - row.abs().mean()).abs().max() < 1e-6
                for row in w.flatten(1)
            )


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_operations_keep_channels_and_divide_the_map(name, stride):
    x = torch.randn(2, 4, 8, 8)
    y = make_operation(name, 4, stride, BINARY)(x)
    assert y.shape == (2, 4, 8 // stride, 8 // stride)
    if name == "none":
        assert y.abs().max() == 0
    if name == "skip_connect" and stride == 1:
        assert torch.equal(x, y)


def test_average_pooling_leaves_the_border_out_of_its_count():
    pool = make_operation("avg_pool_3x3", 1, 1, BINARY)[0]
    assert torch.equal(pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_factorized_reduction_sees_every_second_pixel_in_each_half():
    layer = FactorizedReduce(1, 2, Bits())
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 1] = 1.0
    layer.norm_in = layer.norm = layer.act = nn.Identity()
    even, odd = layer(x)[0]  # the pixel at (1, 1) belongs to the odd ones
    assert even.abs().sum() == 0 and odd[0, 0] == layer.odd.weight.flatten() and odd.count_nonzero() == 1
    with pytest.raises(ValueError, match="a map of 7x8 cannot be halved"):
        layer(torch.zeros(1, 1, 7, 8))
    with pytest.raises(ValueError, match="3 output channels: .*even"):
        FactorizedReduce(1, 3, Bits())


def test_stride_one_blocks_are_residual_and_stride_two_blocks_are_not():
    for stride in (1, 2):
        block = make_operation("dil_conv_3x3", 4, stride, BINARY).eval()
        nn.init.zeros_(block.body[-1].weight)
        x = torch.rand(1, 4, 8, 8)
        y = block(x)
        assert torch.equal(y, x) if stride == 1 else y.abs().max() == 0


# ----------------------------------------------------------------------------------------------------- weight rules
def rule(official):
    torch.manual_seed(3)
    layer = MConv2d(4, 6, 3, official_m_grad=official).double()
    weight = layer.binary_weight()
    upstream = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = (weight * upstream).sum() + 0.5e-4 * layer.reconstruction()
    return layer, upstream, *torch.autograd.grad(loss, [layer.weight, layer.m])


def test_step_two_rule_is_the_published_one():
    layer, upstream, dw, dm = rule(official=False)
    w, m, sign = layer.weight.detach(), layer.m.detach(), binary_sign(layer.weight)
    torch.testing.assert_close(layer.binary_weight().detach(), 0.02 * sign * m.abs())
    residual = w - 0.02 * sign * m.abs()
    torch.testing.assert_close(dw, 1e-4 * residual + upstream * m.abs())
    magnitude = (upstream * w).sum((1, 2, 3), keepdim=True) - 1e-4 * (residual * 0.02 * sign).sum(
        (1, 2, 3), keepdim=True
    )
    torch.testing.assert_close(dm, magnitude * m.sign())


def test_the_official_gradient_of_m_differs_by_the_sign_of_m():
    layer, _, dw, dm = rule(official=False)
    _, _, dw_official, dm_official = rule(official=True)
    assert torch.equal(dw, dw_official) and bool((layer.m < 0).any())
    torch.testing.assert_close(dm, dm_official * layer.m.detach().sign())


def test_search_rule_clips_and_beta_has_its_true_gradient():
    layer = BetaConv2d(2, 3, 3).double()
    with torch.no_grad():
        layer.weight.mul_(8)
        layer.beta[0].neg_()
    upstream = torch.randn(layer.weight.shape, dtype=torch.float64)
    dw, db = torch.autograd.grad((layer.binary_weight() * upstream).sum(), [layer.weight, layer.beta])
    w, beta = layer.weight.detach(), layer.beta.detach()
    torch.testing.assert_close(dw, upstream * beta.abs() * (w.abs() <= 1))
    torch.testing.assert_close(db, (upstream * binary_sign(w)).sum((1, 2, 3), keepdim=True) * beta.sign())
    assert bool((layer.scale() >= 0).all()) and bool((w.abs() > 1).any())


def test_reconstruction_error_sums_or_averages_and_its_scale_is_minimal_at_the_mean():
    net = nn.Sequential(BetaConv2d(2, 3, 3), nn.ReLU(), BetaConv2d(3, 2, 1))
    total = reconstruction_error(net)
    expected = sum((m.weight - m.beta.abs() * m.weight.sign()).square().sum() for m in (net[0], net[2]))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(reconstruction_error(net, reduction="mean"), expected / (54 + 6))
    g = torch.autograd.grad(total, net[0].beta)[0]
    assert g.abs().max() < 1e-5  # beta = mean|w| at the start
    assert reconstruction_error(nn.Linear(2, 2)) == 0
    with pytest.raises(ValueError, match="recon_reduction='max'"):
        reconstruction_error(net, reduction="max")


# --------------------------------------------------------------------------------------------------------- networks
def test_image_net_stem_strides_channels_and_features_only():
    net = Network(GENOTYPES["DCP_NAS_L"], num_classes=5, channels=8, cells=6, stem="imagenet", bits=BINARY)
    x = torch.randn(2, 3, 64, 96)
    assert net(x).shape == (2, 5)
    features = Features(net)
    assert features.feature_info.channels() == [8, 32, 64, 128] and features.feature_info.reduction() == [4, 8, 16, 32]
    for map_, c, s in zip(
        features(x), features.feature_info.channels(), features.feature_info.reduction(), strict=True
    ):
        assert map_.shape == (2, c, 64 // s, 96 // s)
    outputs = []
    for cell in net.cells:
        cell.register_forward_hook(lambda module, args, out: outputs.append(out))
    maps = features.eval()(x)  # the stem, and the last cells before the reductions at 2 and 4
    assert all(torch.equal(m, outputs[i]) for m, i in zip(maps[1:], (1, 3, 5), strict=True))
    some = Features(
        Network(GENOTYPES["CHL_I6"], num_classes=5, channels=8, cells=6, stem="imagenet", bits=BINARY),
        out_indices=(1, 3),
    )
    assert [m.shape[1] for m in some(x)] == some.feature_info.channels() == [32, 128]
    with pytest.raises(ValueError, match=r"out_indices=\[7\]"):
        Features(net, out_indices=(7,))


@pytest.mark.parametrize(
    ("options", "side", "error"),
    [
        ({"stem": "imagenet"}, 16, "images of 16x16.*multiples of 32"),
        ({"stem": "imagenet"}, 48, "images of 48x48.*multiples of 32"),
        ({"channels": 7}, 32, "channels=7.*even"),
        ({"stem": "cifar"}, 32, "stem='cifar'"),
        ({"reductions": [9]}, 32, r"reductions=\[9\]"),
        ({"drop_path": 1.0}, 32, "drop_path=1.0"),
    ],
)
def test_networks_refuse_what_cannot_work(options, side, error):
    with pytest.raises(ValueError, match=error):
        Network(GENOTYPES["CHL_I6"], **{"num_classes": 2, "channels": 8, "cells": 3, "bits": BINARY, **options})(
            torch.randn(1, 3, side, side)
        )


def test_bits_refuse_unknown_kinds():
    with pytest.raises(ValueError, match="weights='ternary'"):
        Bits("ternary")
    with pytest.raises(ValueError, match="activations='4bit'"):
        Bits("m", "4bit")
    assert reduction_cells(20, None) == (6, 13) and reduction_cells(3, [1]) == (1,)


def test_auxiliary_head_and_drop_path_act_in_training_only():
    torch.manual_seed(0)
    net = Network(random_genotype(1), num_classes=3, channels=4, cells=3, bits=BINARY, auxiliary=True, drop_path=0.5)
    x = torch.randn(8, 3, 16, 16)
    logits, side = net(x)
    assert logits.shape == side.shape == (8, 3) and not torch.equal(net(x)[0], logits)
    net.eval()
    assert torch.equal(net(x), net(x))


def test_drop_path_leaves_skip_connections_alone():
    skips = (("skip_connect", 0), ("skip_connect", 1))
    net = Network(Genotype(skips, skips), num_classes=3, channels=4, cells=2, reductions=[], bits=BINARY, drop_path=0.5)
    x = torch.randn(32, 3, 16, 16)
    assert torch.equal(net(x), net(x)) and net.training


def test_batched_equals_single():
    torch.manual_seed(0)
    net = Network(GENOTYPES["TANGENT_2"], num_classes=3, channels=4, cells=3, bits=BINARY).double().eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


# -------------------------------------------------------------------------------------------------------- supernets
def supernet(bits=None, **options):
    torch.manual_seed(0)
    return Supernet(
        **{"num_classes": 3, "in_channels": 1, "channels": 4, "cells": 3, "nodes": 2, **options},
        bits=bits or Bits(affine=False),
    )


def test_a_one_hot_alpha_is_the_single_path_and_rows_of_the_softmax_sum_to_one():
    net = supernet(reductions=[1]).double()
    alphas = tuple(torch.full((5, 8), -1e4, dtype=torch.float64) for _ in range(2))
    choice = [[0, 1, 2, 3, 4], [5, 6, 7, 3, 1]]
    for alpha, ops in zip(alphas, choice, strict=True):
        for edge, k in enumerate(ops):
            alpha[edge, k] = 0.0
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    path = net.fc(net.cell_outputs(x, tuple(choice))[-1].mean((2, 3)))
    torch.testing.assert_close(net(x, alphas), path)
    a, b = net.new_alphas(torch.Generator().manual_seed(0))
    assert a.shape == (5, 8) and not torch.equal(a, b) and 5e-4 < a.std() < 2e-3
    torch.testing.assert_close(a.softmax(-1).sum(-1), torch.ones(5))


def test_cells_concatenate_their_nodes_and_reduction_halves_the_map():
    net = supernet(nodes=4)
    outputs = net.cell_outputs(torch.randn(2, 1, 16, 16), tuple(torch.full((14, 8), 1 / 8) for _ in range(2)))
    assert [tuple(o.shape[1:]) for o in outputs] == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert len(net.cells[0].edges) == 14
    wide = supernet(stem="imagenet", in_channels=3)
    assert wide(torch.randn(2, 3, 64, 64), wide.new_alphas(torch.Generator())).shape == (2, 3)


def test_a_supernet_leaves_no_trace_and_the_child_inherits():
    parent, child = supernet(), supernet(Bits("beta", "binary", affine=False))
    with torch.no_grad():  # as after a round: no weight as it was drawn
        for p in parent.parameters():
            p.mul_(2)
    before = {k: v.clone() for k, v in parent.state_dict().items()}
    parent(torch.randn(4, 1, 8, 8), parent.new_alphas(torch.Generator()))
    assert all(torch.equal(v, before[k]) for k, v in parent.state_dict().items())
    inherit(child, parent)
    for name, value in parent.state_dict().items():
        assert torch.equal(child.state_dict()[name], value)
    for m in child.modules():
        if isinstance(m, BetaConv2d):
            torch.testing.assert_close(m.beta, m.weight.abs().mean((1, 2, 3), keepdim=True))
    with pytest.raises(ValueError, match="Parent and Child differ"):
        inherit(child, nn.Sequential(nn.Linear(2, 2)))


def test_supernets_refuse_what_cannot_work():
    with pytest.raises(ValueError, match="channels=5"):
        supernet(channels=5)
    with pytest.raises(ValueError, match="affine=False"):
        supernet(Bits())
    with pytest.raises(ValueError, match="order='other'"):
        supernet(order="other")
    with pytest.raises(ValueError, match="a map of 7x7"):
        net = supernet(cells=4, reductions=[1, 2])
        net(torch.randn(1, 1, 14, 14), net.new_alphas(torch.Generator()))
