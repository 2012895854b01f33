"""From a model's own scale to 0..10: the logistic of Eq. 5, with constants that are fitted or given, and what shows that they
fit: the rank correlation of the model with known quality. A wrong sign must not pass: a model that is turned around reads as
"very stable" (R of about 11)."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iqa_attack.photographs.images import from_bytes
from iqa_attack.photographs.photos import QualitySet, embedded, graded
from iqa_attack.quality_metrics import correlations, fit_logistic, logistic

FLOOR = 0.3  # SRCC below which a calibration is refused


class Calibration(NamedTuple):
    """b3 and b4 of the logistic; srcc of the model on `images` images of known quality; where b3 and b4 come from."""

    b3: float
    b4: float
    srcc: float
    images: int
    source: str

    def __str__(self) -> str:
        b = f"b3 {self.b3:.4g}, b4 {self.b4:.4g} ({self.source})"
        return f"{b}, SRCC {self.srcc:.3f} on {self.images} images of known quality"


class Scored(nn.Module):
    """q(f(x)): images (B, 3, H, W) in 0..1 -> (B,) in 0..10, larger = better. `model` is f, the raw score."""

    def __init__(self, model: nn.Module, calibration: Calibration):
        super().__init__()
        self.model, self.calibration = model, calibration

    def scale(self, raw: Tensor) -> Tensor:
        """Raw scores of the model -> 0..10."""
        return logistic(raw, self.calibration.b3, self.calibration.b4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.model(x))

    @property
    def minimum(self) -> int:
        """The smallest side that the model takes."""
        return int(getattr(self.model, "minimum", 1))


def fit_calibration(raw: Tensor, mos: Tensor, *, source: str) -> Calibration:
    """The logistic of raw scores (N,) to mos (N,) in 0..10."""
    return Calibration(*fit_logistic(raw, mos), correlations(raw, mos)["srcc"], len(mos), source)


@lru_cache(maxsize=1)
def reference_images(size: int = 192) -> QualitySet:
    """140 images of known order: one crop of every embedded photograph at all distortions and levels, with the pseudo-MOS of
    `photos.pseudo_mos`."""
    return graded(embedded(), per_photo=1, size=size, seed=0, label="reference")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    name: str,
    *,
    b3: float | None = None,
    b4: float | None = None,
    source: str = "given",
    floor: float = FLOOR,
    data: QualitySet | None = None,
    device: Any = "cpu",
) -> Calibration:
    """The calibration of a model that came from elsewhere: b3 and b4 as given or, null, fitted; judged on `data` (null:
    `reference_images`, of model.size pixels where the model takes no other) either way.

    Raises ValueError for a rank correlation below `floor`: a wrong sign, or a model that does not see these distortions."""
    if (b3 is None) != (b4 is None):
        raise ValueError(f"{name}: b3={b3}, b4={b4}: give both, or neither to have them fitted")
    data = data if data is not None else reference_images(getattr(model, "size", None) or 192)
    raw = torch.cat([model(from_bytes(x).to(device)).double().cpu() for x in torch.stack(data.images).split(20)])  # type: ignore[arg-type]
    if not bool(torch.isfinite(raw).all()) or float(raw.max() - raw.min()) == 0:
        raise ValueError(
            f"{name} gives constant scores or no numbers on {len(data)} graded photographs: it cannot be calibrated"
        )
    found = fit_calibration(raw, data.mos, source="fitted to graded photographs")
    if b3 is not None and b4 is not None:
        found = found._replace(b3=float(b3), b4=float(b4), source=source)
    check_calibration(name, found, floor)
    return found


def check_calibration(name: str, calibration: Calibration, floor: float) -> None:
    """ValueError for a calibration whose rank correlation is below `floor`."""
    if not calibration.srcc >= floor:
        wrong = calibration.srcc < -FLOOR
        hint = (
            "its sign is wrong: higher_is_better must be the other value"
            if wrong
            else "it does not rank these distortions"
        )
        raise ValueError(
            f"{name}: SRCC {calibration.srcc:.3f} on {calibration.images} images of known quality, needed: {floor:g}; {hint}. "
            "On a scale like this R would mean nothing"
        )
