"""From the bytes of pictures to the bytes of their JSON answers, twice: the service's rooms called one after the other,
without HTTP, queue or threads; and the service that a user would write with torchvision in an afternoon.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence

import numpy as np
import orjson
import PIL.Image
import torch
from pycocotools import mask as coco
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.transforms.functional import to_tensor

from service.answers import encode
from service.imaging.decode import ImageLimits, decode_image
from service.inference.predictor import Predictor
from service.structures import Image, Json, Prediction, Query

LIMITS = ImageLimits(max_image_pixels=50_000_000)


class OurService:
    """The pipeline of `service`, in this process and in one thread.

    Args:
        predictor: a loaded model.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def answer(self, pictures: Sequence[bytes]) -> list[bytes]:
        """The JSON of each picture; those of one padded size share a batch, as in the server."""
        clock = _Clock()
        images = [decode_image(data, limits=LIMITS) for data in pictures]
        clock.lap("decode")
        predictions = self._predict(images)
        clock.lap("inference")
        answers = []
        for image, prediction in zip(images, predictions, strict=True):
            found = encode(Json("rle"), image, prediction.detections, self._predictor.info)
            clock.lap("encode")
            answers.append(self._document(image, prediction, found, clock.milliseconds))
        return answers

    def _predict(self, images: Sequence[Image]) -> list[Prediction]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(self._predictor.group_key(image.size), []).append(index)
        predictions: dict[int, Prediction] = {}
        for group in groups.values():
            queries = [Query(images[index]) for index in group]
            predictions |= zip(group, self._predictor.predict(queries), strict=True)
        return [predictions[index] for index in range(len(images))]

    def _document(
        self, image: Image, prediction: Prediction, detections: bytes, timings_ms: Mapping[str, float]
    ) -> bytes:
        info = self._predictor.info
        return orjson.dumps(
            {
                "request_id": "benchmark",
                "model": info.name,
                "version": info.version,
                "roi_op": info.roi_op,
                "image": {
                    "width": image.width,
                    "height": image.height,
                    "orientation_applied": image.orientation_applied,
                },
                "detections": orjson.Fragment(detections),
                "timings_ms": timings_ms,
                "batch_size": prediction.batch_size,
            }
        )


class _Clock:
    """How long each stage of a call took, all pictures together."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + 1e3 * (now - self._last)
        self._last = now


class StraightforwardService:
    """PIL, torchvision's model as it is, masks pasted into the picture, pycocotools, json.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: GeneralizedRCNN, labels: Sequence[str]) -> None:
        self._model = model
        self._labels = labels

    def answer(self, pictures: Sequence[bytes]) -> list[bytes]:
        """The JSON of each picture."""
        images = [to_tensor(PIL.Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
        with torch.inference_mode():
            found = self._model(images)
        return [self._encode(one) for one in found]

    def _encode(self, found: dict[str, torch.Tensor]) -> bytes:
        detections = []
        for index in range(len(found["boxes"])):
            label = int(found["labels"][index])
            detection: dict[str, object] = {
                "box": found["boxes"][index].tolist(),
                "label": self._labels[label - 1],
                "label_id": label,
                "score": float(found["scores"][index]),
            }
            if "masks" in found:
                mask = (found["masks"][index, 0] >= 0.5).numpy().astype(np.uint8)
                rle = coco.encode(np.asfortranarray(mask))
                detection["mask"] = {"size": rle["size"], "counts": rle["counts"].decode()}
            detections.append(detection)
        return json.dumps({"detections": detections}).encode()
