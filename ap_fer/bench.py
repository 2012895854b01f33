"""Time with and without pooling: the published network in onnxruntime and in torch, and its transformer alone.

python bench.py [batches=[1,8]] [threads=2] [out=bench.json]
python bench.py record=true             also judges the claims of speed (claims.yaml, scale bench) and writes results/bench/

Random weights: the number of tokens does not depend on them; a seed is other weights and other images, and a claim is judged
over the seeds. Interleaved rounds, medians with quartiles. `ours` is APP + ATP, `baseline` the same weights and runtime without
pooling. `share`: of the time that the multiply-accumulates saved would save, how much is saved, 1 - ours / baseline over
1 - MACs / MACs without pooling. `FirstTokens` are the same layers on as many tokens without choosing them: what is missing
there is the machine's."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from ap_fer.checkpoint import PUBLISHED
from ap_fer.counts import measure
from ap_fer.export import export
from ap_fer.model import APViT
from ap_fer.pooling_vit import PoolingViT
from ap_fer.token_selection import token_schedule
from common.metrics import report
from common.metrics.timing import Bench, Timing, interleaved
from common.scripts import script

PAPER = Path(__file__).resolve().parent
NONE: dict = {"app": {"keep": None}, "atp": {"rate": 1.0, "start": 0}}
ARMS = {"onnxruntime": "whole", "torch": "whole", "torch_transformer": "transformer"}  # and what its MACs are of
Measured = dict[str, dict[int, dict[str, float]]]


class FirstTokens(nn.Module):
    """The layers of a `PoolingViT` on as many tokens, always the first ones: nothing is scored, chosen or gathered."""

    def __init__(self, vit: PoolingViT):
        super().__init__()
        self.vit, self.app, self.blocks = vit, vit.app, vit.blocks

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Features (B, channels, H, W) -> CLS (B, dim), and no indices."""
        vit: Any = self.vit
        x = vit.projs[0](features).flatten(2).transpose(1, 2) + vit.patch_pos_embed
        first, *rest = token_schedule(x.shape[1], vit.app.keep, vit.rates)
        z = torch.cat([(vit.cls_token + vit.cls_pos_embed).expand(x.shape[0], -1, -1), x[:, :first]], 1)
        for block, n in zip(vit.blocks, rest, strict=True):
            u = (z + block.attn(block.norm1(z), row=False)[0])[:, : 1 + n]
            z = u + block.mlp(block.norm2(u))
        return vit.norm(z)[:, 0], None


def networks(seed: int, **shape: Any) -> dict[str, APViT]:
    """{pooled, dense, first}: the same weights, drawn from a seed, in evaluation mode. shape: options of another `APViT`."""
    torch.manual_seed(seed)
    pooled, dense = APViT(**shape).eval(), APViT(**(shape | NONE)).eval()
    dense.load_state_dict(pooled.state_dict())
    with torch.device("meta"):
        first = APViT(**shape).eval()
    first.extractor, first.head, first.vit = pooled.extractor, pooled.head, FirstTokens(pooled.vit)  # type: ignore[arg-type,assignment]
    return {"pooled": pooled, "dense": dense, "first": first}


def onnx_call(path: Path, x: Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = x.numpy()
    return lambda: session.run(None, {"images": images})


def torch_call(module: nn.Module, inputs: Tensor) -> Callable[[], object]:
    def run() -> None:
        module(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return run


def timed(
    models: dict[str, APViT], cfg: DictConfig, device: torch.device, batch: int, folder: Path
) -> dict[str, dict[str, Timing]]:
    """{arm: {pooled, dense, first: time of a batch}}; ONNX files are kept in folder."""
    some = models["pooled"]
    calls, x = {}, torch.randn(batch, 3, some.image_size, some.image_size)
    if device.type == "cpu":
        for name, model in models.items():
            if not (file := folder / f"{name}.onnx").exists():
                export(model, file)
            calls["onnxruntime", name] = onnx_call(file, x, torch.get_num_threads())
    x = x.to(device)
    features = some.to(device).extractor(x)
    for name, model in models.items():
        calls["torch", name] = torch_call(model.to(device), x)
        calls["torch_transformer", name] = torch_call(model.vit, features)  # type: ignore[arg-type]
    times = interleaved({" ".join(key): call for key, call in calls.items()}, rounds=cfg.rounds, seconds=cfg.seconds)
    return {arm: {name: times[f"{arm} {name}"] for name in models} for arm in ARMS if (arm, "dense") in calls}


def add_rows(table: Bench, arm: str, batch: int, times: dict[str, Timing], ideal: float) -> dict[str, float]:
    """The rows of one arm; returns {of_ideal, of_limit}: the time saved, of what the multiply-accumulates promise and of what as
    many tokens save without choosing."""
    saved = {name: times["dense"].median - times[name].median for name in ("pooled", "first")}
    share = {name: s / times["dense"].median / ideal for name, s in saved.items()}
    for name, words in (("pooled", "APP + ATP"), ("first", "as many tokens, not chosen")):
        row = {"batch": batch, "ideal": ideal, "share": share[name]}
        table.add(f"{arm}, {words} against no pooling", times[name], times["dense"], **row)
        print(f"{'':4s}{share[name]:.0%} of the ideal saving of {ideal:.1%}")
    return {"of_ideal": share["pooled"], "of_limit": saved["pooled"] / saved["first"]}


@torch.no_grad()
def bench(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows; with cfg.record judges the claims, too. ValueError for too few
    seeds."""
    if not cfg.seeds or (cfg.record and len(set(cfg.seeds)) < 3):
        raise ValueError(f"seeds={list(cfg.seeds)}: at least one, and three to judge claims")
    counts = [measure(**setting) for setting in (PUBLISHED, NONE)]
    ideal = {
        part: 1 - counts[0][key] / counts[1][key] for part, key in (("transformer", "macs_vit"), ("whole", "macs"))
    }
    print(f"multiply-accumulates saved: transformer {ideal['transformer']:.1%}, whole network {ideal['whole']:.1%}")
    table, measured, begun = (
        Bench(PAPER / "results/bench/bench.json" if cfg.record else cfg.out),
        {},
        time.perf_counter(),
    )
    for seed in cfg.seeds:
        models = networks(seed)
        with tempfile.TemporaryDirectory() as folder:
            for batch in cfg.batches or ([1, 64, 256] if device.type == "cuda" else [1, 8]):
                for arm, times in timed(models, cfg, device, batch, Path(folder)).items():
                    found = add_rows(table, f"seed {seed}, {arm}", batch, times, ideal[ARMS[arm]])
                    own = measured.setdefault(arm, {}).setdefault(seed, {})
                    own |= {f"{key}_b{batch}": value for key, value in found.items()}
    rows = table.write()
    if cfg.record:
        report.judge_speed(PAPER, measured, time.perf_counter() - begun)
    return rows


@script("bench")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    bench(cfg, fabric.device)


if __name__ == "__main__":
    main()
