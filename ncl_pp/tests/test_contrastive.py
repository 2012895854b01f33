import math
import runpy
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ncl_pp.contrastive import MomentumContrast, info_nce
from ncl_pp.model import ConvNet, Experts, NCLModel


def backbones(count=2):
    return [ConvNet(in_channels=1, width=2) for _ in range(count)]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_closed_forms():
    q, queue = unit(4, 8), unit(5, 8, seed=1).T
    row = torch.cat([(q[2] @ q[2])[None], q[2] @ queue]) / 0.2
    one = info_nce(q[2:3], q[2:3], queue)
    assert_close(one, row.logsumexp(0) - row[0])
    each = [info_nce(q[i : i + 1], q[i : i + 1], queue) for i in range(4)]
    assert_close(info_nce(q, q, queue), torch.stack(each).mean())
    orthogonal = torch.zeros(8, 5)
    assert info_nce(q, torch.zeros_like(q), orthogonal).item() == pytest.approx(math.log(6))


def test_loss_is_the_sum_over_experts_and_uses_the_queue_before_this_batch():
    torch.manual_seed(0)
    nets = backbones()
    contrast = MomentumContrast(nets, 8, dim=4, queue=12)
    queue, features, images = contrast.queue.clone(), torch.randn(2, 3, 8), torch.randn(3, 1, 8, 8)
    expected = 0.0
    for k in range(2):
        q = F.normalize(contrast.heads[k](features[k]), dim=-1)
        key = F.normalize(contrast.key_heads[k](contrast.key_backbones[k](images)), dim=-1)
        expected = expected + info_nce(q, key, queue[k])
    assert_close(contrast(features, images), expected)


def test_keys_enter_the_queue_in_turn_and_wrap_around():
    torch.manual_seed(0)
    contrast = MomentumContrast(backbones(), 8, dim=4, queue=6)
    assert_close(contrast.queue.norm(dim=1), torch.ones(2, 6))
    seen = []
    for step in range(3):
        before, images = contrast.queue.clone(), torch.randn(3, 1, 8, 8)
        contrast(torch.randn(2, 3, 8), images)
        seen.append(contrast._encode(images))
        start = 3 * (step % 2)
        assert_close(contrast.queue[:, :, start : start + 3], seen[-1].transpose(1, 2))
        rest = [c for c in range(6) if not start <= c < start + 3]
        assert torch.equal(contrast.queue[:, :, rest], before[:, :, rest])
    assert contrast.pointer.item() == 3
    assert not contrast.queue.requires_grad


def test_gradient_reaches_the_queries_only_and_backward_follows_the_enqueue():
    contrast = MomentumContrast(backbones(), 8, dim=4, queue=6)
    features = torch.randn(2, 3, 8, requires_grad=True)
    contrast(features, torch.randn(3, 1, 8, 8)).backward()
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert all(p.grad is not None for p in contrast.heads.parameters())
    for p in [*contrast.key_backbones.parameters(), *contrast.key_heads.parameters()]:
        assert p.grad is None and not p.requires_grad


def test_momentum_encoder_starts_as_a_copy_and_averages_everything():
    nets = backbones()
    contrast = MomentumContrast(nets, 8, dim=4, queue=6, momentum=0.9)
    for key, query in zip(contrast.key_backbones.parameters(), nn.ModuleList(nets).parameters(), strict=True):
        assert torch.equal(key, query) and key is not query
    old, old_head = deepcopy(contrast.key_backbones[0]), deepcopy(contrast.key_heads[0])
    with torch.no_grad():
        for p in [*nets[0].parameters(), *contrast.heads.parameters()]:
            p.add_(1.0)
        nets[0].blocks[1].running_mean.add_(1.0)
        nets[0].blocks[1].num_batches_tracked.add_(5)
    contrast.update(nets)
    for key, before in zip(contrast.key_backbones[0].parameters(), old.parameters(), strict=True):
        assert_close(key, before + 0.1)
    for key, before in zip(contrast.key_heads[0].parameters(), old_head.parameters(), strict=True):
        assert_close(key, before + 0.1)
    norm = contrast.key_backbones[0].blocks[1]  # type: ignore[index]
    assert_close(norm.running_mean, torch.full((2,), 0.1))
    assert norm.num_batches_tracked == 5


def test_official_quirks():
    nets = backbones(3)
    contrast = MomentumContrast(nets, 8, dim=4, queue=6, official_quirks=True, key_backbones=backbones(3))
    assert not torch.equal(contrast.key_heads[0][0].weight, contrast.heads[0][0].weight)  # type: ignore[index]
    old, head = deepcopy(contrast.key_backbones[0]), deepcopy(contrast.key_heads[0])
    contrast.update(nets)
    effective = 0.999**3
    for key, before, query in zip(
        contrast.key_backbones[0].parameters(), old.parameters(), nets[0].parameters(), strict=True
    ):
        assert_close(key, effective * before + (1 - effective) * query)
    for key, before in zip(contrast.key_heads[0].parameters(), head.parameters(), strict=True):
        assert torch.equal(key, before)


def test_autocast_compares_in_float32():
    torch.manual_seed(0)
    contrast = MomentumContrast(backbones(), 8, dim=4, queue=6)
    queue, features, images = contrast.queue.clone(), torch.randn(2, 3, 8), torch.randn(3, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys = contrast._encode(images)
        queries = [head(f) for head, f in zip(contrast.heads, features, strict=True)]
        loss = contrast(features, images)
    expected = [info_nce(F.normalize(q.float(), dim=-1), k, n) for q, k, n in zip(queries, keys, queue, strict=True)]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, torch.stack(expected).sum())


def test_queue_is_part_of_the_checkpoint():
    contrast, other = (MomentumContrast(backbones(), 8, dim=4, queue=6) for _ in range(2))
    contrast(torch.randn(2, 3, 8), torch.randn(3, 1, 8, 8))
    other.load_state_dict(contrast.state_dict())
    assert torch.equal(other.queue, contrast.queue) and other.pointer == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 0}, "queue=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"official_quirks": True}, "key_backbones"),
        ({"key_backbones": []}, "only with it"),
        ({"official_quirks": True, "key_backbones": []}, "0 key_backbones for 2 backbones"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MomentumContrast(backbones(), 8, **options)


def test_bad_batches():
    contrast = MomentumContrast(backbones(), 8, dim=4, queue=6)
    with pytest.raises(ValueError, match="queue=6 is no multiple of the global batch 4"):
        contrast(torch.zeros(2, 4, 8), torch.zeros(4, 1, 8, 8))
    with pytest.raises(ValueError, match="expected"):
        contrast(torch.zeros(3, 3, 8), torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match="3 images"):
        contrast(torch.zeros(2, 2, 8), torch.zeros(3, 1, 8, 8))


RANK = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from ncl_pp.contrastive import MomentumContrast

rank, world, folder = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), sys.argv[1]
torch.manual_seed(0)
nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh()) for _ in range(2)]
contrast = MomentumContrast(nets, 8, dim=4, queue=8)
features, images = torch.randn(2, 2, 4, 8), torch.randn(2, 4, 1, 2, 2)
torch.manual_seed(rank)  # the shuffle has to agree between ranks all the same
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
part = slice(rank * 4 // world, (rank + 1) * 4 // world)
losses = [contrast(features[step][:, part], images[step][part]).item() for step in range(2)]
torch.save({"losses": losses, "queue": contrast.queue}, f"{folder}/{world}_{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


def test_two_ranks_equal_one_process(ranks, tmp_path, monkeypatch):
    """Without batch statistics the shuffle cancels out: same queue on every rank, mean loss of the ranks."""
    file = tmp_path / "rank.py"
    file.write_text(RANK)
    monkeypatch.setattr(sys, "argv", [str(file), str(tmp_path)])
    runpy.run_path(str(file))
    done = ranks(file, [str(tmp_path)])
    assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    assert_close(first["queue"], one["queue"])
    assert torch.equal(first["queue"], second["queue"])
    means = (torch.tensor(first["losses"]) + torch.tensor(second["losses"])) / 2
    assert_close(means, torch.tensor(one["losses"]))


# ------------------------------------------------------------------------------------------ with the experts, as trained
def ncl_model(**options):
    torch.manual_seed(0)
    experts = Experts("convnet", 5, experts=2, in_channels=1, width=2)
    contrast = MomentumContrast(experts.backbones, experts.num_features, dim=4, queue=6, momentum=0.9, **options)
    return NCLModel(experts, contrast, weight=0.5)


def test_the_query_is_the_first_copy_and_the_term_is_weighted():
    model = ncl_model().eval()
    images, second = torch.randn(6, 1, 8, 8), torch.randn(3, 1, 8, 8)
    expected = deepcopy(model.contrast)(model.experts.features(images[:3]), second)
    logits, terms = model(images, second)
    assert logits.shape == (2, 6, 5) and list(terms) == ["contrast"]
    assert_close(terms["contrast"], 0.5 * expected)
    assert model(images)[1] == {} and torch.equal(model(images)[0], model.experts(images))
    with pytest.raises(ValueError, match="no contrastive branch"):
        NCLModel(model.experts)(images, second)
    with pytest.raises(ValueError, match=r"w_con=-1\.0"):
        NCLModel(model.experts, model.contrast, weight=-1.0)


@pytest.mark.parametrize("quirks", [False, True])
def test_keys_move_after_the_optimiser_step_or_as_published_before_it(quirks):
    model = ncl_model(**({"official_quirks": True, "key_backbones": backbones()} if quirks else {}))
    key, query = (group[0].blocks[0].weight for group in (model.contrast.key_backbones, model.experts.backbones))
    start, momentum = key.clone(), 0.9**2 if quirks else 0.9
    _, terms = model(torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8))
    terms["contrast"].backward()
    old = query.detach().clone()
    with torch.no_grad():
        query.add_(1.0)  # the optimiser step
    model.after_step()
    assert_close(key, momentum * start + (1 - momentum) * (old if quirks else old + 1.0))
    NCLModel(model.experts).after_step()
