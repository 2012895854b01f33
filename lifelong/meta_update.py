"""One training batch of ARI, or of its parent iTAML: inner loops per task, then fusion.

independent       every task starts from the same base parameters, and the fused state is a mean of true copies: the algorithm
                  as the papers state it.
sequential_last   task after task from where the last one ended, the newest task last, and no fusion: what the released code
                  computes, because its reset rebinds a name and its stored states are references.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lifelong.adaptive_fusion import OnlineFusion
from lifelong.background_attack import REGIONS, background_attack, start_noise
from lifelong.ranks import Ranks

SEMANTICS = ("independent", "sequential_last")
LOSSES = ("group", "seen")


@dataclass(frozen=True, kw_only=True)
class MetaOptions:
    """Options of `meta_step`. ValueError for a value that is not allowed.

    steps: r clean inner steps per task. loss: binary cross entropy over the logits of the task's own group (as published: its
    images teach the logits of the other tasks nothing), or over those of all classes seen. attack: background | everywhere |
    foreground, or None for no attacked step. eps: in 1/255. weights, distance, constant: see `OnlineFusion`. beta: see
    `step_size`. optimizer_state: shared (parameters are reset between tasks, moments are not) | per_task. min_samples: a task
    with fewer samples in the batch is skipped (None: 2 with batch norm, which has no statistics of one sample, else 1).
    freeze_bn: see `background_attack`.
    """

    steps: int = 1
    loss: str = "group"
    attack: str | None = "background"
    eps: float = 1.0
    semantics: str = "independent"
    weights: str = "adaptive"
    distance: str = "l1_sum"
    constant: float = 0.85
    beta: float = 1.0
    optimizer_state: str = "shared"
    min_samples: int | None = None
    freeze_bn: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}, allowed: >= 1 clean inner steps")
        if self.attack is not None and self.attack not in REGIONS:
            raise ValueError(f"attack={self.attack!r}, allowed: {', '.join(REGIONS)} or null")
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}, allowed: {', '.join(LOSSES)}")
        if self.semantics not in SEMANTICS:
            raise ValueError(f"semantics={self.semantics!r}, allowed: {', '.join(SEMANTICS)}")
        if self.optimizer_state not in ("shared", "per_task"):
            raise ValueError(f"optimizer_state={self.optimizer_state!r}, allowed: shared, per_task")
        if self.eps < 0 or self.beta < 0:
            raise ValueError(f"eps={self.eps}, beta={self.beta}, allowed: >= 0")
        if self.min_samples is not None and self.min_samples < 1:
            raise ValueError(f"min_samples={self.min_samples}, allowed: >= 1 or null")
        OnlineFusion([], weights=self.weights, distance=self.distance, constant=self.constant)


def group_bce(logits: Tensor, labels: Tensor, group: slice, *, of: int | None = None) -> Tensor:
    """Binary cross entropy, mean over samples and the logits of a group; rows of the head outside `group` get no gradient.

    logits: (B, C); labels: (B,), all in group.start .. group.stop - 1. The group is a task's, or that of all classes seen.
    of: the samples that the mean is over, of which these are a share; None: they are all."""
    inside = logits[:, group].to(torch.promote_types(logits.dtype, torch.float32))  # a sum in bfloat16 would be coarse
    targets = F.one_hot(labels - group.start, inside.shape[1]).to(inside.dtype)
    total = F.binary_cross_entropy_with_logits(inside, targets, reduction="sum")
    return total / ((len(labels) if of is None else of) * inside.shape[1])


def meta_step(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    x: Tensor,
    y: Tensor,
    groups: Sequence[slice],
    *,
    alpha: float,
    options: MetaOptions,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    generator: torch.Generator | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Update the parameters of `model` on one batch; returns {clean, attacked: mean loss, skipped: samples not used, spread:
    see `OnlineFusion.spread`}.

    model(x, return_attention=True) -> logits (B, C), map (B, 1, h, w). optimizers: one, or one per task for per_task state.
    x: (B, c, H, W), normalised with mean, std; y: (B,). groups: the classes of the tasks seen. alpha: see `step_size`.
    ranks: processes that all have the whole batch and share the images of every inner step; None: this one alone.
    Tasks that are absent from the batch take no part. Running statistics are not fused, they run along all passes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    least = options.min_samples or (
        2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1
    )
    base = [p.detach().clone() for p in parameters]
    fusion = OnlineFusion(base, weights=options.weights, distance=options.distance, constant=options.constant)
    independent = options.semantics == "independent"
    clean, attacked, skipped = [], [], 0
    for k, group in enumerate(groups):
        mine = torch.nonzero((y >= group.start) & (y < group.stop)).flatten()
        if len(mine) < least:
            skipped += len(mine)
            continue
        if independent and clean:
            _copy(base, parameters)
        optimizer = optimizers[k if options.optimizer_state == "per_task" else 0]
        learned = group if options.loss == "group" else slice(0, groups[-1].stop)
        found = _inner_loop(
            model, optimizer, x[mine], y[mine], learned, options, mean, std, generator, ranks or Ranks()
        )
        clean += found[0]
        attacked += found[1]
        if independent:
            fusion.add(parameters)
    if not independent and clean:
        fusion.add(parameters)
    if clean:
        _copy(fusion.result(alpha), parameters)
    terms = {"skipped": torch.tensor(float(skipped), device=x.device), "spread": fusion.spread()}
    if clean:
        terms["clean"] = torch.stack(clean).mean()
    if attacked:
        terms["attacked"] = torch.stack(attacked).mean()
    return terms


def _inner_loop(
    model: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    learned: slice,
    options: MetaOptions,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator | None,
    ranks: Ranks,
) -> tuple[list[Tensor], list[Tensor]]:
    """The clean steps on the images of one task, then the attacked one; the losses of the former and of the latter.

    learned: the classes whose logits the loss is over. Every step is on the images of all ranks, each of which takes its own."""
    count, own = len(labels), ranks.mine(labels)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def update(inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, attention = model(inputs, return_attention=True)
        loss = group_bce(logits, own, learned, of=count)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        whole = ranks.add(parameters, {"loss": loss})["loss"]
        optimizer.step()
        return whole, attention.detach()

    clean, attacked = [], []
    for _ in range(options.steps):
        loss, attention = update(ranks.mine(images))
        clean.append(loss)
    if options.attack is not None:
        noise = start_noise(images, options.eps, std, generator)  # of all images, so that ranks draw alike
        hard = background_attack(
            model, ranks.mine(images), own, attention, options.eps, mean=mean, std=std, region=options.attack,
            delta=ranks.mine(noise), freeze_bn=options.freeze_bn,
        )  # fmt: skip
        attacked.append(update(hard)[0])
    return clean, attacked


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for t, s in zip(target, source, strict=True):
        t.copy_(s)
