"""A residual network for small pictures and slow machines."""

from __future__ import annotations

from torch import Tensor, nn


class ResNet8(nn.Module):
    """Eight layers with weights: a convolution, three residual blocks and a dense layer (arXiv:1512.03385).

    78,042 parameters with ten outputs, at any picture size. FedMD and FedDF report on networks of this
    family on CIFAR.

    Parameters
    ----------
    num_classes : int
        Outputs; 1 for two classes (the log-odds of class 1).
    width : int
        Channels of the first block; each further block has twice as many, and pictures of half the side.

    Notes
    -----
    Input float [N, 3, H, W] in [0, 1], output [N, num_classes].
    """

    def __init__(self, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.classifier = nn.Linear(4 * width, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of a batch of images."""
        features: Tensor = self.blocks(self.stem(images)).mean(dim=(2, 3))
        scores: Tensor = self.classifier(features)
        return scores


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        raised: Tensor = nn.functional.relu(self.body(images) + self.shortcut(images))
        return raised
