"""`roiserve train`: from a COCO-format folder to a model in the store. Words and progress bars only; the work is
done by `service/training`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.commands._data import AnnotatedOption, DropOption, LabelsOption, chosen_labels, load_with_words
from service.commands._options import DeviceOption
from service.errors import DatasetError, InvalidRequestError

if TYPE_CHECKING:
    from service.training.evaluation import Evaluation
    from service.training.loop import Best, TrainConfig, Trainer
    from service.training.loop import Progress as TrainingProgress


def train(
    data: Annotated[Path, typer.Option(help="Folder with train.json, val.json and images/ (COCO format).")],
    model_config: Annotated[
        Path | None, typer.Option(help="model.toml that describes the network; its weights do not count.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the model is written: STORE/NAME/VERSION.")] = None,
    suggest: Annotated[
        bool,
        typer.Option(
            "--suggest",
            help="Train nothing: write a model.toml fitted to the data into --model-config, else DATA/model.toml.",
        ),
    ] = False,
    start_from: Annotated[
        Path | None, typer.Option(help="Folder of a stored model (STORE/NAME/VERSION) whose weights to fine-tune.")
    ] = None,
    backbone_weights: Annotated[
        Path | None,
        typer.Option(
            help="Published weights of the trunk to start from: torchvision's or timm's file for a classifier."
        ),
    ] = None,
    labels: LabelsOption = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training pictures.")] = 20,
    images_per_step: Annotated[int, typer.Option(min=1, help="Pictures in one optimiser step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="AdamW's highest.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's.")] = 0.05,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps until the learning rate is reached.")] = 100,
    crop_size: Annotated[
        int, typer.Option(min=32, help="Side of the training pictures, in pixels after resizing.")
    ] = 384,
    min_scale: Annotated[float, typer.Option(min=0.1, help="Least random scale, as a factor.")] = 0.7,
    max_scale: Annotated[float, typer.Option(max=10, help="Greatest random scale, as a factor.")] = 1.4,
    flips: Annotated[bool, typer.Option(help="Mirror pictures and turn them by quarters.")] = True,
    colour: Annotated[float, typer.Option(min=0, max=1, help="Strength of random colour changes.")] = 0.5,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Epochs between evaluations on val.json.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="A run with the same seed repeats.")] = 0,
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of convolutions and matrix products; auto is bfloat16 on CUDA, else float32."),
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the network; 0: one a core.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Threads that prepare pictures; 0: one a core.")] = 0,
    store_as: Annotated[Literal["float32", "float16"], typer.Option(help="Format of the weights on disk.")] = "float16",
    drop_bad_annotations: DropOption = False,
    annotated: AnnotatedOption = "auto",
    data_name: Annotated[
        str | None, typer.Option(help="For the model card: what the data are, with their source.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="For the model card: under which terms the weights are.")] = None,
    attribution: Annotated[str | None, typer.Option(help="For the model card: whom to name.")] = None,
) -> None:
    """Train a model on COCO-format data, from scratch or from another model's weights.

    An interrupted run resumes when the same command is given again. The checkpoint with the best validation AP (of
    masks where there are any, else of boxes) becomes the model.

    Example: roiserve train --data cells --model-config model_store/nuclei/1/model.toml --out model_store/cells/1
    """
    import torch

    from service.cores import available_cores
    from service.devices import choose_device
    from service.model_store.model_toml import ProvenanceTable, read_model_config
    from service.training.export import check_room, export_model, load_initial_weights, target_of
    from service.training.loop import Trainer
    from service.training.run_folder import locked
    from service.training.trunk_weights import load_trunk_weights

    if suggest:
        _suggest(data, model_config or data / "model.toml", chosen_labels(labels), drop_bad_annotations, annotated)
        return
    if model_config is None or out is None:
        raise typer.BadParameter("expected --model-config FILE and --out STORE/NAME/VERSION, or --suggest")
    if start_from is not None and backbone_weights is not None:
        raise typer.BadParameter("expected --start-from or --backbone-weights, got both")
    if threads:
        torch.set_num_threads(threads)
    target = target_of(out)
    config = read_model_config(model_config)
    if (only := chosen_labels(labels)) is not None:
        config = config.model_copy(update={"labels": only})
    target_device = choose_device(device)
    initial_weights = None
    if start_from is not None:
        initial_weights = load_initial_weights(start_from, config)
    elif backbone_weights is not None:
        initial_weights = load_trunk_weights(backbone_weights, config)
    sets = {
        split: load_with_words(
            data / f"{split}.json",
            labels=config.labels,
            leaves_out_others=only is not None,
            masks="required" if config.has_masks else "none",
            drop_bad=drop_bad_annotations,
            frame=annotated,
        )
        for split in ("train", "val")
    }
    for split, dataset in sets.items():
        if not sum(dataset.counts().values()):
            raise DatasetError(f"{data / split}.json: expected at least one object to train and evaluate on, got none")
    if precision == "auto":
        precision = "bfloat16" if target_device.runs_ahead else "float32"
    trainer = Trainer(
        model_config=config,
        train_config=_train_config(
            epochs=epochs,
            images_per_step=images_per_step,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            crop_size=crop_size,
            scale_range=(min_scale, max_scale),
            flips=flips,
            colour=colour,
            precision=precision,
            evaluate_every=evaluate_every,
            seed=seed,
        ),
        train=sets["train"],
        val=sets["val"],
        state_path=target.state_path,
        device=target_device.torch_device,
        initial_weights=initial_weights,
        workers=workers or available_cores(),
    )
    with locked(target.state_path.parent):
        check_room(target, trainer.state_bytes)
        try:
            best = _run_with_progress(trainer)
        except KeyboardInterrupt:
            _tell_where_it_stopped(trainer, target.state_path)
            raise typer.Exit(130) from None
        stored = export_model(
            target,
            config=config,
            best=best,
            val=sets["val"],
            dtype=store_as,
            provenance=ProvenanceTable(
                data=data_name or str(data),
                licence=licence,
                attribution=attribution,
                command=shlex.join(["roiserve", *sys.argv[1:]]),
            ),
            device=target_device.torch_device,
            findings={split: dataset.report.lines() for split, dataset in sets.items()},
            history=trainer.history,
        )
    typer.echo(f"{stored.key} is in {stored.path}, from epoch {best.epoch}")


def _suggest(
    data: Path,
    path: Path,
    labels: tuple[str, ...] | None,
    drop_bad: bool,
    frame: Literal["auto", "upright", "stored"],
) -> None:
    from service.training.suggesting import suggest, suggestion_text

    if path.exists():
        raise InvalidRequestError(f"{path} exists already; --model-config says where else the suggestion may go")
    dataset = load_with_words(
        data / "train.json",
        labels=labels,
        leaves_out_others=labels is not None,
        masks="if_any",
        drop_bad=drop_bad,
        frame=frame,
    )
    suggestion = suggest(dataset)
    try:
        path.write_text(suggestion_text(suggestion, source=str(data)), encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be written: {error.strerror}") from error
    typer.echo(f"{path} is written: {suggestion.words()}")


def _train_config(**values: object) -> TrainConfig:
    from pydantic import ValidationError

    from service.training.loop import TrainConfig

    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r}" for one in error.errors()]
        raise InvalidRequestError("; ".join(problems)) from None


def _tell_where_it_stopped(trainer: Trainer, state_path: Path) -> None:
    typer.echo(
        f"stopped in step {trainer.step + 1} of {trainer.num_steps}; "
        + (
            f"the same command resumes at step {trainer.saved_step}, whose state is in {state_path}"
            if trainer.saved_step
            else "no state was written yet, so the same command starts anew"
        ),
        err=True,
    )


def _run_with_progress(trainer: Trainer) -> Best:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from service.training.figures import percent

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    averages: dict[str, float] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=trainer.num_steps)

        def on_start(step: int) -> None:
            if step:
                console.print(f"resuming at step {step} of {trainer.num_steps}, where an earlier run stopped")
            progress.update(task, completed=step)

        def on_step(now: TrainingProgress) -> None:
            for name, loss in now.losses.items():
                averages[name] = 0.95 * averages.get(name, loss) + 0.05 * loss
            # Beside the bar there is room for their sum alone; lines of a log, and training.csv, have each.
            progress.update(
                task, completed=now.step, description=f"epoch {now.epoch}  loss {sum(averages.values()):.3f}"
            )
            if not console.is_terminal and now.step % 10 == 0:
                losses = "  ".join(f"{name} {value:.3f}" for name, value in averages.items())
                console.print(f"step {now.step}/{now.num_steps}  epoch {now.epoch}  {losses}", soft_wrap=True)

        def on_evaluation(epoch: int, evaluation: Evaluation) -> None:
            figures = "  ".join(
                f"{kind} AP {percent(ap.ap)} AP50 {percent(ap.ap50)} AP75 {percent(ap.ap75)}"
                for kind, ap in evaluation.rows()
            )
            console.print(f"epoch {epoch}: val {figures} (percent)", soft_wrap=True)

        return trainer.run(on_start=on_start, on_step=on_step, on_evaluation=on_evaluation)
