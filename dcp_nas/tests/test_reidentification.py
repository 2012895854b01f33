"""CMC and mAP on rankings made by hand, the two data sets, the batches of P people, the losses, a short training."""

import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from common import runs
from dcp_nas.genotypes import PAPER
from dcp_nas.reid import fit
from dcp_nas.transfer.reidentification import (
    PeopleSet,
    PKPlan,
    ReIdentifier,
    cmc_map,
    identity_loss,
    market1501,
    procedural,
    triplet_loss,
)


def evaluate(rows, gallery_ids, gallery_cameras, query_ids=(1,), query_cameras=(1,), **options):
    return cmc_map(
        torch.tensor(rows), query_ids=torch.tensor(query_ids), query_cameras=torch.tensor(query_cameras),
        gallery_ids=torch.tensor(gallery_ids), gallery_cameras=torch.tensor(gallery_cameras), **options,
    )  # fmt: skip


def test_hit_miss_hit_has_ap_five_sixths():
    found = evaluate([[0.1, 0.2, 0.3]], [1, 2, 1], [2, 2, 3])
    assert found["mAP"] == pytest.approx(100 * (1 / 1 + 2 / 3) / 2) and found["rank1"] == 100
    found = evaluate([[0.3, 0.1, 0.2]], [1, 2, 1], [2, 2, 3], ranks=(1, 2, 3))  # miss, hit, hit
    assert found["mAP"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert (found["rank1"], found["rank2"], found["rank3"]) == (0, 100, 100)


def test_same_camera_and_junk_are_left_out_and_distractors_count_as_wrong():
    distances = [[0.0, 0.1, 0.2, 0.3]]
    found = evaluate(distances, [1, -1, 0, 1], [1, 2, 2, 2])  # same camera, junk, distractor, hit
    assert found["mAP"] == 50 and found["rank1"] == 0 and found["rank5"] == 100
    found = evaluate(distances, [2, -1, 1, 1], [1, 2, 2, 3])  # another person on the same camera stays
    assert found["mAP"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_queries_without_a_match_are_left_out_of_the_means():
    rows = [[0.1, 0.2], [0.1, 0.2]]
    found = evaluate(rows, [1, 2], [2, 2], query_ids=(1, 7), query_cameras=(1, 1))
    assert found["mAP"] == 100
    with pytest.raises(ValueError, match="no query has a match"):
        evaluate([[0.1, 0.2]], [1, 2], [1, 1])


def test_against_a_loop_on_random_rankings():
    g = torch.Generator().manual_seed(0)
    d, q, c = (
        torch.rand(9, 40, generator=g),
        torch.randint(1, 5, (9,), generator=g),
        torch.randint(1, 4, (9,), generator=g),
    )
    gi, gc = torch.randint(-1, 5, (40,), generator=g), torch.randint(1, 4, (40,), generator=g)
    aps = []
    for k in range(9):
        ranked = sorted(range(40), key=lambda j, row=d[k]: row[j].item())
        kept = [j for j in ranked if gi[j] != -1 and not (gi[j] == q[k] and gc[j] == c[k])]
        hits = [n for n, j in enumerate(kept, 1) if gi[j] == q[k]]
        aps.append(sum((m + 1) / n for m, n in enumerate(hits)) / len(hits))
    found = cmc_map(d, query_ids=q, query_cameras=c, gallery_ids=gi, gallery_cameras=gc)
    assert found["mAP"] == pytest.approx(100 * sum(aps) / 9)


def test_procedural_people_differ_between_and_repeat_within_identities():
    train, query, gallery = procedural(seed=3, identities=12, train=8, per_camera=3)
    assert (len(train), len(query), len(gallery)) == (8 * 12, 4 * 4, 4 * 8)
    assert set(train.ids.tolist()).isdisjoint(query.ids.tolist()) and set(query.ids.tolist()) == set(
        gallery.ids.tolist()
    )
    assert (
        set(query.cameras.tolist()) == {1, 2, 3, 4}
        and query.images[0].shape == (64, 32, 3)
        and query.images[0].dtype == np.uint8
    )
    again = procedural(seed=3, identities=12, train=8, per_camera=3)[0]
    assert all(np.array_equal(a, b) for a, b in zip(train.images, again.images, strict=True))
    x = torch.stack(
        [PeopleSet(gallery, gallery.ids, size=(64, 32), augment=False)[i][0] for i in range(len(gallery))]
    ).flatten(1)
    same = (
        (gallery.ids[:, None] == gallery.ids)
        & (gallery.cameras[:, None] == gallery.cameras)
        & ~torch.eye(len(x), dtype=torch.bool)
    )
    other = (gallery.ids[:, None] != gallery.ids) & (gallery.cameras[:, None] == gallery.cameras)
    distance = torch.cdist(x, x)
    assert distance[same].mean() < 0.9 * distance[other].mean()
    with pytest.raises(ValueError, match="train=12"):
        procedural(seed=0, identities=12, train=12)


def test_market_layout_is_read_and_its_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="bounding_box_train"):
        market1501(tmp_path)
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0007_c3s2_000001_01.jpg"], "query": ["0001_c1s1_001051_00.jpg"],
        "bounding_box_test": ["-1_c1s1_000401_03.jpg", "0000_c2s1_000001_00.jpg", "0001_c2s1_001_00.jpg"],
    }  # fmt: skip
    for folder, files in names.items():
        (tmp_path / folder).mkdir()
        for f in files:
            Image.new("RGB", (16, 32), (90, 20, 200)).save(tmp_path / folder / f)
    train, query, gallery = market1501(tmp_path)
    assert train.ids.tolist() == [2, 7] and train.cameras.tolist() == [1, 3]
    assert sorted(gallery.ids.tolist()) == [-1, 0, 1] and query.cameras.tolist() == [1]
    image, label = PeopleSet(train, torch.tensor([0, 1]), size=(64, 32), augment=True)[1]
    assert image.shape == (3, 64, 32) and label == 1
    Image.new("RGB", (16, 32)).save(tmp_path / "query/person.jpg")
    with pytest.raises(ValueError, match=r"query: no identity and camera in the name 'person\.jpg'"):
        market1501(tmp_path)


def test_batches_hold_p_people_with_k_images_each():
    labels = torch.arange(7).repeat_interleave(torch.tensor([5, 5, 5, 5, 5, 5, 2]))
    plan = PKPlan(labels, people=3, images=4, seed=0)
    for epoch in (1, 2):
        people = []
        for _, rows, part in plan.epoch(epoch):
            assert len(rows) == 12 and (part.start, part.stop) == (0, 12)
            values, counts = labels[rows].unique(return_counts=True)
            assert counts.tolist() == [4, 4, 4]
            assert all(len(set(rows[labels[rows] == v].tolist())) == min(4, (labels == v).sum()) for v in values)
            people += values.tolist()
        assert len(people) == len(set(people)) == 6
    assert [r.tolist() for _, r, _ in plan.epoch(1)] != [r.tolist() for _, r, _ in plan.epoch(2)]
    with pytest.raises(ValueError, match="7 identities, P=8"):
        PKPlan(labels, people=8, images=4, seed=0)


def test_triplet_loss_by_hand_and_smoothed_identity_loss():
    f = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    labels = torch.tensor([0, 0, 1, 1])
    expected = [3 - 1, 3 - 10**0.5, 4 - 1, 4 - 5]  # hardest positive - nearest negative of every anchor
    assert triplet_loss(f, labels, margin=0.3).item() == pytest.approx(
        sum(max(0.0, e + 0.3) for e in expected) / 4, rel=1e-5
    )
    same = torch.zeros(4, 2, requires_grad=True)
    triplet_loss(same, labels).backward()
    assert bool(same.grad.isfinite().all())
    logits = torch.tensor([[2.0, 0.0]])
    log_p = logits.log_softmax(1)[0]
    assert identity_loss(logits, torch.tensor([0]), smoothing=0.2).item() == pytest.approx(
        -(0.9 * log_p[0] + 0.1 * log_p[1]).item()
    )


def config(*overrides):
    short = ["train.epochs=2", "train.save_every=1", "train.people=4", "model.channels=4", "+data.identities=10", "+data.train=6",
             "+data.per_camera=2", "arm=test"]  # fmt: skip
    with initialize_config_dir(config_dir=str(PAPER / "configs"), version_base="1.3"):
        return compose("reid", overrides=[*short, *overrides])


def test_short_training_resumes_and_reports(tmp_path):
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    fit(config(), fabric, tmp_path / "whole")
    fit(config("train.epochs=1"), fabric, tmp_path / "parts")
    metrics = json.loads((tmp_path / "whole/result.json").read_text())["metrics"]
    assert 0 < metrics["mAP"] <= 100 and metrics["rank1"] <= metrics["rank5"] <= metrics["rank10"]
    network = runs.load_checkpoint(tmp_path / "whole/last.ckpt")["model"]
    assert network["neck.bias"].abs().max() == 0 and "classifier.bias" not in network
    with pytest.raises(ValueError, match="data.name='cuhk'"):
        fit(config("data.name=cuhk"), fabric, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_head_normalises_in_evaluation_only():
    from dcp_nas.network import Network
    from dcp_nas.operations import Bits
    from dcp_nas.search_space import GENOTYPES

    net = ReIdentifier(
        Network(GENOTYPES["CHL_I6"], num_classes=1, channels=4, cells=2, stem="imagenet", bits=Bits()), 5
    )
    x = torch.randn(4, 3, 64, 32)
    logits, f = net(x)
    assert logits.shape == (4, 5) and f.shape[0] == 4 and not torch.allclose(f.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(net.eval()(x).norm(dim=1), torch.ones(4))
