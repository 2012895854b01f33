"""Speed, size and memory of DeiT-S on 8-bit integers, beside every float form of it on this CPU; and what simulation costs.

python bench.py                                         DeiT-S at 224 x 224, batch 1 and 8, 1 and 2 threads; a quarter of an hour
python bench.py bits=[8] compiled=false rounds=3        in a minute or two
python bench.py out=results/deploy/bench.json           what the README's table is made from

Integers run in onnxruntime (`export.py format=integer`). Widths below 8 bits have smaller codes, not faster products: what they
save is the packed file. The last rows are a price: networks whose quantisers are simulated in float, as in training.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from common.metrics.deployment import add_accuracy, usable_threads
from common.metrics.integer_deployment import dynamic_int8, peak_memory, time_integer, time_layer
from common.metrics.ops import count_ops
from common.metrics.timing import Bench, interleaved
from common.onnx_export import export_onnx
from common.quant.integer_onnx import translations
from common.quant.packed_weights import payload
from common.scripts import script
from q_vit.deploy import deploy
from q_vit.model import build_float, first_forward
from q_vit.ops import layers, mac_table
from q_vit.packing import pack
from q_vit.quantized_vit import head_product, quantize_vit

PAPER = Path(__file__).resolve().parent
TITLES = {f"deit_{size}_patch16_224": f"DeiT-{size[0].upper()}" for size in ("tiny", "small", "base")}
EVIDENCE = PAPER / "results/real_fashion_mnist/cells.csv"
ARMS = {
    "onnxruntime fp32": "fp", "4 bit": "baseline/method.bits-4+method.quant.preset-deployable",
    "2 bit": "baseline/method.quant.preset-deployable",
}  # fmt: skip


def write(network: nn.Module, image: Tensor, out: Path) -> Path:
    """An ONNX file of a float or deployed network. Random networks lie between two codes now and then: not compared."""
    with torch.no_grad():  # the caller may be in inference mode, which the exporter cannot trace
        export_onnx(
            network, image, out, about={}, batches=(1,), tolerance=float("inf"), translations=translations()
        )  # fmt: skip
    return out


class Products(nn.Module):
    """An attention product of an attention layer alone, on one tensor that holds both operands side by side."""

    def __init__(self, attention: nn.Module, which: str):
        super().__init__()
        self.attention, self.scores = attention, which == "scores"

    def forward(self, x: Tensor) -> Tensor:
        m, half = self.attention, x.shape[1] // 2
        if self.scores:  # q and k
            return head_product(m, x[:, :half], x[:, half:], m.q_quantizer, m.k_quantizer)  # pyright: ignore
        return head_product(m, x[..., : x.shape[2]], x[..., x.shape[2] :].mT, m.p_quantizer, m.v_quantizer)  # pyright: ignore


def layer_pairs(real: nn.Module, integer: nn.Module, tokens: int) -> dict[str, tuple[nn.Module, nn.Module, Tensor]]:
    """{what: (on integers, in float, an input)} of every kind of product in the first block, patch embedding and classifier."""
    own, other = integer.blocks[0], real.blocks[0]  # pyright: ignore[reportIndexIssue]
    floats = copy.deepcopy(own.attn)  # pyright: ignore[reportAttributeAccessIssue]
    for operand in "qkpv":
        setattr(floats, f"{operand}_quantizer", nn.Identity())
    width, heads = real.embed_dim, floats.num_heads  # pyright: ignore[reportAttributeAccessIssue]
    found = {}
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = other.get_submodule(name)  # pyright: ignore[reportAttributeAccessIssue]
        found[name] = (own.get_submodule(name), layer, torch.randn(1, 1, tokens, layer.in_features))  # pyright: ignore
    for which, shape in (
        ("scores", (2 * heads, tokens, width // heads)),
        ("map x v", (heads, tokens, tokens + width // heads)),
    ):
        found[which] = (Products(own.attn, which), Products(floats, which), torch.rand(1, *shape))  # pyright: ignore
    image = torch.randn(1, *_image(real).shape[1:])
    return found | {
        "patch embedding": (integer.patch_embed.proj, real.patch_embed.proj, image),  # pyright: ignore
        "classifier": (integer.head, real.head, torch.randn(1, 1, 1, width)),  # pyright: ignore[reportAttributeAccessIssue]
    }


def _image(real: nn.Module) -> Tensor:
    return torch.zeros(1, real.patch_embed.proj.in_channels, *real.patch_embed.img_size)  # pyright: ignore


def students(real: nn.Module, widths: Sequence[int]) -> dict[str, nn.Module]:
    """{"<b> bit": a deployable student of the float network}, its steps from random images."""
    images, found = torch.randn(2, *_image(real).shape[1:]), {}
    for bits in widths:
        found[f"{bits} bit"] = student = quantize_vit(real, bits=bits, preset="deployable")
        first_forward(student, images)
        student.eval()
    return found


def add_sizes(table: Bench, name: str, real: nn.Module, files: dict[str, Path], made: dict[str, nn.Module]) -> None:
    """Rows of kind bytes and memory: of every ONNX file, and of the packed files."""
    floats, image = 4 * sum(p.numel() for p in real.parameters()), _image(real)
    for form, file in files.items():
        table.add(f"{name}, {form}, bytes", file.stat().st_size, floats, unit="bytes", kind="bytes", form=form)
    for form, student in made.items():
        table.add(
            f"{name}, {form} packed, bytes",
            payload(pack(student)),
            floats,
            unit="bytes",
            kind="bytes",
            form=f"{form} packed",
        )
    peak = {form: peak_memory(file, image) for form, file in files.items()}
    for form, size in peak.items():
        table.add(
            f"{name}, {form}, peak memory", size, peak["onnxruntime fp32"], unit="bytes", kind="memory", form=form
        )


def add_layers(table: Bench, real: nn.Module, integer: nn.Module, folder: Path, *, rounds: int) -> None:
    tokens = real.pos_embed.shape[1]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    for name, (own, other, x) in layer_pairs(real, integer, tokens).items():
        pair = [write(m.eval(), x, folder / f"{form}.onnx") for form, m in (("integer", own), ("float", other))]
        time_layer(table, f"layer {name}", pair[0], pair[1], x, rounds=rounds)


def add_simulation(table: Bench, real: nn.Module, *, rounds: int, batch: int) -> None:
    """What quantisers simulated in float cost: evaluation of both presets at 4 and 8 bit, and a training step."""
    x = torch.randn(batch, *_image(real).shape[1:])
    made = {f"{b} bit {p}": quantize_vit(real, bits=b, preset=p) for p in ("official", "deployable") for b in (4, 8)}
    for student in made.values():
        first_forward(student, x)
        student.eval()
    with torch.inference_mode():
        times = interleaved(
            {"float": lambda: real(x)} | {k: lambda m=m: m(x) for k, m in made.items()}, rounds=rounds, warmup=1
        )
    for form in made:
        table.add(f"evaluation in torch, {form} simulated vs float", times[form], times["float"], batch=batch)

    def step(model: nn.Module) -> None:
        model.train()(x).sum().backward()
        model.zero_grad(set_to_none=True)

    trained = copy.deepcopy(real).requires_grad_(True)
    calls = {"float": lambda: step(trained), "ours": lambda: step(made["4 bit official"])}
    times = interleaved(calls, rounds=max(3, rounds // 2), warmup=1)
    table.add("training step, 4 bit official vs float", times["ours"], times["float"], batch=batch)


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows; see configs/bench.yaml."""
    if not cfg.bits:
        raise ValueError("bits=[]: give the widths to measure, e.g. bits=[8,4]")
    torch.manual_seed(0)
    options, before = OmegaConf.to_container(cfg.model), torch.get_num_threads()
    assert isinstance(options, dict)
    real = build_float(**options, num_classes=cfg.classes).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    table, name, made = Bench(cfg.out), TITLES.get(cfg.model.name, str(cfg.model.name)), students(real, cfg.bits)
    with tempfile.TemporaryDirectory() as place:
        folder, image = Path(place), _image(real)
        files = {"onnxruntime fp32": write(real, image, folder / "fp32.onnx")}
        files["onnxruntime int8 dynamic"] = folder / "dynamic.onnx"
        dynamic_int8(files["onnxruntime fp32"], files["onnxruntime int8 dynamic"])
        deployed = {form: deploy(student) for form, student in made.items()}
        files |= {form: write(m, image, folder / f"{form[0]}.onnx") for form, m in deployed.items()}
        add_sizes(table, name, real, files, made)
        try:
            for threads in usable_threads(cfg.threads):
                torch.set_num_threads(threads)
                for batch in cfg.batches:
                    x = torch.randn(batch, *image.shape[1:])
                    with torch.inference_mode():
                        time_integer(table, name, real, files, x, rounds=cfg.rounds, compiled=cfg.compiled)
                if cfg.layers:
                    add_layers(table, real, next(iter(deployed.values())), folder, rounds=cfg.rounds)
        finally:
            torch.set_num_threads(before)
    if cfg.model.name in TITLES:
        for bits in cfg.bits:
            ops, whole = count_ops(layers(cfg.model.name, bits), "lane"), mac_table(cfg.model.name)["total"]
            table.add(f"{name}, {bits} bit, OPs", ops, whole, unit="OPs", kind="ops", form=f"{bits} bit")
        for form, arm in ARMS.items():
            add_accuracy(table, form, EVIDENCE, arm=arm, metric="top1", data="Fashion-MNIST")
    add_simulation(table, real, rounds=max(3, cfg.rounds // 4), batch=4)
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
