"""A stored model in memory, as a predictor in any precision and with any quantisers, before any of it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from service.devices import device_named
from service.errors import ServiceError
from service.inference.engines.choosing import put_engine
from service.inference.engines.folding import fold
from service.inference.engines.openvino import OpenVinoNetwork
from service.inference.loading import describe
from service.inference.predictor import Predictor
from service.inference.verification import Reference
from service.model_store.quantizers import Quantizers
from service.model_store.store import StoredModel
from service.model_store.weights import load_into, rounded_to_int8
from service.modeling.build import build_model
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import Verification

NONE = Quantizers()


def check_quantizable(stored: StoredModel) -> None:
    """Check that a model is in float and proposes boxes itself.

    Raises:
        ServiceError: it is not.
        ModelStoreError: its `model.toml` is broken.
    """
    config = stored.model_toml
    if config.int8 is not None:
        raise ServiceError(f"{stored.key} is in int8 already; name the version that it was made of")
    if not config.has_rpn:
        raise ServiceError(f"expected a network that proposes boxes itself, got a {config.architecture}")


class Workbench:
    """The model that is to be quantised.

    Args:
        stored: with an RPN.
        cache_dir: for what OpenVINO compiles.

    Raises:
        ServiceError: it cannot be quantised.
        ModelStoreError: it is broken.
    """

    def __init__(self, stored: StoredModel, *, cache_dir: Path) -> None:
        check_quantizable(stored)
        self.stored = stored
        self.config = stored.model_toml
        self.weights: Mapping[str, Tensor] = stored.load_weights()
        self._cache_dir = cache_dir
        self._device = device_named("cpu")

    def network(self, quantizers: Quantizers = NONE) -> GeneralizedRCNN:
        """The plain network in float32, with weights as a version with these quantisers would store them."""
        model = build_model(self.config)
        weights = {
            key: rounded_to_int8(value) if key in quantizers.weights else value for key, value in self.weights.items()
        }
        load_into(model, weights, source=self.stored.key)
        return model.eval()

    def graphs(self) -> OpenVinoNetwork:
        """The source of the parts' graphs in float32."""
        model = self.network()
        fold(model)
        return OpenVinoNetwork(model, key="", precision="float32", cache_dir=self._cache_dir)

    def predictor(self, precision: str, quantizers: Quantizers = NONE) -> Predictor:
        """A predictor by OpenVINO.

        Args:
            quantizers: for int8.
        """
        return self.predictor_of(self.network(quantizers), precision, quantizers)

    def differences(self, quantizers: Quantizers) -> Verification:
        """How far int8 is from float32 in the check that runs whenever a model is loaded."""
        model = self.network(quantizers)
        # No difference is too large here.
        anything = dict.fromkeys(("boxes", "scores", "masks"), float("inf"))
        reference = Reference(model, config=self.config, device=self._device, int8_tolerances=anything)
        self.predictor_of(model, "int8", quantizers)
        return reference.hold(model, engine="openvino", precision="int8")

    def predictor_of(self, model: GeneralizedRCNN, precision: str, quantizers: Quantizers) -> Predictor:
        """A predictor of a network from here, whose parts it replaces."""
        placed = put_engine(
            model,
            engine="openvino",
            device=self._device,
            precision=precision,
            key=f"{self.config.model_dump_json()} {sorted(quantizers.weights)}",
            cache_dir=self._cache_dir,
            quantizers=quantizers,
        )
        info = describe(
            self.config,
            name=self.stored.name,
            version=self.stored.version,
            engine=placed.engine,
            precision=precision,
            device="cpu",
        )
        return Predictor(model, info=info, device=torch.device("cpu"))
