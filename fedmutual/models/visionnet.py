"""The convolutional network of arXiv:2503.05803."""

from __future__ import annotations

from torch import Tensor, nn


class VisionNet(nn.Module):
    """Three 3x3 convolutions, two 2x2 poolings and two dense layers, with Keras initialisation.

    1,862,785 parameters at 100x100 with one output.

    Parameters
    ----------
    num_classes : int
        Outputs; 1 for two classes (the log-odds of class 1).
    image_size : int
        Side length of the input in pixels, at least 18.
    dropout : float
        Probability of dropping a feature before each dense layer.

    Notes
    -----
    Input float [N, 3, image_size, image_size] in [0, 1], output [N, num_classes].
    """

    def __init__(self, num_classes: int = 1, image_size: int = 100, dropout: float = 0.2) -> None:
        super().__init__()
        side = ((image_size - 2) // 2 - 2) // 2 - 2
        if side < 1:
            raise ValueError(
                f"VisionNet needs images of at least 18x18 pixels, not {image_size}x{image_size}"
            )
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.MaxPool2d(2),  # before the ReLU: the same values, for a quarter of them
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * side * side, 64),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, num_classes),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of a batch of images."""
        scores: Tensor = self.classifier(self.features(images))
        return scores
