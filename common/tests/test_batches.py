"""Batches depend on (seed, epoch) alone, whatever the ranks, micro-steps and workers."""

import random

import numpy as np
import pytest
import torch

from common.data.batches import CropFlip, Plan, SeededBatches, TensorBatches, Views, eval_batches, seeded, stream

CPU = torch.device("cpu")
IMAGES = torch.arange(24 * 1 * 6 * 6).reshape(24, 1, 6, 6).float()
TARGETS = torch.arange(24) % 5


class Files(torch.utils.data.Dataset):
    """Stands for images in files."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index], int(TARGETS[index])


def jitter(image):
    return image + torch.rand(()) + random.random() + np.random.rand()


def make(kind, plan, indices=None, **kwargs):
    if kind == "tensors":
        return TensorBatches(IMAGES, TARGETS, plan, augment=CropFlip(padding=2), views=2, device=CPU)
    return SeededBatches(Views(Files(), [jitter, jitter], indices), plan, device=CPU, **kwargs)


@pytest.mark.parametrize("kind", ["tensors", "files"])
def test_ranks_and_micro_steps_share_the_global_batch(kind):
    whole = list(make(kind, Plan(24, 8, seed=5)).epoch(3))
    parts = [list(make(kind, Plan(24, 8, seed=5, rank=r, world=2, accumulation=2)).epoch(3)) for r in range(2)]
    assert len(whole) == 3 and len(parts[0]) == 6
    for step, (views, labels) in enumerate(whole):
        pieces = [parts[r][2 * step + m] for r in range(2) for m in range(2)]
        torch.testing.assert_close(labels, torch.cat([y for _, y in pieces]), rtol=0, atol=0)
        for v, view in enumerate(views):
            torch.testing.assert_close(view, torch.cat([x[v] for x, _ in pieces]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["tensors", "files"])
def test_an_epoch_repeats_itself_and_differs_from_the_next_and_views_are_independent(kind):
    batches = make(kind, Plan(24, 24, seed=0))
    (a, labels), (b, _), (c, _) = (next(iter(batches.epoch(e))) for e in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], c[0]) and not torch.equal(a[0], a[1])
    assert sorted(labels.tolist()) == sorted(TARGETS.tolist())


def test_workers_change_nothing_and_indices_choose_the_subset():
    plan = Plan(6, 3, seed=1)
    alone, helped = (list(make("files", plan, workers=w, indices=[0, 5, 10, 15, 20, 23]).epoch(1)) for w in (0, 2))
    for (x, y), (u, v) in zip(alone, helped, strict=True):
        torch.testing.assert_close((x, y), (u, v), rtol=0, atol=0)
    assert {int(t) for _, y in alone for t in y} == {int(TARGETS[i]) for i in (0, 5, 10, 15, 20, 23)}


def test_repeats_show_an_image_several_times_differently_augmented():
    batches = SeededBatches(Views(Files(), [lambda x: x, jitter]), Plan(24, 6, seed=1, repeats=3), device=CPU)
    for (plain, changed), _ in batches.epoch(1):
        triples = plain.unflatten(0, (2, 3))
        assert torch.equal(triples[:, 0], triples[:, 1]) and torch.equal(triples[:, 0], triples[:, 2])
        assert len(changed[:3, 0, 0, 0].unique()) == 3
    assert len(batches) == 4


def test_images_stay_with_their_labels():
    batches = TensorBatches(IMAGES, TARGETS, Plan(24, 6, seed=2), device=CPU)
    for (images,), labels in batches.epoch(1):
        index = (images[:, 0, 0, 0] / 36).long()
        assert torch.equal(TARGETS[index], labels)
    raw = TensorBatches(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), TARGETS[:4], Plan(4, 4, seed=0), device=CPU)
    (images,), _ = next(raw.epoch(1))
    assert images.dtype == torch.float32 and images.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("size", "batch", "error", "parallel"),
    [
        (30, 64, "30 images, fewer than train.batch_size=64", {}),
        (30, 3, "repeats=0", {"repeats": 0}),
        (30, 9, "batch_size=9 is not a positive multiple of 2 ranks x 1", {"world": 2}),
    ],
)
def test_a_plan_without_a_whole_batch_is_an_error(size, batch, error, parallel):
    with pytest.raises(ValueError, match=error):
        Plan(size, batch, seed=0, **parallel)


def test_seeded_gives_the_global_streams_back_also_after_an_error():
    def draw():
        return torch.rand(2), random.random(), np.random.rand()

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    expected = draw()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    with pytest.raises(RuntimeError, match="inside"), seeded(1, 2):
        inside = draw()
        raise RuntimeError("inside")
    after = draw()
    assert torch.equal(after[0], expected[0]) and after[1:] == expected[1:]
    with seeded(1, 2):
        again = draw()
    assert torch.equal(again[0], inside[0]) and again[1:] == inside[1:]


def test_streams_of_different_keys_differ():
    assert len({stream(a, b) for a in range(20) for b in range(20)}) == 400


def test_crop_flip_takes_windows_of_the_padded_image():
    images, op = torch.arange(36.0).reshape(1, 1, 6, 6), CropFlip(padding=2)

    def apply(row, column, flip):
        return op(images, torch.tensor([[row, column]]), torch.tensor([flip]))[0, 0]

    assert torch.equal(apply(2, 2, False), images[0, 0])
    assert torch.equal(apply(2, 2, True), images[0, 0].flip(-1))
    down = apply(4, 2, False)
    assert torch.equal(down[:4], images[0, 0, 2:]) and not down[4:].any()
    right = apply(2, 4, False)
    assert torch.equal(right[:, :4], images[0, 0, :, 2:]) and not right[:, 4:].any()


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_shares_cover_every_image_once(world):
    seen = [x for r in range(world) for x, _ in eval_batches(Files(), batch_size=4, rank=r, world=world)]
    assert sorted((torch.cat(seen)[:, 0, 0, 0] / 36).long().tolist()) == list(range(24))
