"""Classes of image files.  python predict.py runs/default/both/seed0/last.ckpt image.png [...] [--bits 4] [--names root/train]"""

import argparse
import sys
from pathlib import Path

import torch

from common.data.vision import open_image
from q_vit.data import transforms
from q_vit.evaluate import load


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("weights")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--bits", type=int, help="of a released checkpoint")
    parser.add_argument("--names", type=Path, help="folder with one folder per class, for names instead of numbers")
    parser.add_argument("--top", type=int, default=3)
    args = parser.parse_args(argv)
    model, data = load(args.weights, bits=args.bits)
    names = sorted(p.name for p in args.names.iterdir() if p.is_dir()) if args.names else None
    channels = model.patch_embed.proj.in_channels
    size = model.patch_embed.img_size[0]
    _, transform = transforms("none", size=size, crop_pct=data.get("crop_pct", 1.0), channels=channels)
    for path in args.images:
        image = open_image(path)
        x = transform(image if channels == 3 else image.convert("L"))
        with torch.no_grad():
            p = model(x.unsqueeze(0)).softmax(1)[0]
        top = p.topk(min(args.top, len(p)))
        shown = [
            f"{names[i] if names else i} {v:.3f}"
            for v, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        print(f"{path}: {'  '.join(shown)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
