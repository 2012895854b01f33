"""The convolutions and activations of the arms that RBONN is compared with, and which arm takes which."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from common.quant.binary import RSign, binarize, binary_sign, clip_ste_weight, ede, ede_temperature, libra, xnor_scale
from rbonn.binary_conv import BinaryConv2d, binary_layers
from rbonn.recurrent import RBConv2d, check_options

WEIGHTS = ("real", "xnor", "bilinear", "irnet")
ACTIVATIONS = ("real", "binary", "irnet")


class XNORConv2d(BinaryConv2d):
    """ReActNet's convolution: mean|w_c| sign(w_c), straight-through inside |w| <= 1."""

    def binary_weight(self) -> Tensor:
        return clip_ste_weight(self.weight, zero=self.zero)

    def signs_and_scale(self) -> tuple[Tensor, Tensor]:
        return binary_sign(self.weight, zero=self.zero), xnor_scale(self.weight).flatten()


class IRConv2d(BinaryConv2d):
    """IR-Net's convolution: standardised weights, power-of-two scale, the derivative of k tanh(t x). `anneal` moves t."""

    t = 0.1

    def binary_weight(self) -> Tensor:
        w, scale = libra(self.weight)
        return scale * binarize(w, estimator=partial(ede, t=self.t), zero=self.zero)

    def signs_and_scale(self) -> tuple[Tensor, Tensor]:
        """See `BinaryConv2d.signs_and_scale`; the signs are those of w - mean(w)."""
        w, scale = libra(self.weight.detach())
        return binary_sign(w, zero=self.zero), scale.flatten()


def anneal(model: nn.Module, progress: float) -> None:
    """Set t of IR-Net's estimators after the share `progress` (0..1) of the training; other layers are left alone."""
    t = ede_temperature(progress)
    for m in model.modules():
        if isinstance(m, IRConv2d):
            m.t = t
        elif isinstance(m, RSign) and isinstance(m.estimator, partial):
            m.estimator = partial(ede, t=t)


def make_conv(
    *, weights: str, zero: int = 1, recurrent: str = "none", lam: float = 1e-4, tau: float = 0.6, u_init: float = 0.2,
    const: float = 0.02, scale_grad: str = "released",
) -> Callable[..., nn.Conv2d]:  # fmt: skip
    """Builder (in, out, kernel_size, **geometry) -> convolution without bias. weights: real | xnor (ReActNet) | bilinear
    (RBONN; the other options are its) | irnet. ValueError names a wrong value, also of an option that is not used."""
    check_options(recurrent=recurrent, lam=lam, tau=tau, u_init=u_init, const=const, scale_grad=scale_grad)
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}, allowed: {', '.join(WEIGHTS)}")
    if weights == "bilinear":
        return partial(
            RBConv2d, recurrent=recurrent, lam=lam, tau=tau, u_init=u_init, const=const, zero=zero, scale_grad=scale_grad,
            bias=False,
        )  # fmt: skip
    if recurrent != "none":
        raise ValueError(f"recurrent={recurrent!r} with weights={weights!r}: only weights=bilinear has a recurrence")
    if weights == "real":
        return partial(nn.Conv2d, bias=False)
    kind = XNORConv2d if weights == "xnor" else IRConv2d

    def conv(*args: int, **geometry: int) -> nn.Conv2d:
        layer = kind(*args, **geometry, bias=False)  # type: ignore[arg-type]
        layer.zero = zero
        return layer

    return conv


def make_sign(*, activations: str, zero: int = 1) -> Callable[[int], nn.Module]:
    """Builder channels -> what stands before a binary convolution: real (nothing), binary (RSign), irnet (RSign with EDE)."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r}, allowed: {', '.join(ACTIVATIONS)}")
    if activations == "real":
        return lambda channels: nn.Identity()
    return partial(RSign, estimator=partial(ede, t=0.1) if activations == "irnet" else "approx", zero=zero)


def latent_sparsity(model: nn.Module, *, share: float = 0.1) -> float | None:
    """Share of latent weights with |w| < `share` x median|w| of their layer, over all binary layers; None without any."""
    layers = [m.weight.detach() for m in binary_layers(model).values()]
    if not layers:
        return None
    small = sum(int((w.abs() < share * w.abs().median()).sum()) for w in layers)
    return small / sum(w.numel() for w in layers)
