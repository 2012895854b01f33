"""Wrong command lines of many kinds: each ends in one clear line, and leaves nothing behind."""

from pathlib import Path

import pytest

PAPER = Path(__file__).resolve().parents[1]
WRONG = [
    ("train", ["optim.lr=abc"], "optim.lr=abc must be a finite number"),
    ("train", ["optim.lr=-0.1"], "optim.lr=-0.1, allowed: >= 0"),
    ("train", ["optim.u_lr_mult=-1"], "optim.u_lr_mult=-1, allowed"),
    ("train", ["optim.name=lamb"], "optim.name='lamb', allowed: adam, sgd"),
    ("train", ["train.epochs=ten"], "train.epochs=ten must be a whole number"),
    ("train", ["train.epochs=0"], "train.epochs=0, allowed: >= 1"),
    ("train", ["train.save_every=0"], "train.save_every=0, allowed: >= 1"),
    ("train", ["train.batch_size=5000"], "fewer than train.batch_size=5000"),
    ("train", ["train.accumulation=3"], "multiple of"),
    ("train", ["seed=-1"], "seed=-1, allowed"),
    ("train", ["seed=null"], "seed"),
    ("train", ["force=maybe"], "force=maybe must be true or false"),
    ("train", ["preflight=1"], "preflight=1 must be true or false"),
    ("train", ["method=drelu"], "method=drelu, allowed: activations, all"),
    ("train", ["method.tau=2"], "tau=2, allowed: 0..1"),
    ("train", ["methd=xnor"], "there is no key methd; did you mean method?"),
    ("train", ["+method.lamda=1"], "lamda"),
    ("train", ["+data.sigmas=1"], "sigmas"),
    ("train", ["+model.width=3"], "width"),
    ("train", ["+schedule.warm=3"], "warm"),
    ("train", ["+method.scale_grad=true"], "scale_grad=True, allowed: released, exact"),
    ("train", ["method.lam=-1"], "lam=-1, allowed"),
    ("train", ["method.recurrent=some"], "recurrent='some', allowed"),
    ("train", ["method.weights=ternary"], "weights='ternary', allowed"),
    ("train", ["method=xnor", "method.recurrent=all"], "only weights=bilinear has a recurrence"),
    ("train", ["model.name=resnet"], "model.name='resnet', allowed"),
    ("train", ["data.name=svhn"], "data.name='svhn', allowed: digits, mnist"),
    ("train", ["init.arm=a", "init.weights=b"], "not both"),
    ("train", ["schedule.kind=exp"], "schedule.kind='exp', allowed"),
    ("train", ["schedule.kind=step", "schedule.milestones=[99]"], "milestones=[99]"),
    ("train", ["parity.sign_zero=2"], "parity.sign_zero=2, allowed"),
    ("train", ["evaluate.batch_size=0"], "evaluate.batch_size=0, allowed"),
    ("train", ["data.workers=-1"], "data.workers=-1, allowed"),
    ("train", ["data.root=/somewhere"], "data.root=/somewhere: digits are embedded"),
    ("train", ["data=cifar10"], "data.root is not set"),
    ("train", ["data=fashion_mnist", "data.root=/nowhere"], "no folder /nowhere"),
    ("train", ["data.train=99999"], "train must be in 1..1796"),
    ("train", ["run_root=null"], "run_root=null must be a text"),
    ("train", ["init.arm=activations"], "no stage-1 checkpoint at"),
    ("train", ["init.weights=/none.ckpt"], "no stage-1 checkpoint at /none.ckpt"),
    ("train", ["teacher.timm=resnet3000"], "is no timm model"),
    ("train", ["experiment=imagenet_stage2", "data.root=/nowhere"], "init.weights is not set"),
    ("train", ["fabric.precision=16-mixed"], "16-mixed needs a GPU"),
    ("train", ["logger=wandb"], "logger=wandb, allowed"),
    ("detect", ["train.clip_norm=-1"], "train.clip_norm=-1, allowed"),
    ("detect", ["data.name=coco"], "data.root is not set"),
    ("detect", ["detector.frozen_stages=1"], "freezes weights that nothing has trained"),
    ("detect", ["experiment=voc_detection"], "init.weights is not set"),
    ("evaluate", [], "no value given for weights"),
    ("evaluate", ["weights=/none.ckpt"], "no checkpoint at /none.ckpt"),
    ("evaluate", ["weights=/none.ckpt", "claim=best"], "claim=best, allowed"),
    ("evaluate", ["weights=/none.ckpt", "sign_zero=3"], "sign_zero=3, allowed"),
    ("predict", ["weights=/none.ckpt"], "no value given for images"),
    ("predict", ["weights=/none.ckpt", "images=a.jpg", "top=0"], "top=0, allowed"),
    ("export", ["weights=/none.ckpt", "topk=3"], "there is no key topk"),
    ("bench", ["rounds=many"], "rounds=many must be a whole number"),
    ("counts", ["seed=x"], "seed=x must be a whole number"),
]


@pytest.mark.parametrize(("script", "overrides", "message"), WRONG, ids=lambda v: str(v)[:60])
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(script, overrides, message, refused):
    assert message in refused(PAPER, script, overrides)
