"""Count what the published code fixes: parameters and MACs of the networks, images of the long-tailed sets.

python counts.py        writes runs/default/counts/seed0/result.json, in seconds, without any data
"""

import torch

from common.data.longtail import long_tail_counts
from common.metrics.classification import class_groups
from common.metrics.ops import count_macs, count_parameters, record_counts
from common.scripts import script
from ncl_pp.model import Experts

NETWORKS = {  # name: backbone, classes, head, image size
    "resnet32_c10": ("resnet32", 10, "linear", 32),
    "resnet32_c100": ("resnet32", 100, "linear", 32),
    "resnet50_imagenet": ("resnet50", 1000, "cosine", 224),
    "resnet50_inat": ("resnet50", 8142, "cosine", 224),
    "resnext50_imagenet": ("resnext50_32x4d", 1000, "cosine", 224),
    "resnet152_imagenet": ("resnet152", 1000, "cosine", 224),
    "resnet152_places": ("resnet152", 365, "cosine", 224),
}
SETS = {"c10": (5000, 10), "c100": (500, 100)}
IMBALANCES = (10, 50, 100, 200)


def count() -> dict[str, float]:
    """params_<network> and macs_<network> of one expert, images_<set>_if<imbalance>, and classes per group of CIFAR-100."""
    found: dict[str, float] = {}
    with torch.device("meta"):  # shapes only, nothing is computed
        for name, (backbone, classes, head, size) in NETWORKS.items():
            expert = Experts(backbone, classes, experts=1, head=head).single(0)  # type: ignore[arg-type]
            found[f"params_{name}"] = count_parameters(expert)["total"]
            found[f"macs_{name}"] = sum(count_macs(expert, torch.zeros(1, 3, size, size)).values())
    for imbalance in IMBALANCES:
        for name, (n_max, classes) in SETS.items():
            found[f"images_{name}_if{imbalance}"] = sum(long_tail_counts(n_max, imbalance, classes))
        groups = class_groups(long_tail_counts(500, imbalance, 100))
        found |= {f"classes_{group}_c100_if{imbalance}": int(mask.sum()) for group, mask in groups.items()}
    return found


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, count))


if __name__ == "__main__":
    main()
