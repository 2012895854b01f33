"""Mean and standard deviation of finished runs over the sub-protocols of a set, as CeFA's protocols are reported.

python aggregate.py runs=[runs/default/fmvit/data.protocol-4.1/seed0,runs/.../data.protocol-4.3/seed0,...]
"""

import csv
import statistics
from pathlib import Path

import yaml
from omegaconf import DictConfig

from common.runs import read_json
from common.scripts import script


def aggregate(cfg: DictConfig) -> dict[str, tuple[float, float]]:
    """Prints, writes to cfg.out and returns {metric: (mean, standard deviation)}, n - 1 in the latter.

    FileNotFoundError for a run that is not there, ValueError for an unfinished one, fewer than two, or a protocol twice."""
    results, protocols = [], []
    for place in cfg.runs:
        folder = Path(place).expanduser()
        result = read_json(folder / "result.json")
        if result is None:
            raise FileNotFoundError(f"no run in {folder}: it has no result.json")
        if result["status"] != "finished":
            raise ValueError(f"{folder}: the run is {result['status']}, not finished")
        config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
        protocol = f"{config.get('data', {}).get('protocol', folder)}"
        if protocol in protocols:
            raise ValueError(f"runs has the protocol {protocol} twice: {folder}; give one seed and one run of each")
        protocols.append(protocol)
        results.append(result["metrics"])
    if len(results) < 2:
        raise ValueError(f"runs: give two or more finished runs, got {len(results)}")
    shared = [m for m in results[0] if all(m in r for r in results)]
    values = {m: [float(r[m]) for r in results] for m in shared}
    found = {m: (statistics.mean(v), statistics.stdev(v)) for m, v in values.items()}
    out = Path(cfg.out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["metric", "mean", "std", *protocols])
        for m, (mean, std) in found.items():
            writer.writerow([m, f"{mean:.6g}", f"{std:.6g}", *(f"{v:.6g}" for v in values[m])])
            print(f"{m:28s} {mean:8.3f} +- {std:.3f}")
    print(f"over {', '.join(protocols)}: {out}")
    return found


main = script("aggregate", aggregate)


if __name__ == "__main__":
    main()
