"""`roiserve compare`: one model under several RoI operators, on one data set. Words, tables and progress bars only; the
work is done by `service/training/comparing.py`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.commands._options import DEFAULT_STORE, DeviceOption, EngineCacheOption, StoreOption

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from service.inference.predictor import Predictor
    from service.modeling.config import ModelConfig
    from service.training.comparing import Run
    from service.training.dataset import CocoDataset
    from service.training.loop import TrainConfig
    from service.training.proposals import ProposalCache

Precision = Literal["float32", "bfloat16"]


def compare(
    data: Annotated[Path, typer.Option(help="COCO-format annotation file to evaluate on, such as DIR/val.json.")],
    roi_op: Annotated[
        str, typer.Option(metavar="OP,OP,…", help="RoI operators of the box and the mask branch, with commas between.")
    ] = "roi_pool,roi_align",
    model: Annotated[
        str | None, typer.Option(metavar="NAME[@VERSION]", help="The model; without a version its default or highest.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="With --retrain, instead of --model: model.toml that describes the network.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table into this Markdown file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures as bars into this SVG file.")] = None,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = "auto",
    engine_cache_dir: EngineCacheOption = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the model's network anew for each operator, from random weights.")
    ] = False,
    train_data: Annotated[
        Path | None, typer.Option(help="With --retrain: folder with train.json and images/ (COCO format).")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="With --retrain: passes over the training pictures.")] = 20,
    seeds: Annotated[
        int, typer.Option(min=1, help="With --retrain: runs of each operator, with the seeds 0, 1, …; gives a spread.")
    ] = 1,
    images_per_step: Annotated[int, typer.Option(min=1, help="With --retrain: pictures in one optimiser step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="With --retrain: AdamW's highest.")] = 1e-3,
    warmup_steps: Annotated[int, typer.Option(min=0, help="With --retrain: steps until it is reached.")] = 100,
    crop_size: Annotated[
        int, typer.Option(min=32, help="With --retrain: side of the training pictures, in pixels after resizing.")
    ] = 384,
    precision: Annotated[
        Precision, typer.Option(help="With --retrain: of convolutions and matrix products in training.")
    ] = "float32",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the network; 0: one a core.")] = 0,
    runs_dir: Annotated[
        Path, typer.Option(help="With --retrain: where the runs keep their state, from which the same command resumes.")
    ] = Path("runs/compare"),
) -> None:
    """Evaluate one set of weights under several RoI operators, or train each from the same seed.

    Example: roiserve compare --model nuclei --data cells/val.json --roi-op roi_pool,roi_align --out compared.md
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from service.commands._data import load_with_words
    from service.inference.loading import interchangeable_ops, load_predictor
    from service.model_store.model_toml import read_model_config
    from service.model_store.store import ModelStore
    from service.training.comparing import busy_note, markdown
    from service.training.comparison_plot import draw_bars
    from service.training.dataset import load_coco
    from service.training.loop import TrainConfig
    from service.training.proposals import ProposalCache

    # Before this command makes its own load.
    remark = busy_note(os.getloadavg()[0], os.cpu_count() or 1)
    if threads:
        torch.set_num_threads(threads)
    if retrain != (train_data is not None):
        raise typer.BadParameter("--retrain and --train-data DIR belong together")
    if (model is None) == (model_config is None) or (model_config is not None and not retrain):
        raise typer.BadParameter("expected either --model NAME, or --retrain with --model-config FILE")
    stored = None if model is None else ModelStore(store).find(model)
    name: str
    config: ModelConfig
    if stored is not None:
        name, config = stored.key, stored.model_toml
    else:
        assert model_config is not None  # one of the two is given
        name, config = model_config.stem, read_model_config(model_config)
    ops = _operators(roi_op, interchangeable_ops(config), name)
    val = load_with_words(
        data,
        labels=config.labels,
        leaves_out_others=False,
        masks="if_any" if config.has_masks else "none",
        drop_bad=False,
        frame="auto",
    )
    with Progress(console=Console(stderr=True)) as progress, TemporaryDirectory() as folder:
        # Searched for once, for all operators, and in no picture's time.
        proposals = None if config.has_rpn else ProposalCache(Path(folder), config.proposals)
        if train_data is None:
            assert stored is not None  # only --retrain takes a configuration alone
            predictor = load_predictor(stored, device=device, cache_dir=engine_cache_dir)
            runs = list(_measure_each(predictor, ops, val, proposals, progress))
        else:
            train = load_coco(
                train_data / "train.json", labels=config.labels, masks="required" if config.has_masks else "none"
            )
            train_configs = [
                TrainConfig(
                    epochs=epochs,
                    images_per_step=images_per_step,
                    learning_rate=learning_rate,
                    warmup_steps=warmup_steps,
                    crop_size=crop_size,
                    precision=precision,
                    # The last weights count, so that nothing is chosen by what it is then measured by.
                    evaluate_every=epochs,
                    seed=seed,
                )
                for seed in range(seeds)
            ]
            runs = list(
                _retrain_each(name, config, ops, train_configs, train, val, proposals, device, runs_dir, progress)
            )
    title = f"{name} on {len(val)} pictures of {data}"
    _print_table(title, runs)
    if remark is not None:
        typer.echo(f"note: {remark}", err=True)
    if out is not None:
        out.write_text(
            markdown(runs, title=title, command=shlex.join(["roiserve", *sys.argv[1:]]), remark=remark),
            encoding="utf-8",
        )
    if plot is not None:
        plot.write_text(draw_bars(runs, title=title), encoding="utf-8")


def _operators(text: str, known: Sequence[str], model: str) -> list[str]:
    ops = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [op for op in ops if op not in known] or ([] if ops else [text]):
        choices = ", ".join(known) or "no other than its own"
        why = ", as its sampling_ratio is 0, adaptive" if known and unknown[0] == "roi_warp" else ""
        raise typer.BadParameter(f"{model} cannot take the RoI operator {unknown[0]!r}{why}; it can take: {choices}")
    return ops


def _measure_each(
    predictor: Predictor, ops: Sequence[str], val: CocoDataset, proposals: ProposalCache | None, progress: Progress
) -> Iterator[Run]:
    from service.training.comparing import measure

    for op in ops:
        task = progress.add_task(op, total=len(val))

        def advance(task: TaskID = task) -> None:
            progress.advance(task)

        yield measure(predictor, val, roi_op=op, proposals=proposals, advance=advance)


def _retrain_each(
    name: str,
    config: ModelConfig,
    ops: Sequence[str],
    train_configs: Sequence[TrainConfig],
    train: CocoDataset,
    val: CocoDataset,
    proposals: ProposalCache | None,
    device: str,
    runs_dir: Path,
    progress: Progress,
) -> Iterator[Run]:
    from service.devices import choose_device
    from service.training.comparing import measure, retrain
    from service.training.loop import Progress as TrainingProgress

    for train_config in train_configs:
        for op in ops:
            task = progress.add_task(f"{op}, seed {train_config.seed}", total=None)

            def on_step(now: TrainingProgress, task: TaskID = task) -> None:
                progress.update(task, completed=now.step, total=now.num_steps)

            predictor = retrain(
                config,
                roi_op=op,
                train_config=train_config,
                train=train,
                val=val,
                state_path=runs_dir / f"{name}-{op}-{train_config.seed}" / "state.pt",
                device=choose_device(device).torch_device,
                on_step=on_step,
            )
            yield measure(predictor, val, roi_op=op, proposals=proposals)


def _print_table(title: str, runs: Sequence[Run]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from service.training.comparing import COLUMNS, table
    from service.training.figures import NOTE

    # The operator's name stays whole in a narrow terminal.
    operator = Column(COLUMNS[0], no_wrap=True, min_width=max(len(run.roi_op) for run in runs))
    printed = Table(operator, *COLUMNS[1:], title=title, title_justify="left", box=None, pad_edge=False)
    for row in table(runs):
        printed.add_row(*row)
    printed.caption, printed.caption_justify = NOTE, "left"
    Console().print(printed)
