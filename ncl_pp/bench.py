"""Speed ratios from one run: the vectorised criterion, one exported expert, one expert against K. Writes bench.json.

python bench.py threads=1

Interleaved rounds, medians with quartiles; ratio = baseline / ours; nothing is asserted.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from common.data.longtail import long_tail_counts
from common.metrics.timing import Bench, Timing, interleaved
from common.onnx_export import export_onnx
from common.scripts import script
from ncl_pp.criterion import NCLPlusLoss
from ncl_pp.model import Ensemble, Experts

CLASSES, EXPERTS, COPIES, HARD = 100, 2, 4, 30


def plain_loss(z: Tensor, labels: Tensor, counts: Tensor, *, lam: float = 0.6) -> Tensor:
    """The NCL++ criterion as one writes it first: a loop over experts, and one over every pair. Shapes: `NCLPlusLoss`."""
    labels = labels.repeat(COPIES)
    scores = z[0].detach().clone()
    scores[torch.arange(len(labels)), labels] = float("inf")
    mask = torch.zeros_like(scores).scatter_(1, scores.topk(HARD, dim=1).indices, 1.0)
    loss, log_p = z.new_zeros(()), []
    for k in range(EXPERTS):
        v = z[k] + counts.log()
        loss = loss + F.cross_entropy(v, labels) + F.cross_entropy(v * mask, labels)
        log_p.append(F.log_softmax(v, dim=1))

    def pairs(members: list[Tensor], mask: Tensor) -> Tensor:
        total = z.new_zeros(())
        for i, a in enumerate(members):
            for j, b in enumerate(members):
                if i != j:
                    terms = b.exp() * (b - a)
                    total = total + terms.sum(1).mean() + (mask * terms).sum(1).mean()
        return lam * 2 / (len(members) * (len(members) - 1)) * total

    loss = loss + pairs(log_p, mask)
    for k in range(EXPERTS):
        loss = loss + pairs(list(log_p[k].chunk(COPIES)), mask.chunk(COPIES)[0])
    return loss


def criterion_times(batch: int, rounds: int) -> dict[str, Timing]:
    """{ours: NCLPlusLoss, loops}: forward and backward on logits of `batch` images. ValueError if they disagree."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(EXPERTS, COPIES * batch, CLASSES, generator=generator).requires_grad_()
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    criterion = NCLPlusLoss(long_tail_counts(500, 100, CLASSES), hard=HARD, copies=COPIES)
    counts = criterion.class_counts.float()

    def ours() -> Tensor:
        return torch.stack(list(criterion(z, labels).values())).sum()

    def baseline() -> Tensor:
        return plain_loss(z, labels, counts)

    if not torch.allclose(ours(), baseline(), rtol=1e-5):
        raise ValueError(f"the two criteria disagree: {ours().item()} and {baseline().item()}")
    calls = {"ours": lambda: torch.autograd.grad(ours(), z), "loops": lambda: torch.autograd.grad(baseline(), z)}
    return interleaved(calls, rounds=rounds)


@torch.no_grad()
def deployment_times(batches: list[int], rounds: int, *, backbone: str = "resnet32") -> dict[int, dict[str, Timing]]:
    """Times per batch of 32 x 32 images: one expert and the ensemble, each eager, channels_last and onnxruntime."""
    import onnxruntime

    torch.manual_seed(0)
    experts = Experts(backbone, CLASSES, experts=EXPERTS)
    for module in experts.modules():  # batch statistics, without which random weights make the activations explode
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    experts.train()(torch.randn(64, 3, 32, 32))
    experts.eval()
    networks = {"expert": experts.single(0), "ensemble": Ensemble(experts)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    calls: dict[str, Callable[[Tensor], object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, network in networks.items():
            file = Path(scratch) / f"{name}.onnx"
            export_onnx(network, torch.zeros(1, 3, 32, 32), file, about={})
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            calls[f"{name} eager"] = network
            calls[f"{name} onnxruntime"] = lambda x, s=session: s.run(None, {"images": x.numpy()})
            last = copy.deepcopy(network).to(memory_format=torch.channels_last)
            calls[f"{name} channels_last"] = lambda x, n=last: n(x.to(memory_format=torch.channels_last))
    images = {b: torch.randn(b, 3, 32, 32) for b in batches}
    return {
        b: interleaved({n: lambda c=c, x=x: c(x) for n, c in calls.items()}, rounds=rounds) for b, x in images.items()
    }


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    table = Bench(cfg.out)
    times = criterion_times(cfg.batch_size, cfg.rounds)
    name = f"criterion, K={EXPERTS} N={COPIES} C={CLASSES}: vectorised vs loops"
    table.add(name, times["ours"], times["loops"], batch=cfg.batch_size)
    for batch, found in deployment_times([1, cfg.batch_size], cfg.rounds).items():
        kinds = ("expert", "ensemble")
        fastest = [min(t for k, t in found.items() if k.startswith(f"{n} ")) for n in kinds]
        for other in ("eager", "channels_last"):
            name = f"ResNet-32 expert: onnxruntime vs {other}"
            table.add(name, found["expert onnxruntime"], found[f"expert {other}"], batch=batch)
        table.add(f"ResNet-32: one expert vs ensemble of {EXPERTS}, each at its fastest", *fastest, batch=batch)
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
