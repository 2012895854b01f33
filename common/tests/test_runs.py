"""A run directory: fingerprint, skip / resume / refuse / force, atomic checkpoints, refused pickles, finite checks."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from omegaconf import OmegaConf

from common import runs

CFG = {
    "scale": "mini",
    "arm": "a",
    "seed": 3,
    "optim": {"lr": 0.1},
    "data": {"root": "/x", "name": "d"},
    "force": False,
}


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def finished(path, fabric, cfg=CFG, metrics=None):
    run = runs.Run.open(path, cfg, fabric)
    with run:
        run.finish(metrics or {"top1": 1.0})


def test_fingerprint_covers_results_not_places():
    same = {**CFG, "data": {"root": "/elsewhere", "name": "d"}, "force": True, "run_root": "/scratch"}
    assert runs.fingerprint(CFG) == runs.fingerprint(same) == runs.fingerprint(OmegaConf.create(CFG))
    for other in ({**CFG, "seed": 4}, {**CFG, "optim": {"lr": 0.2}}, {**CFG, "data": {"root": "/x", "name": "e"}}):
        assert runs.fingerprint(CFG) != runs.fingerprint(other)


def test_a_key_that_came_later_changes_a_run_only_with_another_value():
    assert (
        runs.fingerprint({**CFG, "compile": False})
        == runs.fingerprint(CFG)
        != runs.fingerprint({**CFG, "compile": True})
    )


def test_differing_keys_name_old_and_new():
    new = {**CFG, "optim": {"lr": 0.2, "nesterov": True}, "data": {"root": "/y", "name": "d"}}
    assert runs.differing_keys(CFG, new) == ["optim.lr: 0.1 -> 0.2", "optim.nesterov: (absent) -> True"]


def test_a_missing_value_is_named():
    with pytest.raises(runs.RunError, match=r"optim\.lr"):
        runs.plain(OmegaConf.create({"optim": {"lr": "???"}}))


def test_finished_run_is_skipped_and_other_config_refused_and_forced(tmp_path, fabric):
    finished(tmp_path, fabric)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished" and result["metrics"] == {"top1": 1.0} and result["seed"] == 3
    assert {"scale", "arm", "seconds", "config_sha256", "commit", "versions", "machine"} <= result.keys()
    assert runs.Run.open(tmp_path, CFG, fabric) is None
    other = {**CFG, "optim": {"lr": 0.5}}
    with pytest.raises(runs.RunError, match=r"optim\.lr: 0\.1 -> 0\.5"):
        runs.Run.open(tmp_path, other, fabric)
    assert json.loads((tmp_path / "result.json").read_text()) == result, "a refusal must change nothing"
    run = runs.Run.open(tmp_path, {**other, "force": True}, fabric)
    assert run is not None and run.load_checkpoint() is None


def test_interrupted_run_resumes_with_its_log_cut_to_the_checkpoint(tmp_path, fabric):
    run = runs.Run.open(tmp_path, CFG, fabric)
    run.log(epoch=1)
    run.save_checkpoint({"epoch": 1, "w": torch.arange(3)})
    run.log(epoch=2)  # killed before the checkpoint of epoch 2
    run._lock.close()
    again = runs.Run.open(tmp_path, CFG, fabric)
    state = again.load_checkpoint()
    assert state["epoch"] == 1 and torch.equal(state["w"], torch.arange(3))
    again.log(epoch=2)
    rows = [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2]


def test_an_exception_marks_the_run_as_failed_and_is_raised(tmp_path, fabric):
    run = runs.Run.open(tmp_path, CFG, fabric)
    with pytest.raises(FloatingPointError), run:
        raise FloatingPointError("loss is NaN")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "failed" and "loss is NaN" in result["error"]


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, fabric, monkeypatch):
    run = runs.Run.open(tmp_path, CFG, fabric)
    run.save_checkpoint({"epoch": 1})

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(runs.RunError, match=r"last\.ckpt.*No space left"):
        run.save_checkpoint({"epoch": 2})
    assert run.load_checkpoint()["epoch"] == 1
    assert not list(tmp_path.glob(".*.tmp")), "half a checkpoint must not stay"


def test_truncated_checkpoint_says_so(tmp_path, fabric):
    run = runs.Run.open(tmp_path, CFG, fabric)
    run.save_checkpoint({"w": torch.randn(1000)})
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:700])
    with pytest.raises(runs.RunError, match=r"last\.ckpt: damaged, truncated"):
        run.load_checkpoint()


class _Payload:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_pickled_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Payload()}, tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(_Payload()))
    for name in ("evil.ckpt", "plain.ckpt"):
        with pytest.raises(runs.RunError, match=name):
            runs.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(FileNotFoundError, match="none.ckpt"):
        runs.load_checkpoint(tmp_path / "none.ckpt")


def test_corrupt_result_is_named(tmp_path, fabric):
    (tmp_path / "result.json").write_text('{"status": "fin')
    with pytest.raises(runs.RunError, match=r"result\.json"):
        runs.Run.open(tmp_path, CFG, fabric)


def test_final_metrics_must_be_finite_numbers(tmp_path, fabric):
    run = runs.Run.open(tmp_path, CFG, fabric)
    with pytest.raises(ValueError, match="top1"):
        run.finish({"top1": float("nan")})


def _hold(path, started, release):
    handle = runs._lock(path)
    started.set()
    release.wait(10)
    handle.close()


def test_a_second_writer_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    started, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, started, release))
    other.start()
    assert started.wait(10)
    waiter = context.Process(target=_hold, args=(tmp_path, context.Event(), release))
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive(), "the lock did not hold"
    release.set()
    waiter.join(10)
    assert waiter.exitcode == 0
    other.join(10)


@pytest.mark.parametrize(("world", "accumulation", "per_device"), [(1, 1, 64), (4, 2, 8)])
def test_per_device_batch(world, accumulation, per_device):
    assert runs.per_device_batch(64, world, accumulation) == per_device


@pytest.mark.parametrize(("batch", "world", "accumulation"), [(64, 3, 1), (64, 8, 16), (0, 1, 1)])
def test_batch_that_does_not_divide_is_an_error(batch, world, accumulation):
    with pytest.raises(ValueError, match=f"batch_size={batch}"):
        runs.per_device_batch(batch, world, accumulation)


def test_check_finite_names_step_and_term(tmp_path):
    runs.check_finite({"ce": torch.tensor(1.0)}, step=0)
    with pytest.raises(FloatingPointError, match=r"step 7: hcm=nan"):
        runs.check_finite({"ce": torch.tensor(1.0), "hcm": torch.tensor(float("nan"))}, step=7)
    good = tmp_path / "last.ckpt"
    good.touch()
    with pytest.raises(FloatingPointError, match="last.ckpt"):
        runs.check_finite({"ce": torch.tensor(float("inf"))}, step=1, last_good=good)


def test_a_finished_rank_leaves_without_ending_the_interpreter(tmp_path, monkeypatch):
    """A late thread of gloo, which DistributedDataParallel keeps, aborts an interpreter that is ending."""
    steps = []
    monkeypatch.setattr(runs.os, "_exit", lambda status: steps.append((status, torch.distributed.is_initialized())))
    runs.leave()
    assert steps == [], "one process by itself goes on"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    runs.leave()
    assert steps == [(0, False)]


def test_launcher_mismatch_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(runs.RunError, match=r"4 processes.*devices=1"):
        runs.launch({"accelerator": "cpu", "devices": 1})


def test_remove_if_empty_stops_at_content(tmp_path):
    (tmp_path / "runs/a/b").mkdir(parents=True)
    (tmp_path / "runs/keep").touch()
    runs.remove_if_empty(tmp_path / "runs/a/b", tmp_path / "runs")
    assert not (tmp_path / "runs/a").exists() and (tmp_path / "runs/keep").exists()


def test_hash_files_depends_on_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    files = [tmp_path / "a", tmp_path / "b"]
    first = runs.hash_files(files, tmp_path)
    assert first == runs.hash_files(reversed(files), tmp_path)
    (tmp_path / "b").write_text("3")
    assert first != runs.hash_files(files, tmp_path)


# -------------------------------------------------------------------------------- what may mislead: data, deletion, damage
def unfinished(path, fabric, **options):
    run = runs.Run.open(path, CFG, fabric, **options)
    run.log(epoch=1)
    run.save_checkpoint({"w": torch.ones(3), "epoch": 1})
    run._lock.close()


def test_other_data_under_the_same_configuration_is_refused(tmp_path, fabric):
    a, b = ({"kind": "folder", "images": n, "sha": "x"} for n in (4, 5))
    with runs.Run.open(tmp_path / "done", CFG, fabric, data=a) as run:
        run.finish({"top1": 1.0})
    assert runs.Run.open(tmp_path / "done", CFG, fabric, data=a) is None
    unfinished(tmp_path / "open", fabric, data=a)
    for name in ("done", "open"):
        with pytest.raises(runs.RunError, match=r"on other data \(kind folder, images 4.*images 5"):
            runs.Run.open(tmp_path / name, CFG, fabric, data=b)


@pytest.mark.parametrize("content", [None, "", '{"status": "fin'])
def test_without_its_result_a_run_resumes_from_its_checkpoint(tmp_path, fabric, content, capsys):
    unfinished(tmp_path, fabric)
    (tmp_path / "result.json").unlink()
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    run = runs.Run.open(tmp_path, CFG, fabric)
    assert run.load_checkpoint()["epoch"] == 1 and "resume" in capsys.readouterr().out
    run._lock.close()
    other = {**CFG, "optim": {"lr": 9}}
    (tmp_path / "result.json").unlink()
    with pytest.raises(runs.RunError, match="another configuration"):
        runs.Run.open(tmp_path, other, fabric)
    assert (tmp_path / "last.ckpt").exists()


def test_a_checkpoint_of_another_configuration_or_by_hand_is_not_resumed(tmp_path, fabric):
    unfinished(tmp_path, fabric)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    run = runs.Run.open(tmp_path, CFG, fabric)
    torch.save({**state, "run": {**state["run"], "config_sha256": "0"}}, tmp_path / "last.ckpt")
    with pytest.raises(runs.RunError, match=r"last\.ckpt belongs to another configuration"):
        run.load_checkpoint()
    for foreign in ({"w": torch.ones(1)}, [torch.ones(1)]):
        torch.save(foreign, tmp_path / "last.ckpt")
        with pytest.raises(runs.RunError, match="was not written by this script: move it away"):
            run.load_checkpoint()


def test_a_flipped_bit_is_noticed(tmp_path, fabric):
    unfinished(tmp_path, fabric)
    raw = bytearray((tmp_path / "last.ckpt").read_bytes())
    place = raw.index(torch.ones(3).numpy().tobytes())
    raw[place + 2] ^= 1
    (tmp_path / "last.ckpt").write_bytes(raw)
    with pytest.raises(runs.RunError, match=r"cannot read .*last\.ckpt: damaged"):
        runs.load_checkpoint(tmp_path / "last.ckpt")


def test_checkpoints_do_not_go_through_a_temporary_folder(tmp_path, fabric, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    unfinished(tmp_path / "run", fabric)
    assert (tmp_path / "run/last.ckpt").exists()


def test_an_error_before_the_first_epoch_leaves_nothing_and_a_later_one_is_recorded(tmp_path, fabric):
    with pytest.raises(ValueError), runs.Run.open(tmp_path / "a", CFG, fabric):
        raise ValueError("found late")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError), runs.Run.open(tmp_path / "b", CFG, fabric) as run:
        run.log(epoch=1)
        raise ValueError("found later")
    assert json.loads((tmp_path / "b/result.json").read_text())["status"] == "failed"


def test_a_finished_run_can_be_read_where_nothing_can_be_written(tmp_path, fabric, monkeypatch):
    finished(tmp_path, fabric)
    monkeypatch.setattr(runs, "_lock", lambda path: PermissionError(13, "Read-only file system"))
    assert runs.Run.open(tmp_path, CFG, fabric) is None
    with pytest.raises(runs.RunError, match="cannot write"):
        runs.Run.open(tmp_path, {**CFG, "force": True}, fabric)


def test_half_precision_without_a_gpu_is_refused_and_srun_tasks_are_no_ranks(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="16-mixed needs a GPU"):
            runs.launch({"accelerator": "auto", "devices": 1, "precision": "16-mixed"})
    for name, value in {
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NAME": "train",
        "SLURM_PROCID": "0",
        "SLURM_JOB_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert runs.launch({"accelerator": "cpu", "devices": 1}).world_size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(runs.RunError, match="srun started several tasks"):
        runs.launch({"accelerator": "cpu", "devices": 1})
