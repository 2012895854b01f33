"""Wrong command lines of many kinds: each ends in one clear line, and leaves nothing behind."""

import runpy
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

import common.scripts
from iqa_attack.tests.conftest import PAPER

WRONG = [
    ("train", ["train.epochs=ten", "method=unique"], "train.epochs=ten"),
    ("train", ["networks.unique.lr=abc"], "networks.unique.lr=abc must be a finite number"),
    ("train", ["networks.unique.lr=-1"], "networks.unique.lr=-1, allowed: >= 0"),
    ("train", ["networks.ma19.epochs=0"], "networks.ma19.epochs=0, allowed: >= 1"),
    ("train", ["networks.unique.batch_size=5000", "method=unique"], "fewer than train.batch_size=5000"),
    ("train", ["networks.unique.model.pretrained=/none.pth", "method=unique"], "no checkpoint at /none.pth"),
    ("train", ["statistics.cornia.patches=0"], "patches=0"),
    ("train", ["statistics.brisque.precision=half"], "precision='half', allowed: double, single"),
    ("train", ["+statistics.niqe.sharpness=1", "method=niqe"], "sharpness"),
    ("train", ["method.models=[brisk]"], "names ['brisk'], allowed: brisque"),
    ("train", ["method.models=[]"], "name at least one model"),
    ("train", ["method=brisk"], "method=brisk, allowed: all, brisque"),
    ("train", ["seed=-1"], "seed=-1, allowed"),
    ("train", ["force=maybe"], "force=maybe must be true or false"),
    ("train", ["data.root=/somewhere"], "data.root=/somewhere: the photographs of data=photos are embedded"),
    ("train", ["data=photo_folder"], "no value given for data.root"),
    ("train", ["data=live", "data.root=/nowhere"], "/nowhere"),
    ("train", ["data=folder", "data.root=/tmp"], "data=folder has no opinions"),
    ("train", ["data=live", "data.root=/tmp", "method=ma19"], "ma19 learns from full-reference annotators"),
    ("train", ["data.test_photos=0"], "data.test_photos=0, allowed: >= 1"),
    ("train", ["run_root=null"], "run_root=null must be a text"),
    ("train", ["logger=wandb"], "logger=wandb, allowed"),
    ("train", ["netwroks.ma19.lr=1"], "there is no key netwroks.ma19.lr; did you mean networks.ma19.lr?"),
    ("attack", ["seed=77"], "run `python train.py method=all seed=77` first"),
    ("attack", ["weights=/none.ckpt"], "no checkpoint at /none.ckpt"),
    ("attack", ["procedure=pgd"], "procedure='pgd', allowed: perceptual"),
    ("attack", ["preset=best"], "preset='best', allowed: official"),
    ("attack", ["strengths=[-1]"], "a list of numbers >= 0"),
    ("attack", ["strengths=[9000000]"], "gray levels, but projected=true"),
    ("attack", ["recipe.steps=0"], "recipe.steps=0, allowed: >= 1"),
    ("attack", ["recipe.noise=loud"], "noise='loud', allowed"),
    ("attack", ["direction=left"], "direction='left', allowed: square"),
    ("attack", ["fr=psnr"], "fr=psnr, allowed: chebyshev"),
    ("attack", ["fr=lpips"], "need the ImageNet weights of VGG-16"),
    ("attack", ["observer.kind=csv", "observer.csv.file=/none.csv"], "no answers /none.csv"),
    ("attack", ["observer.kind=people"], "observer.kind='people', allowed"),
    ("attack", ["bisect=2"], "bisect: projected candidates"),
    ("attack", ["images_per_batch=0"], "images_per_batch=0, allowed: >= 1"),
    ("attack", ["attack=random", "seed=77"], "the control takes its distances"),
    ("attack", ["data.root=/x"], "data.root=/x: the photographs"),
    ("evaluate", [], "no value given for weights"),
    ("evaluate", ["weights=/none.ckpt"], "no checkpoint at /none.ckpt"),
    ("evaluate", ["weights=/none", "kind=brisk"], "kind=brisk, allowed: brisque"),
    ("evaluate", ["weights=/none", "kind=niqe"], "data.root is not set"),
    ("evaluate", ["weights=/none.ckpt", "claim=best"], "claim=best, allowed"),
    ("evaluate", ["weights=/none.ckpt", "data.name=live2", "data.root=/tmp"], "data.name=live2, allowed"),
    ("audit", ["model=x"], "no value given for images"),
    ("audit", ["model=x", "images=/none"], "no file or folder /none"),
    ("audit", ["model=os:nothing", f"images={PAPER / 'pictures'}"], "model=os:nothing"),
    ("audit", ["model=x", "images=a", "fidelity=lpips"], "need the ImageNet weights of VGG-16"),
    ("audit", ["model=x", "images=a", "strengths=[300]"], "gray levels of the largest change"),
    ("export", ["weights=/none.ckpt"], "no checkpoint at /none.ckpt"),
    ("export", ["weights=/none.ckpt", "model=brisque"], "model='brisque', allowed: ma19, unique"),
    ("tables", ["seed=77"], "no finished attack in"),
    ("collect", ["run=/none", "subject=anna"], "/none is no run of attack.py"),
    ("collect", ["run=/none", "subject=anna", "port=99999"], "port=99999, allowed: 0..65535"),
    ("bench", ["rounds=many"], "rounds=many must be a whole number"),
    ("counts", ["seed=x"], "seed=x must be a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "overrides", "message"), WRONG, ids=lambda v: str(v)[:50])
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(script, overrides, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(common.scripts, "_terminate_cleanly", lambda: None)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *overrides])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PAPER / f"{script}.py"), run_name="__main__")
    error = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert ended.value.code == 1 and len(error) == 1, error
    assert error[0].startswith("error: ") and message in error[0]
    assert not list(tmp_path.rglob("*")), "something was left behind"
