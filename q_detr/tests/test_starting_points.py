"""The teacher and the first stage: their own configuration, found again, never trained for a wrong value or by a preflight; the
student starts from them, lambda weighs what it learns, and the switches of the controls do what they say."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from common import runs
from common.quant.lsq import LSQQuantizer
from common.reproduce import stages
from q_detr import train
from q_detr.building import build_real, build_student, parameter_groups
from q_detr.detr import Attention, pad_images
from q_detr.distribution_alignment import DistributionAlignment
from q_detr.distribution_rectification import drd_loss, layer_weight
from q_detr.foreground_query_matching import foreground_queries, matched_teacher_queries
from q_detr.held_out import check_floor, held_out_batch, held_out_distance, held_out_set, predict
from q_detr.official_weights import is_student_key
from q_detr.quantized_detr import quantize_detr
from q_detr.set_prediction import SetCriterion
from q_detr.starting_points import find, first_stage
from q_detr.tests.contract import CONFIGS, short_config, trained

SCENES = {"kind": "scenes"}


def found(fabric, arm, *overrides, identity=SCENES, config=None):
    """(configuration, directory) that the arm of a student with these overrides is trained with."""
    calls = []
    cfg = (config or default)(*overrides)
    seed = cfg.teacher.seed if arm == "teacher" else cfg.start.seed
    path = find(cfg, fabric, arm, seed, identity=identity, train=lambda own, _, out: calls.append((own, out)))
    assert path == calls[0][1] / "last.ckpt"
    return calls[0]


def default(*overrides):
    from hydra import compose, initialize_config_dir

    from q_detr.tests.contract import CONFIGS

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", ["arm=test", "run_root=r", "fabric.accelerator=cpu", *overrides])


def test_the_students_settings_are_not_the_teachers(fabric):
    """After `python train.py` each of these finds the same teacher again."""
    for overrides in (
        [], ["optim.lr=0.1"], ["train.accumulation=2", "train.epochs=7"], ["evaluate.batch_size=3"], ["method=baseline"],
        ["method.quant.bits=4", "seed=3"], ["schedule.kind=step"], ["drd_weight=1.0"], ["force=true"], ["train.clip_norm=2"],
        ["method.quant.parts=[backbone]"], ["parity.quantize_downsample=false"], ["data.workers=2", "threads=1"],
    ):  # fmt: skip
        own, out = found(fabric, "teacher", *overrides)
        assert str(out) == "r/default/teacher/seed0", overrides
        assert not own.force and own.optim.lr == 2e-3 and own.train.epochs == 18 and not own.method.quantised
        runs.plain(own)  # nothing in it is missing
    assert str(found(fabric, "teacher", "teacher.seed=2")[1]) == "r/default/teacher/seed2"


def test_another_data_set_model_or_precision_has_a_teacher_of_its_own(fabric):
    names = {
        str(found(fabric, "teacher", o)[1])
        for o in ("data.train=90", "data.side=32", "model.dim=32", "fabric.precision=bf16-mixed")
    }
    assert len(names) == 4 and all(n.startswith("r/default/teacher/for-") and n.endswith("/seed0") for n in names)
    own = ["data=coco", "data.root=/a", "data.labels=contiguous"]
    a = found(fabric, "teacher", *own, identity={"kind": "coco", "sha": "1"})[1]
    moved = found(
        fabric, "teacher", "data=coco", "data.root=/b", "data.labels=contiguous", identity={"kind": "coco", "sha": "1"}
    )[1]
    other = found(fabric, "teacher", *own, identity={"kind": "coco", "sha": "2"})[1]
    assert a == moved != other


def test_the_first_stage_has_the_students_quantisers_and_teacher(fabric):
    own, out = found(fabric, "stage1", "method=baseline")
    assert str(out) == "r/default/stage1/seed0" and list(own.method.quant.parts) == ["backbone"]
    assert own.method.drd.weight == 2.5 and own.method.start == "teacher" and own.method.drd.lambda_for_layers == 6
    own, longer = found(fabric, "stage1", "train.epochs=7", "optim.lr=0.01", "schedule.warmup=0.2")
    assert (own.train.epochs, own.optim.lr, own.schedule.warmup) == (7, 0.01, 0.2) and "for-" in str(longer)
    own, four = found(fabric, "stage1", "method.quant.bits=4", "method.quant.da=both")
    assert own.method.quant.bits == 4 and own.method.quant.da == "none" and "for-" in str(four)
    own, out = found(fabric, "stage1", "teacher.seed=3")
    assert own.teacher.seed == 3 and out != four and "for-" in str(out)


def test_sweeps_and_teachers_of_another_shape_are_not_trained_by_the_way(fabric, tmp_path):
    with pytest.raises(FileNotFoundError, match="train it first, python train.py method=teacher scale=mini seed=0"):
        found(fabric, "teacher", "scale=mini", f"run_root={tmp_path}")
    with pytest.raises(ValueError, match="give teacher.weights="):
        found(fabric, "teacher", "+teacher.model.ffn=64")


def test_an_error_of_the_teacher_says_whose_it_is_and_what_to_do(fabric):
    def broken(own, fabric, out):
        raise runs.RunError("holds a finished run with another configuration")

    with pytest.raises(
        runs.RunError, match=r"the teacher in r/default/teacher/seed0: holds .* force=true.* teacher.weights="
    ):
        find(default(), fabric, "teacher", 0, identity=SCENES, train=broken)


@pytest.mark.parametrize(
    "wrong", ["method.quant.bits=33", "method.drd.tau=2", "evaluate.difficult=maybe", "train.clip_norm=0"]
)
def test_a_wrong_value_is_refused_before_a_teacher_is_trained(wrong, fabric, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find", lambda *a, **k: pytest.fail("a teacher is looked for"))
    monkeypatch.setattr(train, "detection_sets", lambda **k: pytest.fail("data is read"))
    with pytest.raises(ValueError, match=wrong.split("=")[0].split(".")[-1]):
        train.fit(default(wrong, f"run_root={tmp_path}"), fabric, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", ["teacher", "stage1"])
def test_a_preflight_trains_nothing_and_writes_nothing(start, fabric, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "find", lambda *a, **k: pytest.fail("a teacher is looked for"))
    ran = []
    monkeypatch.setattr(train, "drd_loss", lambda *a, **k: (ran.append(1), drd_loss(*a, **k))[1])
    train.fit(short_config("preflight=true", f"method.start={start}", f"run_root={tmp_path}"), fabric, tmp_path / "run")
    out = capsys.readouterr().out
    assert "teacher and start were not loaded: fresh networks" in out and "GiB" in out and len(ran) == 4
    assert not list(tmp_path.iterdir())


def test_the_student_starts_from_the_teachers_weights_and_the_teacher_is_frozen(fabric):
    cfg = short_config(f"teacher.weights={trained('teacher', 'seed=5', 'train.epochs=1')}", "model.dropout=0.5")
    images = [torch.rand(3, 32, 32) for _ in range(3)]
    network, teacher = train.build(cfg, fabric, 3, images, SCENES)
    state = runs.load_checkpoint(cfg.teacher.weights)["model"]
    for model in (network, teacher):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    batch = pad_images(images)
    assert torch.equal(teacher(*batch)["co_attended"], teacher(*batch)["co_attended"])  # no dropout in what is imitated
    network.train()
    assert not torch.equal(network(*batch)["co_attended"], network(*batch)["co_attended"])
    groups = parameter_groups(network, **cfg.optim)
    own = {id(p) for n, p in network.named_parameters() if is_student_key(n)}
    assert own and all(g["weight_decay"] == (0.0 if id(g["params"][0]) in own else 1e-4) for g in groups)


def test_the_students_seed_is_not_its_teachers(fabric, monkeypatch):
    asked, weights = [], trained("teacher", "seed=5", "train.epochs=1")
    monkeypatch.setattr(train, "find", lambda cfg, fabric, arm, seed, **_: asked.append((arm, seed)) or weights)
    train.build(short_config("seed=3", "teacher.seed=2"), fabric, 3, [torch.rand(3, 32, 32)], SCENES)
    assert asked == [("teacher", 2)]


def test_steps_are_calibrated_on_the_whole_first_batch(fabric, tmp_path, monkeypatch):
    """However it is divided over devices and micro-batches."""
    seen = []

    def build(cfg, fabric, classes, first_batch, identity):
        seen.extend(first_batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build", build)
    weights = trained("teacher", "seed=5", "train.epochs=1")
    with pytest.raises(KeyboardInterrupt):
        train.fit(short_config(f"teacher.weights={weights}", "train.accumulation=4"), fabric, tmp_path)
    assert [image.shape for image in seen] == [(3, 32, 32)] * 8


def batch_of(seed=0, **changes):
    """(student, teacher, images, targets) of the tiny network."""
    options = {**OmegaConf.to_container(short_config().model), **changes}
    torch.manual_seed(seed)
    real, teacher = (build_real(**options, num_classes=3) for _ in range(2))
    images = [torch.rand(3, 32, 32) for _ in range(2)]
    student = build_student(real, *pad_images(images), quant={"bits": 4, "da": "co_attn"})
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.6, 0.6]])} for _ in images]
    return student, teacher.eval(), images, targets


def terms(fabric, batch, **drd):
    student, teacher, images, targets = batch
    criterion = SetCriterion(3)
    options = {"weight": 2.5, "lambda_for_layers": None, **drd}
    return train.losses(
        fabric, student, teacher, criterion, images, targets, count=criterion.count(targets), drd=options
    )[0]


def test_lambda_and_the_controls_of_the_distillation(fabric):
    batch = batch_of()
    student, teacher, images, targets = batch
    outs, boxes = [m(*pad_images(images)) for m in (student, teacher)], [t["boxes"] for t in targets]
    plain = drd_loss(*outs, boxes)[0]
    torch.testing.assert_close(terms(fabric, batch)["drd"], 2.5 * plain)
    torch.testing.assert_close(terms(fabric, batch, weight=0.5)["drd"], 0.5 * plain)
    torch.testing.assert_close(terms(fabric, batch, lambda_for_layers=6)["drd"], 2.5 * plain * 2 / 6)
    assert "drd" not in terms(fabric, batch, weight=0.0)
    kept = foreground_queries(outs[0]["pred_boxes"], boxes)
    ours, theirs = (o["co_attended"][:, kept] for o in outs)
    torch.testing.assert_close(terms(fabric, batch, partner="index")["drd"], 2.5 * (ours - theirs).norm(dim=-1).mean())
    image, query = kept.nonzero(as_tuple=True)
    partner = matched_teacher_queries(outs[0]["pred_boxes"], outs[1]["pred_boxes"])[image, query]
    theirs = outs[1]["co_attended"][:, image, partner]
    cosine = (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
    torch.testing.assert_close(terms(fabric, batch, distance="cosine")["drd"], 2.5 * (1 - cosine).mean())


def test_an_infinite_pixel_is_not_clipped_away(fabric):
    batch = batch_of()
    batch[2][1][0, 3, 3] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite at step 0: ce=nan"):
        runs.check_finite(terms(fabric, batch), step=0)
        pytest.fail("an infinite pixel passed")


def test_the_default_is_the_protocol_of_the_evidence_and_a_recipe_is_the_papers():
    """Two stages, gamma of the size of the queries and lambda by the layers in every student of the embedded default."""
    for arm in ("baseline", "da", "fqm", "drd", "imitation", "tau0", "lsq"):
        cfg = default(f"method={arm}")
        assert (cfg.method.start, cfg.method.da_init, cfg.method.drd.lambda_for_layers) == (
            "stage1",
            "calibrated",
            6,
        ), arm
    assert [default(f"method={arm}").method.start for arm in ("stage1", "percentile")] == ["teacher", "teacher"]
    for recipe in ("coco_stage2", "voc_stage2", "smca_stage2", "released"):
        cfg = default(f"experiment={recipe}")
        assert cfg.method.da_init == "ones" and layer_weight(2.5, layers=cfg.model.decoder_layers, of=6) == 2.5


def test_a_second_stage_does_not_go_on_with_other_quantisers():
    quant = OmegaConf.to_container(default("method=baseline").method.quant, resolve=True)
    saved = {"model": {"w": 1}, "config": {"method": {"quant": {**quant, "parts": ["backbone"]}}}}
    assert first_stage(saved, quant) == {"w": 1} == first_stage({"model": {"w": 1}}, quant)
    for key, other in (("bits", 4), ("stem_bits", 4), ("quantizer", "lsq"), ("act_granularity", "per_tensor")):
        with pytest.raises(
            ValueError, match=f"trained with method.quant.{key}={quant[key]}, this student has {key}={other}"
        ):
            first_stage(saved, {**quant, key: other})


def test_a_teacher_below_the_floor_stops_what_follows(fabric, tmp_path):
    """The run fails, naming arm, seed and number; started again it fails again, and no student finds it finished."""
    cfg = short_config("method=teacher", "train.epochs=1", "evaluate.floor=100", "seed=7")
    for _ in range(2):
        with pytest.raises(runs.RunError, match=r"test, seed 7: AP50 \d+\.\d\d is below evaluate\.floor=100"):
            train.fit(cfg, fabric, tmp_path / "run")
        result = json.loads((tmp_path / "run/result.json").read_text())
        assert result["status"] == "failed" and not result["metrics"]
    check_floor(50.0, floor=50, who="teacher")
    check_floor(0.0, floor=None, who="teacher")
    for low in (49.99, float("nan")):
        with pytest.raises(runs.RunError, match="is below evaluate.floor=50"):
            check_floor(low, floor=50, who="teacher")


@pytest.mark.parametrize("scale", ["mini", "full", "real_bccd", "gpu_scenes", "gpu_bccd"])
def test_every_scale_has_three_teachers_with_a_floor_and_one_protocol(scale):
    """Students learn from the teacher of their seed; those of one seed and one width of bits start from one first stage, and
    train for as many steps as it did."""
    schedules, starts, teachers, kept = set(), set(), set(), ("epochs", "batch_size")
    for file in stages(CONFIGS.parent, scale):
        if file.stem.split("_")[1] != "train":
            continue
        cfg, params = composed(scale, file.stem)
        seeds = set(params["seed"].split(","))
        if params["method"] == "teacher":
            teachers = seeds
            assert cfg.evaluate.floor >= 40, file.stem
            continue
        assert len(seeds) >= 3 and seeds <= teachers, file.stem  # sweeps run by name: the teachers' is the first
        assert cfg.teacher.seed == cfg.seed == 101 and cfg.evaluate.floor is None, file.stem
        schedule = (*(cfg.train[k] for k in kept), cfg.optim.lr, cfg.optim.quant_lr)
        if params["method"] == "stage1":
            schedules.add(schedule)
            bits = params["method.quant.bits"].split(",")
            starts |= {f"{cfg.run_root}/{scale}/{cfg.arm}/method.quant.bits-{b}/seed101/last.ckpt" for b in bits}
        elif cfg.method.start == "stage1":
            assert (cfg.method.da_init, cfg.method.drd.lambda_for_layers) == ("calibrated", 6), file.stem
            assert schedules == {schedule}, file.stem
            assert cfg.start.weights in starts and f"bits-{cfg.method.quant.bits}/" in cfg.start.weights, file.stem
    assert schedules and starts


def composed(scale, stage):
    """(the configuration of the first cell of seed 101, what the sweep varies)."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    data = [] if scale in ("mini", "full", "gpu_scenes") else ["data.root=/d"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        sweep = [f"+reproduce/{scale}={stage}", *data]
        params = compose("config", sweep, return_hydra_config=True).hydra.sweeper.params
        first = [
            f"{k}={str(v).split(',')[0] if k != 'method.quant.parts' else '[backbone]'}" for k, v in params.items()
        ]
        cfg = compose("config", [*sweep, *first, "seed=101"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg, params


def test_32_bits_is_no_quantiser_at_all():
    real = build_real(**OmegaConf.to_container(short_config().model), num_classes=3)
    student = quantize_detr(real, bits=32)
    assert not any(isinstance(m, LSQQuantizer) for m in student.modules())
    x = pad_images([torch.rand(3, 32, 32)])
    torch.testing.assert_close(student.eval()(*x)["pred_logits"], real.eval()(*x)["pred_logits"])


def test_gamma_is_calibrated_by_the_queries_of_the_first_stage():
    options = OmegaConf.to_container(short_config().model)
    torch.manual_seed(0)
    real, other = (build_real(**options, num_classes=3) for _ in range(2))
    images, mask = pad_images([torch.rand(3, 32, 32) for _ in range(2)])
    quant = {"bits": 4, "parts": ["backbone"]}
    stage1 = build_student(other, images, mask, quant=quant)
    for layer in stage1.transformer["decoder"].layers:
        layer.multihead_attn.in_proj_weight.data.mul_(3)
    whole = {"bits": 4, "da": "co_attn"}
    student = build_student(real, images, mask, quant=whole, da_init="calibrated", stage1=stage1.state_dict())
    seen = []
    for layer in stage1.transformer["decoder"].layers:
        layer.multihead_attn.align.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    stage1.eval()(images, mask)
    gammas = [m.gamma for m in student.modules() if isinstance(m, DistributionAlignment)]
    for gamma, q in zip(gammas, seen, strict=True):
        torch.testing.assert_close(gamma.detach(), torch.full_like(gamma, q.var(-1, correction=1).mean().sqrt().item()))


def test_attention_drops_its_weights_in_training_only():
    torch.manual_seed(0)
    attention, x = Attention(8, 2, dropout=0.5), torch.randn(1, 5, 8)
    assert not torch.equal(attention(x, x, x)[1], attention(x, x, x)[1])
    attention.eval()
    assert torch.equal(attention(x, x, x)[1], attention(x, x, x)[1])


def test_the_held_out_distance_is_over_the_kept_queries_only():
    student, teacher, *_ = batch_of()
    held_out = held_out_set({"name": "scenes", "seed": 1, "train": 1, "test": 6, "side": 48, "max_shapes": 3})
    value = held_out_distance(student, teacher, held_out, torch.device("cpu"), images=6, side=None)
    images, mask, targets = held_out_batch(held_out, range(6), torch.device("cpu"), None)
    with torch.no_grad():
        ours, theirs = student.eval()(images, mask), teacher(images, mask)
    distances, queries = [], ours["pred_boxes"].shape[1]
    for i, t in enumerate(targets):
        corners = t["boxes"].as_subclass(torch.Tensor) / 48
        boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
        kept = foreground_queries(ours["pred_boxes"][i : i + 1], [boxes])[0]
        partner = matched_teacher_queries(ours["pred_boxes"][i : i + 1], theirs["pred_boxes"][i : i + 1])[0]
        distances += [
            (o[i, j] - th[i, partner[j]]).norm()
            for j in kept.nonzero().flatten().tolist() for o, th in zip(ours["co_attended"], theirs["co_attended"], strict=True)
        ]  # fmt: skip
    assert 0 < len(distances) < 2 * 6 * queries and value["held_out_pairs"] == len(distances) / 2 / 6
    assert value["held_out_drd"] == pytest.approx(torch.stack(distances).mean().item(), rel=1e-5)


def test_ranks_share_the_batches_of_the_evaluation(fabric):
    """Each of two ranks predicts every other batch; together they are the one process."""
    student, *_ = batch_of()
    held_out = held_out_set({"name": "scenes", "seed": 1, "train": 1, "test": 7, "side": 48, "max_shapes": 3})
    options = {"loss": "softmax", "batch_size": 2, "side": None}
    whole, shares = predict(fabric, student, held_out, **options), []
    for rank in range(2):

        def kept(value, reduce_op):
            assert reduce_op == "sum"
            return value

        own = SimpleNamespace(global_rank=rank, world_size=2, device=torch.device("cpu"), all_reduce=kept)
        shares.append(predict(own, student, held_out, **options))
    for image_id, p in whole.items():
        parts = [s[image_id] for s in shares]
        assert sum(bool(q["boxes"].any()) for q in parts) == 1
        for key, value in p.items():
            torch.testing.assert_close(parts[0][key] + parts[1][key], value, rtol=0, atol=0)


def test_a_new_classifier_is_told(fabric, tmp_path, capsys):
    options = {k: v for k, v in OmegaConf.to_container(short_config().model).items() if k != "kind"}
    for classes, said in ((5, "left out: the classes differ"), (3, "kept: they have 3 classes, too")):
        torch.save(build_real("detr", num_classes=classes, **options).state_dict(), tmp_path / f"{classes}.pth")
        cfg = short_config(
            "method=teacher",
            "method.start=weights",
            f"start.weights={tmp_path / f'{classes}.pth'}",
            "start.new_classes=true",
        )
        train.build(cfg, fabric, 3, None, SCENES)
        assert said in capsys.readouterr().out


def test_a_finished_teacher_is_found_again_by_another_student(fabric, tmp_path, capsys, monkeypatch):
    """The whole way at scale default, with a short recipe in place of the teacher's."""
    real = train.find

    def short(cfg, fabric, arm, seed, *, identity, train):
        def quick(own, fabric, out):
            own = OmegaConf.merge(own, {"train": {"epochs": 1, "batch_size": 8}})
            train(own, fabric, out)

        return real(cfg, fabric, arm, seed, identity=identity, train=quick)

    monkeypatch.setattr(train, "find", short)
    for name, overrides in (("a", []), ("b", ["optim.lr=0.01", "train.accumulation=2", "method=baseline"])):
        train.fit(short_config(f"run_root={tmp_path}", "train.epochs=1", *overrides), fabric, tmp_path / name)
    assert capsys.readouterr().out.count("finished already") == 1
    (teacher,) = (tmp_path / "default/teacher").rglob("last.ckpt")
    assert json.loads((teacher.parent / "result.json").read_text())["status"] == "finished"
