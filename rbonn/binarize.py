"""RBONN in any convolutional network, for example of timm or torchvision.

model = torchvision.models.resnet18(num_classes=10)
binarize_(model, recurrent="drelu_fixed")
optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3))
recurrence = Recurrence(model, optimizer)
"""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from common.quant.binary import RSign
from rbonn.recurrent import RBConv2d

# Modules that may stand between a convolution and its norm without changing the scale argument.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)


def binarize_(
    model: nn.Module, skip_first: bool = True, skip_last: bool = True, *, recurrent: str = "drelu_official",
    activations: bool = True, skip: Collection[str] = (), **options: float,
) -> list[str]:  # fmt: skip
    """Replace the convolutions of `model` in place by `RBConv2d` with the same weights; returns their names.

    skip_first, skip_last: leave the first convolution and the last layer with weights (convolution or linear) real.
    activations: also put an RSign before every one of them (its input becomes +-1) and replace ReLU by Hardtanh, whose
    output has two signs. skip: names to leave real. recurrent and options (lam, tau, u_init, const, zero): of `RBConv2d`.
    A norm must follow every convolution: the next module in the order of registration, with as many features as the
    convolution has outputs. The new layers keep geometry, padding mode, bias, dtype, device, mode and what is frozen. ValueError
    naming the layers without a norm, those that are more than nn.Conv2d (a subclass, a parametrization, a hook, which would be
    lost) and those that the model uses under several names; then nothing is changed. Linear layers stay."""
    leaves = [
        (n, m) for n, m in model.named_modules() if not list(m.children()) or isinstance(m, _NormBase | nn.Conv2d)
    ]
    weighted = [(n, m) for n, m in leaves if isinstance(m, nn.Conv2d | nn.Linear)]
    convs = [(n, m) for n, m in weighted if isinstance(m, nn.Conv2d)]
    left = (
        set(skip)
        | ({convs[0][0]} if skip_first and convs else set())
        | ({weighted[-1][0]} if skip_last and weighted else set())
    )
    if unknown := sorted(set(skip) - {n for n, _ in convs}):
        raise ValueError(f"skip={unknown}: no such convolution; there are {[n for n, _ in convs]}")
    chosen = [(n, m) for n, m in convs if n not in left]
    if not chosen:
        raise ValueError(f"no convolution to binarise: {len(convs)} found, {len(left)} left real")
    if special := [f"{n} ({why})" for n, m in chosen if (why := _more_than_a_convolution(n, m, model))]:
        raise ValueError(f"cannot replace {', '.join(special)}: leave them real with skip=[...]")
    position = {n: i for i, (n, _) in enumerate(leaves)}
    bare = [n for n, m in chosen if not _norm_follows(leaves[position[n] + 1 :], m.out_channels)]
    if bare:
        raise ValueError(
            f"no norm follows {', '.join(bare)}: the binary scale is arbitrary and needs one. Leave them real with skip={bare}"
        )
    new = {name: _layer(conv, recurrent, options) for name, conv in chosen}
    for name, layer in new.items():
        parent, _, own = name.rpartition(".")
        replacement = (
            nn.Sequential(RSign(layer.in_channels, zero=layer.zero).to(layer.weight), layer) if activations else layer
        )
        setattr(model.get_submodule(parent), own, replacement)
    if activations:
        for parent in list(model.modules()):
            for own, child in parent.named_children():
                if type(child) in (nn.ReLU, nn.ReLU6):
                    setattr(parent, own, nn.Hardtanh(inplace=False))
    return list(new)


def _norm_follows(rest: list[tuple[str, nn.Module]], channels: int) -> bool:
    following = next((m for _, m in rest if not isinstance(m, _TRANSPARENT)), None)
    features = getattr(following, "num_features", getattr(following, "num_channels", None))
    return isinstance(following, _NormBase | nn.GroupNorm) and features == channels


def _more_than_a_convolution(name: str, conv: nn.Conv2d, model: nn.Module) -> str:
    """Why a new layer would not do what this one does; empty where it would."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__}, not nn.Conv2d"
    if conv._forward_pre_hooks or conv._forward_hooks or conv._backward_hooks:
        return "it has hooks"
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is conv and n != name]
    return f"also used as {', '.join(names)}" if names else ""


def _layer(conv: nn.Conv2d, recurrent: str, options: dict[str, float]) -> RBConv2d:
    layer = RBConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, conv.padding_mode, recurrent=recurrent, **options,  # type: ignore[arg-type]
    ).to(device=conv.weight.device, dtype=conv.weight.dtype).train(conv.training)  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(conv.weight)
        if conv.bias is not None and layer.bias is not None:
            layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
    for p in (layer.weight, layer.scale_factor, *([layer.u] if recurrent != "none" else [])):
        p.requires_grad_(conv.weight.requires_grad)
    return layer


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, u_lr_mult: float = 0.1, decay_4d_biases: bool = False
) -> list[dict]:
    """Optimizer groups of the published code: `u` at u_lr_mult * lr, convolution weights with weight decay, all else without.

    Each group has `lr_mult`, its factor on the learning rate. The scale factors are never decayed. decay_4d_biases: also decay
    the (1, C, 1, 1) shifts, as the published grouping by `ndim == 4` does."""
    groups: dict[str, list] = {"u": [], "weights": [], "others": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        own = name.rpartition(".")[2]
        decayed = p.ndim == 4 and own != "scale_factor" and (own == "weight" or decay_4d_biases)
        groups["u" if own == "u" else "weights" if decayed else "others"].append(p)
    factors = {"u": u_lr_mult, "weights": 1.0, "others": 1.0}
    decay = {"u": 0.0, "weights": weight_decay, "others": 0.0}
    return [
        {"params": params, "lr": lr * factors[k], "lr_mult": factors[k], "weight_decay": decay[k]}
        for k, params in groups.items()
        if params
    ]
