"""The frame of a script: types and values of overrides, errors on one line, names of run directories."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common import scripts
from common.loop import Means, gather, once
from common.scripts import arm_name, check_types, check_values, override

CONFIG = """
defaults: [_self_, {method: a}, {override hydra/job_logging: stdout}]
run_root: runs
scale: default
arm: "${hydra:runtime.choices.method}"
seed: 0
force: false
threads: null
logger: null
name: digits
sizes: [8, 16]
optim: {lr: 0.1, nesterov: true, weight_decay: 0.0}
train: {epochs: 3, batch_size: 8, save_every: 1, clip: null}
data: {root: null}
fabric: {accelerator: cpu, devices: 1}
hydra:
  output_subdir: null
  job: {chdir: false}
  run: {dir: "${run_root}/${scale}/${run_name:method}"}
  sweep: {dir: "${run_root}/${scale}", subdir: "${run_name:method}"}
"""
SCRIPT = '''
"""A toy."""
from common import runs
from common.scripts import script

def fit(cfg, fabric, out):
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        if cfg.optim.lr == 7:
            raise ValueError("a value that is found late")
        if cfg.optim.lr == 8:
            raise KeyError("a defect")
        for logger in fabric.loggers:
            logger.log_metrics({"loss": 0.25}, step=1)
        run.finish({"lr": cfg.optim.lr})

main = script("config", fit)

if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    (root / "configs/method").mkdir(parents=True)
    (root / "configs/config.yaml").write_text(CONFIG)
    (root / "configs/method/a.yaml").write_text("width: 3\nmode: null\n")
    (root / "configs/method/b.yaml").write_text("width: 4\nmode: renorm\n")
    (root / "train.py").write_text(SCRIPT)
    return root


def test_a_script_that_has_finished_leaves_its_ranks(toy, tmp_path, started, monkeypatch):
    left = []
    monkeypatch.setattr(scripts, "leave", lambda: left.append(True))
    assert started(toy / "train.py", [f"run_root={tmp_path}"]) == 0 and left == [True]
    assert started(toy / "train.py", [f"run_root={tmp_path}", "optim.lr=7"]) == 1 and left == [True]


def typed(toy, *overrides):
    """check_types as a script calls it."""
    with initialize_config_dir(config_dir=str(toy / "configs"), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
        main = SimpleNamespace(provider="main", path=str(toy / "configs"))
        runtime = SimpleNamespace(choices={"method": "a"}, config_sources=[main])
        check_types(cfg, list(overrides), SimpleNamespace(runtime=runtime, job=SimpleNamespace(config_name="config")))
    return cfg


@pytest.mark.parametrize(
    "wrong",
    ["optim.lr=abc", "optim.lr=true", "optim.lr=nan", "optim.lr=inf", "optim.lr=null", "optim.lr=[1]", "train.epochs=ten",
     "train.epochs=1.5", "train.epochs=true", "force=no", "force=1", "force=maybe", "seed=null", "seed=1.0", "name=null",
     "name=[a]", "sizes=8", "sizes=[a,b]", "optim=3", "optim.nesterov=off", "method.width=x"],
)  # fmt: skip
def test_an_override_of_another_type_names_its_key(toy, wrong):
    with pytest.raises(ValueError, match=rf"{wrong.split('=')[0]}=.* must be .*, as its default"):
        typed(toy, wrong)


@pytest.mark.parametrize(
    ("right", "value"),
    [("optim.lr=1", 1), ("optim.lr=1e-3", 1e-3), ("train.epochs=5", 5), ("force=True", True), ("train.clip=0.5", 0.5),
     ("train.clip=null", None), ("data.root=/x", "/x"), ("name=2024", "2024"), ("sizes=[4]", [4]), ("seed=3", 3),
     ("method.mode=renorm", "renorm")],
)  # fmt: skip
def test_an_override_of_the_same_type_or_of_a_null_is_taken(toy, right, value):
    assert OmegaConf.select(typed(toy, right), right.split("=")[0]) == value


def test_a_key_takes_what_another_configuration_of_the_folder_gives_it(toy):
    typed(toy, "method=b", "method.mode=null")  # a.yaml has null there
    with pytest.raises(ValueError, match="method.mode"):
        typed(toy, "method=b", "method.mode=[x]")


def test_a_key_takes_what_a_sweep_of_the_folder_goes_through(toy):
    (toy / "configs/reproduce/full").mkdir(parents=True)
    sweep = "hydra: {sweeper: {params: {force: 'true,inter', seed: '1,2'}}}\n"
    (toy / "configs/reproduce/full/10_train_both.yaml").write_text(sweep)
    assert typed(toy, "force=inter").force == "inter"
    with pytest.raises(ValueError, match="force=1"):
        typed(toy, "force=1")


@pytest.mark.parametrize(
    "flat",
    [{"seed": -1}, {"train.batch_size": 0}, {"data.workers": -1}, {"train.save_every": 0}, {"train.log_every": 0},
     {"optim.lr": -0.1}, {"optim.weight_decay": -1.0}, {"optim.u_lr_mult": -1}, {"train.clip": -1.0}, {"optim.lr": float("nan")},
     {"run_root": None}, {"run_root": " "}, {"scale": "../../x"}, {"scale": "", "run_root": "r"}, {"arm": "/etc"}, {"top": 0},
     {"train.epochs": -1}, {"evaluate.batch_size": 0}, {"threads": 0}],
)  # fmt: skip
def test_values_that_nothing_can_use_name_their_key(flat):
    with pytest.raises(ValueError, match=next(iter(flat))):
        check_values(flat)


@pytest.fixture
def run(toy, started, monkeypatch, capsys):
    """run(overrides) -> (exit status, stdout, lines of stderr) of the script, started in its folder and in this process."""

    def call(*args):
        monkeypatch.chdir(toy)
        status, said = started(toy / "train.py", args), capsys.readouterr()
        return status, said.out, said.err.strip().splitlines()

    return call


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.lr", "1"], "error: there is no option --optim.lr: options are words like optim.lr=..., see --help"),
        (["seed=1", "--seed=2"], "error: there is no option --seed=2: options are words like seed=..., see --help"),
        (["optim.lrr=1"], "error: there is no key optim.lrr; did you mean optim.lr?"),
        (["method=c"], "error: method=c, allowed: a, b"),
        (["optim.lr=7"], "error: a value that is found late"),
        (["optim.lr="], "error: optim.lr= must be a finite number"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(toy, run, args, message):
    status, _, lines = run(*args)
    assert status == 1 and len(lines) == 1 and lines[0].startswith(message), lines
    assert not (toy / "runs").exists()


def test_a_logger_has_written_its_rows_when_a_short_run_ends(toy):
    """A process of its own, as the end of it is what is tested."""
    subprocess.run([sys.executable, "train.py", "logger=csv", "run_root=runs_logged"], cwd=toy, check=True)
    (file,) = (toy / "runs_logged").rglob("metrics.csv")
    assert "0.25" in file.read_text()


def test_a_defect_shows_its_traceback(run):
    with pytest.raises(KeyError, match="a defect"):  # what nothing catches ends a script with status 1 and a traceback
        run("optim.lr=8", "run_root=defects")


def test_help_lists_the_options_with_their_comments_and_the_choices(run):
    status, out, _ = run("--help")
    assert status == 0 and "A toy." in out and "optim: {lr: 0.1" in out and "method=      a, b" in out


def test_a_cell_of_a_sweep_that_fails_lets_the_others_finish(toy, run):
    status, _, lines = run("-m", "optim.lr=7,2", "run_root=swept")
    assert status == 1 and sum("a value that is found late" in line for line in lines) >= 1
    assert [p.parent.parent.name for p in (toy / "swept").rglob("result.json")] == ["optim.lr-2"]


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("bil", "bil"),
        ("bil/loss.mode=renorm", "bil/loss.mode-renorm"),
        ("x/parts=[backbone,encoder],epochs=3", "x/parts-backbone_encoder+epochs-3"),
        ("x/w=-1.5e-3", "x/w--1.5e-3"),
        ("already/loss.mode-renorm", "already/loss.mode-renorm"),
    ],
)
def test_names_of_arms(arm, name):
    assert arm_name(arm) == name == arm_name(name)


def test_names_can_be_given_to_hydra_unquoted_and_paths_do_not_enter_them():
    names = [arm_name(f"x/start.weights={p}") for p in ("/a/b=c.ckpt", "/a/d.ckpt")]
    assert len(set(names)) == 2 and not any("ckpt" in n for n in names)
    long = arm_name("x/" + ",".join(f"key{i}=value{i}" for i in range(60)))
    assert all(len(part) <= 180 for part in long.split("/"))
    for name in (*names, long, arm_name("x/a='it s',b={c:1}")):
        assert (
            OverridesParser.create().parse_override(f"weights=runs/{name}/last.ckpt").value()
            == f"runs/{name}/last.ckpt"
        )


@pytest.mark.parametrize(
    "path", ["/a b", "/x (1)", "/a=b", "/a,b", "/it's", '/"q"', "~/x", "/ü", "/[a]/{b}", "/a\\b", "/end\\", "1"]
)
def test_any_path_reaches_hydra(path):
    assert OverridesParser.create().parse_override(override("k", path)).value() == path


def test_the_nearest_name_is_suggested():
    assert scripts.nearest("optm.lr", ["optim.lr", "seed"]) == "; did you mean optim.lr?" and not scripts.nearest(
        "zzz", ["a"]
    )


# ------------------------------------------------------------------------------------------------------------- the loop
class TwoRanks:
    """Fabric of one of two ranks whose partner holds `other`, what it would put into an all_reduce."""

    world_size, device = 2, torch.device("cpu")

    def __init__(self, rank, others):
        self.global_rank, self.others = rank, list(others)

    def all_reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor + self.others.pop(0)


def test_means_are_over_images_and_ranks():
    one = Means()
    for value, images in ((1.0, 4), (2.0, 4), (6.0, 2)):
        one.add({"loss": torch.tensor(value), "log": value}, images)
    assert one.result() == pytest.approx({"loss": 2.4, "log": 2.4}) and one.images == 10
    equal = Means()
    for value in (1.0, 2.0):
        equal.add({"loss": torch.tensor(value)}, 8)
    other = torch.tensor([[10.0, 2.0]], dtype=torch.float64)  # two batches of 8 whose losses sum to 10
    assert equal.result(TwoRanks(0, [other])) == {"loss": (3 + 10) / 4}


def test_a_term_that_is_not_finite_is_named_once_per_step(tmp_path):
    means = Means()
    means.add({"ce": torch.tensor(1.0), "kd": torch.tensor(float("inf"))}, 4)
    means.add({"ce": torch.tensor(1.0), "kd": torch.tensor(1.0)}, 4)
    with pytest.raises(FloatingPointError, match="step 3: kd=inf"):
        means.check(step=3, norm=torch.tensor(1.0), last_good=None)
    good = Means()
    good.add({"ce": torch.tensor(1.0)}, 4)
    with pytest.raises(FloatingPointError, match="gradient norm=nan"):
        good.check(step=0, norm=torch.tensor(float("nan")), last_good=None)
    good.check(step=0, norm=torch.tensor(float("inf")), last_good=None, precision="16-mixed")


@pytest.mark.parametrize("size", [4, 5])
def test_gathered_rows_are_in_order_without_padding(size):
    rows = torch.arange(size * 2).view(size, 2).float()
    flags = torch.arange(size) % 2 == 0
    lost = {k: v.clone() for k, v in (("rows", rows), ("flags", flags.long()))}
    for v in lost.values():
        v[0::2] = 0
    fabric = TwoRanks(0, lost.values())
    whole = gather(fabric, {"rows": rows[0::2], "flags": flags[0::2]}, size)
    assert (
        torch.equal(whole["rows"], rows) and torch.equal(whole["flags"], flags) and whole["flags"].dtype == torch.bool
    )
    with pytest.raises(ValueError, match="1 images for 2 ranks"):
        gather(fabric, {"rows": rows[:1]}, 1)


def test_the_threads_of_one_script_are_not_those_of_the_next():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), scripts._threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError
    assert torch.get_num_threads() == before


def test_what_is_checked_once_fails_every_time_and_passes_once():
    made = []

    def check(side):
        made.append(side)
        if side == 7:
            raise ValueError("cannot be halved")

    for side in (8, 8, 16):
        once(check, side)
    for _ in range(2):  # the second cell of a sweep has the same fault
        with pytest.raises(ValueError, match="halved"):
            once(check, 7)
    assert made == [8, 16, 7, 7]
