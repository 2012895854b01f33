"""The Python of every README runs as it stands, on small networks of torchvision and timm with random weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[1]
Names = dict[str, Any]


def blocks(readme: Path) -> str:
    """All Python of a README, without downloads: the tests have random weights."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.S))
    return code.replace("pretrained=True", "pretrained=False").replace('"pretrained": True', '"pretrained": False')


def ncl_pp() -> Names:
    experts = [torchvision.models.resnet18(num_classes=10) for _ in range(2)]
    return {"class_counts": [100 - 10 * c for c in range(10)], "experts": experts, "images": torch.randn(8, 3, 32, 32),
            "labels": torch.tensor([0, 9])}  # fmt: skip


def root() -> Names:
    return ncl_pp() | {"logits": torch.randn(2, 8, 10, requires_grad=True)}


def adaptive_prune() -> Names:
    return {"timm": timm, "F": F, "images": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 9])}


class Supernet(nn.Module):
    """The smallest network with an architecture: a softmax over two layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor, alpha: list[Tensor]) -> Tensor:
        return sum(w * layer(x) for w, layer in zip(alpha[0].softmax(0), self.layers, strict=True))  # type: ignore[return-value]


def dcp_nas() -> Names:
    return {"parent": Supernet(), "child": Supernet(), "x": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
            "alpha": [torch.zeros(2, requires_grad=True)], "alpha_hat": [torch.tensor([0.5, 0], requires_grad=True)]}  # fmt: skip


def fm_vit() -> Names:
    return {"x": torch.rand(2, 3, 224, 224), "y": torch.rand(2, 3, 224, 224), "labels": torch.tensor([0, 1])}


def iqa_attack() -> Names:
    kernel = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])

    def metric(x: Tensor) -> Tensor:  # lower is better: minus the kurtosis of edges, which noise lowers
        edges = F.conv2d(x.mean(1, keepdim=True), kernel)
        edges = edges - edges.mean((1, 2, 3), keepdim=True)
        return -edges.pow(4).mean((1, 2, 3)) / (edges.square().mean((1, 2, 3)) + 1e-5).square()

    return {"metric": metric, "images": F.avg_pool2d(torch.rand(2, 3, 66, 66), 3, 1)}


def lifelong() -> Names:
    model = torchvision.models.resnet18(num_classes=4)
    state = model.state_dict()
    moved = [{k: v + i if v.is_floating_point() else v for k, v in state.items()} for i in (1, 2)]
    return {"model": model, "x": torch.rand(2, 3, 32, 32), "y": torch.tensor([0, 3]), "mean": (0.5,), "std": (0.5,),
            "attention_fn": lambda x: torch.full((len(x), 1, 4, 4), 0.3), "base_state": state, "task_states": moved}  # fmt: skip


def q_detr() -> Names:
    from q_detr.detr import DETR  # the network of the folder: the method needs its co-attended features

    teacher = DETR(
        num_classes=3, backbone="tiny", queries=6, dim=32, heads=2, ffn=32, encoder_layers=1, decoder_layers=1
    ).eval()
    boxes = [torch.tensor([[0.5, 0.5, 0.4, 0.4]]), torch.tensor([[0.3, 0.3, 0.2, 0.2]])]
    return {"teacher": teacher, "images": torch.randn(2, 3, 64, 64), "mask": torch.zeros(2, 64, 64, dtype=torch.bool),
            "boxes": boxes, "detection_loss": 0.0}  # fmt: skip


def q_vit() -> Names:
    teacher = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)
    return {"teacher": teacher, "images": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 4])}


def rbonn() -> Names:
    return {"torch": torch, "model": torchvision.models.resnet18(num_classes=5)}


def trained(names: Names) -> None:
    assert torch.isfinite(names["loss"])
    names["loss"].backward()


def attacked(names: Names) -> None:
    rows = names["rows"]
    assert len(rows) == 2 and all(abs(r["after"] - r["before"]) > 0 for r in rows)
    assert len(list(Path("audit/images").iterdir())) >= 2


def lifelong_checked(names: Names) -> None:
    assert 0 < (names["hard"] - names["x"]).abs().max() <= 1.01 * 2 / 255 / 0.5
    assert names["state"].keys() == names["base_state"].keys()


def ncl_checked(names: Names) -> None:
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for e in names["experts"] for p in e.fc.parameters())


def rbonn_checked(names: Names) -> None:
    model, optimizer = names["model"], names["optimizer"]
    assert names["recurrence"].counters() == {}
    F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert 0 < names["recurrence"].counters()["active_share"] <= 1


SCENES: dict[str, tuple[Callable[[], Names], Callable[[Names], Any]]] = {
    ".": (root, lambda n: n["logits"].grad.abs().sum() > 0), "ncl_pp": (ncl_pp, ncl_checked),
    "adaptive_prune": (adaptive_prune, trained), "ap_fer": (dict, lambda n: n["model"](torch.rand(1, 3, 224, 224))),
    "dcp_nas": (dcp_nas, lambda n: n["alpha_hat"][0].grad.abs().sum() > 0), "fm_vit": (fm_vit, lambda n: n["live"].shape == (2,)),
    "iqa_attack": (iqa_attack, attacked), "lifelong": (lifelong, lifelong_checked), "q_detr": (q_detr, trained),
    "q_vit": (q_vit, trained), "rbonn": (rbonn, rbonn_checked),
}  # fmt: skip


def test_no_readme_is_left_out():
    assert set(SCENES) == {".", *PAPERS}


@pytest.mark.parametrize("place", SCENES)
def test_the_python_of_a_readme_runs(place, tmp_path, monkeypatch):
    make, check = SCENES[place]
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, **make()}
    code = blocks(ROOT / place / "README.md")
    assert code.strip(), "no Python in this README"
    exec(compile(code, f"{place}/README.md", "exec"), names)
    assert check(names) is not False
