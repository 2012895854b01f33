"""A yes/no study with people: a local web page shows every candidate beside its original and writes the answers to a CSV.

python attack.py save_candidates=true hydra.run.dir=runs/study/made                     first: the candidates as PNG
python collect.py run=runs/study/made subject=anna                                      then open the address it prints
python attack.py reuse=runs/study/made observer.kind=csv observer.csv.file=answers.csv hydra.run.dir=runs/study/judged

One second per image, half a second of grey between, random order, a training session first, breaks. Keys: s (same) and d
(different). A study that is interrupted goes on where it stopped.
"""

from pathlib import Path

from omegaconf import DictConfig

from common.scripts import script
from iqa_attack.study.session import Study, serve


def collect(cfg: DictConfig) -> None:
    """Serves the page until Ctrl-C."""
    for key, low in {"repeats": 1, "training": 0, "pause_every": 1, "port": 0}.items():
        if cfg[key] < low or (key == "port" and cfg.port > 65535):
            raise ValueError(f"{key}={cfg[key]}, allowed: {'0..65535' if key == 'port' else f'>= {low}'}")
    study = Study(
        Path(cfg.run).expanduser(), subject=str(cfg.subject), file=Path(cfg.file).expanduser(), repeats=cfg.repeats,
        training=cfg.training, pause_every=cfg.pause_every, seed=cfg.seed,
    )  # fmt: skip
    server = serve(study, cfg.port)
    where = f"http://127.0.0.1:{server.server_port}/"
    print(f"{len(study.trials)} trials for {study.subject}: open {where} , end with Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"answers in {cfg.file}")
    finally:
        server.server_close()


main = script("collect", collect)


if __name__ == "__main__":
    main()
