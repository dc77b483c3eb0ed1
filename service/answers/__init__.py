"""Encodes the detections of an image into the bytes of an answer: one file per form.

An encoder splits long work into parts of a few milliseconds, so that its caller can stop between two parts and share
threads fairly among requests.
"""

from __future__ import annotations

from typing import assert_never

from service.answers.coco import CocoEncoder
from service.answers.cvat import CvatEncoder
from service.answers.drawing import DrawingEncoder
from service.answers.encoder import Encoder, never
from service.answers.hugging_face import HuggingFaceEncoder
from service.answers.json import JsonEncoder
from service.answers.label_studio import LabelStudioEncoder
from service.answers.roboflow import RoboflowEncoder
from service.answers.tensors import TensorsEncoder
from service.structures import (
    Coco,
    Cvat,
    Detections,
    Drawing,
    Form,
    HuggingFace,
    Image,
    Json,
    LabelStudio,
    ModelInfo,
    Roboflow,
    Tensors,
)


def encoder_for(form: Form) -> Encoder:
    """The encoder for answers of this form."""
    match form:
        case Json():
            return JsonEncoder(form)
        case Drawing():
            return DrawingEncoder(form)
        case Tensors():
            return TensorsEncoder()
        case Coco():
            return CocoEncoder(form)
        case Roboflow():
            return RoboflowEncoder(form)
        case HuggingFace():
            return HuggingFaceEncoder(form)
        case Cvat():
            return CvatEncoder(form)
        case LabelStudio():
            return LabelStudioEncoder(form)
        case _:
            assert_never(form)


def encode(form: Form, image: Image, detections: Detections, info: ModelInfo) -> bytes:
    """Encode a whole answer in this thread."""
    encoder = encoder_for(form)
    parts = encoder.split(detections)
    return encoder.join([list(encoder.encode(image, part, info, should_stop=never)) for part in parts])
