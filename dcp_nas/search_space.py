"""The search space: eight operations, cells of nodes with two inputs, and the genotypes that describe them.

A cell has two inputs (nodes 0 and 1) and intermediate nodes 2, 3, ...; node j receives an edge from every earlier node, so that
four intermediate nodes have 14 edges. A genotype keeps two edges per node, each with one operation that is not `none`.
"""

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.data.files import read_json

# The two orders in which the operations stand in published code; the columns of alpha follow one of them. `control` has one more,
# which gives noise in place of its input: a search that decides anything keeps it less often than one edge in eight.
ORDERS = {
    "darts": (
        "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
    ),
    "released": (
        "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "none",
    ),
}  # fmt: skip
OPERATIONS = ORDERS["darts"]
NOISE = "noise"
ORDERS["control"] = (*OPERATIONS, NOISE)
Edge = tuple[str, int]


def operations(order: str) -> tuple[str, ...]:
    """Names of the columns of alpha. ValueError for another order."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r}, allowed: {', '.join(ORDERS)}")
    return ORDERS[order]


def edge_nodes(nodes: int) -> list[tuple[int, int]]:
    """(predecessor, node) of every edge, row by row of alpha: node 2 first, its predecessors in order."""
    if nodes < 1:
        raise ValueError(f"nodes={nodes}: a cell needs at least one intermediate node")
    return [(i, j) for j in range(2, 2 + nodes) for i in range(j)]


@dataclass(frozen=True)
class Genotype:
    """normal, reduce: two (operation, predecessor) per intermediate node, in the order of the nodes."""

    normal: tuple[Edge, ...]
    reduce: tuple[Edge, ...]

    def __post_init__(self) -> None:
        if len(self.normal) != len(self.reduce) or len(self.normal) < 2 or len(self.normal) % 2:
            raise ValueError(
                f"genotype: {len(self.normal)} normal and {len(self.reduce)} reduction edges; two per node, the same nodes"
            )
        for kind, edges in (("normal", self.normal), ("reduce", self.reduce)):
            for k, (name, source) in enumerate(edges):
                node = 2 + k // 2
                if name not in ORDERS["control"] or name == "none":
                    allowed = ", ".join(o for o in OPERATIONS if o != "none")
                    raise ValueError(f"genotype: {kind} edge {k} has operation {name!r}, allowed: {allowed}")
                if not 0 <= source < node:
                    raise ValueError(
                        f"genotype: {kind} edge {k} goes from node {source} to node {node}: never forwards"
                    )
            pairs = [{s for _, s in edges[k : k + 2]} for k in range(0, len(edges), 2)]
            if any(len(p) != 2 for p in pairs):
                raise ValueError(f"genotype: a {kind} node takes both inputs from one predecessor: {edges}")

    @property
    def nodes(self) -> int:
        return len(self.normal) // 2

    def skips(self) -> int:
        """Number of skip connections in the normal cell: the sign of a collapsed search."""
        return sum(name == "skip_connect" for name, _ in self.normal)

    def share(self, operation: str) -> float:
        """The share of the edges of both cells that have this operation, 0..1."""
        names = [name for name, _ in self.normal + self.reduce]
        return names.count(operation) / len(names)

    def plain(self) -> dict[str, list[list]]:
        """{"normal": [[operation, predecessor], ...], "reduce": [...]}, which `parse` reads."""
        return {kind: [list(edge) for edge in getattr(self, kind)] for kind in ("normal", "reduce")}

    def save(self, path: str | Path, **more: Any) -> None:
        """Writes JSON, moved into place. more: facts beside it, which `load` does not need."""
        target = Path(path)
        beside = target.with_name(f".{target.name}.tmp")
        beside.write_text(json.dumps({**self.plain(), **more}, indent=1) + "\n")
        os.replace(beside, target)

    @classmethod
    def load(cls, path: str | Path) -> "Genotype":
        """Read what `save` wrote. FileNotFoundError, or ValueError naming the file and what is wrong in it."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"no genotype at {file.absolute()}")
        content = read_json(file)
        try:
            return cls.parse(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, content: object) -> "Genotype":
        """From {"normal": [[operation, predecessor], ...], "reduce": [...]}. ValueError for anything else."""
        try:
            cells = {k: tuple((str(name), int(source)) for name, source in content[k]) for k in ("normal", "reduce")}  # type: ignore[index]
        except (KeyError, TypeError, ValueError) as error:
            shape = '{"normal": [[operation, predecessor], ...], "reduce": [...]}'
            raise ValueError(f"not a genotype, expected {shape}: {error!r}") from error
        return cls(**cells)


def discretise(normal: Tensor, reduce: Tensor, *, order: str = "darts") -> Genotype:
    """Per node the two incoming edges with the largest non-none softmax weight, each with its best non-none operation.

    normal, reduce: alpha, (E, M). The two edges stand in falling order of that weight; of equal weights the first wins.
    ValueError for shapes that are not a cell, or alpha that is not finite."""
    return Genotype(_cell(normal, order), _cell(reduce, order))


def _cell(alpha: Tensor, order: str) -> tuple[Edge, ...]:
    names = operations(order)
    rows = alpha.detach().softmax(dim=-1).tolist()
    nodes = math.isqrt(2 * len(rows) + 2) - 1  # E = sum_{j=2}^{n+1} j = n (n + 3) / 2
    if alpha.ndim != 2 or alpha.shape[1] != len(names) or nodes * (nodes + 3) // 2 != len(rows) or not len(rows):
        raise ValueError(f"alpha of shape {tuple(alpha.shape)}: expected (2 | 5 | 9 | 14 ..., {len(names)})")
    if not bool(alpha.isfinite().all()):
        raise ValueError("alpha holds NaN or infinity")
    kept: list[Edge] = []
    usable = [m for m, name in enumerate(names) if name != "none"]
    for j in range(2, 2 + nodes):
        first = j * (j - 1) // 2 - 1
        best = [
            max(usable, key=lambda m, row=rows[first + i]: row[m]) for i in range(j)
        ]  # max keeps the first of equals
        ranked = sorted(range(j), key=lambda i: -rows[first + i][best[i]])  # stable
        kept += [(names[best[i]], i) for i in ranked[:2]]
    return tuple(kept)


def random_genotype(seed: int, *, nodes: int = 4) -> Genotype:
    """Uniform over the discretised space: two different predecessors per node, operations except `none`."""
    draw, usable = random.Random(seed), [name for name in OPERATIONS if name != "none"]

    def cell() -> tuple[Edge, ...]:
        return tuple((draw.choice(usable), i) for j in range(2, 2 + nodes) for i in draw.sample(range(j), 2))

    return Genotype(cell(), cell())


def space_size(nodes: int = 4) -> int:
    """Number of cells of one type after discretisation: prod_j C(j, 2) * 7^(2 nodes); 180 * 7^8 for four nodes."""
    return math.prod(math.comb(j, 2) for j in range(2, 2 + nodes)) * 7 ** (2 * nodes)


_SHORT = {
    "max": "max_pool_3x3", "avg": "avg_pool_3x3", "skip": "skip_connect", "sep3": "sep_conv_3x3", "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5",
}  # fmt: skip


def _short(text: str) -> tuple[Edge, ...]:
    pairs: Sequence[list[str]] = [word.split(",") for word in text.replace("|", " ").split()]
    return tuple((_SHORT[name], int(source)) for name, source in pairs)


# Genotypes of the released training code (facts), and the cell of DARTS (second order).
GENOTYPES = {
    "DCP_NAS_L": Genotype(  # DDPNAS_MCN_2 there
        _short("sep5,1 max,0 | dil3,2 skip,0 | sep3,3 avg,1 | dil3,4 avg,3"),
        _short("max,0 sep3,1 | dil3,1 sep3,0 | max,1 dil5,2 | dil5,2 sep5,1"),
    ),
    "CHL_I6": Genotype(
        _short("avg,0 max,1 | max,0 avg,2 | max,1 dil5,3 | max,1 dil5,4"),
        _short("sep3,0 sep3,1 | sep3,0 sep5,1 | sep5,2 sep5,0 | dil5,0 max,1"),
    ),
    "TANGENT_1": Genotype(
        _short("sep3,1 max,0 | sep3,0 dil3,1 | sep5,3 max,2 | sep5,4 max,0"),
        _short("max,0 sep5,1 | dil3,1 dil5,2 | skip,0 dil5,3 | sep5,2 skip,4"),
    ),
    "TANGENT_2": Genotype(
        _short("skip,0 dil3,1 | sep3,0 sep3,2 | avg,2 sep3,3 | max,0 dil5,4"),
        _short("dil3,0 dil5,1 | max,1 dil5,2 | dil3,1 avg,2 | sep3,1 dil5,3"),
    ),
    "DARTS_V2": Genotype(
        _short("sep3,0 sep3,1 | sep3,0 sep3,1 | sep3,1 skip,0 | skip,0 dil3,2"),
        _short("max,0 max,1 | skip,2 max,1 | max,0 skip,2 | skip,2 max,1"),
    ),
}
