"""Recurrent bilinear optimisation: the layer, and the optimizer hook that feeds it.

    conv = RBConv2d(64, 64, 3, padding=1, recurrent="drelu_fixed")      # a norm must follow it
    optimizer = torch.optim.Adam(parameters(model))
    recurrence = Recurrence(model, optimizer)                           # after the model is on its device

The published layer reads W.grad in its forward pass. That is None after `zero_grad(set_to_none=True)` and on the replicas of
nn.DataParallel, and then the recurrence is silently off. Here the gradient is copied immediately before the optimizer
uses it: unscaled, accumulated and averaged over the devices. At the same moment the gradient of the reconstruction is added,
which a backward rule would add once per micro-step and unscaled. A layer that nobody feeds refuses to train.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.quant.binary import binary_sign
from rbonn.bilinear import SCALE_GRADS, bilinear_binarize, constraint
from rbonn.binary_conv import BinaryConv2d, binary_layers
from rbonn.density_relu import check_tau, density_channels, small_scale_channels

RECURRENT = ("none", "all", "drelu_official", "drelu_fixed", "paper")


class RBConv2d(BinaryConv2d):
    """Convolution with binary weights const * |s_c| * sign(w_c), s learned per channel, and the recurrence of RBONN.

    recurrent, with g = the gradient of the last optimizer step and alpha = |s|:
      none            w as it is; lam > 0 is the bilinear constraint alone, lam = 0 a learned scale alone
      all             training forward with w - u g on every channel
      drelu_official  the same on the channels of `small_scale_channels(alpha, rule="official")`: the published code
      drelu_fixed     the same on the channels with the smallest alpha
      paper           after each step w <- w + U DReLU(w_old, A_old) and U <- |U|; the forward pass uses w
    lam >= 0: weight of the reconstruction; tau: share of DReLU; u_init: all entries of u; const: factor of the published
    code; zero: value of sign(0); scale_grad: released | exact, see `bilinear_binarize`. kernel_size ... padding_mode: of
    nn.Conv2d. Input (B, in, H, W): any, usually signs. In evaluation the recurrence is off.
    Parameters: weight (out, in/groups, k, k), scale_factor and (unless none) u, both (out, 1, 1, 1).
    `const` makes the output small: a norm has to follow. ValueError for a value out of range."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, bias: bool = False, padding_mode: Any = "zeros", *, recurrent: str = "drelu_official",
        lam: float = 1e-4, tau: float = 0.6, u_init: float = 0.2, const: float = 0.02, zero: int = 1,
        scale_grad: str = "released",
    ):  # fmt: skip
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        check_options(recurrent=recurrent, lam=lam, tau=tau, u_init=u_init, const=const, scale_grad=scale_grad)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self.recurrent, self.lam, self.tau, self.const, self.zero = recurrent, lam, tau, const, zero
        self.scale_grad = scale_grad
        self.scale_factor = nn.Parameter(torch.randn(out_channels, 1, 1, 1))
        if recurrent != "none":
            self.u = nn.Parameter(torch.full((out_channels, 1, 1, 1), float(u_init)))
        # Plain attributes: in the state dict they would change its format, and as buffers DDP would broadcast them.
        self.previous: Tensor | None = None  # g, where the forward pass looks ahead along it
        self.written_back: Tensor | None = None  # DReLU(w_old, A_old), of "paper"
        self.fed_by: int | None = None  # id of the module that a Recurrence feeds: a copy is another module
        self.passes: Any = 0
        self.active: Any = 0
        self.lookahead_flips: Any = 0

    def binary_weight(self) -> Tensor:
        w = self.weight
        # A frozen layer has no gradient to go back to.
        if self.training and self.needs_feeding and self.weight.requires_grad:
            if self.fed_by != id(self):
                raise RuntimeError(
                    f"RBConv2d(recurrent={self.recurrent!r}, lam={self.lam:g}) trains without a Recurrence: recurrence and "
                    "reconstruction would be silently off. Make Recurrence(model, optimizer) once the model is on its device "
                    "(not on a copy; nn.DataParallel makes copies, use DistributedDataParallel)"
                )
            w = self._backtracked()
            with torch.no_grad():
                self.passes += 1
                self.lookahead_flips = self.lookahead_flips + ((w < 0) != (self.weight < 0)).sum()
                if self.recurrent != "paper":
                    self.active = self.active + self.chosen().sum()
        # lam acts at the optimizer step (`_reconstruct`): in the backward pass it would be divided by the loss scale of
        # mixed precision and multiplied by the number of accumulated micro-steps.
        return bilinear_binarize(
            w, self.scale_factor.abs(), lam=0.0, const=self.const, zero=self.zero, scale_grad=self.scale_grad
        )

    @property
    def needs_feeding(self) -> bool:
        """Whether training needs a `Recurrence`: for its gradients, or for the gradient of the reconstruction."""
        return self.recurrent != "none" or self.lam > 0

    def _backtracked(self) -> Tensor:
        if self.written_back is not None:
            # w was backtracked after the step; what is left is the gradient of u, dL/dU = <dL/dw, DReLU(w_old, A_old)>
            return self.weight + (self.u - self.u.detach()) * self.written_back
        if self.previous is not None:
            return self.weight - self.u * self.previous * self.chosen().view(-1, 1, 1, 1)
        return self.weight

    def _reconstruct(self) -> None:
        """Add the gradients of the bilinear `constraint` to those of the task."""
        with torch.enable_grad():
            term = constraint(
                self._backtracked(), self.scale_factor.abs(), lam=self.lam, const=self.const, zero=self.zero
            )
        parameters = [p for n, p in self.named_parameters() if n != "bias" and p.requires_grad]
        for p, grad in zip(parameters, torch.autograd.grad(term, parameters, allow_unused=True), strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)

    @torch.no_grad()
    def chosen(self) -> Tensor:
        """The channels backtracked now, bool (out,); none for recurrent="none". "paper" chooses anew in every step."""
        alpha = self.scale_factor.abs().flatten()
        if self.recurrent == "all":
            return torch.ones_like(alpha, dtype=torch.bool)
        if self.recurrent == "paper":
            return density_channels(self.weight, self._a(), tau=self.tau)
        if self.recurrent == "none":
            return torch.zeros_like(alpha, dtype=torch.bool)
        return small_scale_channels(alpha, tau=self.tau, rule=self.recurrent.removeprefix("drelu_"))

    def _a(self) -> Tensor:
        return 1 / (self.const * self.scale_factor.detach().abs().flatten()).clamp_min(1e-8)

    def attach(self) -> None:
        """Start with nothing to go back to; called by the `Recurrence` that feeds this layer from now on."""
        self.previous = self.written_back = None
        if self.recurrent == "paper":
            self.written_back = torch.zeros_like(self.weight, requires_grad=False)
        elif self.recurrent != "none":
            self.previous = torch.zeros_like(self.weight, requires_grad=False)
        self.fed_by = id(self)

    @property
    def snapshot(self) -> Tensor | None:
        """What the next forward pass or step goes back to; None without a recurrence."""
        return self.previous if self.written_back is None else self.written_back

    @torch.no_grad()
    def before_step(self) -> None:
        """With the gradient that is about to be applied: add the constraint's, and remember what the next forward pass
        (or `after_step`) goes back to. RuntimeError without a gradient."""
        if self.weight.grad is None:
            raise RuntimeError(
                "an RBConv2d has no gradient at optimizer.step(): use it in every step, or freeze its weight"
            )
        if self.lam > 0:
            self._reconstruct()
        if self.written_back is not None:
            chosen = self.chosen()
            self.written_back = self.weight * chosen.view(-1, 1, 1, 1)
            self.active = self.active + chosen.sum()
            self._u = self.u.detach().clone()
        if self.previous is not None:
            self.previous.copy_(self.weight.grad)

    @torch.no_grad()
    def after_step(self) -> None:
        """The paper's write-back w <- w + U^t DReLU(w^t, A^t) and projection U <- |U|; nothing for the other rules."""
        if self.written_back is not None:
            self.weight.add_(self._u * self.written_back)
            self.u.abs_()

    def signs_and_scale(self) -> tuple[Tensor, Tensor]:
        return binary_sign(self.weight, zero=self.zero), (self.const * self.scale_factor.detach().abs()).flatten()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recurrent={self.recurrent}, lam={self.lam:g}, tau={self.tau:g}"


def check_options(
    *, recurrent: str, lam: float, tau: float, u_init: float, const: float, scale_grad: str = "released"
) -> None:
    """ValueError naming the option of `RBConv2d` that is out of range, and what is allowed."""
    if recurrent not in RECURRENT:
        raise ValueError(f"recurrent={recurrent!r}, allowed: {', '.join(RECURRENT)}")
    check_tau(tau)
    for name, value in (("lam", lam), ("u_init", u_init)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value}, allowed: finite and >= 0")
    if not 0 < const < float("inf"):
        raise ValueError(f"const={const}, allowed: finite and > 0")
    if scale_grad not in SCALE_GRADS:
        raise ValueError(f"scale_grad={scale_grad!r}, allowed: {', '.join(SCALE_GRADS)}")


class Recurrence:
    """Feeds the binary layers of `model` from `optimizer` and counts what happens to their signs.

    model: on its device, its layers not wrapped one by one (give the module that Fabric or DDP wraps). optimizer: a
    torch.optim.Optimizer that holds every recurrent weight. Before each `optimizer.step()` the gradient about to be
    applied is copied into the layers; a step that a loss scaler skips changes nothing. The flipped signs of all binary layers are
    counted.
    ValueError: a recurrent weight is in no group of the optimizer; a fused optimizer, which unscales only inside its
    step; at the step, a closure, which computes gradients only inside it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.layers = binary_layers(model)
        self.fed = {
            n: m for n, m in self.layers.items()
            if isinstance(m, RBConv2d) and m.needs_feeding and m.weight.requires_grad
        }  # fmt: skip
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if absent := [n for n, m in self.fed.items() if id(m.weight) not in held]:
            raise ValueError(f"the optimizer does not hold the recurrent weights of {', '.join(absent[:5])}")
        if self.fed and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError("fused optimizers see scaled gradients under AMP: make the optimizer with fused=False")
        for m in self.fed.values():
            m.attach()
        self.steps = 0
        self._before: dict[str, Tensor] = {}
        self._flips: Any = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Take the hooks off; recurrent layers refuse to train again."""
        for hook in self._hooks:
            hook.remove()
        for m in self.fed.values():
            m.previous = m.written_back = m.fed_by = None

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.fed and any(callable(a) for a in (*args, *kwargs.values()) if a is not optimizer):
            raise ValueError("optimizer.step(closure) computes gradients inside the step; call backward before step()")
        for m in self.fed.values():
            m.before_step()
        self._before = {n: m.signs_and_scale()[0] for n, m in self.layers.items()}

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for m in self.fed.values():
            m.after_step()
        self.steps += 1
        for n, m in self.layers.items():
            self._flips = self._flips + (m.signs_and_scale()[0] != self._before[n]).sum()

    def counters(self) -> dict[str, float]:
        """Since the last call: flip_rate, signs flipped per weight and step; with a recurrence also active_share, channels
        backtracked per channel and forward pass, and lookahead_flips, signs that the backtracked weight has and the
        weight has not, per weight and forward pass. Empty without binary layers or steps."""
        if not self.layers or not self.steps:
            return {}
        weights = sum(m.weight.numel() for m in self.layers.values())
        out = {"flip_rate": float(self._flips) / (weights * self.steps)}
        if any(m.recurrent != "none" for m in self.fed.values()):
            layers = self.fed.values()
            out["active_share"] = float(sum(m.active for m in layers)) / max(
                1, sum(m.out_channels * m.passes for m in layers)
            )
            looked_at = sum(m.weight.numel() * m.passes for m in layers)
            out["lookahead_flips"] = float(sum(m.lookahead_flips for m in layers)) / max(1, looked_at)
        self.steps, self._flips = 0, 0
        for m in self.fed.values():
            m.passes = m.active = m.lookahead_flips = 0
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """{layer: what it goes back to}, for an exact resume; belongs into the training checkpoint, not into the model's."""
        return {n: m.snapshot.clone() for n, m in self.fed.items() if m.snapshot is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """ValueError if `state` is of other layers."""
        own = {n: m.snapshot for n, m in self.fed.items() if m.snapshot is not None}
        if state.keys() != own.keys():
            raise ValueError(f"recurrence state of other layers: {sorted(state.keys() ^ own.keys())[:5]}")
        for n, snapshot in own.items():
            snapshot.copy_(state[n])
