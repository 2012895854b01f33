"""Parameters, MACs, OPs and sizes for the exact claims, on the meta device.  python counts.py"""

from pathlib import Path

import yaml

from common.metrics.ops import count_parameters, record_counts
from common.scripts import script
from q_detr.ops import mac_table, meta_detr, ops, size_mib
from q_detr.quantized_detr import quantize_detr
from q_detr.smca import SMCADETR

CLAIMS = Path(__file__).parent / "claims.yaml"


def measure() -> dict[str, float]:
    """{metric: number}; the claims of kind exact in claims.yaml say what each is."""
    found: dict[str, float] = {}
    r50 = meta_detr()
    models = {
        "r50": r50, "r101": meta_detr("resnet101"), "r18": meta_detr("resnet18"), "r50_voc": meta_detr(num_classes=20),
        "smca": meta_detr(cls=SMCADETR),
    }  # fmt: skip
    for name, model in models.items():
        counted = count_parameters(model)
        found |= {f"params_{name}": counted["total"], f"entries_{name}": len(model.state_dict())}
        if name != "r50_voc":
            found[f"trainable_{name}"] = counted["trainable"]
    rprelu = quantize_detr(r50, bits=32, attention_bits=32, stem_bits=32)
    found["extra_rprelu"] = count_parameters(rprelu)["total"] - found["params_r50"]
    found |= {"mib_r50": size_mib(r50), "mib_rprelu": size_mib(rprelu)}
    found |= {f"mib_{bits}": size_mib(r50, bits=bits) for bits in (2, 3, 4)}
    table = mac_table(r50, 800, 1066)
    found |= {f"macs_{group}": macs / 1e9 for group, macs in table.items()}
    total = sum(table.values()) / 1e9
    found |= {"macs_total": total, "macs_512": sum(mac_table(r50, 512, 512).values()) / 1e9}
    found["macs_1333"] = sum(mac_table(r50, 800, 1333).values()) / 1e9
    for bits in (2, 3, 4):
        found[f"ops_{bits}"] = ops(table, bits) / 1e9
        found[f"ratio_{bits}"] = total / found[f"ops_{bits}"]
    found["ops_4_attention_8"] = ops(table, 4, attention_bits=8) / 1e9
    found["ratio_4_attention_8"] = total / found["ops_4_attention_8"]
    found["ops_4_real_downsample"] = ops(table, 4, quantize_downsample=False) / 1e9
    found["ratio_4_real_downsample"] = total / found["ops_4_real_downsample"]
    table3 = {p["id"]: p["value"] for p in yaml.safe_load(CLAIMS.read_text())["published"]}
    for bits in (2, 3, 4):  # the paper's own columns against its prose
        found[f"table3_ops_ratio_{bits}"] = table3["ops_real"] / table3[f"ops_{bits}bit"]
        found[f"table3_size_ratio_{bits}"] = table3["size_real"] / table3[f"size_{bits}bit"]
    return found


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, measure))


if __name__ == "__main__":
    main()
