"""What is exact: parameters and MACs of the networks, alpha, and the fixed points of fusion on quadratic tasks.

python counts.py
"""

import torch

from common.metrics.ops import count_macs, count_parameters, record_counts
from common.scripts import script
from lifelong.adaptive_fusion import step_size
from lifelong.model import build_model
from lifelong.theory import iterate, minimiser_of_sum


def measure() -> dict[str, float]:
    """{metric: value}, all computed here from the models and the fusion code."""
    counts: dict[str, float] = {}
    with torch.device("meta"):  # nothing but shapes is needed
        for c in (10, 100, 200):
            counts[f"rps_net_{c}_parameters"] = count_parameters(
                build_model(name="rps_net", num_classes=c, unused=True)
            )["total"]
        rps = build_model(name="rps_net", num_classes=100)
        macs = sum(count_macs(rps, torch.zeros(1, 3, 32, 32)).values())
        counts["rps_net_100_parameters_used"] = count_parameters(rps)["total"]
        for unused in (True, False):
            mlp = build_model(name="mlp", num_classes=10, channels=1, size=28, unused=unused)
            counts["mlp_parameters" + "_used" * (not unused)] = count_parameters(mlp)["total"]
        resnet = build_model(name="resnet18", num_classes=100)
        counts["resnet18_parameters"] = count_parameters(resnet)["total"]
    counts["rps_net_mmacs"] = macs / 1e6
    counts["rps_net_mmacs_with_gate"] = (macs + 21 * 32 * 32) / 1e6  # the product a * F, 21 channels
    counts["alpha_last_of_10"] = step_size(9, 10)

    one = torch.zeros(1, dtype=torch.double)
    h, m = torch.ones(3, 1, 1, dtype=torch.double), torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.double)
    counts["fixed_point_adaptive"] = iterate(h, m, one, eta=0.5).item()
    counts["fixed_point_mean"] = iterate(h, m, one, eta=0.5, weights="mean").item()
    counts["fixed_point_two_tasks_gap"] = abs(
        iterate(h[1:], m[1:], one, eta=0.5).item() - iterate(h[1:], m[1:], one, eta=0.5, weights="mean").item()
    )
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 3, 3, generator=generator, dtype=torch.double)
    h, m = (
        a @ a.mT / 3 + 0.2 * torch.eye(3, dtype=torch.double),
        torch.randn(4, 3, generator=generator, dtype=torch.double),
    )
    start = torch.full((3,), 5.0, dtype=torch.double)
    shared = [iterate(h, m[:1].expand(4, 3), start, eta=0.2, weights=w, rounds=3000) for w in ("adaptive", "mean")]
    counts["shared_minimiser_distance"] = max((s - m[0]).norm().item() for s in shared)
    plain = iterate(h, m, start, eta=0.05, weights="mean", rounds=5000)
    counts["sum_minimiser_distance"] = (plain - minimiser_of_sum(h, m)).norm().item()
    return counts


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, measure))


if __name__ == "__main__":
    main()
