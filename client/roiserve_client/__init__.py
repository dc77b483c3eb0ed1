"""The client of RoIServe, a server for two-stage detectors: images in; boxes, labels, scores and masks out.

`Client` is for threads, `AsyncClient` for asyncio; both have the same methods. The names below are the public
interface.
"""

from roiserve_client.answers import Answer, Detection, ImageInfo, Model
from roiserve_client.async_client import AsyncClient
from roiserve_client.client import Client
from roiserve_client.errors import (
    DeadlineExceededError,
    ImageError,
    NoAnswerError,
    ProblemError,
    ResultsFileError,
    RoIServeError,
    UnexpectedAnswerError,
    UnreachableError,
)
from roiserve_client.images import ImageLike
from roiserve_client.masks import Mask
from roiserve_client.options import AnnotateOptions, DetectOptions
from roiserve_client.results import FolderSummary, Outcome, read_results, write_coco_results
from roiserve_client.version import __version__

__all__ = [
    "AnnotateOptions",
    "Answer",
    "AsyncClient",
    "Client",
    "DeadlineExceededError",
    "DetectOptions",
    "Detection",
    "FolderSummary",
    "ImageError",
    "ImageInfo",
    "ImageLike",
    "Mask",
    "Model",
    "NoAnswerError",
    "Outcome",
    "ProblemError",
    "ResultsFileError",
    "RoIServeError",
    "UnexpectedAnswerError",
    "UnreachableError",
    "__version__",
    "read_results",
    "write_coco_results",
]
