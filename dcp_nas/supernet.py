"""The supernet: every edge is the softmax-weighted sum of all operations; real for the Parent, 1-bit for the Child.

Norms use batch statistics and have no parameters, so that a forward pass leaves no trace: the second pass of the tangent term,
and the Parent as a source of targets, need nothing else.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dcp_nas.network import reduction_cells
from dcp_nas.operations import BinaryConv2d, Bits, FactorizedReduce, Preprocess, make_operation, wide_dil_conv
from dcp_nas.ranks import BatchStatistics
from dcp_nas.search_space import edge_nodes, operations

SEARCH_STEMS = ("small", "imagenet")
Alphas = tuple[Tensor, Tensor]


class MixedEdge(nn.Module):
    """All operations of one edge. weights (M,) mixes them; an int runs that operation alone."""

    def __init__(self, channels: int, stride: int, order: str, bits: Bits):
        super().__init__()
        self.ops = nn.ModuleList(make_operation(name, channels, stride, bits) for name in operations(order))

    def forward(self, x: Tensor, weights: Tensor | int) -> Tensor:
        if isinstance(weights, int):
            return self.ops[weights](x)
        return sum(w * op(x) for w, op in zip(weights, self.ops, strict=True))  # type: ignore[return-value]


def mixed_edges(x: Tensor, edges: Sequence[MixedEdge], weights: Tensor, names: Sequence[str]) -> list[Tensor]:
    """The outputs of all edges that leave one node, as `MixedEdge` gives them one by one, with their convolutions side by side.

    weights: (n, M). `none` adds nothing, pools have no parameters and are the same on every edge."""
    at = {name: k for k, name in enumerate(names)}
    twice, once = ([name for name in names if name.startswith(kind)] for kind in ("sep_conv", "dil_conv"))
    seps = [edge.ops[at[name]] for name in twice for edge in edges]
    dils = [edge.ops[at[name]] for name in once for edge in edges]
    wide = wide_dil_conv(x, [s[0] for s in seps] + dils, shared=True)  # type: ignore[index, operator]
    cut = wide.shape[1] * len(seps) // (len(seps) + len(dils))
    wide = torch.cat([wide_dil_conv(wide[:, :cut], [s[1] for s in seps], shared=False), wide[:, cut:]], dim=1)  # type: ignore[index]
    branches = wide.chunk(len(seps) + len(dils), dim=1)
    found: dict[str, list[Tensor]] = {
        name: list(branches[k * len(edges) : (k + 1) * len(edges)]) for k, name in enumerate(twice + once)
    }
    for name in names:
        if name.endswith("pool_3x3"):
            found[name] = [edges[0].ops[at[name]](x)] * len(edges)
        elif name in ("skip_connect", "noise"):
            found[name] = [edge.ops[at[name]](x) for edge in edges]
    columns = weights[:, [at[name] for name in found]]
    rows = [torch.stack(outputs) for outputs in zip(*found.values(), strict=True)]
    return [torch.einsum("m,mbchw->bchw", w, row) for w, row in zip(columns, rows, strict=True)]


class SearchCell(nn.Module):
    """A cell with all its edges; edge (i, j) of `edge_nodes` is row k of alpha."""

    def __init__(
        self, nodes: int, c_pp: int, c_p: int, c: int, *, reduction: bool, reduction_prev: bool, order: str, bits: Bits
    ):
        super().__init__()
        self.reduction, self.nodes, self.names = reduction, nodes, operations(order)
        self.preprocess0 = (FactorizedReduce if reduction_prev else Preprocess)(c_pp, c, bits)
        self.preprocess1 = Preprocess(c_p, c, bits)
        self.edges = edge_nodes(nodes)
        self.mixed = nn.ModuleList(MixedEdge(c, 2 if reduction and i < 2 else 1, order, bits) for i, _ in self.edges)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor | Sequence[int]) -> Tensor:
        """weights: (E, M), rows of a softmax, or one operation index per edge. -> (B, nodes * c, H, W)."""
        states, outputs = [self.preprocess0(s0), self.preprocess1(s1)], {}
        for i in range(1 + self.nodes):  # every node with edges that leave it
            if i > 1:
                states.append(sum(outputs[k] for k, (_, node) in enumerate(self.edges) if node == i))  # type: ignore[arg-type]
            leaving = [k for k, (source, _) in enumerate(self.edges) if source == i]
            edges: list[MixedEdge] = [self.mixed[k] for k in leaving]  # type: ignore[misc]
            if isinstance(weights, Tensor):
                found = mixed_edges(states[i], edges, weights[leaving], self.names)
            else:
                found = [edge(states[i], weights[k]) for k, edge in zip(leaving, edges, strict=True)]
            outputs |= zip(leaving, found, strict=True)
        states.append(sum(outputs[k] for k, (_, node) in enumerate(self.edges) if node == 1 + self.nodes))  # type: ignore[arg-type]
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """channels: C of the first cell, doubled in reduction cells. stem: "small" (3C channels, stride 1), "imagenet" (stride 8)."""

    def __init__(
        self, *, num_classes: int, in_channels: int = 3, channels: int = 16, cells: int = 8, nodes: int = 4,
        reductions: Sequence[int] | None = None, stem: str = "small", order: str = "darts", bits: Bits,
    ):  # fmt: skip
        super().__init__()
        if channels < 2 or channels % 2 or stem not in SEARCH_STEMS:
            raise ValueError(
                f"channels={channels}, stem={stem!r}: channels must be even and >= 2 (factorized reductions make two halves), "
                f"the stem one of {', '.join(SEARCH_STEMS)}"
            )
        if bits.affine:
            raise ValueError("a supernet needs bits with affine=False: its norms use batch statistics")
        self.nodes, self.order, self.bits = nodes, order, bits
        where = reduction_cells(cells, reductions)
        norm = functools.partial(BatchStatistics, affine=True)
        if stem == "small":
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, 3 * channels, 3, padding=1, bias=False), norm(3 * channels)
            )
            c_pp = c_p = 3 * channels
        else:
            steps = [(in_channels, channels // 2), (channels // 2, channels), (channels, channels)]
            self.stem = nn.Sequential(
                *(m for a, b in steps for m in (nn.Conv2d(a, b, 3, 2, 1, bias=False), norm(b), nn.ReLU()))
            )
            c_pp = c_p = channels
        c, reduction_prev = channels, False
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduction = i in where
            c = 2 * c if reduction else c
            self.cells.append(
                SearchCell(
                    nodes, c_pp, c_p, c, reduction=reduction, reduction_prev=reduction_prev, order=order, bits=bits
                )
            )
            c_pp, c_p, reduction_prev = c_p, nodes * c, reduction
        self.fc = nn.Linear(c_p, num_classes)

    def cell_outputs(self, x: Tensor, weights: tuple) -> list[Tensor]:
        """Outputs of all cells. weights: (normal, reduce), each as `SearchCell.forward` takes them."""
        s0 = s1 = self.stem(x)
        found = []
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, weights[bool(cell.reduction)])
            found.append(s1)
        return found

    def forward(self, x: Tensor, alphas: Alphas) -> Tensor:
        """(B, C, H, W) and alpha (normal, reduce), each (E, M), before the softmax -> logits (B, classes)."""
        weights = tuple(a.softmax(dim=-1) for a in alphas)
        return self.fc(self.cell_outputs(x, weights)[-1].mean(dim=(2, 3)))

    def new_alphas(self, generator: torch.Generator) -> Alphas:
        """alpha = 1e-3 N(0, 1) for normal and reduction cells, (E, M) each, as leaves that require a gradient."""
        shape = (len(edge_nodes(self.nodes)), len(operations(self.order)))
        normal, reduce = (1e-3 * torch.randn(shape, generator=generator) for _ in range(2))
        return normal.requires_grad_(), reduce.requires_grad_()

    @torch.no_grad()
    def operation_norms(self, *, reduction: bool) -> Tensor:
        """||w||_2^2 per parameter of every operation on every edge, mean over the cells of one type, (E, M).

        By the convention of the paper: none and noise 0, identity 1, 3x3 pooling 1/81; w = beta o sign(w) in the Child."""
        names = operations(self.order)
        fixed = {"none": 0.0, "noise": 0.0, "skip_connect": 1.0, "max_pool_3x3": 1 / 81, "avg_pool_3x3": 1 / 81}
        cells = [c for c in self.cells if c.reduction == reduction]
        table = torch.zeros(len(edge_nodes(self.nodes)), len(names))
        for k, m in ((k, m) for k in range(table.shape[0]) for m in range(table.shape[1])):
            if names[m] in fixed:
                table[k, m] = fixed[names[m]]
                continue
            means = []
            for cell in cells:
                convs = [c for c in cell.mixed[k].ops[m].modules() if isinstance(c, nn.Conv2d)]  # type: ignore[union-attr, index]
                weights = [c.binary_weight() if isinstance(c, BinaryConv2d) else c.weight for c in convs]
                means.append(sum(w.square().sum() for w in weights) / sum(w.numel() for w in weights))
            table[k, m] = torch.stack(means).mean() if means else 0.0
        return table


def inherit(child: nn.Module, parent: nn.Module) -> None:
    """w_hat <- w: the Child takes the Parent's weights, and beta_c = mean|w_c| of them (the minimiser of L_R)."""
    missing, unexpected = child.load_state_dict(parent.state_dict(), strict=False)
    if unexpected or any(not name.endswith(".beta") for name in missing):
        raise ValueError(f"Parent and Child differ: missing {missing[:3]}, unexpected {unexpected[:3]}")
    with torch.no_grad():
        for m in child.modules():
            if isinstance(m, BinaryConv2d) and hasattr(m, "beta"):
                m.beta.copy_(m.weight.abs().mean(dim=(1, 2, 3), keepdim=True))  # type: ignore[union-attr, operator]
