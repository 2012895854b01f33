"""From a configuration to a model with its starting weights, its optimiser and its cost."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ap_fer.cost import vit_macs
from ap_fer.model import APViT
from ap_fer.stages import stem_place
from ap_fer.weights import load_ir50, load_released, load_vit_small, read_state
from common.data.batches import stream
from common.metrics.ops import count_macs

TOKENS = ("vit.cls_token", "vit.cls_pos_embed", "vit.patch_pos_embed")


def rebuild(config: dict[str, Any], num_classes: int) -> APViT:
    """The untrained model of a resolved configuration (a checkpoint holds one)."""
    network = {k: v for k, v in config["model"].items() if k not in ("keep", "rate", "start", "stem_rate")}
    app, atp = config["method"]["app"], config["method"]["atp"]
    if not network["depth"]:  # the CNN alone has nothing to pool
        app, atp = {"keep": None}, {"rates": []}
    return APViT(num_classes=num_classes, image_size=config["data"]["size"], app=app, atp=atp, **network)


def untrained(cfg: DictConfig, num_classes: int) -> APViT:
    """The model of a configuration, drawn from the current stream, without the weights that `start` names."""
    parts = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("model", "method", "data")}
    return rebuild(parts, num_classes)  # type: ignore[arg-type]


def build(cfg: DictConfig, num_classes: int) -> APViT:
    """The model of a configuration, drawn from its seed, with the weights that `start` names."""
    torch.manual_seed(stream(cfg.seed))
    model = untrained(cfg, num_classes)
    if cfg.start.arm and not cfg.preflight:  # a preflight trains no stem first
        path = stem_place(cfg) / "last.ckpt"
        state = {k: v for k, v in read_state(path).items() if k.startswith("extractor.")}
        own = {k for k in model.state_dict() if k.startswith("extractor.")}
        if set(state) != own or any(v.shape != model.state_dict()[k].shape for k, v in state.items()):
            raise ValueError(f"the stem in {path} is not this model's: give another run_root, or start.arm=null")
        model.load_state_dict(state, strict=False)
    if cfg.start.ir50:
        load_ir50(model.extractor, read_state(_weights(cfg, "ir50")))
    if cfg.start.vit:
        load_vit_small(model.vit, read_state(_weights(cfg, "vit")))
    if cfg.start.checkpoint:
        load_released(model, read_state(_weights(cfg, "checkpoint")))
    return model


def _weights(cfg: DictConfig, name: str) -> Path:
    """The file start.<name>, relative to data.root (so that a configuration is the same on every machine) or absolute."""
    path = Path(cfg.data.root or ".").expanduser() / cfg.start[name]
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path} (start.{name}): put them there, or start.{name}=null begins without"
        )
    return path


def macs(model: APViT, cfg: DictConfig) -> dict[str, float]:
    """Multiply-accumulates for one image in evaluation (M): `mmacs` of stem and transformer; of the transformer `vit_mmacs`,
    and without any pooling `vit_mmacs_unpooled`."""
    vit, m = model.vit, cfg.model
    stem = sum(count_macs(model.extractor, torch.zeros(1, 3, model.image_size, model.image_size)).values())
    if vit is None:
        return {"mmacs": stem / 1e6}
    first: Any = vit.projs[0]
    shape = {"channels": first.in_channels, "kernel": first.kernel_size[0], "dim": m.dim, "mlp_ratio": m.mlp_ratio}
    keep = None if vit.app.when == "train" else vit.app.keep
    rates = [1.0] * m.depth if cfg.method.atp.when == "train" else vit.rates
    pooled = vit_macs(model.patches, keep, rates, **shape)
    return {
        "mmacs": (stem + pooled) / 1e6,
        "vit_mmacs": pooled / 1e6,
        "vit_mmacs_unpooled": vit_macs(model.patches, None, [1.0] * m.depth, **shape) / 1e6,
    }


def build_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.Optimizer:
    """SGD as published, or AdamW. stem: the rate of the CNN stem as a multiple of lr, the group's "scale". no_decay_tokens: no
    weight decay on class token and positions, which the released code meant and, by a leading dot in its keys, did not do;
    everything else is decayed. Raises ValueError for another name, or a stem below 0."""
    o = cfg.optim
    if o.name not in ("sgd", "adamw"):
        raise ValueError(f"optim.name={o.name!r}, allowed: sgd, adamw")
    if o.stem < 0:
        raise ValueError(f"optim.stem={o.stem}, allowed: a multiple of the rate from 0 on")
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = float(o.stem) if name.startswith("extractor.") else 1.0
        decay = 0.0 if o.no_decay_tokens and name in TOKENS else o.weight_decay
        parts.setdefault((scale, decay), []).append(parameter)
    groups = [{"params": p, "scale": scale, "weight_decay": decay} for (scale, decay), p in parts.items()]
    if o.name == "sgd":
        return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.momentum, 0.999), weight_decay=o.weight_decay)
