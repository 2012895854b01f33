"""Boxes on one's own images.  python predict.py runs/default/drd/seed0/last.ckpt image.jpg folder [...] --out boxes

Prints a line of JSON per image and, with --out, writes the images with their boxes drawn. A file that is no image gets a line
with "error", and the exit status is 1."""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from common import runs
from common.data.vision import open_image
from q_detr.data import normalise, resize_for_test
from q_detr.detr import pad_images
from q_detr.evaluate import load
from q_detr.set_prediction import postprocess

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")


def image_files(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as the images in them, sorted. FileNotFoundError for a folder without an image."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMG_EXTENSIONS) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"no image in {path}: looked for {', '.join(IMG_EXTENSIONS)}")
        found += inside
    return found


def draw(image: Image.Image, rows: list[dict], colours: dict[str, str]) -> Image.Image:
    """The image with a frame and "label score" per detection, the surest on top; small images are enlarged first."""
    factor = max(1, round(400 / min(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for row in sorted(rows, key=lambda r: r["score"]):
        x0, y0, x1, y1 = (factor * v for v in row["box"])
        colour = colours[row["label"]]
        if x1 < x0 or y1 < y0:
            continue
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        text, at = f"{row['label']} {row['score']:.2f}", (max(x0, 0) + 3, max(y0, 0) + 2)
        pen.rectangle(pen.textbbox(at, text), fill=colour)
        pen.text(at, text, fill="white")
    return image


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("weights")
    parser.add_argument("images", nargs="+", type=Path, help="files, or folders of images")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score")
    parser.add_argument("--out", type=Path, help="folder for the images with boxes")
    args = parser.parse_args(argv)
    try:
        files = image_files(args.images)
        network, loss, data = load(args.weights, {})
    except (OSError, ValueError, runs.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = runs.load_checkpoint(args.weights).get("names")
    if data["labels"] == "ids":
        names = None  # category ids have gaps: print the id
    colours = {names[i] if names else str(i): COLOURS[i % len(COLOURS)] for i in range(network.num_classes)}
    status = 0
    for path in files:
        try:
            image = open_image(path)
        except (FileNotFoundError, ValueError) as error:
            print(json.dumps({"image": str(path), "error": str(error)}))
            status = 1
            continue
        batch, mask = pad_images([resize_for_test(normalise(pil_to_tensor(image)), data["test_side"])])
        (found,) = postprocess(network(batch, mask), torch.tensor([(image.height, image.width)]), loss=loss)
        keep = (found["scores"] >= args.threshold) & (found["labels"] < network.num_classes)  # SMCA has a channel more
        boxes, scores, labels = (found[k][keep] for k in ("boxes", "scores", "labels"))
        rows = [
            {"label": names[i] if names else str(i), "score": round(s, 4), "box": [round(v, 1) for v in b]}
            for i, s, b in zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
        ]
        print(json.dumps({"image": str(path), "detections": rows}))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            draw(image, rows, colours).save(args.out / f"{path.stem}.png")
    return status


if __name__ == "__main__":
    sys.exit(main())
