"""Weights in the layout of Hugging Face, whose names are written out here a second time, in the other direction."""

import pytest
import torch

from q_detr.detr import DETR
from q_detr.official_weights import from_hugging_face, load_real_valued, load_weights
from q_detr.quantized_detr import quantize_detr

# official -> name in transformers 4 with its own ResNet, with timm's, and in version 5
EXAMPLES = {
    "backbone.0.body.conv1.weight": (
        "model.backbone.conv_encoder.model.embedder.embedder.convolution.weight",
        "conv1.weight",
    ),
    "backbone.0.body.bn1.running_var": (
        "model.backbone.conv_encoder.model.embedder.embedder.normalization.running_var",
        "bn1.running_var",
    ),
    "backbone.0.body.layer1.0.conv3.weight": (
        "model.backbone.conv_encoder.model.encoder.stages.0.layers.0.layer.2.convolution.weight",
        "layer1.0.conv3.weight",
    ),
    "backbone.0.body.layer4.2.bn1.bias": (
        "model.backbone.conv_encoder.model.encoder.stages.3.layers.2.layer.0.normalization.bias",
        "layer4.2.bn1.bias",
    ),
    "backbone.0.body.layer2.0.downsample.0.weight": (
        "model.backbone.conv_encoder.model.encoder.stages.1.layers.0.shortcut.convolution.weight",
        "layer2.0.downsample.0.weight",
    ),
    "backbone.0.body.layer2.0.downsample.1.running_mean": (
        "model.backbone.conv_encoder.model.encoder.stages.1.layers.0.shortcut.normalization.running_mean",
        "layer2.0.downsample.1.running_mean",
    ),
    "transformer.encoder.layers.5.self_attn.out_proj.bias": ("model.encoder.layers.5.self_attn.out_proj.bias", None),
    "transformer.encoder.layers.0.linear1.weight": ("model.encoder.layers.0.fc1.weight", None),
    "transformer.encoder.layers.0.norm1.weight": ("model.encoder.layers.0.self_attn_layer_norm.weight", None),
    "transformer.encoder.layers.0.norm2.weight": ("model.encoder.layers.0.final_layer_norm.weight", None),
    "transformer.decoder.layers.3.multihead_attn.out_proj.weight": (
        "model.decoder.layers.3.encoder_attn.out_proj.weight",
        None,
    ),
    "transformer.decoder.layers.3.norm1.bias": ("model.decoder.layers.3.self_attn_layer_norm.bias", None),
    "transformer.decoder.layers.3.norm2.bias": ("model.decoder.layers.3.encoder_attn_layer_norm.bias", None),
    "transformer.decoder.layers.3.norm3.bias": ("model.decoder.layers.3.final_layer_norm.bias", None),
    "transformer.decoder.layers.3.linear2.bias": ("model.decoder.layers.3.fc2.bias", None),
    "transformer.decoder.norm.weight": ("model.decoder.layernorm.weight", None),
    "query_embed.weight": ("model.query_position_embeddings.weight", None),
    "input_proj.bias": ("model.input_projection.bias", None),
    "class_embed.weight": ("class_labels_classifier.weight", None),
    "bbox_embed.layers.2.bias": ("bbox_predictor.layers.2.bias", None),
}


def hugging_face(state, *, timm: bool, version: int):
    """An official state dict in the layout of transformers."""
    out = {}
    for key, tensor in state.items():
        words = key.split(".")
        if words[0] == "backbone":
            prefix = ["model", "backbone", "conv_encoder", "model"] if version == 4 else ["model", "backbone", "model"]
            own = words[3:]
            if not timm:
                kind = {"conv": "convolution", "bn": "normalization"}
                if own[0] in ("conv1", "bn1"):
                    own = ["embedder", "embedder", kind[own[0][:-1]], own[1]]
                else:
                    stage, block, part, *rest = own
                    own = ["encoder", "stages", str(int(stage[5:]) - 1), "layers", block]
                    if part == "downsample":
                        own += ["shortcut", ["convolution", "normalization"][int(rest[0])], rest[1]]
                    else:
                        own += ["layer", str(int(part[-1]) - 1), kind[part[:-1]], *rest]
            out[".".join([*prefix, *own])] = tensor
        elif words[0] == "transformer" and words[2] == "norm":
            out[f"model.{words[1]}.layernorm.{words[3]}"] = tensor
        elif words[0] == "transformer":
            side, layer, part, *rest = words[1], words[3], words[4], *words[5:]
            names = {
                "multihead_attn": "encoder_attn",
                "linear1": "fc1",
                "linear2": "fc2",
                "norm1": "self_attn_layer_norm",
            }
            names |= {
                "norm2": "encoder_attn_layer_norm" if side == "decoder" else "final_layer_norm",
                "norm3": "final_layer_norm",
            }
            name = names.get(part, part)
            if version == 5 and part.startswith("linear"):
                name = f"mlp.{name}"
            base = f"model.{side}.layers.{layer}.{name}"
            if rest[0].startswith("in_proj"):
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{base}.{letter}_proj.{rest[0].removeprefix('in_proj_')}"] = piece
            else:
                out[".".join([base, *("o_proj" if version == 5 and w == "out_proj" else w for w in rest)])] = tensor
        else:
            first = {
                "query_embed": "model.query_position_embeddings", "input_proj": "model.input_projection",
                "class_embed": "class_labels_classifier", "bbox_embed": "bbox_predictor",
            }[words[0]]  # fmt: skip
            out[".".join([first, *words[1:]])] = tensor
    return out


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("version", [4, 5])
def test_all_458_names_of_hugging_face_become_the_official_ones(timm, version):
    with torch.device("meta"):
        official = DETR(num_classes=91).state_dict()
    theirs = hugging_face(official, timm=timm, version=version)
    if version == 4:
        for key, (own, short) in EXAMPLES.items():
            assert (f"model.backbone.conv_encoder.model.{short}" if timm and short else own) in theirs, key
    assert (
        len(official) == 458 and len(theirs) == 458 + 18 * 2 * 2
    )  # 18 attentions: q, k, v in the place of in_proj, twice
    theirs["model.backbone.conv_encoder.model.bn1.num_batches_tracked"] = torch.zeros(())
    found = from_hugging_face(theirs)
    assert found.keys() == official.keys()
    assert all(found[k].shape == v.shape for k, v in official.items())


def small(seed):
    torch.manual_seed(seed)
    options = {"queries": 5, "dim": 16, "heads": 2, "ffn": 24, "encoder_layers": 1, "decoder_layers": 2}
    network = DETR(num_classes=3, backbone="resnet18", **options).eval()
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.add_(torch.rand_like(buffer))
    return network


@pytest.mark.parametrize("timm", [False, True])
@torch.no_grad()
def test_weights_of_hugging_face_give_the_same_outputs_and_enter_a_student(timm, tmp_path):
    source, images, mask = small(0), torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    torch.save(hugging_face(source.state_dict(), timm=timm, version=4), tmp_path / "pytorch_model.bin")
    other = small(1)
    assert load_weights(other, tmp_path / "pytorch_model.bin") == []
    expected, found = source(images, mask), other(images, mask)
    assert torch.equal(found["pred_logits"], expected["pred_logits"]) and torch.equal(
        found["pred_boxes"], expected["pred_boxes"]
    )
    student = quantize_detr(small(2), bits=4)
    load_weights(student, tmp_path / "pytorch_model.bin")
    assert all(torch.equal(student.state_dict()[k], v) for k, v in source.state_dict().items())


def test_what_does_not_belong_is_reported():
    theirs = hugging_face(small(0).state_dict(), timm=True, version=4)
    del theirs["model.decoder.layers.1.encoder_attn.k_proj.bias"]
    with pytest.raises(
        ValueError, match=r"layers.1.multihead_attn.in_proj_bias is made of q, k and v, but there is only q, v"
    ):
        from_hugging_face(theirs)
    theirs = hugging_face(small(0).state_dict(), timm=True, version=4) | {
        "model.bbox_attention.q_linear.bias": torch.zeros(1)
    }
    with pytest.raises(ValueError, match="1 not in the model, e.g. model.bbox_attention.q_linear.bias"):
        load_real_valued(small(1), theirs)
