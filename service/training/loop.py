"""The training loop: data in, best weights by validation AP out. A run is a function of its seed and configuration:
batches, augmentation and sampling depend on (seed, step) alone, so a run that was interrupted and resumed takes the
same steps as one that was not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from service.errors import ServiceError, first_line
from service.inference.loading import describe
from service.inference.predictor import Predictor
from service.model_store.weights import load_into
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import ModelInfo
from service.training.augmentation import Augmentation, TrainingPicture, augment
from service.training.dataset import CocoDataset
from service.training.evaluation import AveragePrecision, Evaluation, evaluate
from service.training.history import History, Row
from service.training.proposals import ProposalCache

PREFETCHED_BATCHES = 4
Weights = dict[str, Tensor]


class TrainConfig(BaseModel):
    """How a network is trained. Lengths are in pixels of the resized image.

    Attributes:
        epochs: passes over the training pictures.
        images_per_step: pictures in one optimiser step.
        learning_rate: AdamW's, reached after `warmup_steps` and lowered along a half cosine to 1 % of it.
        weight_decay: AdamW's, for matrices and kernels only.
        max_gradient_norm: gradients are clipped to this norm.
        ema_decay: decay per step of the exponential moving average of the weights, which is what is evaluated and kept.
        crop_size, scale_range, flips, colour, noise, blur: see `Augmentation`.
        precision: `bfloat16` runs convolutions and matrix products in it; losses and boxes stay float32.
        evaluate_every: epochs between evaluations on the validation split.
        seed: of everything random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(20, ge=1)
    images_per_step: int = Field(4, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int = Field(100, ge=0)
    max_gradient_norm: float = Field(5.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    crop_size: int = Field(384, ge=32, le=4096)
    scale_range: tuple[float, float] = (0.7, 1.4)
    flips: bool = True
    colour: float = Field(0.5, ge=0, le=1)
    noise: float = Field(8.0, ge=0)
    blur: float = Field(1.0, ge=0)
    precision: str = Field("float32", pattern="^(float32|bfloat16)$")
    evaluate_every: int = Field(5, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _scales_rise(self) -> Self:
        low, high = self.scale_range
        if not 0 < low <= high:
            raise ValueError(f"expected 0 < min_scale <= max_scale, got {low} and {high}")
        return self

    def augmentation(self) -> Augmentation:
        """The part that `augment` needs."""
        return Augmentation(
            crop_size=self.crop_size,
            scale_range=self.scale_range,
            flips=self.flips,
            colour=self.colour,
            noise=self.noise,
            blur=self.blur,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """After a step: where the run is and what its losses were."""

    step: int
    num_steps: int
    epoch: int
    losses: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The best checkpoint so far by validation AP (of masks where there are any, else of boxes)."""

    weights: Weights
    evaluation: Evaluation
    epoch: int

    @property
    def ap(self) -> float:
        """The figure by which checkpoints are compared."""
        figures = self.evaluation.masks or self.evaluation.boxes
        return figures.ap


class Trainer:
    """One training run.

    Args:
        model_config: the network.
        train_config: how it is trained.
        train: pictures to learn from; its labels are the network's.
        val: pictures to choose the checkpoint by.
        state_path: where the run's state is kept, so that the same call continues it.
        device: where to train.
        initial_weights: weights to start from, by name; random for the rest.
        workers: threads that prepare pictures. Their number does not affect results.

    Attributes:
        history: the losses and figures so far.
    """

    def __init__(
        self,
        *,
        model_config: ModelConfig,
        train_config: TrainConfig,
        train: CocoDataset,
        val: CocoDataset,
        state_path: Path,
        device: torch.device,
        initial_weights: Weights | None = None,
        workers: int = 2,
    ) -> None:
        self._model_config = model_config
        self._config = train_config
        self._train = train
        self._val = val
        self._state_path = state_path
        self._device = device
        self._workers = workers
        self._start_digest = _digest(initial_weights or {})
        self._proposals = None if model_config.has_rpn else ProposalCache(state_path.parent, model_config.proposals)
        torch.manual_seed(train_config.seed)
        self._model = build_model(model_config).to(device)
        if not _crashes_in_channels_last(self._model):
            self._model.to(memory_format=torch.channels_last)
        if initial_weights is not None:
            self._model.load_state_dict(initial_weights, strict=False)
        # Training pictures are already at the serving scale; the transform only normalises and batches them.
        self._model.transform._skip_resize = True
        self._optimizer = _build_optimizer(self._model, train_config)
        self._average: Weights = {key: value.clone() for key, value in self._model.state_dict().items()}
        self._step = 0
        self._best: Best | None = None
        self._saved_step = 0
        self.history = History()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the training pictures."""
        return math.ceil(len(self._train) / self._config.images_per_step)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self._config.epochs

    @property
    def step(self) -> int:
        """Steps taken so far, including those before an interruption."""
        return self._step

    @property
    def saved_step(self) -> int:
        """The step from which the same call would resume."""
        return self._saved_step

    @property
    def state_bytes(self) -> int:
        """Approximate size of the state on disk: weights, their average, the best ones, and AdamW's two moments."""
        return 5 * sum(value.numel() * value.element_size() for value in self._average.values())

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda step: None,
        on_step: Callable[[Progress], None] = lambda progress: None,
        on_evaluation: Callable[[int, Evaluation], None] = lambda epoch, evaluation: None,
        save_every_steps: int = 20,
    ) -> Best:
        """Train to the end, from the saved state if there is one.

        Args:
            on_start: called with the number of steps taken by earlier calls.
            on_step: called after every step.
            on_evaluation: called with the epoch after every evaluation.
            save_every_steps: how often the state is written.

        Returns:
            The best checkpoint by validation AP.

        Raises:
            ServiceError: the losses are no longer finite, or the saved state belongs to another run or cannot be
                written.
        """
        self._resume()
        on_start(self._step)
        self._model.train()
        for pictures in self._batches():
            losses = self._take_step(pictures)
            self._step += 1
            self.history.add_losses(losses)
            epoch = math.ceil(self._step / self.steps_per_epoch)
            on_step(Progress(self._step, self.num_steps, epoch, losses))
            if self._step % self.steps_per_epoch == 0 and (
                epoch % self._config.evaluate_every == 0 or epoch == self._config.epochs
            ):
                evaluation = self._evaluate(epoch)
                self._save(epoch, evaluation)
                on_evaluation(epoch, evaluation)
            elif self._step % save_every_steps == 0:
                self._save(epoch)
        assert self._best is not None  # the last epoch is always evaluated
        return self._best

    def _take_step(self, pictures: list[TrainingPicture]) -> dict[str, float]:
        config, step = self._config, self._step
        # RPN and RoI sampling draw from torch's generator; seeding it by step makes a resumed run repeat.
        torch.manual_seed(config.seed * 1_000_003 + step)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.warmup_steps, self.num_steps)
        images = [torch.from_numpy(one.pixels).to(self._device).permute(2, 0, 1).float().div_(255) for one in pictures]
        targets = [_target(one, self._device) for one in pictures]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            losses = self._model(images, targets)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            raise ServiceError(
                f"the losses are no longer finite at step {step}: "
                + ", ".join(f"{name}={float(loss.detach()):.3g}" for name, loss in losses.items())
                + "; try a lower learning rate"
            )
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), config.max_gradient_norm)
        self._optimizer.step()
        self._update_average()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        # The early average follows the weights closely; a random start would otherwise linger in it.
        decay = min(self._config.ema_decay, (1 + self._step) / (10 + self._step))
        for key, value in self._model.state_dict().items():
            if value.is_floating_point():
                self._average[key].lerp_(value, 1 - decay)
            else:
                self._average[key].copy_(value)

    def _evaluate(self, epoch: int) -> Evaluation:
        evaluation = evaluate(evaluation_predictor(self._model_config, self._average, self._device), self._val)
        candidate = Best({key: value.cpu().clone() for key, value in self._average.items()}, evaluation, epoch)
        if self._best is None or candidate.ap >= self._best.ap:
            self._best = candidate
        return evaluation

    def _batches(self) -> Iterator[list[TrainingPicture]]:
        """The remaining batches, prepared in threads a few steps ahead (OpenCV and Pillow release the GIL)."""
        with ThreadPoolExecutor(max_workers=self._workers, thread_name_prefix="augment") as pool:
            pending: list[Future[list[TrainingPicture]]] = []
            for step in range(self._step, self.num_steps):
                pending.append(pool.submit(self._prepare_batch, step))
                if len(pending) > max(PREFETCHED_BATCHES, 2 * self._workers):
                    yield pending.pop(0).result()
            for future in pending:
                yield future.result()

    def _prepare_batch(self, step: int) -> list[TrainingPicture]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self._config.seed, epoch)).permutation(len(self._train))
        first = place * self._config.images_per_step
        # The last batch of an epoch is filled up from the epoch's beginning: BatchNorm wants full batches.
        chosen = np.take(order, range(first, first + self._config.images_per_step), mode="wrap")
        rng = np.random.default_rng((self._config.seed, step, 1))
        return [self._prepare(int(index), rng) for index in chosen]

    def _prepare(self, index: int, rng: np.random.Generator) -> TrainingPicture:
        sample = self._train.samples[index]
        red, green, blue = (channel * 255 for channel in self._model_config.transform.mean)
        return augment(
            sample,
            scale=self._model.transform.scale(sample.image_size),
            augmentation=self._config.augmentation(),
            fill=(red, green, blue),
            rng=rng,
            proposals=None if self._proposals is None else self._proposals.of(sample),
        )

    def _save(self, epoch: int, evaluation: Evaluation | None = None) -> None:
        rate = self._optimizer.param_groups[0]["lr"]
        self.history.close_row(step=self._step, epoch=epoch, learning_rate=rate, evaluation=evaluation)
        state = {
            "run": self._fingerprint(),
            "step": self._step,
            "model": self._model.state_dict(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "best": None if self._best is None else _best_to_dict(self._best),
            "history": [asdict(row) for row in self.history.rows],
        }
        temporary = self._state_path.with_suffix(".tmp")
        try:
            self._state_path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, temporary)
            temporary.replace(self._state_path)
            self._state_path.with_name("training.csv").write_text(self.history.csv(), encoding="utf-8")
        except (OSError, RuntimeError) as error:  # on a full disk torch's zip writer raises a RuntimeError
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
            raise ServiceError(
                f"{self._state_path}: the run's state cannot be written: {reason}; that of step {self._saved_step} is "
                "kept, and the same command resumes there"
            ) from error
        self._saved_step = self._step

    def _resume(self) -> None:
        if not self._state_path.exists():
            return
        try:
            state = torch.load(self._state_path, map_location=self._device, weights_only=True)
            run = state["run"]
        except Exception as error:  # torch raises nearly anything on a damaged file
            raise ServiceError(
                f"{self._state_path}: the run's state cannot be read: {first_line(error)}; remove it to start anew"
            ) from error
        fingerprint = self._fingerprint()
        known = run if isinstance(run, dict) else {}
        if other := [part for part, value in fingerprint.items() if known.get(part) != value]:
            raise ServiceError(
                f"{self._state_path} holds the state of a run with another {', '.join(other)}; "
                "remove it to start anew, or repeat the command that began it"
            )
        self._step = self._saved_step = state["step"]
        self._model.load_state_dict(state["model"])
        self._average = state["average"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._best = None if state["best"] is None else _best_from_dict(state["best"])
        self.history = History([Row(**row) for row in state["history"]])

    def _fingerprint(self) -> dict[str, str]:
        """What identifies a run, under names that can appear in a message."""
        return {
            "network": self._model_config.model_dump_json(),
            "configuration of training": self._config.model_dump_json(),
            "training set": self._train.fingerprint,
            "validation set": self._val.fingerprint,
            "start weights": self._start_digest,
        }


def _digest(weights: Weights) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _crashes_in_channels_last(model: nn.Module) -> bool:
    """Whether oneDNN's backward pass would write out of bounds. In torch 2.14.1 it does so for a strided 1 x 1
    convolution of fewer than 16 channels in channels-last format.
    """
    return any(
        isinstance(one, nn.Conv2d) and one.kernel_size == (1, 1) and one.stride != (1, 1) and one.in_channels < 16
        for one in model.modules()
    )


def _build_optimizer(model: GeneralizedRCNN, config: TrainConfig) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )


def _schedule(step: int, warmup_steps: int, num_steps: int) -> float:
    """Linear warm-up, then a half cosine from 1 to 0.01."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _target(picture: TrainingPicture, device: torch.device) -> dict[str, Tensor]:
    target = {
        "boxes": torch.from_numpy(picture.boxes).to(device),
        "labels": torch.from_numpy(picture.labels).to(device),
    }
    if picture.masks is not None:
        target["masks"] = torch.from_numpy(picture.masks).to(device)
    if picture.proposals is not None:
        target["proposals"] = torch.from_numpy(picture.proposals).to(device)
    return target


def evaluation_predictor(config: ModelConfig, weights: Weights, device: torch.device) -> Predictor:
    """A network that is not in a store yet, on its device, ready to be evaluated."""
    model = build_model(config.searching())
    load_into(model, weights, source="the checkpoint")
    return Predictor(model.to(device), info=evaluation_info(config), device=device)


def evaluation_info(config: ModelConfig) -> ModelInfo:
    """The `ModelInfo` of a network that is not in a store yet."""
    return describe(config.searching(), name="training", version=0, precision="float32", device="cpu")


def _best_to_dict(best: Best) -> dict[str, Any]:
    return {"weights": best.weights, "evaluation": asdict(best.evaluation), "epoch": best.epoch}


def _best_from_dict(state: dict[str, Any]) -> Best:
    evaluation = state["evaluation"]
    masks = evaluation["masks"]
    figures = {
        **evaluation,
        "boxes": AveragePrecision(**evaluation["boxes"]),
        "masks": None if masks is None else AveragePrecision(**masks),
    }
    return Best(state["weights"], Evaluation(**figures), state["epoch"])
