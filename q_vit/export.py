"""Export a checkpoint packed to its bits, so that the file has the size that is claimed for it; every script here reads it.

python export.py weights=runs/default/both/seed0/last.ckpt out=packed.pt
python export.py weights=twobits_deit_small.pth bits=2 out=packed.pt

It is a storage format: there is no 2-bit arithmetic on CPUs."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from common.scripts import script
from q_vit.checkpoint import load
from q_vit.packing import pack


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    out = Path(cfg.out).expanduser()
    if out.suffix != ".pt":
        raise ValueError(f"out={cfg.out}: give a name that ends in .pt")
    model, config, about = load(cfg.weights, bits=cfg.bits, check_bits=cfg.check_bits)
    packed = pack(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.tmp")
    torch.save({**packed, "about": about, "config": config}, beside)
    beside.replace(out)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, float32 parameters {parameters / 1e6:.3f} MB")
    return out


main = script("export", export)


if __name__ == "__main__":
    main()
