"""One subject's session of the yes/no study: the trials that are left, the page that shows them, the file of answers."""

import csv
import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import yaml

from iqa_attack.jnd import ANSWER_COLUMNS, read_answers

PAGE = Path(__file__).with_name("collect.html")


def plan_trials(run: Path, subject: str, answered: set[tuple[str, str]], *, repeats: int, seed: int) -> list[dict]:
    """The trials of a subject that are left, in a random order that belongs to the subject. FileNotFoundError without
    candidates."""
    files = sorted((run / "candidates").glob("*/[0-9]*.png"))
    if not files:
        raise FileNotFoundError(f"no candidates in {run / 'candidates'}: run attack.py with save_candidates=true first")
    trials = [{"image": f.parent.name, "candidate": f.stem, "repeat": r} for f in files for r in range(repeats)]
    order = np.random.default_rng([seed, *subject.encode()]).permutation(len(trials))
    return [trials[i] for i in order if (trials[i]["image"], trials[i]["candidate"]) not in answered]


def read_answered(file: Path, subject: str, nr: str, fr: str) -> set[tuple[str, str]]:
    """(image, candidate) that the subject has judged already."""
    if not file.exists():
        return set()
    rows = [r for _, r in read_answers(file)]
    return {(r["image"], r["candidate"]) for r in rows if (r["subject"], r["nr"], r["fr"]) == (subject, nr, fr)}


class Study:
    """The state of one subject's session, and the file it appends to."""

    def __init__(
        self,
        run: Path,
        *,
        subject: str,
        file: Path,
        repeats: int = 1,
        training: int = 5,
        pause_every: int = 60,
        seed: int = 0,
    ):
        if not re.fullmatch(r"[\w.-]+", subject):
            raise ValueError(f"subject={subject!r}: use letters, digits, '.', '_' and '-'")
        if not (run / "config.yaml").is_file():
            raise FileNotFoundError(f"{run} is no run of attack.py (no config.yaml)")
        config = yaml.safe_load((run / "config.yaml").read_text())
        self.nr, self.fr = config["nr"], config["fr"]["kind"]
        self.run, self.subject, self.file, self.lock = run, subject, file, threading.Lock()
        self.trials = plan_trials(
            run, subject, read_answered(file, subject, self.nr, self.fr), repeats=repeats, seed=seed
        )
        self.page = {
            "training": min(training, len(self.trials)),
            "pause_every": pause_every,
            "trials": self.trials,
            "subject": subject,
        }

    def answer(self, row: dict) -> None:
        """Append one answer. ValueError for one that is not of this study."""
        known = {(t["image"], t["candidate"]) for t in self.trials}
        if (row.get("image"), row.get("candidate")) not in known or row.get("answer") not in ("same", "different"):
            raise ValueError(f"not an answer of this study: {row}")
        line = {
            "nr": self.nr,
            "fr": self.fr,
            "subject": self.subject,
            **{k: row[k] for k in ("image", "candidate", "answer")},
        }
        line |= {"order": int(row["order"]), "seconds": f"{float(row['seconds']):.3f}"}
        with self.lock:
            new = not self.file.exists()
            with self.file.open("a", newline="") as f:
                writer = csv.DictWriter(f, ANSWER_COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(line)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """GET / (page), /study (trials), /candidates/<image>/<file>.png; POST /answer."""

    def __init__(self, study: Study, *args, **kwargs):
        self.study = study
        super().__init__(*args, **kwargs)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(self.path)
        if path == "/":
            return self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        if path == "/study":
            return self._send(200, "application/json", json.dumps(self.study.page).encode())
        asked = re.fullmatch(r"/candidates/([^/]+)/(original|\d+)\.png", path)
        file = (
            self.study.run / "candidates" / asked[1] / f"{asked[2]}.png"
            if asked and asked[1] not in (".", "..")
            else None
        )
        if file is None or not file.is_file():
            return self._send(404, "text/plain", b"not here")
        return self._send(200, "image/png", file.read_bytes())

    def do_POST(self) -> None:
        try:
            if self.path != "/answer":
                raise ValueError(f"nothing to post to {self.path}")
            self.study.answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0)))))
        except (ValueError, KeyError, TypeError) as error:
            return self._send(400, "text/plain", str(error).encode())
        return self._send(204, "text/plain", b"")

    def log_message(self, format: str, *args) -> None:
        """No line per request."""


def serve(study: Study, port: int) -> ThreadingHTTPServer:
    """A server on this machine only; call serve_forever(). port 0: any free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, study))
