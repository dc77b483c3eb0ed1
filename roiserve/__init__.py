"""RoIServe in Python: the names that programs may rely on. They live in the package `service`; see docs/python.md.

A name is imported when it is first used, so that `import roiserve` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.app import create_app
    from service.imaging.decode import ImageLimits, decode_image
    from service.inference.loading import load_predictor
    from service.inference.predictor import Predictor
    from service.masks.polygons import encode_polygons
    from service.masks.rle import encode_rle
    from service.model_store.store import ModelStore, StoredModel
    from service.modeling.build import build_model
    from service.modeling.config import ModelConfig
    from service.ops import crop, roi_align, roi_align_max, roi_pool, roi_warp, spp
    from service.settings import Settings
    from service.structures import Detections, DetectOptions, Image, Prediction, Query

_HOMES = {
    "service.app": ("create_app",),
    "service.imaging.decode": ("ImageLimits", "decode_image"),
    "service.inference.loading": ("load_predictor",),
    "service.inference.predictor": ("Predictor",),
    "service.masks.polygons": ("encode_polygons",),
    "service.masks.rle": ("encode_rle",),
    "service.model_store.store": ("ModelStore", "StoredModel"),
    "service.modeling.build": ("build_model",),
    "service.modeling.config": ("ModelConfig",),
    "service.ops": ("crop", "roi_align", "roi_align_max", "roi_pool", "roi_warp", "spp"),
    "service.settings": ("Settings",),
    "service.structures": ("DetectOptions", "Detections", "Image", "Prediction", "Query"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = version("roiserve")
__all__ = [
    "DetectOptions",
    "Detections",
    "Image",
    "ImageLimits",
    "ModelConfig",
    "ModelStore",
    "Prediction",
    "Predictor",
    "Query",
    "Settings",
    "StoredModel",
    "build_model",
    "create_app",
    "crop",
    "decode_image",
    "encode_polygons",
    "encode_rle",
    "load_predictor",
    "roi_align",
    "roi_align_max",
    "roi_pool",
    "roi_warp",
    "spp",
]


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'roiserve' has no attribute {name!r}")
        return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
