"""A quantised student from a real-valued DETR: weights, activations and attention operands on learned grids (Eq. 1-3).

Names and shapes of the real-valued parameters stay, so an official checkpoint loads; what a student has besides are
quantisers, RPReLU and PReLU of the backbone, biases of its convolutions, and gamma, beta of DA.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common.quant.binary import RPReLU
from common.quant.lsq import LSQQuantizer, calibrate
from q_detr.detr import DETR, Attention, ResNetBody, TinyBody
from q_detr.distribution_alignment import DistributionAlignment

PARTS = ("backbone", "encoder", "decoder_attention", "decoder_mlp")
QUANTIZERS = {"lsqplus": ("real", "zero"), "lsq": ("none", "zero"), "released": ("integer", "official")}
ALIGN = ("none", "co_attn", "self_attn", "both")


class QuantLinear(nn.Linear):
    """Eq. 2: the input is quantised by `act_quant`, the weight per output by `weight_quant`."""

    act_quant: nn.Module
    weight_quant: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act_quant(x), self.weight_quant(self.weight), self.bias)


class QuantConv2d(nn.Conv2d):
    """The same for a convolution."""

    act_quant: nn.Module
    weight_quant: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.act_quant(x), self.weight_quant(self.weight), self.bias)


class PreActivationBlock(nn.Module):
    """A residual block of torchvision with RPReLU in front of the first convolution, behind every norm and behind the sum.

    The shortcut starts before the first RPReLU, and the convolutions have a bias. With slope 0, shifts 0 and bias 0 it is
    torchvision's block, because the input of a block is not negative. Parameter names are torchvision's."""

    def __init__(self, block: BasicBlock | Bottleneck, *, slope: float):
        super().__init__()
        self.depth = 3 if isinstance(block, Bottleneck) else 2
        self.act0 = RPReLU(block.conv1.in_channels, slope=slope)
        for i in range(1, self.depth + 1):
            conv = getattr(block, f"conv{i}")
            if conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", getattr(block, f"bn{i}"))
            setattr(self, f"act{i}", RPReLU(conv.out_channels, slope=slope))
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.act0(x)
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = getattr(self, f"act{i}")(out)
        shortcut = x if self.downsample is None else self.downsample(x)
        return getattr(self, f"act{self.depth}")(out + shortcut)


@dataclass(frozen=True)
class _Maker:
    """Builds the quantisers of one choice of options; `nn.Identity` for 32 bits."""

    bits: int
    attention_bits: int
    quantizer: str
    zp_init: str | None
    weight_init: str
    act_granularity: str

    def weight(self, outputs: int, bits: int | None = None) -> nn.Module:
        bits = self.bits if bits is None else bits
        init: Any = {"global": "official", "per_channel": "per_group"}[self.weight_init]
        return nn.Identity() if bits == 32 else LSQQuantizer(bits, "weight", axis=0, groups=outputs, init=init)

    def act(self, axis: int, groups: int, bits: int | None = None, *, per_tensor_allowed: bool = True) -> nn.Module:
        bits = self.bits if bits is None else bits
        if bits == 32:
            return nn.Identity()
        form, start = QUANTIZERS[self.quantizer]
        options: dict[str, Any] = {"zero_point": form, "zp_init": self.zp_init or start}
        if self.act_granularity == "per_channel" or not per_tensor_allowed:
            options |= {"axis": axis, "groups": groups}
        return LSQQuantizer(bits, "activation", **options)

    def heads(self, heads: int) -> nn.Module:
        """A step per head of q, k or v, (B, heads, tokens, d)."""
        return self.act(1, heads, self.attention_bits, per_tensor_allowed=False)

    def linear(self, layer: nn.Linear, *, inputs: bool = True) -> QuantLinear:
        layer.__class__ = QuantLinear  # keeps the parameters and their names
        layer.act_quant = self.act(-1, layer.in_features) if inputs else nn.Identity()
        layer.weight_quant = self.weight(layer.out_features)
        assert isinstance(layer, QuantLinear)
        return layer

    def conv(self, conv: nn.Conv2d, bits: int | None = None) -> None:
        conv.__class__ = QuantConv2d
        conv.act_quant = self.act(1, conv.in_channels, bits)
        conv.weight_quant = self.weight(conv.out_channels, bits)

    def attention(self, attention: Attention, *, inputs: bool) -> None:
        attention.in_proj_quant = self.weight(3 * attention.dim)  # pyright: ignore[reportAttributeAccessIssue]
        names = {f"input_{x}": self.act(-1, attention.dim) for x in "qkv"} if inputs else {}
        names |= {f"quant_{x}": self.heads(attention.heads) for x in "qkv"}
        if self.attention_bits < 32:
            # From the largest value: the mean of a softmax over 850 keys would clip all of its peaks.
            softmax: dict[str, Any] = {"axis": 1, "groups": attention.heads, "signed": False, "init": "max"}
            names["quant_a"] = LSQQuantizer(self.attention_bits, "activation", **softmax)
        for name, module in names.items():
            setattr(attention, name, module)
        self.linear(attention.out_proj, inputs=inputs)


def _check_widths(**widths: int) -> None:
    for name, width in widths.items():
        if width not in (*range(2, 9), 32):
            raise ValueError(f"{name}={width}, allowed: 2 to 8, or 32 for real-valued")


def quantize_detr(
    model: DETR, *, bits: int = 4, attention_bits: int = 8, quantizer: str = "lsqplus", parts: Sequence[str] = PARTS,
    da: str = "none", backbone_act: str = "rprelu", slope: float = 0.0, stem_bits: int = 8, quantize_downsample: bool = True,
    quantize_proj_inputs: bool = True, act_granularity: str = "per_channel", weight_init: str = "global",
    zp_init: str | None = None,
) -> DETR:  # fmt: skip
    """A copy of `model` with quantisers; set their steps with `calibrate_student`. Parameters keep names and values.

    bits: weights and activations, 2..8, or 32: no quantiser at all, whatever the other widths. attention_bits: q, k, v and the
        softmax map, a step per head.
    stem_bits: weight and input of the first convolution.
    quantizer: "lsqplus", a learned real offset (the paper's baseline); "lsq", none; "released", a rounded zero point. Inputs
        that are not negative get unsigned codes in all three.
    parts: what is quantised; input_proj, heads, norms and embeddings never are.
    da: where `DistributionAlignment` acts: co_attn is the paper's place, self_attn that of the released code.
    backbone_act: "rprelu" rebuilds the residual blocks of a ResNet; slope 0 starts as ReLU. Only with parts "backbone".
    quantize_downsample=False, quantize_proj_inputs=False: the released code.
    act_granularity: per_channel | per_tensor (which integers can follow). weight_init: "global", one mean for all outputs
        (released), or "per_channel". zp_init: start of the offset, zero | lsqplus | official; None: by quantizer.
    ValueError names a value out of range."""
    _check_widths(bits=bits, attention_bits=attention_bits, stem_bits=stem_bits)
    for name, value, allowed in (
        ("quantizer", quantizer, tuple(QUANTIZERS)), ("da", da, ALIGN), ("backbone_act", backbone_act, ("relu", "rprelu")),
        ("act_granularity", act_granularity, ("per_channel", "per_tensor")),
        ("weight_init", weight_init, ("global", "per_channel")),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name}={value!r}, allowed: {', '.join(allowed)}")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts={unknown}, allowed: {', '.join(PARTS)}")
    model = copy.deepcopy(model)
    attention_bits, stem_bits = (32 if bits == 32 else b for b in (attention_bits, stem_bits))
    make = _Maker(bits, attention_bits, quantizer, zp_init, weight_init, act_granularity)
    if "backbone" in parts:
        body: Any = model.backbone[0].body
        if backbone_act == "rprelu":
            _use_rprelu(body, slope)
        for name, conv in [(n, m) for n, m in body.named_modules() if isinstance(m, nn.Conv2d)]:
            if name in ("conv1", "layers.0"):
                make.conv(conv, stem_bits)
            elif quantize_downsample or "downsample" not in name:
                make.conv(conv)
    encoder: Any = model.transformer["encoder"].layers
    decoder: Any = model.transformer["decoder"].layers
    for layer in encoder if "encoder" in parts else ():
        make.attention(layer.self_attn, inputs=quantize_proj_inputs)
        make.linear(layer.linear1)
        make.linear(layer.linear2)
    for layer in decoder:
        for name, attention in (("self_attn", layer.self_attn), ("co_attn", layer.multihead_attn)):
            if "decoder_attention" in parts:
                make.attention(attention, inputs=quantize_proj_inputs)
            if da in (name, "both"):
                attention.align = DistributionAlignment(attention.dim // attention.heads)
        if layer is decoder[0] and not getattr(model, "learned_content", False):
            layer.self_attn.input_v = nn.Identity()  # its input is exactly 0, which has no step
        if "decoder_mlp" in parts:
            make.linear(layer.linear1)
            make.linear(layer.linear2)
    return model


def _use_rprelu(body: ResNetBody | TinyBody, slope: float) -> None:
    if isinstance(body, TinyBody):
        body.acts = nn.ModuleList(RPReLU(c.out_channels, slope=slope) for c in body.layers)  # type: ignore[union-attr]
        return
    body.relu = nn.PReLU(body.conv1.out_channels, init=slope)
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        for name, block in list(stage.named_children()):
            setattr(stage, name, PreActivationBlock(block, slope=slope))  # type: ignore[arg-type]


@torch.no_grad()
def calibrate_student(student: DETR, images: Tensor, mask: Tensor, *, percentile: float | None = None) -> None:
    """Set the steps (and offsets) that are not set yet from one batch, without dropout, in the order of the forward pass, so
    that a quantiser sees quantised inputs. Nothing to do at 32 bits.

    percentile: set all of them anew, clipping there instead of by the mean, from real-valued inputs (post-training
    quantisation, e.g. 99.99)."""
    quantizers = [m for m in student.modules() if isinstance(m, LSQQuantizer)]
    if not quantizers:
        return
    training = student.training
    student.eval()
    if percentile is not None:
        with calibrate(student, percentile=percentile):
            student(images, mask)
    else:
        for q in quantizers:
            q.train()
        student(images, mask)
    student.train(training)


@torch.no_grad()
def calibrate_alignment(student: DETR, source: DETR, images: Tensor, mask: Tensor) -> None:
    """gamma of every DA module = the root mean square, over queries and heads of a batch, of the standard deviation of q in
    `source`, the real-valued network from which the student starts. DA then keeps the mean size of the attention logits."""
    aligned = [(n, m) for n, m in student.named_modules() if isinstance(m, DistributionAlignment)]
    pairs = [(m, source.get_submodule(name)) for name, m in aligned]
    seen: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0])) for _, m in pairs]
    training = source.training
    source.eval()(images, mask)
    source.train(training)
    for hook in hooks:
        hook.remove()
    for own, other in pairs:
        own.gamma.fill_(seen[other].var(-1, correction=1).mean().sqrt().item())
