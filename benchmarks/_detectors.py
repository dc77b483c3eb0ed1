"""What the benchmarks run: pictures, torchvision's detectors with random weights, and the same weights in a model store
of ours, from where our predictor loads them as a server does.

Random weights stand in for trained ones: time does not depend on what the weights are, only on how much is found, so
norms and predictors are fitted to what passes through them until more objects are found than are returned.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import MultiScaleRoIAlign

from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore, StoredModel
from service.model_store.torchvision_layout import builder_config
from service.model_store.weights import load_into
from service.modeling.build import build_model
from service.modeling.poolers import RoIPooler
from service.structures import Image
from tests.random_detectors import enliven

EXAMPLES = Path(__file__).parent.parent / "examples"
BUNDLED = Path(__file__).parent.parent / "model_store"
SCORE_THRESH = 0.05  # torchvision's default
NUM_CLASSES = 91  # COCO's, with the background


def picture_for(model: str) -> str:
    """The example picture in which a model finds a lot."""
    return "nuclei-dense.png" if model == "nuclei" else "blood-smear-1.jpg"


def example_picture(width: int, height: int, *, name: str = "blood-smear-1.jpg") -> PIL.Image.Image:
    """One of the repository's pictures, stretched to a size."""
    with PIL.Image.open(EXAMPLES / name) as picture:
        return picture.convert("RGB").resize((width, height), PIL.Image.Resampling.BICUBIC)


def as_image(picture: PIL.Image.Image) -> Image:
    return Image(np.array(picture))


def as_jpeg(picture: PIL.Image.Image, *, progressive: bool = False) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92, progressive=progressive)
    return file.getvalue()


def torchvision_input(image: Image, device: str = "cpu") -> Tensor:
    """(3, H, W) float32 in 0..1, as torchvision's detectors want it."""
    return torch.from_numpy(image.pixels).to(device).permute(2, 0, 1).float() / 255


def random_detector(builder: str, image: Image) -> GeneralizedRCNN:
    """torchvision's own model that finds as many objects in this picture as it may return."""
    torch.manual_seed(0)
    build: Callable[..., GeneralizedRCNN] = getattr(detection, builder)
    model = build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES, box_score_thresh=SCORE_THRESH).eval()
    enliven(model, lambda: model([torchvision_input(image)]))
    return model


def store_detector(model: GeneralizedRCNN, builder: str, folder: Path) -> StoredModel:
    """The same weights in a store of ours."""
    weights = {key: one for key, one in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    return ModelStore(folder).write_model(
        builder.replace("_", "-"),
        1,
        config=builder_config(builder, [f"class {label}" for label in range(1, NUM_CLASSES)]),
        state_dict=weights,
        provenance=ProvenanceTable(),
        readme="Random weights.",
    )


def bundled_models() -> list[StoredModel]:
    """Of each model that comes with the repository, the version that its name stands for: the one in float32."""
    store = ModelStore(BUNDLED)
    return [store.find(name) for name in dict.fromkeys(stored.name for stored in store.list())]


def torchvision_twin(stored: StoredModel) -> GeneralizedRCNN:
    """A stored model with torchvision's own `forward` and torchvision's own RoI Align."""
    config = stored.model_toml
    if config.roi.op != "roi_align" or config.roi.aligned:
        raise ValueError(f"expected {stored.key} to have torchvision's RoI Align, got {config.roi}")
    model = build_model(config)
    load_into(model, stored.load_weights(), source=str(stored.path))
    heads = model.roi_heads
    heads.box_roi_pool = _torchvision_pooler(heads.box_roi_pool)
    if config.has_masks:
        heads.mask_roi_pool = _torchvision_pooler(heads.mask_roi_pool)
    return model.eval()


def our_predictor(
    stored: StoredModel,
    engine: str = "auto",
    *,
    device: str = "cpu",
    precision: str = "auto",
    cache_dir: Path | None = None,
) -> Predictor:
    predictor = load_predictor(stored, device=device, engine=engine, precision=precision, cache_dir=cache_dir)
    predictor.warm_up()
    return predictor


def _torchvision_pooler(pooler: nn.Module) -> MultiScaleRoIAlign:
    assert isinstance(pooler, RoIPooler)
    assert isinstance(pooler.output_size, int)
    return MultiScaleRoIAlign(list(pooler.strides), pooler.output_size, pooler.roi.sampling_ratio)
