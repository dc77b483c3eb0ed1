"""Box and mask heads that torchvision lacks: an MLP head with dropout, for VGG-16, and ResNet's last stage, for C4.
Knows pooled features; knows nothing of boxes or classes.

Shapes: R proposals of the whole batch, C channels, S x S output size of the RoI pooler.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import TwoMLPHead


class DropoutMLPHead(TwoMLPHead):
    """torchvision's two hidden layers, each followed by dropout, as in Fast R-CNN on VGG-16.

    Args:
        in_channels: number of values per proposal.
        representation_size: width of both layers.
        dropout: probability of setting a value to 0 in training.
    """

    def __init__(self, in_channels: int, representation_size: int, *, dropout: float) -> None:
        super().__init__(in_channels, representation_size)  # type: ignore[no-untyped-call]  # torchvision has no annotation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(R, …) with `in_channels` values each -> (R, representation_size)."""
        for layer in (self.fc6, self.fc7):
            x = functional.dropout(functional.relu(layer(x.flatten(start_dim=1))), self.dropout, self.training)
        return x


class Res5BoxHead(nn.Module):
    """ResNet's last stage and its average pooling (He et al. 2015, appendix A).

    Args:
        res5: torchvision's `layer4`.
    """

    def __init__(self, res5: nn.Module) -> None:
        super().__init__()
        self.layer4 = res5

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, S, S) -> (R, 2 C)."""
        pooled: Tensor = self.layer4(x).mean(dim=(2, 3))
        return pooled


class Res5MaskHead(nn.Module):
    """The box head's last stage, applied to the mask branch's patches (Mask R-CNN, figure 4, left).

    Args:
        res5: the box head's own module; both branches share its weights.
    """

    def __init__(self, res5: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that the state dict does not hold the same weights twice.
        self._res5 = (res5,)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, S, S) -> (R, 2 C, S / 2, S / 2)."""
        (res5,) = self._res5
        stage: Tensor = res5(x)
        return stage
