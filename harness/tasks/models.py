"""The networks of the image tasks. All take (batch, channels, size, size) and return (batch, classes) logits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.context import UserError


def build(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """The network ``name`` (a key of ``MODELS``), initialised from torch's global generator as He et al. (2015) do, the
    transformer as Dosovitskiy et al. (2021) do. Errors: UserError for an unknown name."""
    if name not in MODELS:
        raise UserError(f"task.model must be one of {', '.join(MODELS)}, not {name!r}")
    net = MODELS[name](channels, size, classes)
    if isinstance(net, VisionTransformer):
        return net
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def mlp(channels: int, size: int, classes: int, width: int = 64) -> nn.Module:
    """Two hidden layers, no normalisation."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size**2, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def cnn(channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """Two stride-2 convolutions with BatchNorm: the few, cheap operations that 8x8 images leave worth doing."""
    return nn.Sequential(
        _conv(channels, width, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        _conv(width, 2 * width, 2), nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, classes),
    )  # fmt: skip


class Block(nn.Module):
    """Basic residual block. Its shortcut has no parameters: subsampling and zero channels (He et al., option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(residual + x, inplace=True)


class ResNet(nn.Module):
    """He et al. (2016), section 4.2: three stages of ``n`` blocks with 16, 32 and 64 channels, 6n+2 layers."""

    def __init__(self, channels: int, classes: int, n: int):
        super().__init__()
        self.stem = nn.Sequential(_conv(channels, 16, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        blocks, inputs = [], 16
        for outputs in (16, 32, 64):
            for index in range(n):
                blocks.append(Block(inputs, outputs, 2 if index == 0 and outputs > 16 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention of all tokens, in PyTorch's fused kernel. (batch, tokens, width) to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm: attention, then a perceptron of four times the width, both residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021) for small images, with learned positions and the mean of all tokens before the head
    (Zhai et al. 2022). 2.7 M parameters at 6 layers of 192. No dropout."""

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        *,
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
    ):
        super().__init__()
        if size % patch:
            raise UserError(f"images of {size} pixels cannot be cut into patches of {patch}")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.empty((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet8": lambda channels, size, classes: ResNet(channels, classes, n=1),
    "resnet20": lambda channels, size, classes: ResNet(channels, classes, n=3),
    "resnet32": lambda channels, size, classes: ResNet(channels, classes, n=5),
    "resnet56": lambda channels, size, classes: ResNet(channels, classes, n=9),
    "vit": VisionTransformer,
    "vit_tiny": lambda channels, size, classes: VisionTransformer(channels, size, classes, width=32, depth=2, heads=2),
}


def parameters_by_decay(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed): weight decay acts on weight matrices and kernels, not on biases and BatchNorm."""
    parameters = list(net.parameters())
    return [p for p in parameters if decays(p)], [p for p in parameters if not decays(p)]


def decays(parameter: Tensor) -> bool:
    return parameter.ndim >= 2
