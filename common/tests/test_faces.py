import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from common.data import backgrounds, faces
from common.data.faces import EXPRESSIONS, SPLITS, expression_faces
from common.data.presentation_attacks import ATTACKS, CHANNELS, DOMAINS, Domain, spoof_faces


@pytest.mark.parametrize("make", [expression_faces, spoof_faces])
def test_deterministic_in_seed_and_split_with_a_range_of_0_to_1(make):
    a = make(70, split="train", seed=3)
    b = make(70, split="train", seed=3)
    assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and torch.equal(a.masks, b.masks)
    others = [make(70, split=s, seed=3) for s in SPLITS[1:]] + [make(70, split="train", seed=4)]
    assert all(not torch.equal(a.images, o.images) for o in others)
    assert 0 <= a.images.min() < 0.1 and 0.9 < a.images.max() <= 1
    with pytest.raises(ValueError, match="'valid'"):
        make(5, split="valid")
    with pytest.raises(ValueError, match="size=16"):
        make(5, split="train", size=16)


def test_masks_partition_the_image_and_occluders_hide_at_most_30_percent():
    data = expression_faces(300, split="train", occluded=0.5)
    background, occluder = data.extra["background"], data.extra["occluder"]
    assert torch.equal(data.masks.int() + background.int() + occluder.int(), torch.ones_like(occluder, dtype=torch.int))
    covered = occluder.flatten(1).any(1).float().mean()
    assert 0.4 < covered < 0.6
    clear = ~occluder.flatten(1).any(1)
    assert 0.3 < data.masks[clear].float().mean() < 0.6
    same = expression_faces(300, split="train", occluded=0.0)
    assert not same.extra["occluder"].any() and torch.equal(same.targets, data.targets)
    whole = same.masks.flatten(1).sum(1)
    hidden = (same.masks & occluder).flatten(1).sum(1)  # poses are drawn before the occluders, the ovals are the same
    assert (hidden <= 0.3 * whole).all() and (hidden > 0.1 * whole).any()
    assert expression_faces(50, split="test", occluded=1.0).extra["occluder"].flatten(1).any(1).all()


def test_hair_over_the_forehead_is_background():
    """The fringe is darker than the skin by more than any shade; of what is called face at the top of the oval, nothing is."""
    drawn = one_face("neutral", hairline=-0.5, fringe=0.0)
    forehead = (drawn.y < -0.6) & (drawn.face > 0.5)
    assert (drawn.canvas[:, :3].mean(axis=1)[forehead] < 0.2).mean() > 0.9 and drawn.fringe[forehead].mean() > 0.9
    assert drawn.fringe[(drawn.y > -0.4) & (drawn.face == 1)].max() == 0
    data, same = (expression_faces(40, split="train", occluded=0.0, noise=0.0, busy=b) for b in (0.0, 1.0))
    assert torch.equal(data.masks, same.masks) and not torch.equal(data.images, same.images)
    rows = data.masks.float().mean(dim=(0, 2))
    assert rows[4] < 0.2 and rows[8] < 0.5 and rows[16:36].min() > 0.55, (
        "of 0.4, 0.65 and more of the rows the oval fills"
    )


def test_busy_surroundings_have_the_contrast_of_the_face_and_the_face_stays():
    plain, busy = (expression_faces(120, split="train", occluded=0.0, noise=0.0, busy=b) for b in (0.0, 1.0))
    assert not plain.extra["busy"].any() and busy.extra["busy"].all()
    face = plain.masks
    kernel = torch.ones(1, 1, 3, 3)
    whole = lambda m: torch.nn.functional.conv2d(m[:, None].float(), kernel, padding=1)[:, 0] == 9  # noqa: E731
    assert torch.equal(face, busy.masks) and (busy.images - plain.images).abs().amax(1)[whole(face)].max() < 1e-5
    ratios = {}
    for name, data in (("plain", plain), ("busy", busy)):
        square = torch.from_numpy(faces.contrast(data.images))
        inner, outer = ((square * w).sum(dim=(1, 2)) / w.sum(dim=(1, 2)) for w in (whole(face), whole(~face)))
        ratios[name] = (outer / inner).median().item()
    assert ratios["plain"] < 0.8 and 0.75 < ratios["busy"] < 1.3, ratios
    half = expression_faces(200, split="train", busy=0.5).extra["busy"].float().mean()
    assert 0.4 < half < 0.6


def test_a_hand_is_one_palm_with_fingers_that_end():
    along, across = np.meshgrid(np.linspace(-0.9, 0.8, 171), np.linspace(-0.6, 0.6, 121), indexing="ij")
    inside = faces._hand(along, across) > 0
    runs = [(np.diff(np.r_[0, inside[i].astype(int), 0]) == 1).sum() for i in range(171)]
    at = lambda place: runs[round((place + 0.9) * 100)]  # noqa: E731
    assert at(-0.5) == 1 and at(0.0) <= 2 and at(0.36) >= 4, "wrist, palm (and thumb), fingers apart"
    assert at(0.7) == 0 and 0.1 < inside[60:].mean() < 0.5


def test_brows_are_darker_than_the_skin_whatever_the_hair():
    rng = np.random.default_rng(0)
    people = faces._legible(faces.identities(500, rng) | faces.poses(500, rng))
    assert (0.7 * people["ink"] <= 0.46 * people["skin"]).all() and (people["brow"] > 0.045).all()
    free = people["hairline"] + people["fringe"] * (0.45 / 0.74) ** 4
    assert (free < faces._BROW_V - 0.05).all(), "no hair over the brows of a resting face"


def test_counts_give_the_classes():
    data = expression_faces(20, split="train", counts=[0, 1, 2, 3, 4, 4, 6])
    assert torch.bincount(data.targets, minlength=7).tolist() == [0, 1, 2, 3, 4, 4, 6]
    assert torch.bincount(expression_faces(16, split="train").targets).tolist() == [3, 3, 2, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="sum to n"):
        expression_faces(20, split="train", counts=[1] * 7)
    with pytest.raises(ValueError, match="occluded"):
        expression_faces(20, split="train", occluded=1.5)


def one_face(expression: str, **changes: float) -> faces.Rendered:
    """The same upright, light, bald head with dark brows and another expression at full strength, without noise."""
    rng = np.random.default_rng(0)
    p = faces.identities(1, rng) | faces.poses(1, rng) | faces.lights(1, rng)
    p |= {k: np.array([v]) for k, v in zip(faces._TRAITS, faces._FULL[expression], strict=True)}
    p |= {"scale": np.array([0.85]), "hairline": np.array([-1.5]), "ambient": np.array([0.6])}
    p |= {"hair": np.full((1, 3), 0.1), "ink": np.full((1, 3), 0.1), "skin": np.array([[0.9, 0.75, 0.65]])}
    p |= {k: np.zeros(1) for k in ("roll", "yaw", "pitch", "left", "down", "gaze")}
    p |= {k: np.array([v]) for k, v in changes.items()}
    return faces.render(p, np.full((1, 3, 96, 96), 0.5, np.float32), rng)


def test_expressions_differ_only_at_brows_eyes_mouth_and_folds():
    neutral = one_face("neutral")
    for name in EXPRESSIONS[:-1]:
        other = one_face(name)
        changed = (np.abs(other.canvas - neutral.canvas).max(axis=1) > 0.02)[0]
        assert changed.sum() > 60, name
        x, y = neutral.x[0], neutral.y[0]
        allowed = ((np.abs(y + 0.25) < 0.42) | ((y > 0.1) & (y < 0.9))) & (np.abs(x) < 0.7)
        assert not (changed & ~allowed).any(), name
        assert np.array_equal(other.depth, neutral.depth) and np.array_equal(other.face, neutral.face)


def test_geometry_of_the_expressions():
    """Rows of the darkest part of brow and mouth, against the definition of the expressions."""

    def darkest_row(drawn: faces.Rendered, x: float, low: float, high: float) -> float:
        column = np.argmin(np.abs(drawn.x[0, 48] - x))
        y, grey = drawn.y[0, :, column], drawn.canvas[0, :3, :, column].mean(axis=0)
        grey = np.where((y > low) & (y < high), grey, 9.0)
        return float(y[grey.argmin()])

    def brow(name: str, x: float) -> float:
        return darkest_row(one_face(name), x, -0.65, -0.25)

    assert brow("anger", 0.2) > brow("neutral", 0.2)  # inner ends down: y points down
    assert brow("sadness", 0.2) < brow("sadness", 0.45) - 0.05
    assert brow("surprise", 0.32) < brow("neutral", 0.32) - 0.1
    happy, sad = one_face("happiness", gape=0.0, teeth=0.0), one_face("sadness")
    assert darkest_row(happy, 0.27, 0.3, 0.8) < darkest_row(happy, 0.0, 0.3, 0.8) - 0.05  # the corners are up
    assert darkest_row(sad, 0.2, 0.3, 0.8) > darkest_row(sad, 0.0, 0.3, 0.8) + 0.05
    dark = [(one_face(n).canvas[0, 0][(one_face(n).y[0] > 0.3)] < 0.2).sum() for n in ("neutral", "surprise")]
    assert dark[1] > dark[0] + 50  # an open mouth


def test_nearer_is_brighter_in_depth_and_the_nose_is_nearest():
    drawn = one_face("neutral")
    face, rest = drawn.face[0] == 1, drawn.face[0] == 0
    y, x = np.unravel_index(drawn.depth[0].argmax(), drawn.depth[0].shape)
    assert abs(drawn.x[0, y, x]) < 0.06 and abs(drawn.y[0, y, x] - 0.12) < 0.15
    assert drawn.depth[0][face].min() > drawn.depth[0][rest].max() and drawn.depth.max() < 1


def test_a_turned_head_moves_the_features_and_not_the_outline():
    ahead, aside = one_face("neutral"), one_face("neutral", yaw=0.25)
    assert np.array_equal(ahead.face, aside.face)
    nose = [d.x[0].ravel()[d.depth[0].argmax()] for d in (ahead, aside)]
    assert nose[1] - nose[0] > 0.15


# ---------------------------------------------------------------------------------------------- presentation attacks
def test_attacks_are_where_the_mask_says_in_depth_and_infrared():
    quiet = Domain(noise=0, depth_noise=0, ir_noise=0, holes=0, ir_gain=(1, 1), albedo=(0.4, 0.5))
    data = spoof_faces(400, split="train", domain=quiet)
    attack = data.extra["attack"]
    assert torch.equal(data.targets, (attack == 0).long()) and abs(data.targets.float().mean() - 0.5) < 0.01
    assert torch.equal(data.masks.flatten(1).any(1), attack > 0)
    skin = data.images[:, CHANNELS["ir"]][:, 0][data.extra["face"] & (attack == 0)[:, None, None]].median()
    for k, name in enumerate(ATTACKS, start=1):
        ir = data.images[attack == k][:, CHANNELS["ir"]][:, 0]
        where, face = data.masks[attack == k], data.extra["face"][attack == k]
        inside = (ir[where & face] - skin).abs().mean()
        outside = (ir[~where & face] - skin).abs().mean() if (~where & face).any() else torch.zeros(())
        assert inside > 0.15 and inside > 1.5 * outside, (name, inside, outside)
    flat = data.images[attack == 2][:, CHANNELS["depth"]][:, 0]
    second = flat[:, :, 2:] - 2 * flat[:, :, 1:-1] + flat[:, :, :-2]
    assert second.abs().max() < 1e-5  # a screen is a plane


def test_the_cue_in_colour_is_weak_and_can_be_removed():
    """Between the same faces with and without the texture the difference is a few times smaller than in infrared."""
    quiet = Domain(noise=0, depth_noise=0, ir_noise=0, holes=0)
    with_cue = spoof_faces(200, split="test", domain=quiet, cue=1.0)
    without = spoof_faces(200, split="test", domain=quiet, cue=0.0)
    difference = (with_cue.images - without.images)[:, CHANNELS["rgb"]]
    prints = with_cue.extra["attack"] == 1
    cue = difference[prints].abs().amax(1)
    assert 0.02 < cue[with_cue.masks[prints]].mean() < 0.08  # twice the sensor noise
    live = with_cue.extra["attack"] == 0
    assert difference[live].abs().amax() > 0.02  # live images carry textures too, beside the face
    assert torch.equal(with_cue.images[:, 3:], without.images[:, 3:])


def test_subjects_belong_to_one_split_and_protocols_can_leave_one_attack_out():
    train, test = (spoof_faces(300, split=s, subjects=20) for s in ("train", "test"))
    assert not set(train.extra["subject"].tolist()) & set(test.extra["subject"].tolist())
    assert len(set(train.extra["subject"].tolist())) == 20
    seen = spoof_faces(200, split="train", attacks=("print", "mask"), live=0.25)
    assert set(seen.extra["attack"].tolist()) == {0, 1, 3} and seen.targets.sum() == 50
    for bad in ({"attacks": ("paper",)}, {"attacks": ()}, {"domain": "moon"}, {"live": 2.0}, {"subjects": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}"):
            spoof_faces(10, split="train", **bad)


def test_domains_differ_in_light_and_skin():
    images = {name: spoof_faces(120, split="train", domain=name, live=1.0) for name in DOMAINS}
    tone = {n: d.images[:, :3].mean(1)[d.extra["face"]].mean() for n, d in images.items()}
    assert tone["light"] > tone["medium"] > tone["dark"] and tone["office"] < tone["studio"]
    holes = {n: (d.images[:, 3] == 0).float().mean() for n, d in images.items()}
    assert holes["street"] > holes["studio"] + 0.03


def test_clouds_are_joined_linearly_along_rows_and_columns():
    grid = np.random.default_rng(0).random((2, 6), dtype=np.float32)
    joined = backgrounds._join(grid, 16, 4)
    expected = [np.interp((np.arange(16) + 0.5) / 4, np.arange(6), row) for row in grid]
    assert joined.dtype == np.float32 and joined.shape == (2, 16)
    np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-7)
    clouds = backgrounds.cloud_noise(1, (8, 16), np.random.default_rng(1), cell=4, grain=0.0)[0]
    coarse = np.random.default_rng(1).random((4, 6), dtype=np.float32)
    rows = np.array([np.interp((np.arange(16) + 0.5) / 4, np.arange(6), row) for row in coarse])
    both = np.array([np.interp((np.arange(8) + 0.5) / 4, np.arange(4), column) for column in rows.T]).T
    np.testing.assert_allclose(clouds - clouds[:, :1, :1], 0.25 * (both - both[0, 0])[None].repeat(3, 0), atol=1e-6)


def test_clouds_do_not_depend_on_the_kernels_of_a_blas():
    """One last bit of one cloud once moved a grey level of a face, and the record of a seed with it."""
    code = (
        "import zlib, numpy as np; from common.data.backgrounds import cloud_noise as c; "
        "print(zlib.crc32(c(64, (24, 24), np.random.default_rng(104), cell=4).tobytes()))"
    )
    found = set()
    for kernels in ("Prescott", "Haswell"):  # without and with fused multiply-adds
        env = os.environ | {"OPENBLAS_CORETYPE": kernels}
        found.add(
            int(
                subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
            )
        )
    here = backgrounds.cloud_noise(64, (24, 24), np.random.default_rng(104), cell=4)
    assert found == {zlib.crc32(here.tobytes())} == {3043271147}
