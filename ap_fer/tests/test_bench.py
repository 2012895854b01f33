"""The benchmark: equal weights, a limit that chooses nothing, complete rows, and claims judged by the times."""

import json

import pytest
import torch
import yaml

from ap_fer import attentive_patch_pooling, attentive_token_pooling, bench
from ap_fer.export import export, onnx_logits
from ap_fer.tests.helpers import config
from common.metrics.ops import count_macs
from common.metrics.timing import Timing

SMALL = {
    "image_size": 24, "stem": "patches", "patch": 4, "dim": 16, "depth": 3, "heads": 2, "app": {"keep": 20},
    "atp": {"rate": 0.7, "start": 1},
}  # fmt: skip


def small_networks(seed=3):
    """As `bench.networks`, of a size at which everything matters."""
    models = bench.networks(seed, **SMALL)
    torch.manual_seed(seed)
    for p in models["pooled"].parameters():
        torch.nn.init.normal_(p, std=0.3)
    models["dense"].load_state_dict(models["pooled"].state_dict())
    return models


def test_all_forms_have_the_weights_of_their_seed():
    one, again, other = (bench.networks(seed, **SMALL) for seed in (3, 3, 4))
    first = one["first"].vit.vit.state_dict()
    for key, value in one["pooled"].state_dict().items():
        assert torch.equal(value, one["dense"].state_dict()[key]) and torch.equal(
            value, again["pooled"].state_dict()[key]
        )
        assert not key.startswith("vit.") or torch.equal(value, first[key.removeprefix("vit.")])
    assert not torch.equal(one["pooled"].vit.cls_token, other["pooled"].vit.cls_token)


def first_ones(scores, k, *, lowest=False):
    return torch.arange(k).expand(len(scores), -1)


@torch.no_grad()
def test_the_limit_is_the_same_network_with_the_first_tokens(monkeypatch, tmp_path):
    models, x = small_networks(), torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = {name: model(x) for name, model in models.items()}
    assert not torch.allclose(found["first"], found["pooled"], atol=1e-3), "other tokens are the first than the best"
    assert not torch.allclose(found["dense"], found["pooled"], atol=1e-3)
    export(models["first"], tmp_path / "first.onnx")
    torch.testing.assert_close(
        torch.from_numpy(onnx_logits(tmp_path / "first.onnx", x)), found["first"], rtol=1e-4, atol=1e-4
    )
    macs = {name: sum(count_macs(model, x).values()) for name, model in models.items()}
    assert macs["first"] == macs["pooled"] < macs["dense"]
    for module in (attentive_patch_pooling, attentive_token_pooling):
        monkeypatch.setattr(module, "select", first_ones)
    torch.testing.assert_close(models["pooled"](x), found["first"])


def timing(ms):
    return Timing(ms, ms, ms, 3)


def test_shares_are_of_the_ideal_and_of_the_limit(tmp_path):
    """Of 100 ms a fifth of the products would save 20; 15 are saved, and 18 without choosing."""
    table, times = (
        bench.Bench(tmp_path / "b.json"),
        {"pooled": timing(85.0), "first": timing(82.0), "dense": timing(100.0)},
    )
    assert bench.add_rows(table, "torch", 8, times, 0.2) == pytest.approx({"of_ideal": 0.75, "of_limit": 15 / 18})
    ours, limit = table.rows
    assert (ours["ours"], limit["ours"], ours["share"], limit["share"]) == pytest.approx((85, 82, 0.75, 0.9))
    assert ours["ideal"] == limit["ideal"] == 0.2 and ours["batch"] == limit["batch"] == 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the claims of speed are judged instead of in the paper's folder."""
    document = yaml.safe_load((bench.PAPER / "claims.yaml").read_text())
    document["claims"] = [c for c in document["claims"] if c["scale"] == "bench"]
    document["abstract"] = document["advice"] = []
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setattr(bench.report, "update_readmes", lambda *_, **__: None)
    monkeypatch.setattr(bench, "PAPER", tmp_path)
    return tmp_path


def test_the_script_measures_every_form_on_every_seed_and_judges(folder, monkeypatch):
    networks = bench.networks
    monkeypatch.setattr(bench, "networks", lambda seed: networks(seed, **SMALL))
    rows = bench.bench(config("bench", "record=true", "rounds=3", "seconds=1"), torch.device("cpu"))
    assert json.loads((folder / "results/bench/bench.json").read_text()) == json.loads(json.dumps(rows))
    words = ("APP + ATP", "as many tokens, not chosen")
    wanted = {f"seed {s}, {arm}, {w} against no pooling" for s in (100, 101, 102) for arm in bench.ARMS for w in words}
    for batch in (1, 8):
        assert {r["name"] for r in rows if r["batch"] == batch} == wanted
    for row in rows:  # the shares that the published network promises, whatever is timed
        assert row["ideal"] == pytest.approx(0.2683 if "transformer" in row["name"] else 0.1723, abs=1e-4)
        assert row["share"] == pytest.approx((1 - row["ours"] / row["baseline"]) / row["ideal"])
    claims = json.loads((folder / "results/bench/claims.json").read_text())["claims"]
    assert len(claims) == 8 and all(c["effect"]["n"] == 3 for c in claims), "a claim without its measurement"
    for wrong, error in (("seeds=[]", "at least one"), ("seeds=[1,2]", "three to judge")):
        with pytest.raises(ValueError, match=error):
            bench.bench(config("bench", "record=true", wrong), torch.device("cpu"))


def test_ninety_percent_of_the_saving_is_the_claim(folder):
    for share, verdict in ((0.85, "contradicted"), (0.95, "supported")):
        names = ("of_ideal_b1", "of_ideal_b8", "of_limit_b1", "of_limit_b8")
        metrics = {s: dict.fromkeys(names, 0.5) | {"of_ideal_b1": share + 0.01 * (s % 3 - 1)} for s in (100, 101, 102)}
        bench.report.judge_speed(bench.PAPER, {"onnxruntime": metrics, "torch": metrics}, 60.0)
        claims = {c["id"]: c for c in json.loads((folder / "results/bench/claims.json").read_text())["claims"]}
        assert claims["of_ideal_b1"]["verdict"] == claims["of_ideal_torch_b1"]["verdict"] == verdict
        assert claims["of_ideal_b8"]["verdict"] == claims["of_limit_b1"]["verdict"] == "contradicted"
