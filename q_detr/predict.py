"""Boxes on one's own images.  python predict.py runs/default/drd/seed0/last.ckpt image.jpg [...] --out boxes --threshold 0.5

Prints a line of JSON per image and, with --out, writes the images with their boxes drawn."""

import argparse
import json
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes, save_image

from common import runs
from common.data.vision import open_image
from q_detr.data import normalise, resize_for_test
from q_detr.detr import pad_images
from q_detr.evaluate import load
from q_detr.set_prediction import postprocess


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("weights")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score")
    parser.add_argument("--out", type=Path, help="folder for the images with boxes")
    args = parser.parse_args(argv)
    network, loss, data = load(args.weights, {})
    names = runs.load_checkpoint(args.weights).get("names")
    if data["labels"] == "ids":
        names = None  # category ids have gaps: print the id
    for path in args.images:
        image = pil_to_tensor(open_image(path))
        batch, mask = pad_images([resize_for_test(normalise(image), data["test_side"])])
        (found,) = postprocess(network(batch, mask), torch.tensor([image.shape[-2:]]), loss=loss)
        keep = found["scores"] >= args.threshold
        boxes, scores, labels = (found[k][keep] for k in ("boxes", "scores", "labels"))
        texts = [names[i] if names else str(i) for i in labels.tolist()]
        rows = [
            {"label": t, "score": round(s, 4), "box": [round(v, 1) for v in b]}
            for t, s, b in zip(texts, scores.tolist(), boxes.tolist(), strict=True)
        ]
        print(json.dumps({"image": str(path), "detections": rows}))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            shown = [f"{t} {s:.2f}" for t, s in zip(texts, scores.tolist(), strict=True)]
            drawn = draw_bounding_boxes(image, boxes, shown, colors="red") if len(boxes) else image
            save_image(drawn.float() / 255, args.out / f"{path.stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
