"""Small detectors as torchvision builds them, with weights at random, and what runs fast enough to compare them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from service.model_store.importing import ImportedModel
from service.modeling.build import build_model

Builder = Callable[..., nn.Module]
Detect = Callable[[nn.Module], dict[str, Tensor]]
Rebuild = Callable[[ImportedModel], nn.Module]


@pytest.fixture
def build() -> Builder:
    """A torchvision builder by its name: `build("maskrcnn_resnet50_fpn", num_classes=4)`."""

    def build(name: str, **options: object) -> nn.Module:
        torch.manual_seed(0)
        options = {"weights": None, "weights_backbone": None, **options}
        small = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10}
        model: nn.Module = getattr(detection, name)(**options, **small)
        return model.eval()

    return build


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Batch norms with statistics that matter, and a classifier that is sure enough to detect something."""

    def randomise(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                tensors["weight"].data.uniform_(0.2, 0.6)
                tensors["bias"].data.normal_(0, 0.1)
                tensors["running_mean"].normal_(0, 0.1)
                tensors["running_var"].uniform_(0.5, 1.5)
        model.roi_heads.box_predictor.cls_score.weight.data.mul_(100)  # type: ignore[operator,union-attr]  # a detector

    return randomise


@pytest.fixture
def rebuild() -> Rebuild:
    """Our network of an import, with the small sizes of `build`."""

    def rebuild(imported: ImportedModel) -> nn.Module:
        config = imported.config
        small = {
            "transform": config.transform.model_copy(update={"min_size": 64, "max_size": 96}),
            "rpn": config.rpn.model_copy(update={"post_nms_top_n_test": 30}),
            "detections": config.detections.model_copy(update={"detections_per_img": 10}),
        }
        model = build_model(config.model_copy(update=small)).eval()
        model.load_state_dict(imported.state_dict)
        return model

    return rebuild


@pytest.fixture
def detect() -> Detect:
    """What a detector finds in a picture of noise, at least three objects."""

    def detect(model: nn.Module) -> dict[str, Tensor]:
        image = torch.rand(3, 70, 100, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found: dict[str, Tensor] = model([image])[0]
        assert len(found["boxes"]) >= 3
        return found

    return detect
