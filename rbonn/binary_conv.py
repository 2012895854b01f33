"""What every binary convolution is: a convolution whose weights are signs times a scale per output channel."""

from torch import Tensor, nn


class BinaryConv2d(nn.Conv2d):
    """A convolution with the weights `binary_weight()`. zero: value of sign(0). (B, in, H, W) -> (B, out, H', W')."""

    zero = 1

    def binary_weight(self) -> Tensor:
        """The weights of this forward pass, (out, in / groups, k, k), with the derivatives of the method."""
        raise NotImplementedError

    def signs_and_scale(self) -> tuple[Tensor, Tensor]:
        """Signs of the weights (out, in / groups, k, k) and the scale per channel (out,): their product is what runs in
        evaluation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.binary_weight().to(x.dtype), self.bias)


def binary_layers(model: nn.Module) -> dict[str, BinaryConv2d]:
    """{name: layer} of every binary convolution of a network."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryConv2d)}
