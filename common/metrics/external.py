"""The record of an evaluation of released (or anybody's) weights, in the form that results/external/ takes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.metrics.claims import load_claims
from common.runs import provenance


def check_claim(paper: Path, claim: str | None) -> None:
    """ValueError unless `claim` is null or the id of a claim about released weights; to be called before the evaluation."""
    known = [c["id"] for c in load_claims(paper) if c["kind"] == "released_weights"]
    if claim is not None and claim not in known:
        raise ValueError(f"claim={claim}, allowed: {', '.join(sorted(known)) or 'null'}")


def write_record(
    to: str | Path,
    *,
    weights: str | Path,
    value: float,
    n: int,
    data: str,
    metrics: Mapping[str, float],
    claim: str | None = None,
    device: torch.device | None = None,
    **more: Any,
) -> Path:
    """Writes {claim, value, weights_sha256, n, data, metrics, commit, versions, machine, ...} and returns the file.

    weights: the file (or a folder of them) that was evaluated; value: the metric of the claim; n: images; data: its name."""
    place = Path(weights).expanduser()
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    digest = (
        hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)) if place.is_dir() else None
    )
    sha = digest.hexdigest() if digest else hashlib.sha256(place.read_bytes()).hexdigest()
    record = {
        "claim": claim,
        "value": value,
        "weights_sha256": sha,
        "n": n,
        "data": data,
        "metrics": dict(metrics),
        **more,
    }
    target = Path(to).expanduser() / f"{sha[:12]}_{data.replace(' ', '_').replace('/', '_')}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record | provenance(device), indent=1) + "\n")
    print(f"recorded in {target}")
    return target


def print_metrics(metrics: Mapping[str, float], images: int) -> None:
    """One metric a line, then the number of images."""
    for name, value in metrics.items():
        print(f"{name:28s} {value:.4f}")
    print(f"{images:,} images")
