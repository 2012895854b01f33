"""Networks from the nodes of a configuration: the arm decides the convolutions and signs, the rest is the same."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN

from rbonn.detection import faster_rcnn
from rbonn.layers import make_conv, make_sign
from rbonn.model import build_model


def builders(method: Mapping[str, Any], *, sign_zero: int) -> dict[str, Any]:
    """{conv, sign} of an arm. ValueError or TypeError names a wrong key or value."""
    if isinstance(sign_zero, bool) or sign_zero not in (1, 0, -1):
        raise ValueError(f"parity.sign_zero={sign_zero!r}, allowed: 1, 0, -1")
    method = dict(method)
    sign = make_sign(activations=method.pop("activations"), zero=sign_zero)
    return {"conv": make_conv(**method, zero=sign_zero), "sign": sign}


def build_network(*, model: Mapping, method: Mapping, sign_zero: int, classes: int, channels: int) -> nn.Module:
    """The classifier of one arm: `model` and `method` are config nodes. ValueError or TypeError names a wrong key or value."""
    return build_model(num_classes=classes, in_channels=channels, **builders(method, sign_zero=sign_zero), **model)


def build_detector(*, detector: Mapping, method: Mapping, sign_zero: int, classes: int) -> FasterRCNN:
    """The detector of one arm: `detector` and `method` are config nodes. ValueError or TypeError names a wrong key or value."""
    return faster_rcnn(num_classes=classes, **builders(method, sign_zero=sign_zero), **detector)
