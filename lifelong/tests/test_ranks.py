"""Several processes on one batch: shares that add up, and two ranks that train the network of one."""

import json
from pathlib import Path

import pytest
import torch

from common import runs
from lifelong.ranks import Ranks
from lifelong.tests.test_train import composed, config
from lifelong.tests.two_ranks import CASES, learn
from lifelong.train import check, fit

TWO_RANKS = Path(__file__).with_name("two_ranks.py")


def test_two_ranks_learn_what_one_process_learns(ranks, tmp_path):
    """Every term and weight: a mean over a rank's own rows would weigh uneven shares alike, or divide by two."""
    done = ranks(TWO_RANKS, ["cases", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    for case in CASES:
        torch.testing.assert_close(found[0][case], found[1][case], rtol=0, atol=0, msg=lambda m, c=case: f"{c}: {m}")
        one = learn(case, None)
        torch.testing.assert_close(found[0][case], one, rtol=1e-4, atol=1e-4, msg=lambda m, c=case: f"{c}: {m}")


def test_a_run_of_two_ranks_is_that_of_one(ranks, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    done = ranks(TWO_RANKS, ["run", str(two)])
    assert done.returncode == 0, done.stderr
    fit(config("method=ari", "data.tasks=2"), runs.launch({"accelerator": "cpu", "devices": 1}), one)
    found, expected = (json.loads((d / "result.json").read_text())["metrics"] for d in (two, one))
    assert found.keys() == expected.keys()
    assert {k: v for k, v in found.items() if "spread" in k} == pytest.approx(
        {k: v for k, v in expected.items() if "spread" in k}, rel=1e-3
    )
    assert found == pytest.approx(expected, abs=1.5)  # a rounding may flip one of 80 test images
    a, b = (runs.load_checkpoint(d / "last.ckpt")["model"] for d in (two, one))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    logs = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (two, one)]
    trained = [[row for row in log if "clean" in row] for log in logs]
    assert len(trained[0]) == len(trained[1]) == 4
    for x, y in zip(*trained, strict=True):
        assert x == pytest.approx(y, rel=1e-3, abs=1e-6), "what is logged is of the whole batch"


class Pair:
    """Stands for a Fabric of two ranks, of which this is one."""

    world_size = 2

    def __init__(self, rank, device="cpu"):
        self.global_rank, self.device = rank, torch.device(device)
        self.sent = []

    def all_reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        self.sent.append(tensor.clone())
        return 2 * tensor


def test_rows_are_dealt_once_and_gradients_and_terms_are_summed_in_one_message():
    rows = torch.arange(7)
    shares = [Ranks(Pair(r)).mine(rows).tolist() for r in (0, 1)]  # type: ignore[arg-type]
    assert shares == [[0, 2, 4, 6], [1, 3, 5]]
    assert Ranks().mine(rows).tolist() == rows.tolist()
    pair, used, idle = Pair(1), torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2))
    used.grad = torch.arange(6.0).view(2, 3)
    terms = Ranks(pair).add([used, idle], {"ce": torch.tensor(1.5), "ewc": torch.tensor(0.5)})  # type: ignore[arg-type]
    assert used.grad.tolist() == [[0, 2, 4], [6, 8, 10]] and idle.grad is None and len(pair.sent) == 1
    assert {k: v.item() for k, v in terms.items()} == {"ce": 3.0, "ewc": 1.0}


def test_what_ranks_cannot_do_is_refused_with_the_reason(fabric):
    with pytest.raises(runs.RunError, match="rps_net on 2 CPU processes: batch norm would use the statistics of each"):
        check(composed("config", "arm=test", "model=rps_net", "model.widths=[2,2,2,2]"), two_of(fabric))
    with pytest.raises(ValueError, match=r"train\.batch_size=63 is the global batch"):
        check(config("train.batch_size=63"), two_of(fabric))
    check(config(), two_of(fabric))


def two_of(fabric):
    pair = Pair(0)
    pair._precision = fabric._precision  # type: ignore[attr-defined]
    return pair


@pytest.fixture(scope="module")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})
