"""How ci/test_loop.py trains this paper. The node `method` belongs to the search: its keys are tested by what a search finds."""

import math
import tempfile
from pathlib import Path
from unittest import mock

import torch
from omegaconf import OmegaConf

from common import runs
from dcp_nas import search, train
from dcp_nas.checkpoint import state
from dcp_nas.data import build_data
from dcp_nas.genotypes import find_genotype
from dcp_nas.tests import layouts

__all__ = ["ACCUMULATES", "CLIPS", "FRESH", "KEYS", "RELOADED", "TEACHER", "config", "fit", "observe", "rates"]

TEACHER_FILE = Path(tempfile.gettempdir()) / "dcp_nas_contract_teacher.ckpt"


def config(*overrides):
    """A training of seconds, with the node `method` of a search of seconds beside it."""
    of_method = [o for o in overrides if o.startswith("method.")]
    cfg = layouts.config("model.channels=2", "model.cells=2", *[o for o in overrides if o not in of_method])
    OmegaConf.set_struct(cfg, False)
    cfg.method = layouts.search_config(*of_method).method
    return cfg


def fit(cfg, fabric, out):
    if cfg.teacher.weights == str(TEACHER_FILE):
        write_teacher(cfg)
    train.fit(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "method"]), fabric, out)


def write_teacher(cfg):
    """The checkpoint of a real-valued network that has not been trained: enough for a teacher that must stay as it is."""
    own = layouts.config("stage=real", "model.channels=2", "model.cells=2")
    data = build_data(seed=0, **own.data)
    network = train.build(own, data, find_genotype(own))
    about = {"task": "classification", **data.about()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.save(
        state(network, optimizer, about, find_genotype(own), epoch=0, rows=[], config=runs.plain(own)), TEACHER_FILE
    )


def observe(cfg, fabric, out):
    """alpha and the weights after a short search with the method of `cfg`."""
    own = layouts.search_config()
    own.method = cfg.method
    with mock.patch.multiple(
        search, draw_cells=mock.DEFAULT, draw_search=mock.DEFAULT
    ):  # no pictures of twenty searches
        search.fit(own, fabric, out)
    algorithm = runs.load_checkpoint(out / "last.ckpt")["algorithm"]
    tensors = [v for net in algorithm["nets"].values() for v in net.values()]
    return tensors + [a for arch in algorithm.get("arch", {}).values() for a in arch["alphas"]]


def rates(cfg, step, steps):
    """Half a cosine by epoch, its first epoch at the full rate."""
    epoch, o = step // steps, cfg.optim
    return [o.lr_min + (o.lr - o.lr_min) * (1 + math.cos(math.pi * epoch / cfg.train.epochs)) / 2]


ACCUMULATES = []
CLIPS = (["train.clip=0.05"], 0.05)
TEACHER = [f"teacher.weights={TEACHER_FILE}"]
FRESH = ["genotype.draw=null", "genotype.name=DARTS_V2"]  # a random cell is another one for every seed
RELOADED = ["stage.strict_1bit=true"]

FELT = ["method.lam=10.0"]  # the tangent term as large as g
BACK = ["method.decoupled.eta=0.1"]  # the backtracking as large as a step
KEYS = {
    "algorithm": ("darts", []), "network": ("real", ["method.algorithm=darts"]), "lam": (10.0, []), "mu": (0.5, []),
    "hessian": ("exact", FELT), "distance": ("l1", FELT), "chunks": (5, ["method.hessian=fisher_empirical", *FELT]),
    "tangent": ("last", FELT), "recon_reduction": ("sum", []), "inherit": ("never", []), "reduction": ("sum", FELT),
    "product": "not here: double_vjp is the same product on the kept graph, equal up to rounding (test_tangent_propagation.py)",
    "decoupled.eta": (0.1, []), "decoupled.psi": (0.5, BACK), "decoupled.psi_lr_mult": (1e4, BACK),
    "decoupled.tau": (0.1, BACK), "decoupled.granularity": ("edge_op", BACK),
}  # fmt: skip
