"""The alternating search: Parent round, Child round, and again. Also DARTS on one network.

A Parent round alternates steps on its weights (training half) and on alpha (validation half) and collects the tangent
direction. A Child round takes alpha over, learns the Parent's output distribution with its 1-bit weights, and moves alpha^ by
the gradient of `tangent_propagation`. Without a Child this is first-order DARTS on whatever network it is given.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcp_nas.decoupled_optimisation import Decoupled, active_operations
from dcp_nas.operations import reconstruction_error
from dcp_nas.ranks import average_gradients, world_size
from dcp_nas.search_space import Genotype, discretise
from dcp_nas.supernet import Supernet, inherit
from dcp_nas.tangent_propagation import check_rule, child_gradient, flatten, parent_tangent, unflatten

Batch = tuple[Tensor, Tensor]
TANGENTS = ("round", "last", "same")
INHERIT = ("first", "every", "never")


class Architecture:
    """alpha of both cell types with its Adam and, if wanted, decoupled optimisation."""

    def __init__(
        self, net: Supernet, alphas: tuple[Tensor, Tensor], *, lr: float, betas: Sequence[float], weight_decay: float,
        decoupled: dict[str, Any] | None, w_lr: float,
    ):  # fmt: skip
        self.net, self.alphas = net, alphas
        self.optimizer = torch.optim.Adam(alphas, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)
        self.decoupled: list[Decoupled] = []
        if decoupled is not None:
            options = dict(decoupled)
            self.active = {k: options.pop(k) for k in ("tau", "granularity")}
            eta = options.pop("eta")
            eta_psi = lr * options.pop("psi_lr_mult")
            eta = lr * w_lr if eta is None else eta  # eta_1 eta_2
            active_operations(torch.zeros(1, 8), **self.active)  # a wrong value fails here, not at the first step
            self.decoupled = [Decoupled(a, eta=eta, eta_psi=eta_psi, **options) for a in alphas]

    def step(self, gradient: Tensor) -> float:
        """One Adam step along -gradient (K,), then the backtracking. Returns its size relative to the Adam step."""
        before = flatten([a.detach() for a in self.alphas])
        for alpha, part in zip(self.alphas, unflatten(gradient, self.alphas), strict=True):
            alpha.grad = part.clone()
        for rule, alpha in zip(self.decoupled, self.alphas, strict=False):
            rule.before_step(alpha.grad)  # type: ignore[arg-type]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moved = (flatten([a.detach() for a in self.alphas]) - before).norm().item()
        added = 0.0
        for reduction, rule in enumerate(self.decoupled):
            norms = self.net.operation_norms(reduction=bool(reduction)).to(rule.alpha.device)
            added = math.hypot(added, rule.after_step(active_operations(norms, **self.active)))
        return added / max(moved, 1e-12)

    @torch.no_grad()
    def copy_from(self, other: "Architecture") -> None:
        """Takes the other's alpha over. What was added to the own alpha before is no part of it any more."""
        for a, b in zip(self.alphas, other.alphas, strict=True):
            a.copy_(b)
        for rule in self.decoupled:
            rule.added = torch.zeros_like(rule.added)

    def state_dict(self) -> dict[str, Any]:
        rules = [rule.state_dict() for rule in self.decoupled]
        return {
            "alphas": [a.detach() for a in self.alphas],
            "optimizer": self.optimizer.state_dict(),
            "decoupled": rules,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for a, b in zip(self.alphas, state["alphas"], strict=True):
            a.copy_(b)
        self.optimizer.load_state_dict(state["optimizer"])
        for rule, part in zip(self.decoupled, state["decoupled"], strict=True):
            rule.load_state_dict(part)


class ChildParentSearch:
    """The published algorithm with a Child, first-order DARTS without. `step`: one step on the weights and one on alpha.

    lam, hessian, distance, chunks, reduction, product: see `child_gradient`.
    mu: weight of the reconstruction error (recon_reduction: mean over the binary weights, or sum). tangent: t is the mean over
    the round's validation batches, the last one, or that of the batch of g (same). steps: per phase. inherit: rounds in which the
    Child takes the Parent's weights. alpha_start: rounds before alpha moves. ValueError for a name that is not allowed."""

    def __init__(
        self, parent: Supernet, child: Supernet | None, *, generator: torch.Generator, rounds: int, steps: int,
        w: dict[str, Any], alpha: dict[str, Any], lam: float = 5e-3, mu: float = 0.2, hessian: str = "ggn",
        distance: str = "frobenius", chunks: int = 10, tangent: str = "round", recon_reduction: str = "mean",
        inherit: str = "first", alpha_start: int = 0, decoupled: dict[str, Any] | None = None, reduction: str = "mean",
        product: str = "forward",
    ):  # fmt: skip
        if tangent not in TANGENTS or inherit not in INHERIT or min(rounds, steps) < 1 or mu < 0:
            raise ValueError(
                f"tangent={tangent!r}, inherit={inherit!r}, rounds={rounds}, steps={steps}, mu={mu}, allowed: "
                f"{', '.join(TANGENTS)}; {', '.join(INHERIT)}; rounds and steps >= 1; mu >= 0"
            )
        names = {"hessian": hessian, "distance": distance, "reduction": reduction, "product": product}
        check_rule(lam=lam, **names)
        if world_size() > 1 and hessian in ("fisher_empirical", "ggn_diag"):
            raise ValueError(f"hessian={hessian!r} takes the gradients of parts of one batch: it runs on one device")
        self.rule: dict[str, Any] = {"lam": lam, "chunks": chunks, **names}
        self.mu, self.recon_reduction, self.tangent, self.inherit = mu, recon_reduction, tangent, inherit
        self.rounds, self.steps_per_phase, self.alpha_start, self.w = rounds, steps, alpha_start, dict(w)
        self.nets: dict[str, Supernet] = {"parent": parent} | ({} if child is None else {"child": child})
        self.arch: dict[str, Architecture] = {}
        self.optimizers: dict[str, torch.optim.SGD] = {}
        start = parent.new_alphas(generator)
        device = next(parent.parameters()).device
        for name, net in self.nets.items():
            leaves = tuple(a.detach().clone().to(device).requires_grad_() for a in start)
            self.arch[name] = Architecture(net, leaves, decoupled=decoupled, w_lr=w["lr"], **alpha)  # type: ignore[arg-type]
            options = {"momentum": w["momentum"], "weight_decay": w["weight_decay"]}
            self.optimizers[name] = torch.optim.SGD(net.parameters(), lr=w["lr"], **options)
        self.moving = "parent"  # the network whose alpha moved last
        self.t: Tensor | None = None
        self.collected: list[Tensor] = []

    # ------------------------------------------------------------------------------------------------------ phases
    def phases(self) -> list[str]:
        """Names of the phases in order."""
        return [f"{name} {r + 1}" for r in range(self.rounds) for name in self.nets]

    def steps(self, phase: int) -> int:
        """Steps of a phase."""
        return self.steps_per_phase

    def begin(self, phase: int) -> None:
        """To be called once before the first step of a phase."""
        self.moving, r = self._where(phase)
        if self.moving == "parent":
            self.collected = []
            return
        self.t = None
        if self.collected and self.tangent != "same":
            self.t = self.collected[-1] if self.tangent == "last" else torch.stack(self.collected).mean(0)
        self.arch["child"].copy_from(self.arch["parent"])
        if self.inherit == "every" or (self.inherit == "first" and r == 0):
            inherit(self.nets["child"], self.nets["parent"])

    def end(self, phase: int) -> None:
        """To be called once after the last step of a phase: the Parent goes on from the Child's alpha."""
        if self._where(phase)[0] == "child":
            self.arch["parent"].copy_from(self.arch["child"])

    def _where(self, phase: int) -> tuple[str, int]:
        return list(self.nets)[phase % len(self.nets)], phase // len(self.nets)

    # ------------------------------------------------------------------------------------------------------- steps
    def step(self, phase: int, train: Batch, val: Batch) -> dict[str, Tensor | float]:
        """One step on the weights with `train`, one on alpha with `val`; returns what happened."""
        name, r = self._where(phase)
        row = self.weight_step(name, r, train)
        if r >= self.alpha_start:
            row |= self.parent_alpha_step(val) if name == "parent" else self.child_alpha_step(val)
        return row

    def weight_step(self, name: str, r: int, train: Batch) -> dict[str, Tensor | float]:
        net, arch, optimizer = self.nets[name], self.arch[name], self.optimizers[name]
        images, labels = train
        logits = net(images, tuple(a.detach() for a in arch.alphas))  # type: ignore[arg-type]
        if name == "parent":
            loss = F.cross_entropy(logits, labels)
        else:  # -G up to the Parent's entropy, which no weight changes
            loss = F.cross_entropy(logits, self.target(images))
        row: dict[str, Tensor | float] = {"loss": loss.detach()}
        if name == "child" and self.mu:
            recon = reconstruction_error(net, reduction=self.recon_reduction)
            loss, row["reconstruction"] = loss + self.mu * recon, recon.detach()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(net.parameters())
        row["gradient norm"] = torch.nn.utils.clip_grad_norm_(net.parameters(), self.w["clip"])
        for group in optimizer.param_groups:
            group["lr"] = (
                self.w["lr_min"] + (self.w["lr"] - self.w["lr_min"]) * (1 + math.cos(math.pi * r / self.rounds)) / 2
            )
        if bool(row["gradient norm"].isfinite()):  # the caller stops the run otherwise
            optimizer.step()
        return row

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """p(w, alpha) of the Parent, (B, N)."""
        return self.nets["parent"](images, self.arch["parent"].alphas).softmax(dim=1)  # type: ignore[arg-type]

    def parent_alpha_step(self, val: Batch) -> dict[str, Tensor | float]:
        arch, (images, labels) = self.arch["parent"], val
        logits = self.nets["parent"](images, arch.alphas)  # type: ignore[arg-type]
        t = parent_tangent(logits, labels, arch.alphas, reduction=self.rule["reduction"])
        self.collected.append(t)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"val_accuracy": accuracy, "backtrack_ratio": arch.step(-t), "tangent_norm": t.norm()}

    def child_alpha_step(self, val: Batch) -> dict[str, Tensor | float]:
        arch, net, (images, labels) = self.arch["child"], self.nets["child"], val
        t = self.t
        if self.tangent == "same":
            parent = self.arch["parent"].alphas
            logits = self.nets["parent"](images, parent)  # type: ignore[arg-type]
            t = parent_tangent(logits, labels, parent, reduction=self.rule["reduction"])
        rule = self.rule if t is not None else self.rule | {"lam": 0.0}
        found = child_gradient(lambda a: net(images, tuple(a)), arch.alphas, self.target(images), t, **rule)  # type: ignore[arg-type]
        row: dict[str, Tensor | float] = {"objective": found["objective"], "child_gradient_norm": found["g"].norm()}
        if t is not None:
            row["discrepancy"] = found["discrepancy"]
            row["gradient_cosine"] = torch.cosine_similarity(found["g"], t, dim=0)
        if "tangent_term" in found:
            row["tangent_ratio"] = found["tangent_term"].norm() / found["g"].norm().clamp_min(1e-12)
        return row | {"backtrack_ratio": arch.step(found["gradient"])}

    # ------------------------------------------------------------------------------------------------------- state
    def alphas(self) -> tuple[Tensor, Tensor]:
        """alpha of the network that moved last: the Child's after a round."""
        return self.arch[self.moving].alphas

    def genotype(self) -> Genotype:
        return discretise(*self.alphas(), order=self.nets["parent"].order)

    def state_dict(self) -> dict[str, Any]:
        return {
            "nets": {k: v.state_dict() for k, v in self.nets.items()},
            "arch": {k: v.state_dict() for k, v in self.arch.items()},
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "t": self.t, "collected": list(self.collected), "moving": self.moving,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(self.nets["parent"].parameters()).device
        for part in ("nets", "arch", "optimizers"):
            for k, v in getattr(self, part).items():
                v.load_state_dict(state[part][k])
        self.moving = state["moving"]
        self.t = None if state["t"] is None else state["t"].to(device)
        self.collected = [t.to(device) for t in state["collected"]]
