"""Turn a timm ViT, DeiT or Swin into its fully quantised form: every matrix product on low-bit operands.

    student = quantize_vit(timm.create_model("deit_small_patch16_224", pretrained=True), bits=4)

Quantised: qkv, proj, fc1, fc2 (and Swin's patch merging), weights and inputs; q, k, v and the attention map; at 8 bits the
patch embedding and the classifiers. Real-valued: LayerNorm, softmax, GELU, residuals, biases, embeddings, rectification.

Integer form (preset "deployable", evaluation): with centred codes c = clip(round(x / a), qn - z, qp - z), all integers,
    y_o = a_x a_{w,o} sum_i c^x_i c^w_{o,i} + b_o,      scores = a_q a_k sum_d c^q_d c^k_d / sqrt(D)
so a runtime with integer products and these scales gives these numbers. `official` has one input step per channel,
along the axis of the sum: its steps cannot leave the integer product, and it is evaluated as fake quantisation.
"""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, WindowAttention
from timm.models.vision_transformer import Attention  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from common.quant.integer import LARGEST, centred_codes, exact_linear, reach, scaled, weight_codes
from common.quant.integer_onnx import Operand, integer_product
from common.quant.lsq import MIN_STEP, LSQQuantizer
from q_vit.information_rectification import Form, InformationRectification, Stats

Preset = Literal["official", "deployable"]
Parts = Literal["all", "mlp", "mhsa_weights", "mhsa_acts"]
PARTS = ("all", "mlp", "mhsa_weights", "mhsa_acts")
INITS = ("official", "per_group", "max")
BITS = (2, 3, 4, 5, 6, 7, 8, 32)
# The rules of the released code, and those of LSQ for steps that factor out of an integer product.
PRESETS: dict[str, dict[str, Any]] = {
    "official": {"init": "official", "zp_init": "official", "grad_scale": "official"},
    "deployable": {"init": "per_group", "zp_init": "zero", "grad_scale": "per_group"},
}


def quantize_vit(
    model: nn.Module,
    *,
    bits: int = 4,
    irm: bool = True,
    preset: Preset = "deployable",
    edge_bits: int = 8,
    parts: Parts = "all",
    gelu_clip: float | None = 10.0,
    irm_form: Form = "layernorm",
    irm_stats: Stats = "token",
    symmetric: bool = False,
    init: str | None = None,
    weight_init: str | None = None,
    zp_init: str | None = None,
    grad_scale: str | None = None,
) -> nn.Module:
    """A quantised copy of `model` (any timm model of `Attention` or Swin `WindowAttention` blocks); weights are kept.

    bits: 2..8 of weights and activations alike, or 32 for none. irm: rectify q and k (q_norm, k_norm of a model are kept).
    preset: "deployable" (one input step per layer, integer evaluation) or "official" (one per input channel).
    edge_bits: of patch embedding and classifiers. parts: quantise one part only, the rest and the edges stay real:
        mlp (weights and inputs of fc1, fc2), mhsa_weights (weights of qkv, proj), mhsa_acts (q, k, v, attention map).
    gelu_clip: the input of fc2 is clipped to +-this (released code), None for no clip. symmetric: no zero points.
    init, zp_init, grad_scale: see LSQQuantizer; None takes the preset's. init counts for activations and, where weight_init is
        None, for weights as well: weight_init="per_group" with init="official" starts every row of a weight from its own
        step and activations as released.
    bits=32 without rectification returns a copy of the float network as it is, bit for bit.
    Calibrate before evaluation: one forward pass in training mode, or `common.quant.lsq.calibrate`.
    Raises ValueError for other values, or a model in which nothing can be quantised."""
    _check(bits, edge_bits, parts, gelu_clip)
    rules, rows = _rules(preset, symmetric, weight_init, init=init, zp_init=zp_init, grad_scale=grad_scale)
    model = copy.deepcopy(model)
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, Attention | WindowAttention)]
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no timm Attention or WindowAttention: only ViT, DeiT and Swin")
    if bits == 32 and not irm:
        return model
    on = {part: bits < 32 and parts in ("all", part) for part in ("mlp", "mhsa_weights", "mhsa_acts")}
    whole = parts == "all"
    for m in attentions:
        _add_rectification(m, irm, irm_form, irm_stats)
        _quantize_attention(m, bits if on["mhsa_acts"] else 32, preset, rules)
        if on["mhsa_weights"]:
            for layer in (m.qkv, m.proj):
                _quantize_layer(layer, bits, preset, rules, rows, inputs=whole)
    blocks: list[Any] = list(model.modules())
    for m in blocks:
        if hasattr(m, "fc1") and hasattr(m, "fc2") and on["mlp"]:
            _quantize_layer(m.fc1, bits, preset, rules, rows)
            _quantize_layer(m.fc2, bits, preset, rules, rows)
            if gelu_clip is not None:
                m.act = nn.Sequential(m.act, nn.Hardtanh(-gelu_clip, gelu_clip))
        if isinstance(m, PatchMerging) and bits < 32 and whole:
            _quantize_layer(m.reduction, bits, preset, rules, rows)
    if bits < 32 and edge_bits < 32 and whole:
        for layer in edge_layers(model):
            _quantize_layer(layer, edge_bits, preset, rules, rows)
    return model


def _check(bits: int, edge_bits: int, parts: str, gelu_clip: float | None) -> None:
    if bits not in BITS or edge_bits not in BITS:
        raise ValueError(f"bits={bits}, edge_bits={edge_bits}, allowed: 2..8, or 32 for no quantisation")
    if parts not in PARTS:
        raise ValueError(f"parts={parts!r}, allowed: {', '.join(PARTS)}")
    if gelu_clip is not None and gelu_clip <= 0:
        raise ValueError(f"gelu_clip={gelu_clip}, allowed: > 0 or None")


def _rules(
    preset: str, symmetric: bool, weight_init: str | None, **given: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keywords of the quantisers of activations, of weights): the preset's, with those of `given` that are not None."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}, allowed: {', '.join(PRESETS)}")
    for name, value in (("init", given["init"]), ("weight_init", weight_init)):
        if value not in (None, *INITS):
            raise ValueError(f"{name}={value!r}, allowed: {', '.join(INITS)}, or null for the preset's")
    rules: dict[str, Any] = PRESETS[preset] | {key: value for key, value in given.items() if value is not None}
    rules |= {"zero_point": "none" if symmetric else "integer"}
    return rules, {"init": weight_init or rules["init"], "grad_scale": rules["grad_scale"]}


def edge_layers(model: nn.Module) -> list[nn.Module]:
    """The patch embedding's projection and the classifiers of a timm model."""
    heads = model.get_classifier()  # pyright: ignore[reportCallIssue]
    heads = heads if isinstance(heads, tuple) else (heads,)
    found = [model.patch_embed.proj, *heads]  # pyright: ignore[reportAttributeAccessIssue]
    return [layer for layer in found if isinstance(layer, nn.Linear | nn.Conv2d)]


def _quantize_attention(m: Any, bits: int, preset: str, rules: dict[str, Any]) -> None:
    """Give an attention layer its quantisers of q, k, v and the attention map, one step per head, in place; 32 bits: none."""
    if getattr(m, "gate", None) is not None:
        raise ValueError("gated attention is not supported")
    m.__class__ = QuantAttention if isinstance(m, Attention) else QuantWindowAttention  # pyright: ignore
    for name in ("q", "k", "v", "p"):
        quantizer = nn.Identity()
        if bits < 32:
            quantizer = LSQQuantizer(bits, "activation", axis=1, groups=m.num_heads, **rules)
        setattr(m, f"{name}_quantizer", quantizer)
    m.integer = preset == "deployable"  # pyright: ignore


def _add_rectification(m: Any, irm: bool, form: Form, stats: Stats) -> None:
    for name in ("q_norm", "k_norm"):
        if irm and isinstance(getattr(m, name, nn.Identity()), nn.Identity):
            head_dim = m.qkv.out_features // (3 * m.num_heads)  # pyright: ignore
            setattr(m, name, InformationRectification(head_dim, m.num_heads, form=form, stats=stats))  # pyright: ignore
        elif not hasattr(m, name):
            setattr(m, name, nn.Identity())


def _quantize_layer(
    layer: Any, bits: int, preset: str, rules: dict[str, Any], rows: dict[str, Any], *, inputs: bool = True
) -> None:
    """Give a Linear or Conv2d its quantisers, in place: its input by `rules`, its weight by `rows`. The weight keeps its name,
    so float state dicts still load."""
    linear = isinstance(layer, nn.Linear)
    features = layer.in_features if linear else layer.in_channels
    outputs = layer.out_features if linear else layer.out_channels
    layer.__class__ = QuantLinear if linear else QuantConv2d
    layer.weight_quantizer = LSQQuantizer(bits, "weight", axis=0, groups=outputs, **rows)
    layer.input_quantizer = nn.Identity()
    if inputs:
        where = {"axis": -1 if linear else 1, "groups": features} if preset == "official" else {}
        layer.input_quantizer = LSQQuantizer(bits, "activation", **where, **rules)
    layer.integer = preset == "deployable" and inputs


@torch.no_grad()
def keep_steps_positive(model: nn.Module) -> None:
    """Project every step back to >= 1e-5; call it after an optimiser step. The released code has no such guard, and an
    optimiser of Adam's kind moves a step by the learning rate however small its gradient is."""
    for m in model.modules():
        if isinstance(m, LSQQuantizer):
            m.step.clamp_(min=MIN_STEP)


# ------------------------------------------------------------------------------------------------------ integer codes
def _integers(module: nn.Module, *quantizers: nn.Module) -> bool:
    """Whether to compute on codes: in evaluation, except while the quantisers collect statistics."""
    return not module.training and all(isinstance(q, LSQQuantizer) and q._statistics is None for q in quantizers)


class QuantLinear(nn.Linear):
    """A Linear with `weight_quantizer` (a step per output) and `input_quantizer`; made by `quantize_vit`."""

    weight_quantizer: LSQQuantizer
    input_quantizer: LSQQuantizer | nn.Identity
    integer: bool

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.integer and _integers(self, self.input_quantizer):
            return self._on_codes(x)
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    def _on_codes(self, x: Tensor) -> Tensor:
        a, w = self.input_quantizer, self.weight_quantizer
        assert isinstance(a, LSQQuantizer)
        with torch.autocast(x.device.type, enabled=False):
            y = exact_linear(centred_codes(a, x), weight_codes(self, w, self.weight), reach(a) * reach(w))
            return scaled(y, a.effective_step() * w.effective_step(), self.bias).to(x.dtype)


class QuantConv2d(nn.Conv2d):
    """A Conv2d with `weight_quantizer` and `input_quantizer`, see `QuantLinear`."""

    weight_quantizer: LSQQuantizer
    input_quantizer: LSQQuantizer | nn.Identity
    integer: bool

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.integer and _integers(self, self.input_quantizer):
            a, w = self.input_quantizer, self.weight_quantizer
            assert isinstance(a, LSQQuantizer)
            with torch.autocast(x.device.type, enabled=False):
                codes, weight = centred_codes(a, x), weight_codes(self, w, self.weight)
                if self.weight[0].numel() * reach(a) * reach(w) > LARGEST:
                    codes, weight = codes.double(), weight.double()
                y = self._conv_forward(codes, weight, None).float()
                scale = (a.effective_step() * w.effective_step()).view(-1, 1, 1)
                return scaled(y, scale, None if self.bias is None else self.bias.view(-1, 1, 1)).to(x.dtype)
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


def head_product(module: Any, a: Tensor, b: Tensor, qa: nn.Module, qb: nn.Module, factor: float = 1.0) -> Tensor:
    """factor Q(a) Q(b)^T per head; a (B, H, M, K), b (B, H, N, K). On codes the factor is part of the scale of a head."""
    if isinstance(qa, Operand) and isinstance(qb, Operand):
        return integer_product(qa(a), qb(b).mT, qa, qb, (qa.step * qb.step * factor).view(-1, 1, 1))
    if not (module.integer and _integers(module, qa, qb)):
        found = qa(a) @ qb(b).mT
        return found if factor == 1 else found * factor
    assert isinstance(qa, LSQQuantizer) and isinstance(qb, LSQQuantizer)
    with torch.autocast(a.device.type, enabled=False):
        product = exact_linear(centred_codes(qa, a), centred_codes(qb, b), reach(qa) * reach(qb))
        scale = qa.effective_step() * qb.effective_step() * factor
        return scaled(product, scale.view(-1, 1, 1), None).to(a.dtype)


def _attend(m: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of x (B, N, C) with quantised operands: (B, N, H * D) before proj."""
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = m.q_norm(q), m.k_norm(k)
    scores = head_product(m, q, k, m.q_quantizer, m.k_quantizer, m.scale)
    if bias is not None:
        scores = scores + bias
    attention = m.attn_drop(scores.softmax(dim=-1))
    return head_product(m, attention, v.mT, m.p_quantizer, m.v_quantizer).transpose(1, 2).reshape(b, n, -1)


class QuantAttention(Attention):
    """timm's Attention with quantisers on q, k, v and the attention map, after `q_norm`, `k_norm`; never fused."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if is_causal or (attn_mask is not None and attn_mask.dtype == torch.bool):
            raise ValueError("quantised attention takes an additive attn_mask or none")
        out = _attend(self, x, attn_mask)
        out = self.norm(out) if hasattr(self, "norm") else out
        return self.proj_drop(self.proj(out))


class QuantWindowAttention(WindowAttention):
    """Swin's WindowAttention likewise; relative position bias and shift mask are added in float."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self._get_rel_pos_bias()
        if mask is not None:  # (windows, N, N), the same for every image
            bias = (bias + mask.unsqueeze(1)).repeat(len(x) // len(mask), 1, 1, 1)
        return self.proj_drop(self.proj(_attend(self, x, bias)))


class Tapped(nn.Module):
    """`model` whose forward also returns what distribution guided distillation compares.

    forward(images) -> (output of the model, [(q, k), ...] per attention layer, each (B, H, N, D), Swin: (windows, H, n, D)).
    at: "raw" (after the head split), "pre_quant" (after rectification) or "post_quant"."""

    def __init__(self, model: nn.Module, at: Literal["raw", "pre_quant", "post_quant"] = "pre_quant"):
        super().__init__()
        self.model, self._found, self._handles = model, {}, []
        self.training = model.training
        attentions = [m for m in model.modules() if isinstance(m, Attention | WindowAttention)]
        names = {"raw": None, "pre_quant": "norm", "post_quant": "quantizer"}
        if at not in names:
            raise ValueError(f"dgd student_tap={at!r}, allowed: {', '.join(names)}")
        if at != "raw" and not all(isinstance(m, QuantAttention | QuantWindowAttention) for m in attentions):
            raise ValueError(f"student_tap={at!r} needs a quantised model")
        self.layers = len(attentions)
        for i, m in enumerate(attentions):
            if at == "raw":
                watched = {"qk": m.qkv}
            else:
                watched = {which: getattr(m, f"{which}_{names[at]}") for which in "qk"}
            for which, module in watched.items():
                self._handles.append(module.register_forward_hook(self._hook(i, which, m.num_heads)))

    def _hook(self, layer: int, which: str, heads: int):
        def collect(_: nn.Module, __: Any, output: Tensor) -> None:
            if which != "qk":
                self._found[layer, which] = output
                return
            b, n, _c = output.shape
            q, k, _v = output.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            self._found[layer, "q"], self._found[layer, "k"] = q, k

        return collect

    def remove(self) -> None:
        """Take the hooks off `model`."""
        for handle in self._handles:
            handle.remove()

    def forward(self, images: Tensor) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        self._found.clear()
        output = self.model(images)
        taps = [(self._found[i, "q"], self._found[i, "k"]) for i in range(self.layers)]
        self._found.clear()
        return output, taps
