"""FM-ViT: a vision transformer per modality, joined by Cross-Modal Transformer Blocks; and the interface of all models here.

    model = FMViT(["rgb", "depth", "ir"], vit={"name": "vit_small_patch16_224", "pretrained": True})
    logits = model({"rgb": x, "ir": y})        # any subset; absent means absent -> {"rgb": (B, 2), "ir": (B, 2)}
    live = model.score(logits)                 # (B,) in 0..1

Every model maps (images, paths) to one dict of named logits per path, a path being the modalities that may see each other.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from common.runs import load_checkpoint
from fm_vit.cross_modal_block import CrossModalBlock, cross_modal

LIVE = 1  # the class index of a live face
Logits = dict[str, Tensor]


def build_trunk(*, name: str | None = None, pretrained: bool = False, weights: str | None = None, **vit: Any) -> Any:
    """A timm vision transformer without classifier: `name` with timm's weights if pretrained, else one of the options `vit`.

    weights: a state dict file of that architecture instead (a classifier in it is left out).
    ValueError if the network has no class token, or the file is of another one."""
    if name is None:
        trunk = VisionTransformer(num_classes=0, **vit)
    else:
        trunk = _named(name, pretrained and weights is None, **vit)
    if not isinstance(trunk, VisionTransformer) or trunk.cls_token is None or trunk.num_prefix_tokens != 1:
        raise ValueError(f"{name or 'the trunk'} must be a timm VisionTransformer with one class token and no other")
    (height, width), (ph, pw) = trunk.patch_embed.img_size, trunk.patch_embed.patch_size  # pyright: ignore
    if height % ph or width % pw:
        raise ValueError(f"images of {height} x {width} are no multiple of patches of {ph} x {pw}")
    if weights is not None:
        _load(trunk, weights)
    return trunk


def _named(name: str, pretrained: bool, **options: Any) -> Any:
    """timm's network; an error that says what to do where its weights cannot be had."""
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:8]}*")[:5]) or "none like it"
        raise ValueError(f"model.vit.name={name!r}: timm has no such network; it has {near}")
    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    try:
        with _offline_at_once():
            return timm.create_model(name, pretrained=True, num_classes=0, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if not isinstance(error, OSError) and "offline" not in str(error).lower():
            raise
        raise FileNotFoundError(
            f"cannot get the ImageNet weights of {name} ({type(error).__name__}): give a local file, +model.vit.weights=<file>, "
            "or model.vit.pretrained=false to start at random"
        ) from error


@contextmanager
def _offline_at_once() -> Iterator[None]:
    """Where the hub cannot be reached, its files on this machine are used or the download fails at once; by itself it would try
    again for a minute. Behind a proxy nothing is tried beforehand."""
    before = constants.HF_HUB_OFFLINE
    if not getproxies():
        address = urlparse(constants.ENDPOINT)
        try:
            socket.create_connection((address.hostname or "", address.port or 443), timeout=3).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load(trunk: Any, weights: str) -> None:
    """Weights of a file into a trunk; positions of another grid are resized (timm's rule, bicubic), and a line says so."""
    state = load_checkpoint(weights)
    state = state.get("model", state.get("state_dict", state))
    state = {k: v for k, v in state.items() if not k.startswith("head")}
    own, found = trunk.pos_embed, state.get("pos_embed")
    if found is not None and found.shape[-1] == own.shape[-1] and found.shape != own.shape:
        print(f"{weights}: positions of {found.shape[1] - 1} patches are resized to {own.shape[1] - 1}")
        state["pos_embed"] = resample_abs_pos_embed(found, list(trunk.patch_embed.grid_size), num_prefix_tokens=1)
    wrong = [k for k, v in state.items() if k in (has := trunk.state_dict()) and v.shape != has[k].shape]
    missing, extra = trunk.load_state_dict({k: v for k, v in state.items() if k not in wrong}, strict=False)
    if wrong or missing or extra:
        raise ValueError(
            f"{weights} does not fit the trunk: other shapes {wrong[:3]}, missing {list(missing)[:3]}, "
            f"unexpected {list(extra)[:3]}"
        )


def check_images(images: Mapping[str, Tensor], modalities: Sequence[str], trunk: Any = None) -> list[str]:
    """The modalities present, in canonical order. ValueError for none, an unknown name, batches that differ, or images that
    have another size than those of the trunk."""
    if not images:
        raise ValueError(f"no modality given; allowed: any non-empty subset of {', '.join(modalities)}")
    if unknown := sorted(set(images) - set(modalities)):
        raise ValueError(f"unknown modality {', '.join(unknown)}; this model has {', '.join(modalities)}")
    first = next(iter(images.values()))
    if any(x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:] for x in images.values()):
        shapes = {m: tuple(x.shape) for m, x in images.items()}
        raise ValueError(f"batch and image size must be the same in every modality, got {shapes}")
    if trunk is not None and tuple(first.shape[2:]) != tuple(trunk.patch_embed.img_size):
        raise ValueError(
            f"images are {tuple(first.shape[2:])}, the network was made for {tuple(trunk.patch_embed.img_size)}"
        )
    return [m for m in modalities if m in images]


class Branch(nn.Module):
    """What is deployed for one modality: trunk, its CMTBs and a two-class head on the normalised class token."""

    def __init__(self, trunk: Any, blocks: int, options: Mapping[str, Any]):
        super().__init__()
        dim, heads = trunk.embed_dim, trunk.blocks[0].attn.num_heads
        self.trunk = trunk
        self.cmtb = nn.ModuleList(CrossModalBlock(dim, heads, **options) for _ in range(blocks))
        self.head = nn.Linear(dim, 2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), or one channel, which is repeated -> (B, 1 + N, D) with positions."""
        return self.trunk.norm_pre(self.trunk.patch_drop(self.trunk._pos_embed(self.trunk.patch_embed(repeated(x)))))

    def classify(self, c: Tensor) -> Tensor:
        """Class tokens (B, D) -> logits (B, 2)."""
        return self.head(self.trunk.norm(c))


def repeated(x: Tensor) -> Tensor:
    """One channel three times; three channels as they are. ValueError for another number."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 3, H, W) or (B, 1, H, W), got {tuple(x.shape)}")
    return x.expand(-1, 3, -1, -1)


class FMViT(nn.Module):
    """One branch per name in `modalities` (any names, any number, canonical order).

    vit: see `build_trunk`, the same for every branch. after: the CMTBs stand after these trunk blocks, counted from 1 (None:
    after the last); an empty list leaves them out (late fusion). cmtb: options of `CrossModalBlock`.
    ValueError for no or repeated names, or a position that is no block."""

    def __init__(
        self,
        modalities: Sequence[str],
        *,
        vit: Mapping[str, Any],
        after: Sequence[int] | None = None,
        cmtb: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.modalities = list(modalities)
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities={self.modalities}: give one or more different names")
        trunks = [build_trunk(**vit) for _ in self.modalities]
        depth = len(trunks[0].blocks)
        self.after = [depth] if after is None else [int(a) for a in after]
        if len(set(self.after)) < len(self.after) or not set(self.after) <= set(range(1, depth + 1)):
            raise ValueError(f"cmtb after blocks {self.after}: different numbers in 1..{depth}")
        self.branches = nn.ModuleDict(
            {m: Branch(t, len(self.after), cmtb or {}) for m, t in zip(self.modalities, trunks, strict=True)}
        )
        self.selects = bool(self.after) and (cmtb or {}).get("mma", "union") is not None  # whether there are masks

    def forward(
        self, images: Mapping[str, Tensor], paths: Sequence[Sequence[str]] | None = None, *, with_masks: bool = False
    ) -> Any:
        """images: modality -> (B, 1 or 3, H, W). paths: subsets of the modalities given, each with its own cross-modal blocks;
        the trunks are shared up to the first of them. Returns a list of {modality: logits (B, 2)}, one per path; without
        `paths` the one dict of all modalities given. with_masks: (that, masks), masks being for each path a list of the
        {modality: patches that MMA reads (B, N) bool} of its CMTBs."""
        names = check_images(images, self.modalities, self.branches[self.modalities[0]].trunk)
        wanted = [names] if paths is None else [[m for m in self.modalities if m in path] for path in paths]
        for path, found in zip(paths or [names], wanted, strict=True):
            if not found or set(path) - set(names):
                raise ValueError(f"path {list(path)}: needs one or more of the modalities given, {names}")
        branches: dict[str, Any] = {m: self.branches[m] for m in names}
        tokens = {m: branch.tokens(images[m]) for m, branch in branches.items()}
        states = [tokens]  # one, until the paths part
        masks: Any = [[] for _ in wanted]
        tops: list[dict[str, Tensor]] = []  # class tokens after the last CMTB, where no other block follows
        depths = len(branches[names[0]].trunk.blocks)
        for depth in range(depths):
            states = [{m: branches[m].trunk.blocks[depth](z) for m, z in state.items()} for state in states]
            if depth + 1 in self.after:
                blocks = {m: branch.cmtb[self.after.index(depth + 1)] for m, branch in branches.items()}
                if len(states) == 1:  # the paths part here: what they have in common is computed once
                    done = cross_modal(states[0], blocks, wanted)
                else:
                    done = [cross_modal(z, blocks, [path])[0] for z, path in zip(states, wanted, strict=True)]
                tops = [c for c, _ in done]
                masks = [[*earlier, used] for earlier, (_, used) in zip(masks, done, strict=True)]
                if depth + 1 < depths:
                    states = states * (len(wanted) // len(states))
                    states = [
                        {m: torch.cat([c[:, None], z[m][:, 1:]], dim=1) for m, c in top.items()}
                        for top, z in zip(tops, states, strict=True)
                    ]
        if depths not in self.after:
            tops = [{m: z[:, 0] for m, z in state.items()} for state in states]
            tops = tops * (len(wanted) // len(tops))
        outputs = [{m: branches[m].classify(c[m]) for m in path} for c, path in zip(tops, wanted, strict=True)]
        outputs, masks = (outputs, masks) if paths is not None else (outputs[0], masks[0])
        return (outputs, masks) if with_masks else outputs

    @staticmethod
    def score(logits: Logits) -> Tensor:
        """Liveness (B,) in 0..1: the mean over the branches of softmax(logits)[live]."""
        return torch.stack([z.float().softmax(-1)[:, LIVE] for z in logits.values()]).mean(0)

    @staticmethod
    def loss(logits: Logits, labels: Tensor) -> Tensor:
        """Cross-entropy of two classes (that is, BCE): the sum over heads of the mean over images. labels: (B,), 1 live."""
        first, *others = (F.cross_entropy(z.float(), labels) for z in logits.values())
        return sum(others, start=first)
