"""The page of an audit: a table, and of every image the original, the attacked one and their difference."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iqa_attack.quality_metrics import COMPETENT
from iqa_attack.quality_models.calibration import Calibration

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } figure { display: inline-block; margin: .5em; width: 30%; }
figure img { width: 100%; image-rendering: pixelated; } figcaption { text-align: center; color: #444; }"""
COLUMNS = {
    "image": "image", "before": "before", "after": "after", "random": "noise", "r": "R", "r_random": "R of noise",
    "max_change": "largest change", "visibility": "visibility", "gradient": "gradient",
}  # fmt: skip


def write_page(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
    *,
    model: str,
    fidelity: str,
    calibration: Calibration,
) -> None:
    """Writes the page beside the folder images/. summary: R and its interval of the attack and of the control; calibration: how
    the raw scores were brought to 0..10."""

    def interval(key: str) -> str:
        if summary["images"] < 2:
            return f"{summary[key]:.2f}"
        return f"{summary[key]:.2f} [{summary[f'{key}_low']:.2f}, {summary[f'{key}_high']:.2f}]"

    head = "".join(f"<th>{escape(title)}</th>" for title in COLUMNS.values())
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row[k])}</td>' for k in COLUMNS)}</tr>" for row in rows)
    blind = any(row["gradient"] != "exact" for row in rows)
    note = "<p><b>The model has no gradient: it was attacked with random squares. A large R here is not robustness.</b></p>"
    doubt = (
        f"<p><b>It ranks images of known quality with an SRCC of {calibration.srcc:.2f}, below {COMPETENT}: how stable a model "
        "is that knows little of quality says little.</b></p>"
    )
    pictures = "".join(_pictures(row) for row in rows)
    title = escape(model)
    path.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<h1>How far can {title} be moved without a visible change?</h1>
<p>R under the attack ({escape(fidelity)}): <b>{interval("r")}</b>; under noise at the same distance:
<b>{interval("r_random")}</b> (mean over {int(summary["images"])} images, 95 % interval).
R is the mean of ln(largest possible change / change): smaller = less stable.
The score moved by {summary["change_after"]:.2f} of 10 under the attack, by {summary["change_random"]:.2f} under noise.</p>
{note if blind else ""}{doubt if calibration.srcc < COMPETENT else ""}
<p>Scores are mapped to 0..10: {escape(str(calibration))}.
Visibility is in just-noticeable differences (a formula, no people).</p>
<table><tr>{head}</tr>{body}</table>{pictures}</html>
""")


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else escape(str(value))


def _pictures(row: Mapping[str, Any]) -> str:
    name = str(row["image"])
    captions = {
        "original": f"original: {row['before']:.2f} (raw {row['raw_before']:.4g})",
        "attacked": f"attacked: {row['after']:.2f} (raw {row['raw_after']:.4g})",
    }
    captions["difference"] = "difference, amplified"
    parts = (
        f'<figure><img src="images/{quote(name)}_{k}.png" alt="{k}"><figcaption>{v}</figcaption></figure>'
        for k, v in captions.items()
    )
    return f"<h2>{escape(name)}</h2>{''.join(parts)}"
