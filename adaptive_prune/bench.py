"""Time of really dropping tokens against the dense timm model, top-k, EViT and ToMe at equal MACs. Writes bench.json.

python bench.py [vit=deit_small_patch16_224] [budget=0.65] [batches=[1,8,32]]
python bench.py record=true             also judges the claims of speed (claims.yaml, scale bench) and writes results/bench/

Interleaved rounds, medians with quartiles; ratio = baseline / ours. Weights are random, so thresholds are score quantiles of the
images measured: the counts still vary by image, and the budget is met; the baselines get the cost that AS-ViT really has.
`unpruned` is the same code with nothing dropped. A seed is other weights and other images; a claim is judged over the seeds.

For one image, `first` has as many tokens in timm's own blocks without choosing them: what is missing there is the machine's. Rows
named `onnxruntime` time the exported networks, with as many threads, rows named `compiled` what torch.compile makes of the same
graphs; one that differs from torch is an error.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_prune.backbones import check_known, check_vit
from adaptive_prune.budget import check_budget
from adaptive_prune.calibrate import calibrate
from adaptive_prune.export import OneImage, traced
from adaptive_prune.model import PrunedViT, prune
from common.metrics import report
from common.metrics.timing import Bench, Timing, compiled_calls, interleaved
from common.scripts import script

PAPER = Path(__file__).resolve().parent
LARGE = 8  # beyond this batch size a warm-up of 2 rounds is enough
OTHERS = ("topk", "evit", "evit_no_fusion", "tome")
EXPORTED = ("dense", "packed", "first")
FORMS = {
    "float32": "",
    "compiled": "compiled",
    "onnxruntime": "onnxruntime",
    "bfloat16": "bf16",
}  # and what rows call them
TOLERANCE = 1e-3  # of logits, compiled or in onnxruntime against torch
Measured = dict[str, dict[int, dict[str, float]]]


class FirstTokens(nn.Module):
    """The timm blocks of a `PrunedViT` on `kept` patch tokens per stage, always the first ones: nothing is scored, chosen or
    gathered."""

    def __init__(self, model: PrunedViT, kept: Sequence[int]):
        super().__init__()
        self.model, self.tokens = model, [n + model.cost.prefix for n in (model.cost.patches, *kept)]

    def forward(self, images: Tensor) -> Tensor:
        m, x = self.model, self.model.embed(images)
        for blocks, n in zip(m.stages(), self.tokens, strict=True):
            x = blocks(x[:, :n])
        return m.vit.forward_head(m.vit.norm(x)[:, : m.cost.prefix])


def dense_model(name: str, seed: int) -> nn.Module:
    """A random timm model. Random weights attend almost uniformly: sharpened, so that counts vary between images."""
    torch.manual_seed(seed)
    dense = timm.create_model(name).eval()
    check_vit(dense)
    with torch.no_grad():
        for block in dense.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight.mul_(4)
    return dense


@torch.no_grad()
def rivals(dense: Any, x: Tensor, budget: float) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """{name: model} and {name: cost relative to dense} on the images x (B, 3, H, W). ValueError if packed and padded differ."""
    reference = prune(dense, budget=budget).eval().to(x.device)
    calibrate(reference, [x], budget, rounds=1)
    layouts = ("packed", "padded", "batch_topk", *(["bucketed"] if x.is_cuda else []))
    same = {"thresholds": reference.theta.tolist(), "budget": budget}
    models: dict[str, Any] = {name: PrunedViT(dense, inference=name, **same).eval().to(x.device) for name in layouts}
    (logits, info), (other, _) = (models[name](x, details=True) for name in ("packed", "padded"))
    if not torch.allclose(logits, other, rtol=1e-3, atol=1e-3):
        raise ValueError("the packed and the padded pass disagree")
    ratio = float(info.macs.double().mean()) / reference.cost.dense
    models |= {
        "topk": PrunedViT(dense, rule="topk", budget=ratio), "evit": PrunedViT(dense, rule="evit", score="mean", budget=ratio),
        "evit_no_fusion": PrunedViT(dense, rule="topk", score="mean", budget=ratio),
        "tome": PrunedViT(dense, rule="tome", budget=ratio), "unpruned": PrunedViT(dense, rule="none"),
    }  # fmt: skip
    cost = {
        n: float(m.eval()(x, details=True)[1].macs.double().mean()) / reference.cost.dense for n, m in models.items()
    }
    if len(x) == 1:
        models["first"] = FirstTokens(models["packed"], [int(n) for n in info.kept[0]])
        cost["first"] = cost["packed"]
    return {"dense": dense, **models}, {"dense": 1.0, **cost}


def timed(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A call that has finished when it returns."""

    def call() -> None:
        with torch.no_grad():
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def one_image(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """{name: the network as one graph for one image}."""
    return {n: OneImage(m).eval() if isinstance(m := models[n], PrunedViT) else m for n in EXPORTED}


def check_same(found: Tensor, expected: Tensor, who: str) -> None:
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE):
        raise ValueError(f"{who} differs from torch on the image that is timed")


@torch.no_grad()
def compiled(models: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[[], object]]:
    """{name: a call of the compiled network on one image x}; the number of tokens that stay is a variable of the graph.

    ValueError for what does not compile, and for logits that differ from torch's."""
    failed: dict[str, str] = {}
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # or the graph ends where tokens are chosen
        calls = compiled_calls({name: (network, x) for name, network in one_image(models).items()}, failed)
    if failed:
        raise ValueError(f"torch.compile: {failed}; compiled=false leaves these rows out")
    for name, call in calls.items():
        check_same(call(), models[name](x), f"{name}: compiled, it")  # type: ignore[arg-type]
    return calls


@torch.no_grad()
def exported(models: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[[], object]]:
    """{name: a call of the network in onnxruntime on one image x, with as many threads as torch has}.

    ValueError for a network whose logits differ from torch's, on x or on random images."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    inputs, calls = {"images": x.numpy()}, {}
    for name, network in one_image(models).items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, on shapes that are fixed here
            traced(network, x, file := Path(folder, "one.onnx"), {}, TOLERANCE, batch=False)
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        check_same(torch.from_numpy(session.run(None, inputs)[0]), models[name](x), f"{name}: onnxruntime")
        calls[name] = lambda session=session: session.run(None, inputs)
    return calls


def measure(
    cfg: DictConfig, fabric: Fabric, seed: int, batch: int
) -> dict[str, tuple[dict[str, Timing], dict[str, float]]]:
    """{form: (times, costs relative to dense)} of one seed, by model; the forms are those of `FORMS`."""
    dense: Any = dense_model(cfg.vit, seed).to(fabric.device)
    size, generator = dense.patch_embed.img_size[0], torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator) * torch.linspace(0.5, 2, batch).view(-1, 1, 1, 1)
    x = x.to(fabric.device)
    models, cost = rivals(dense, x, cfg.budget)
    wanted = {
        "float32": True,
        "compiled": cfg.compiled and batch == 1 and not x.is_cuda,
        "onnxruntime": cfg.onnxruntime and batch == 1 and not x.is_cuda,
        "bfloat16": batch in cfg.bfloat16,
    }
    found = {}
    warmup = cfg.warmup if batch <= LARGE else min(cfg.warmup, 2)
    for form in (form for form in FORMS if wanted[form]):
        if form == "onnxruntime":
            calls = exported(models, x)
        elif form == "compiled":
            calls = compiled(models, x)
        else:
            dtype = getattr(torch, form)
            dense.to(dtype)
            calls = {name: timed(model, x.to(dtype)) for name, model in models.items()}
        found[form] = interleaved(calls, rounds=cfg.rounds, warmup=warmup, seconds=cfg.seconds), cost
    return found


def add_rows(table: Bench, where: str, batch: int, times: dict[str, Timing], cost: dict[str, float]) -> dict[str, dict]:
    """The rows of one setting; returns {model: {ms, of_ideal}}. of_ideal: the share of the speed-up that its MACs promise."""
    for name in times:
        if name != "dense":
            table.add(f"{where} {name} vs dense", times[name], times["dense"], batch=batch, macs=cost[name])
    for other in (name for name in ("first", *OTHERS) if name in times):
        table.add(f"{where} packed vs {other}", times["packed"], times[other], batch=batch, macs=cost["packed"])
    reached = {name: times["dense"].median / t.median * cost[name] for name, t in times.items()}
    name, macs = f"{where} packed: speed-up over dense, of the MAC ratio", cost["packed"]
    table.add(name, 1.0, reached["packed"], batch=batch, unit="x", macs=macs)
    return {name: {"ms": t.median, "of_ideal": reached[name]} for name, t in times.items()}


def bench(cfg: DictConfig, fabric: Fabric) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows; with cfg.record judges the claims, too."""
    check(cfg)
    table = Bench(PAPER / "results/bench/bench.json" if cfg.record else cfg.out)
    measured, begun = {}, time.perf_counter()
    for seed in cfg.seeds:
        for batch in cfg.batches:
            for form, (times, cost) in measure(cfg, fabric, seed, batch).items():
                where = " ".join(filter(None, (cfg.vit, FORMS[form], f"seed {seed}")))
                for name, values in add_rows(table, where, batch, times, cost).items():
                    own = measured.setdefault(name, {}).setdefault(seed, {})
                    own |= {"_".join(filter(None, (key, f"b{batch}", FORMS[form]))): v for key, v in values.items()}
    rows = table.write()
    if cfg.record:
        report.judge_speed(PAPER, measured, time.perf_counter() - begun)
    return rows


def check(cfg: DictConfig) -> None:
    """ValueError for what cannot be measured."""
    if not cfg.batches or min(cfg.batches) < 1:
        raise ValueError(f"batches={list(cfg.batches)}: batch sizes of at least 1")
    if not set(cfg.bfloat16) <= set(cfg.batches):
        raise ValueError(f"bfloat16={list(cfg.bfloat16)}: batch sizes among batches={list(cfg.batches)}")
    if not cfg.seeds or (cfg.record and len(set(cfg.seeds)) < 3):
        raise ValueError(f"seeds={list(cfg.seeds)}: at least one, and three to judge claims")
    check_budget(cfg.budget)
    check_known(cfg.vit)


main = script("bench", bench)


if __name__ == "__main__":
    main()
