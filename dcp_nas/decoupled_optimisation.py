"""Decoupled optimisation: architecture parameters step back along their previous value where the weights are large.

    alpha~^{t+1} = alpha^{t+1} + eta psi~ (*) alpha~^t   in the active columns, alpha^{t+1} elsewhere
    psi~^{t+1}   = | psi~^t - eta_psi dL/dpsi~^t |,   dL/dpsi~_e = eta sum_{m active} alpha~^t_{e,m} dL/dalpha~^{t+1}_{e,m}

Active are the operations whose weights R(w_m) rank above int(M tau) in rising order.
"""

import torch
from torch import Tensor

GRANULARITIES = ("operation", "edge_op")


def active_operations(norms: Tensor, *, tau: float, granularity: str = "operation") -> Tensor:
    """(E, M) mask of the active entries. norms: ||w||^2 per parameter, (E, M), see `Supernet.operation_norms`.

    operation: R(w_m) is the mean over the edges, whole columns are active; edge_op: every edge ranks its own operations.
    Of equal norms the later operation ranks higher. ValueError for tau outside 0..1 or another granularity."""
    if not 0 <= tau <= 1 or granularity not in GRANULARITIES:
        raise ValueError(f"tau={tau}, granularity={granularity!r}, allowed: 0..1; {', '.join(GRANULARITIES)}")
    values = norms.mean(0, keepdim=True).expand_as(norms) if granularity == "operation" else norms
    ranks = values.argsort(dim=1, stable=True).argsort(dim=1) + 1
    return ranks > int(norms.shape[1] * tau)


class Decoupled:
    """Decoupled optimisation of one matrix alpha (E, M). Call `before_step` with the gradient there, then `after_step`.

    eta: eta_1 eta_2 of the paper, the product of the learning rates of alpha and w. eta_psi: learning rate of psi~."""

    def __init__(self, alpha: Tensor, *, eta: float, eta_psi: float, psi: float = 0.2):
        if eta < 0 or eta_psi < 0 or psi < 0:
            raise ValueError(f"eta={eta}, eta_psi={eta_psi}, psi={psi}: all must be >= 0")
        self.alpha, self.eta, self.eta_psi = alpha, eta, eta_psi
        self.psi = torch.full((alpha.shape[0],), float(psi), device=alpha.device)
        self.added = torch.zeros_like(alpha.detach())  # the entries of alpha~^{t-1} that were added, before eta psi~
        self.previous = alpha.detach().clone()

    def psi_gradient(self, gradient: Tensor) -> Tensor:
        """dL/dpsi~ (E,) from dL/dalpha~ (E, M)."""
        return self.eta * (self.added * gradient).sum(1)

    @torch.no_grad()
    def before_step(self, gradient: Tensor) -> None:
        """Update psi~ with the gradient at the current alpha~, and remember alpha~."""
        self.psi = (self.psi - self.eta_psi * self.psi_gradient(gradient)).abs()
        self.previous = self.alpha.detach().clone()

    @torch.no_grad()
    def after_step(self, active: Tensor) -> float:
        """Add eta psi~ (*) alpha~^t in the active entries, in place. Returns the norm of what was added."""
        self.added = torch.where(active, self.previous, 0.0)
        change = self.eta * self.psi[:, None] * self.added
        self.alpha.add_(change)
        return change.norm().item()

    def state_dict(self) -> dict[str, Tensor]:
        return {"psi": self.psi, "added": self.added, "previous": self.previous}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.psi, self.added, self.previous = (state[k].to(self.alpha) for k in ("psi", "added", "previous"))
