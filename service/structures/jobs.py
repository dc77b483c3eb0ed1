"""A job: one image as it arrived, what to find in it, and the form of the answer. NumPy arrays and bytes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from service.structures.detections import DetectOptions, UInt8Array
from service.structures.progress import Progress

MaskFormat = Literal["rle", "polygons", "png", "crop", "none"]
RoboflowMasks = Literal["points", "rle", "none"]
RegionType = Literal["rectanglelabels", "polygonlabels", "brushlabels"]
"""What Label Studio calls rectangles, polygons and brush strokes."""
Intensity = Literal["full", "stretch"]
PictureType = Literal["image/png", "image/jpeg"]
DrawnPart = Literal["boxes", "masks", "labels", "scores"]
ALL_DRAWN_PARTS: tuple[DrawnPart, ...] = get_args(DrawnPart)

# A rough figure for JPEG photographs; and the size to which networks resize large images.
_PIXELS_PER_BYTE = 8
_MOST_LIKELY_PIXELS = 1344 * 1344
# Networks enlarge small pictures, and part of the time does not depend on size. So a tiny picture must not count as
# next to nothing, or the first one would make the device look slow.
_LEAST_LIKELY_PIXELS = 250_000


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An image as the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file.

    Attributes:
        intensity: how 16-bit grey becomes 8-bit: from its full range, or stretched between its own smallest and largest
            values, which 12-bit camera images in 16-bit files need.
    """

    data: bytes
    intensity: Intensity = "full"


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """An image that its sender has already decoded.

    Attributes:
        array: (H, W, 3) uint8 RGB, C-contiguous.
    """

    array: UInt8Array


Source = Encoded | Pixels


@dataclass(frozen=True, slots=True)
class Json:
    """An answer as our JSON, with masks in one of several formats."""

    masks: MaskFormat = "none"


@dataclass(frozen=True, slots=True)
class Drawing:
    """An answer as the image with the detections drawn into it.

    Attributes:
        type: media type of the picture.
        parts: what to draw; None for a choice that suits the image, see `imaging/overlay.py`.
    """

    type: PictureType = "image/png"
    parts: Sequence[DrawnPart] | None = None


@dataclass(frozen=True, slots=True)
class Tensors:
    """An answer as named arrays, see `answers/tensors.py`."""


@dataclass(frozen=True, slots=True)
class Coco:
    """An answer as COCO results, which `pycocotools` evaluates.

    Attributes:
        image_id: of the image, in the data set that it belongs to.
        with_masks: whether results have a segmentation.
        category_ids: the data set's category for each of the model's labels, in order; None for the label's own id.
    """

    image_id: int | str
    with_masks: bool = False
    category_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Roboflow:
    """An answer as the `predictions` of Roboflow's inference server, with masks as points or run lengths."""

    masks: RoboflowMasks = "none"


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """An answer as Hugging Face's tasks `object-detection` and, with masks, `image-segmentation` have it."""

    with_masks: bool = False


@dataclass(frozen=True, slots=True)
class Cvat:
    """An answer as the shapes that CVAT's functions return: masks, or else rectangles."""

    with_masks: bool = False


@dataclass(frozen=True, slots=True)
class LabelStudioTag:
    """A tag of a Label Studio project that takes objects as regions.

    Attributes:
        from_name: the tag's name.
        to_name: the name of the image's tag.
        labels: the tag's label for each of the model's labels, in order; None where it has none.
        score_thresh: it takes what scores above this.
    """

    type: RegionType
    from_name: str
    to_name: str
    labels: tuple[str | None, ...]
    score_thresh: float


@dataclass(frozen=True, slots=True)
class LabelStudio:
    """An answer as a prediction of Label Studio, with a region for each object in every tag that takes it.

    Attributes:
        model_version: what the prediction says of the model.
    """

    model_version: str
    tags: tuple[LabelStudioTag, ...]

    @property
    def with_masks(self) -> bool:
        """Whether any tag takes masks."""
        return any(tag.type != "rectanglelabels" for tag in self.tags)


Form = Json | Drawing | Tensors | Coco | Roboflow | HuggingFace | Cvat | LabelStudio


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    """One image, what to find in it, and the form of the answer.

    Attributes:
        model: the key of a loaded model, name@version.
        source: the image as it arrived.
        form: the form of the answer.
        deadline: when the caller stops waiting, in seconds of `time.monotonic`.
        is_bulk: whether it is one of many that may take their time.
        entries: most entries of the batcher, such as tiles, that are made of the image at a time. Each needs a place,
            so there must not be more than the detector's capacity.
    """

    model: str
    source: Source
    options: DetectOptions
    form: Form
    deadline: float
    progress: Progress
    is_bulk: bool = False
    entries: int = 1

    @property
    def likely_pixels(self) -> int:
        """Roughly how many pixels the network will see: a guess from what is known without decoding."""
        if isinstance(self.source, Pixels):
            pixels = self.source.array.size // 3
        else:
            pixels = _PIXELS_PER_BYTE * len(self.source.data)
        return min(max(_LEAST_LIKELY_PIXELS * self.entries, pixels), _MOST_LIKELY_PIXELS * self.entries)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The result of a job.

    Attributes:
        image_size: (height, width) of the upright image, the frame of the boxes.
        detections: how many there are.
        batch_size: how many images shared the batch.
        pieces: the detections in the form that the job asked for; a long answer arrives from a worker in pieces.
        batch_id: identifies the batch.
        left_out: how many of the detections have labels for which the form has no place.
    """

    image_size: tuple[int, int]
    orientation_applied: bool
    detections: int
    batch_size: int
    pieces: Sequence[bytes]
    batch_id: str = ""
    left_out: int = 0

    @property
    def encoded(self) -> bytes:
        """All pieces together, which takes a copy."""
        return b"".join(self.pieces)

    @property
    def num_bytes(self) -> int:
        """The length of all pieces together."""
        return sum(map(len, self.pieces))
