"""Exact numbers: parameters of the architectures, and the arithmetic of the published table.

python counts.py        writes runs/default/counts/seed0/result.json, in seconds, without any data
"""

import math
from pathlib import Path

import numpy as np
import torch
import torchvision

from common.metrics.claims import load_document
from common.metrics.ops import count_parameters, record_counts
from common.scripts import script
from iqa_attack.fidelities.deep_fidelity import vgg16_trunk
from iqa_attack.perceptual_attack import CODE_LAMBDAS
from iqa_attack.quality_metrics import clean_lattice, doubled_lattice, on_lattice, srcc24, stability
from iqa_attack.quality_models.ma19 import Ma19
from iqa_attack.quality_models.unique import Unique

PAPER = Path(__file__).resolve().parent


def published_table() -> dict[tuple[str, str, str, str], float]:
    """{(metric, attacked, fidelity, evaluated): value} of the rows t1_* of claims.yaml."""
    rows = load_document(PAPER)["published"]
    return {tuple(r["id"].split("-")[1:]): r["value"] for r in rows if r["id"].startswith("t1-")}


def count() -> dict[str, float]:
    """Every exact number by name."""
    found: dict[str, float] = {}
    with torch.device("meta"):
        found["params_ma19"] = count_parameters(Ma19())["total"]
        found["params_ma19_gap"] = count_parameters(Ma19(pooling="gap"))["total"]
        unused = count_parameters(torchvision.models.resnet34(weights=None).fc)["total"]
        found["params_unique"] = count_parameters(Unique())["total"]
        found["params_unique_with_unused_fc"] = found["params_unique"] + unused
        found["params_vgg16_features"] = count_parameters(vgg16_trunk())["total"]
    found["lambdas_nonzero"] = sum(v > 0 for v in CODE_LAMBDAS)

    # 12 untied points: SRCC = 1 - sum d^2 / 286
    clean, doubled = clean_lattice(12), doubled_lattice(12)
    found["clean_step"] = float(2 / (clean[0] - clean[1]))
    rows = {r["id"]: r["value"] for r in load_document(PAPER)["published"]}
    for name in ("brisque", "cornia", "ma19", "unique"):  # the lattice value nearest to the published one
        nearest = clean[np.abs(clean - rows[f"srcc_clean_{name}"]).argmin()]
        found[f"srcc_clean_{name}"] = round(float(nearest), 4)
    same = np.arange(12.0)  # counterexamples that fall between their own image and the next: no ties, the best order
    found["srcc24_ceiling"] = srcc24(same, same + 0.5, same)
    table = published_table()
    srcc = [v for (metric, *_), v in table.items() if metric == "srcc"]
    found["srcc24_on_lattice"] = sum(on_lattice(v, doubled) for v in srcc)
    found["srcc24_on_neither"] = sum(not on_lattice(v, doubled) and not on_lattice(v, clean) for v in srcc)

    # the qualitative claims, read from the table itself
    def where(metric: str, diagonal: bool) -> list[float]:
        return [
            v for (m, attacked, _, evaluated), v in table.items() if m == metric and (attacked == evaluated) is diagonal
        ]

    found["table_srcc_diagonal_max"], found["table_srcc_off_min"] = max(where("srcc", True)), min(where("srcc", False))
    found["table_r_diagonal_max"], found["table_r_off_min"] = max(where("r", True)), min(where("r", False))
    unique = [v for (m, a, _, e), v in table.items() if (m, a, e) == ("r", "unique", "unique")]
    others = [v for (m, a, _, e), v in table.items() if m == "r" and a == e != "unique"]
    found["table_r_unique_max"], found["table_r_others_min"] = max(unique), min(others)

    # R: 0 for a change as large as it can be, ln 10 for a tenth of it
    found["r_of_maximal_change"] = stability([0.0, 10.0, 2.0], [10.0, 0.0, 10.0])[0]
    found["r_of_a_tenth"] = stability([0.0, 10.0], [1.0, 9.0])[0] - math.log(10)
    return found


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, count))


if __name__ == "__main__":
    main()
