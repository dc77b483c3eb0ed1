"""The `roiserve` command: mounts the subcommands of `commands/` and turns our errors into words. Nothing heavy is
imported before a command runs.
"""

from __future__ import annotations

import os
import sys

import typer

from service.commands.bench import bench
from service.commands.compare import compare
from service.commands.detect import detect
from service.commands.evaluate import evaluate
from service.commands.models import models_app
from service.commands.serve import serve_command
from service.commands.train import train
from service.errors import ServiceError

app = typer.Typer(
    name="roiserve",
    help="Detections from images: serve, train, evaluate and manage models of the R-CNN family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve_command())
app.add_typer(models_app)
app.command("detect")(detect)
app.command("train")(train)
app.command("evaluate")(evaluate)
app.command("compare")(compare)
app.command("bench")(bench)


def let_waiting_threads_sleep() -> None:
    """Have PyTorch's waiting threads leave their cores to others, in this process and those that it starts.

    To be called before torch is imported, for OpenMP reads its variables as it is loaded. A variable that is set stays.
    """
    # Threads that wait for PyTorch's next loop would spin for milliseconds on the cores where OpenVINO, our own kernels
    # and the decoders run meanwhile: OpenVINO's calls take a sixth longer then. Not 0: PyTorch's loops follow closely
    # on each other, and to wake threads for each costs more than so short a wait.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def import_nothing_from_here() -> None:
    """Keep the processes that this one starts from importing modules out of the folder that they are started in."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def main() -> None:
    """Run the command line; an error of ours is one line and status 1, not a traceback."""
    let_waiting_threads_sleep()
    import_nothing_from_here()
    try:
        app(prog_name="roiserve")
    except ServiceError as error:
        print(f"roiserve: {error}", file=sys.stderr)
        sys.exit(1)
