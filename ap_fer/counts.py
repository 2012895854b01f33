"""Parameters and multiply-accumulates of the published network, measured on the model:  python counts.py

The models live on the meta device, and two counts must agree: the formula of cost.py, and the operations that torch
dispatches. `gflops` adds norms as fvcore counts them: the convention of the published 12.67 G."""

import torch
from omegaconf import DictConfig, OmegaConf

from ap_fer.cost import norm_elements, published_flops, vit_macs
from ap_fer.expressions import RAF_DB_COUNTS, repeat_factors
from ap_fer.model import APViT
from ap_fer.token_selection import token_schedule
from common.metrics.ops import count_macs, count_parameters, record_counts
from common.scripts import script


def measure(app: dict, atp: dict) -> dict[str, float]:
    """params, macs, macs_vit, macs_ir50 (all without the head), macs_formula, bn and ln elements, gflops, tokens_last."""
    with torch.device("meta"):
        model, x = APViT(app=app, atp=atp), torch.zeros(1, 3, 112, 112)
        by_module, elements = count_macs(model, x), norm_elements(model, x)
    parts = {p: sum(v for k, v in by_module.items() if k.startswith(p)) for p in ("extractor", "vit", "head")}
    vit = model.vit
    assert vit is not None
    formula = vit_macs(model.patches, vit.app.keep, vit.rates, channels=256, dim=768, mlp_ratio=3)
    total = sum(parts.values())
    return {
        "params": count_parameters(model)["total"],
        "macs": total - parts["head"],
        "macs_vit": parts["vit"],
        "macs_ir50": parts["extractor"],
        "macs_formula": formula,
        "bn": elements["bn"],
        "ln": elements["ln"],
        "gflops": published_flops(total, elements) / 1e9,
        "tokens_last": 1 + token_schedule(model.patches, vit.app.keep, vit.rates)[-1],
    }


def parts() -> dict[str, float]:
    """Parameters of the parts, and the epoch length of RAF-DB's balancing."""
    with torch.device("meta"):
        model = APViT()
    vit, stem = model.vit, model.extractor
    assert vit is not None
    size = {f"params_stage{i + 1}": count_parameters(s)["total"] for i, s in enumerate(stem.body)}  # type: ignore[arg-type]
    size |= {"params_stem": count_parameters(stem.input_layer)["total"], "params_ir50": count_parameters(stem)["total"]}  # type: ignore[arg-type]
    size |= {
        "params_projection": count_parameters(vit.projs)["total"],
        "params_block": count_parameters(vit.blocks[0])["total"],
    }
    size |= {"params_head": count_parameters(model.head)["total"]}
    factors = repeat_factors(RAF_DB_COUNTS)
    return {**size, "raf_db_epoch": sum(f * n for f, n in zip(factors, RAF_DB_COUNTS, strict=True))}


def all_counts(settings: DictConfig) -> dict[str, float]:
    """`parts`, and `measure` of every setting as <key>_<setting>."""
    found = parts()
    for name, setting in OmegaConf.to_container(settings, resolve=True).items():  # type: ignore[union-attr]
        found |= {f"{key}_{name}": value for key, value in measure(setting["app"], setting["atp"]).items()}
    return found


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, lambda: all_counts(cfg.settings)))


if __name__ == "__main__":
    main()
