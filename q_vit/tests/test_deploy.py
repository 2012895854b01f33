"""Networks on integer operators: the simulation's numbers in torch and in onnxruntime, what the files hold, what is refused."""

import math

import pytest
import torch
from torch import nn

from common.onnx_export import export_onnx, read_about
from common.quant.integer_onnx import IntegerConv2d, IntegerLinear, Operand, translations
from common.quant.lsq import LSQQuantizer
from q_vit.checkpoint import load
from q_vit.deploy import deploy, why_not_integer
from q_vit.export import export
from q_vit.packing import quantised_weights
from q_vit.tests.conftest import config
from q_vit.tests.test_quantized_vit import images, ready, swin, vit
from q_vit.train import fit

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def moved(model, seed=0):
    """A quantised network whose zero points are what training makes of them: other integers, of every head."""
    generator = torch.Generator().manual_seed(seed)
    for q in model.modules():
        if isinstance(q, LSQQuantizer) and q.zero_point is not None:
            with torch.no_grad():
                q.zero_point.add_(torch.randint(-1, 2, q.zero_point.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("zeros", ["zero", "moved"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vit, {"bits": 8}), (vit, {"bits": 4, "irm": False}), (vit, {"bits": 3, "symmetric": True}), (vit, {"bits": 2}),
        (swin, {"bits": 4}), (swin, {"bits": 8, "edge_bits": 5}), (vit, {"bits": 4, "parts": "mhsa_acts"}),
        (vit, {"bits": 3, "parts": "mlp", "edge_bits": 32}), (vit, {"bits": 5, "irm_form": "paper", "irm_stats": "tensor"}),
    ],
)  # fmt: skip
def test_integer_operators_give_the_simulation_bit_for_bit(make, options, zeros):
    model = ready(make(), **options)
    model = moved(model) if zeros == "moved" else model.eval()
    x = images(3, seed=4)
    torch.testing.assert_close(deploy(model)(x), model(x), rtol=0, atol=0)


def test_every_product_of_the_network_runs_on_integers():
    deployed = deploy(ready(vit(distilled=True), bits=4))
    kinds = [type(m) for m in deployed.modules()]
    assert (
        kinds.count(IntegerLinear) == 2 * 4 + 2 and kinds.count(IntegerConv2d) == 1 and kinds.count(LSQQuantizer) == 0
    )
    attention = deployed.blocks[0].attn
    lefts = {n: getattr(attention, f"{n}_quantizer").left for n in "qkpv"}
    assert lefts == {"q": True, "k": False, "p": True, "v": False}
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in deployed.modules())


def test_the_attention_map_has_all_its_codes_and_no_zero_point():
    model = ready(vit(), bits=8, init="max")
    deployed, seen = deploy(model), {}
    p = deployed.blocks[0].attn.p_quantizer
    p.register_forward_hook(lambda _, args, codes: seen.update(p=args[0], codes=codes))
    deployed(images())
    assert seen["codes"].dtype == torch.uint8 and p.shift.tolist() == [0, 0] and not p.clips
    assert int(seen["codes"].max()) > 200  # a signed map would end at 127
    step = model.blocks[0].attn.p_quantizer.step.detach().view(1, -1, 1, 1)
    torch.testing.assert_close(seen["codes"].float(), (seen["p"] / step).round().clamp(0, 255), rtol=0, atol=0)


class Together(nn.Module):
    """Several networks as one: an export takes seconds."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return tuple(network(x) for network in self.networks)


def written(networks, file):
    names = [f"y{i}" for i in range(len(networks))]
    image = images(1)
    export_onnx(
        Together(networks), image, file, about={}, outputs=names, tolerance=float("inf"), translations=translations()
    )
    return onnx.load(file), onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_onnxruntime_gives_the_simulation_at_every_width(tmp_path):
    """In float32 all that differs is a rounding of LayerNorm, softmax or GELU, by which no code changes here."""
    models = [moved(ready(vit(seed=b, depth=1), bits=b), seed=b) for b in (8, 4, 3, 2)]
    file, session = written([deploy(m) for m in models], tmp_path / "all.onnx")
    for batch in (1, 6):
        x = images(batch, seed=7)
        for model, y in zip(models, session.run(None, {"images": x.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-5, atol=1e-5)
    stored = {t.name: t for t in file.graph.initializer}
    int8 = [
        t for t in stored.values() if t.data_type == onnx.TensorProto.INT8 and math.prod(t.dims) > 100
    ]  # not the ones
    quantised = [m for model in models for m, _ in quantised_weights(model).values()]
    assert sorted(math.prod(t.dims) for t in int8) == sorted(m.weight.numel() for m in quantised)
    rest = sum(p.numel() for m in models for p in m.parameters()) - sum(m.weight.numel() for m in quantised)
    size = sum(m.weight.numel() for m in quantised) + 4 * rest  # bytes: no weight is there twice, or as floats
    assert sum(len(t.raw_data) for t in stored.values()) <= size
    assert (tmp_path / "all.onnx").stat().st_size < size + 250 * len(file.graph.node)
    operators = [n.op_type for n in file.graph.node]
    assert operators.count("MatMulInteger") >= 4 * (4 + 2 + 2) and not {"MatMul", "Gemm", "Conv"} & set(operators)
    left = {n.input[0] for n in file.graph.node if n.op_type == "MatMulInteger"}
    weights = {n.input[1] for n in file.graph.node if n.op_type == "MatMulInteger"} & stored.keys()
    assert not left & stored.keys() or {stored[n].data_type for n in left & stored.keys()} == {onnx.TensorProto.UINT8}
    assert {stored[n].data_type for n in weights} == {onnx.TensorProto.INT8}


def test_qdq_holds_every_preset(tmp_path):
    models = [
        moved(ready(vit(depth=1), bits=8, preset="official")), moved(ready(vit(depth=1), bits=4)),
        ready(vit(depth=1), bits=3, irm=False, parts="mhsa_weights").eval(),
    ]  # fmt: skip
    file, session = written([deploy(m, "qdq") for m in models], tmp_path / "all.onnx")
    x = images(6, seed=7)
    for model, y in zip(models, session.run(None, {"images": x.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)
    count = [t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 for t in file.graph.initializer].count(True)
    assert count == sum(len(quantised_weights(m)) for m in models)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"preset": "official"}, "9 layers, blocks.0.attn.qkv first, have a step per input channel"),
        ({"parts": "mhsa_weights"}, "no product has two quantised operands"), ({"bits": 32}, "nothing to compute in integers"),
    ],
)  # fmt: skip
def test_what_cannot_be_integer_is_refused_in_one_line(options, reason):
    model = ready(vit(), **options)
    assert "\n" not in (why_not_integer(model) or "\n")
    with pytest.raises(ValueError, match=reason):
        deploy(model)
    with pytest.raises(ValueError, match="format='int4', allowed: integer, qdq"):
        deploy(model, "int4")


def test_attention_of_the_official_preset_is_integer_where_it_is_all_that_is_quantised():
    model = ready(vit(), bits=8, preset="official", parts="mhsa_acts").eval()
    deployed, x = deploy(model), images(3, seed=4)
    assert isinstance(deployed.blocks[1].attn.k_quantizer, Operand)
    torch.testing.assert_close(
        deployed(x), model(x), rtol=1e-4, atol=1e-4
    )  # the simulation multiplies real values here


def test_export_writes_both_files_or_none(fabric, arm, checkpoint, tmp_path):
    run = tmp_path / "run"
    fit(arm("train.epochs=1", "method.bits=3", "method.quant.preset=deployable"), fabric, run)
    out = tmp_path / "made/model.onnx"
    export(config(f"weights={run / 'last.ckpt'}", f"out={out}", name="export"))
    assert sorted(f.name for f in out.parent.iterdir()) == ["model.onnx", "model.packed.pt"]
    model, _, about = load(out.with_name("model.packed.pt"))
    assert read_about(out)["classes"] == about["classes"]
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    (y,) = onnxruntime.InferenceSession(str(out)).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)
    again = tmp_path / "again.packed.pt"  # a packed file can be exported as well
    export(config(f"weights={out.with_name('model.packed.pt')}", f"out={again}", name="export"))
    torch.testing.assert_close(load(again).model(x), model(x), rtol=0, atol=0)
    for overrides, error in (
        ([], "preset=official"),
        (["format=fp16"], "allowed: integer, qdq"),
        (["tolerance=-1"], "allowed: > 0"),
    ):
        with pytest.raises(ValueError, match=error):
            export(config(f"weights={checkpoint}", f"out={tmp_path / 'no/model.onnx'}", *overrides, name="export"))
        assert not (tmp_path / "no").exists() or not list((tmp_path / "no").iterdir())
