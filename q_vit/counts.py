"""Parameters, MACs, operations and storage of the paper's models, measured for the exact claims.

python counts.py        writes runs/default/counts/seed0/result.json, in seconds, without any data

The paper says 6.14x for 4-bit DeiT-S; its convention is not stated, and none of these gives that number."""

import torch

from common.metrics.ops import count_ops, count_parameters, record_counts
from common.scripts import script
from q_vit.ops import CONVENTIONS, extra_parameters, float_model, layers, mac_table, storage_mb
from q_vit.quantized_vit import quantize_vit

SIZES = {"t": "tiny", "s": "small", "b": "base"}


def count() -> dict[str, float]:
    """{metric: number}: see the claims of kind exact in claims.yaml for what each is."""
    found: dict[str, float] = {}
    for letter, size in SIZES.items():
        for suffix, name in (("", f"deit_{size}_patch16_224"), ("d", f"deit_{size}_distilled_patch16_224")):
            model = float_model(name)
            found[f"params_{letter}{suffix}"] = count_parameters(model)["total"]
            with torch.device("meta"):
                quantised = quantize_vit(model, bits=4, irm=True, preset="official")
            extra = extra_parameters(quantised)
            found[f"steps_{letter}{suffix}"] = extra["quantizers"]
            if suffix:
                found[f"irm_{letter}"] = extra["irm"]
                found[f"total_{letter}"] = count_parameters(quantised)["total"]
        plain = f"deit_{size}_patch16_224"
        table = mac_table(plain)
        found |= {f"macs_{kind}_{letter}": macs for kind, macs in table.items()}
        found[f"mb_{letter}_32"] = storage_mb(plain, 32, edge_bits=32)
        found |= {f"mb_{letter}_{bits}": storage_mb(plain, bits) for bits in (2, 3, 4)}
    small, distilled = mac_table("deit_small_patch16_224"), mac_table("deit_small_distilled_patch16_224")
    found |= {"macs_total_sd": distilled["total"], "macs_without_attention_sd": distilled["without_attention"]}
    for bits in (4, 3, 2):
        own = layers("deit_small_patch16_224", bits)
        for convention in CONVENTIONS:
            found[f"{convention}_{bits}"] = count_ops(own, convention)
            found[f"{convention}_{bits}_ratio"] = small["total"] / found[f"{convention}_{bits}"]
        real = count_ops(layers("deit_small_patch16_224", bits, attention_bits=32), "lane")
        found |= {f"lane_fp_attention_{bits}": real, f"lane_fp_attention_{bits}_ratio": small["total"] / real}
    for size in ("tiny", "small"):
        found[f"params_swin_{size[0]}"] = count_parameters(float_model(f"swin_{size}_patch4_window7_224"))["total"]
    return found


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, count))


if __name__ == "__main__":
    main()
