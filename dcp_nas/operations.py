"""The bodies of the operations, as in the released training code, with real-valued or 1-bit convolutions.

In the published networks only the 1x1 convolutions inside `DilConv` and `SepConv` see binary activations; depth-wise,
preprocessing and factorized-reduction convolutions have 1-bit weights and real-valued inputs. `strict_1bit` binarises those
inputs, too.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.binary import binarize, binary_sign
from dcp_nas.ranks import BatchStatistics, batch_normed

WEIGHTS = ("real", "beta", "m")
ACTIVATIONS = ("real", "binary")
EPS = 1e-3  # of the norms inside operations; 1e-5 of those at the entrance of a cell


# ----------------------------------------------------------------------------------------------- 1-bit convolutions
class BinaryConv2d(nn.Conv2d):
    """A convolution with 1-bit weights, without bias. act_bits: 1 or 32, what its input is (for the counts)."""

    act_bits = 32

    def scale(self) -> Tensor:
        """The non-negative scale of each output channel, (out, 1, 1, 1)."""
        raise NotImplementedError

    def binary_weight(self) -> Tensor:
        raise NotImplementedError

    def reconstruction(self) -> Tensor:
        """||w - scale o sign(w)||^2 of this layer (a sum), with sign(w) as a constant."""
        return (self.weight - self.scale() * binary_sign(self.weight)).square().sum()

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.binary_weight().to(x.dtype), None)


class BetaConv2d(BinaryConv2d):
    """beta o sign(w) of the search: dL/dw = dL/db 1{|w| <= 1} with b = sign(w), the true gradient for beta, beta >= 0 by abs."""

    def __init__(self, *args: int, **geometry: int):
        super().__init__(*args, **geometry, bias=False)  # type: ignore[arg-type]
        self.beta = nn.Parameter(self.weight.detach().abs().mean(dim=(1, 2, 3), keepdim=True))

    def scale(self) -> Tensor:
        return self.beta.abs()

    def binary_weight(self) -> Tensor:
        return wide_weight([self])


class MConv2d(BinaryConv2d):
    """0.02 |m_c| sign(w) of the released second training step, m ~ N(0, 1) per output channel.

    Its backward rule, with G = dL/dW_b: dL/dw = G |m| and dL/d|m| = sum G w (published; not the derivative of the value). The
    terms 1e-4 R of that rule are those of `reconstruction` with the weight 1e-4 / 2, which the train loop adds to the loss.
    official_m_grad: the published code took |m| inside the rule and forgot its derivative sign(m)."""

    CONST = 0.02

    def __init__(self, *args: int, official_m_grad: bool = False, **geometry: int):
        super().__init__(*args, **geometry, bias=False)  # type: ignore[arg-type]
        self.m = nn.Parameter(torch.randn(self.out_channels, 1, 1, 1))
        self.official_m_grad = official_m_grad

    def magnitude(self) -> Tensor:
        return self.m + (self.m.abs() - self.m).detach() if self.official_m_grad else self.m.abs()

    def scale(self) -> Tensor:
        return self.CONST * self.magnitude()

    def binary_weight(self) -> Tensor:
        surrogate = self.weight * self.magnitude()
        return (self.scale() * binary_sign(self.weight)).detach() + (surrogate - surrogate.detach())


@dataclass(frozen=True)
class Bits:
    """Which convolutions and signs a network is made of. ValueError for a value that is not in WEIGHTS, ACTIVATIONS."""

    weights: str = "real"
    activations: str = "real"
    strict_1bit: bool = False
    official_m_grad: bool = False
    affine: bool = True  # of the norms inside cells: False in the search

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS or self.activations not in ACTIVATIONS:
            raise ValueError(
                f"weights={self.weights!r}, activations={self.activations!r}, allowed: {', '.join(WEIGHTS)} and "
                f"{', '.join(ACTIVATIONS)}"
            )

    def is_binary(self, *, pointwise: bool) -> bool:
        """Whether the input of a convolution is binary. pointwise: the 1x1 convolution inside Dil/Sep."""
        return self.activations == "binary" and (pointwise or self.strict_1bit)

    def sign(self, *, pointwise: bool = False) -> nn.Module:
        return Sign() if self.is_binary(pointwise=pointwise) else nn.Identity()

    def conv(self, c_in: int, c_out: int, k: int, *, pointwise: bool = False, **geometry: int) -> nn.Conv2d:
        if self.weights == "real":
            return nn.Conv2d(c_in, c_out, k, bias=False, **geometry)  # type: ignore[arg-type]
        if self.weights == "beta":
            layer: BinaryConv2d = BetaConv2d(c_in, c_out, k, **geometry)
        else:
            layer = MConv2d(c_in, c_out, k, official_m_grad=self.official_m_grad, **geometry)
        layer.act_bits = 1 if self.is_binary(pointwise=pointwise) else 32
        return layer

    def norm(self, channels: int, *, eps: float = EPS) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, eps=eps) if self.affine else BatchStatistics(channels, eps=eps)


class Sign(nn.Module):
    """sign(x) in the forward pass, ApproxSign's derivative in every other."""

    def forward(self, x: Tensor) -> Tensor:
        return binarize(x, estimator="approx")


# ------------------------------------------------------------------------------------------------------- operations
class Zero(nn.Module):
    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Noise(nn.Module):
    """N(0, 1) in place of x: of its position in the batch, so that a forward pass leaves no trace, and of the module, so that no
    two networks share it."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride, self.seed = stride, int(torch.randint(2**62, (), device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        like = x[:, :, :: self.stride, :: self.stride]
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(self.seed)).to(like)


class Preprocess(nn.Sequential):
    """BN - conv1x1 - BN - PReLU."""

    def __init__(self, c_in: int, c_out: int, bits: Bits):
        super().__init__(
            bits.norm(c_in, eps=1e-5), bits.sign(), bits.conv(c_in, c_out, 1), bits.norm(c_out), nn.PReLU(c_out)
        )


class FactorizedReduce(nn.Module):
    """BN - two 1x1 convolutions of stride 2, on even and on odd pixels - BN - PReLU. Needs an even height, width and C."""

    def __init__(self, c_in: int, c_out: int, bits: Bits):
        super().__init__()
        if c_out % 2:
            raise ValueError(f"{c_out} output channels: a factorized reduction makes two halves, so C must be even")
        self.norm_in, self.sign = bits.norm(c_in, eps=1e-5), bits.sign()
        self.even, self.odd = (bits.conv(c_in, c_out // 2, 1, stride=2) for _ in range(2))
        self.norm, self.act = bits.norm(c_out), nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            raise ValueError(
                f"a map of {x.shape[-2]}x{x.shape[-1]} cannot be halved by a factorized reduction: use images whose sides "
                "are multiples of the network's stride"
            )
        x = self.sign(self.norm_in(x))
        return self.act(self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1)))


class DilConv(nn.Module):
    """y = BN - depth-wise conv - BN - PReLU - sign - conv1x1 - BN; PReLU(y + x), without x at stride 2."""

    def __init__(self, channels: int, k: int, stride: int, padding: int, dilation: int, bits: Bits):
        super().__init__()
        self.residual = stride == 1
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels}
        self.body = nn.Sequential(
            bits.norm(channels), bits.sign(), bits.conv(channels, channels, k, **geometry), bits.norm(channels),  # type: ignore[arg-type]
            nn.PReLU(channels), bits.sign(pointwise=True), bits.conv(channels, channels, 1, pointwise=True), bits.norm(channels),
        )  # fmt: skip
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.act(y + x if self.residual else y)


def sep_conv(channels: int, k: int, stride: int, bits: Bits) -> nn.Sequential:
    """The depth-wise separable convolution, applied twice."""
    return nn.Sequential(
        DilConv(channels, k, stride, k // 2, 1, bits), DilConv(channels, k, 1, k // 2, 1, bits)
    )  # fmt: skip


def make_operation(name: str, channels: int, stride: int, bits: Bits) -> nn.Module:
    """One of `search_space.OPERATIONS`, or noise: (B, C, H, W) -> (B, C, H / stride, W / stride). ValueError for another name."""
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, bits)
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), bits.norm(channels))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), bits.norm(channels))
    if name in ("sep_conv_3x3", "sep_conv_5x5"):
        return sep_conv(channels, int(name[-1]), stride, bits)
    if name in ("dil_conv_3x3", "dil_conv_5x5"):
        k = int(name[-1])
        return DilConv(channels, k, stride, k - 1, 2, bits)
    if name == "noise":
        return Noise(stride)
    raise ValueError(f"operation {name!r} does not exist")


# ------------------------------------------------------------------------------------- several operations in one pass
def wide_weight(layers: Sequence[nn.Conv2d]) -> Tensor:
    """The weights of convolutions of one shape, stacked along the output channels: real, or beta o sign(w)."""
    weight = torch.cat([m.weight for m in layers])
    if not isinstance(layers[0], BetaConv2d):
        return weight
    return torch.cat([m.scale() for m in layers]) * binarize(weight, estimator="ste")  # type: ignore[operator]


def wide_act(x: Tensor, acts: Sequence[nn.Module]) -> Tensor:
    """Activations side by side: PReLU with the weights of each, or one without parameters."""
    return F.prelu(x, torch.cat([a.weight for a in acts])) if isinstance(acts[0], nn.PReLU) else acts[0](x)  # type: ignore[misc]


def wide_dil_conv(x: Tensor, convs: Sequence[DilConv], *, shared: bool) -> Tensor:
    """The outputs of n `DilConv` without parameters in their norms, side by side: (B, n C, H, W).

    x: (B, C, H, W) that all of them see (shared), or (B, n C, H, W), C channels for each. Small maps are bound by the number
    of kernels, not by arithmetic: one pass over n C channels costs little more than one over C. Those of one kernel
    size and dilation must stand together; the stride is common to all."""
    body, n = convs[0].body, len(convs)
    c = convs[0].body[2].in_channels
    h, parts, start = body[1](batch_normed(x, eps=body[0].eps)), [], 0  # type: ignore[arg-type]
    for _, group in itertools.groupby((m.body[2] for m in convs), key=lambda m: (m.kernel_size, m.dilation)):
        layers = list(group)
        m, layer = len(layers), layers[0]
        own = h.repeat(1, m, 1, 1) if shared else h[:, start * c : (start + m) * c]
        parts.append(
            F.conv2d(own, wide_weight(layers), None, layer.stride, layer.padding, layer.dilation, groups=m * c)
        )
        start += m
    h = wide_act(batch_normed(torch.cat(parts, dim=1), eps=body[3].eps), [m.body[4] for m in convs])  # type: ignore[arg-type]
    h = batch_normed(F.conv2d(body[5](h), wide_weight([m.body[6] for m in convs]), groups=n), eps=body[7].eps)  # type: ignore[arg-type, misc]
    if convs[0].residual:
        h = h + (x.repeat(1, n, 1, 1) if shared else x)
    return wide_act(h, [m.act for m in convs])


def reconstruction_error(model: nn.Module, *, reduction: str = "sum") -> Tensor:
    """L_R = sum over binary convolutions of ||w - scale o sign(w)||^2; `mean`: divided by the number of their weights."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"recon_reduction={reduction!r}, allowed: sum, mean")
    layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
    if not layers:
        return torch.zeros(())
    total = torch.stack([m.reconstruction() for m in layers]).sum()
    return total / sum(m.weight.numel() for m in layers) if reduction == "mean" else total
