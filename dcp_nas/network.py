"""The network of a genotype: stems for ImageNet and for small images, cells, auxiliary head, and a features-only backbone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from dcp_nas.operations import Bits, FactorizedReduce, Preprocess, make_operation
from dcp_nas.search_space import Genotype

STEMS = ("imagenet", "small")


class Cell(nn.Module):
    """One cell of a genotype. c_pp, c_p: channels of its two inputs; c: of its nodes; output: nodes * c."""

    def __init__(
        self, genotype: Genotype, c_pp: int, c_p: int, c: int, *, reduction: bool, reduction_prev: bool, bits: Bits
    ):
        super().__init__()
        self.reduction, self.nodes = reduction, genotype.nodes
        self.preprocess0 = (FactorizedReduce if reduction_prev else Preprocess)(c_pp, c, bits)
        self.preprocess1 = Preprocess(c_p, c, bits)
        edges = genotype.reduce if reduction else genotype.normal
        self.sources = [source for _, source in edges]
        self.ops = nn.ModuleList(
            make_operation(name, c, 2 if reduction and source < 2 else 1, bits) for name, source in edges
        )

    def forward(self, s0: Tensor, s1: Tensor, drop_path: float = 0.0) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for j in range(self.nodes):
            parts = []
            for k in (2 * j, 2 * j + 1):
                h = self.ops[k](states[self.sources[k]])
                if drop_path and not isinstance(self.ops[k], nn.Identity):
                    h = stochastic_depth(h, drop_path, "row", self.training)
                parts.append(h)
            states.append(parts[0] + parts[1])
        return torch.cat(states[2:], dim=1)


class Auxiliary(nn.Sequential):
    """DARTS' auxiliary classifier: pool (stride 2 or 3) - 1x1 conv - 2x2 conv - linear, real-valued."""

    def __init__(self, channels: int, classes: int, *, side: int):
        super().__init__(
            nn.PReLU(channels), nn.AdaptiveAvgPool2d(2 if side >= 2 else 1), nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128), nn.PReLU(128), nn.Conv2d(128, 768, 2 if side >= 2 else 1, bias=False), nn.BatchNorm2d(768),
            nn.PReLU(768), nn.Flatten(), nn.Linear(768, classes),
        )  # fmt: skip


def reduction_cells(cells: int, reductions: Sequence[int] | None) -> tuple[int, ...]:
    """Positions of the reduction cells: `reductions`, or one third and two thirds of the depth. ValueError outside 0..cells-1."""
    chosen = (cells // 3, 2 * cells // 3) if reductions is None else tuple(reductions)
    if cells < 1 or any(not 0 <= r < cells for r in chosen):
        raise ValueError(f"cells={cells}, reductions={list(chosen)}: reductions must lie in 0..cells-1")
    return tuple(sorted(set(chosen)))


def small_stem(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


class Network(nn.Module):
    """The network of a genotype for training, detection and re-identification.

    channels: C of the first cell, doubled at every reduction. stem: "imagenet" (stride 8 at the first cell, images of at least 32
    pixels and sides that are multiples of 32) or "small" (stride 1). auxiliary: a second classifier at the last reduction.
    Strides of `features`: 4, 8, 16, 32 for "imagenet"; 1, 2, 4 for "small"."""

    def __init__(
        self, genotype: Genotype, *, num_classes: int, in_channels: int = 3, channels: int, cells: int, stem: str = "small",
        reductions: Sequence[int] | None = None, bits: Bits, auxiliary: bool = False, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if stem not in STEMS or channels < 2 or channels % 2 or not 0 <= drop_path < 1:
            raise ValueError(
                f"stem={stem!r}, channels={channels}, drop_path={drop_path}, allowed: {', '.join(STEMS)}, an even number of "
                "channels >= 2 (factorized reductions make two halves) and 0 <= drop_path < 1"
            )
        self.stem, self.drop_path = stem, drop_path
        where = reduction_cells(cells, reductions)
        if stem == "imagenet":
            half = channels // 2
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
                nn.Conv2d(half, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels),
            )  # fmt: skip
            self.stem1 = nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels)
            )
            c_pp = c_p = channels
        else:
            self.stem0 = small_stem(in_channels, 3 * channels)
            c_pp = c_p = 3 * channels
        c, reduction_prev, stride = channels, stem == "imagenet", 8 if stem == "imagenet" else 1
        self.cells = nn.ModuleList()
        # (channels, stride) of every map that `features` gives: the stem of stride 4, and the last cell of each stride.
        info = [(c_p, 4)] if stem == "imagenet" else []
        for i in range(cells):
            if reduction := i in where:
                if i > 0:
                    info.append((c_p, stride))
                c, stride = 2 * c, 2 * stride
            options = {"reduction": reduction, "reduction_prev": reduction_prev, "bits": bits}
            self.cells.append(Cell(genotype, c_pp, c_p, c, **options))
            c_pp, c_p, reduction_prev = c_p, genotype.nodes * c, reduction
        self.info = [*info, (c_p, stride)]
        self.out_channels = c_p
        self.auxiliary_at = max(where, default=-1) if auxiliary else -1
        if auxiliary:
            if not where:
                raise ValueError("auxiliary=true needs a reduction cell")
            at = self.cells[self.auxiliary_at]
            width = genotype.nodes * channels * 2 ** (where.index(self.auxiliary_at) + 1)
            assert isinstance(at, Cell)
            self.auxiliary_head = Auxiliary(width, num_classes, side=2)
        self.fc = nn.Linear(c_p, num_classes)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.stem == "imagenet" and (min(x.shape[-2:]) < 32 or x.shape[-1] % 32 or x.shape[-2] % 32):
            raise ValueError(
                f"images of {x.shape[-2]}x{x.shape[-1]}: this network has stride 32 and needs sides that are multiples of 32 "
                "(use stem=small for small images)"
            )
        s0 = self.stem0(x)
        return (s0, self.stem1(s0)) if self.stem == "imagenet" else (s0, s0)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> the maps of `info`, largest first."""
        s0, s1 = self._inputs(x)
        found = [s0] if self.stem == "imagenet" else []
        for i, cell in enumerate(self.cells):
            if cell.reduction and i > 0:
                found.append(s1)
            s0, s1 = s1, cell(s0, s1, self.drop_path)
        return [*found, s1]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, classes); in training with an auxiliary head (logits, auxiliary logits)."""
        s0, s1 = self._inputs(x)
        side = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path)
            if i == self.auxiliary_at and self.training:
                side = self.auxiliary_head(s1)
        logits = self.fc(s1.mean(dim=(2, 3)))
        return logits if side is None else (logits, side)


class Features(nn.Module):
    """timm-style `features_only` form of a network: a list of maps, and `feature_info.channels()`, `.reduction()`."""

    def __init__(self, network: Network, out_indices: Sequence[int] | None = None):
        super().__init__()
        from timm.models import FeatureInfo

        self.network = network
        network.fc = nn.Identity()  # type: ignore[assignment]
        chosen = tuple(range(len(network.info))) if out_indices is None else tuple(out_indices)
        if not chosen or any(not 0 <= i < len(network.info) for i in chosen):
            raise ValueError(f"out_indices={list(chosen)}, allowed: 0..{len(network.info) - 1}")
        rows = [{"num_chs": c, "reduction": s, "module": f"stride{s}"} for c, s in network.info]
        self.feature_info, self.out_indices = FeatureInfo(rows, chosen), chosen

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.features(x)
        return [maps[i] for i in self.out_indices]
