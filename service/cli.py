"""The `roiserve` command: mounts the subcommands of `commands/` and turns our errors into words. Nothing heavy is
imported before a command runs.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Annotated

import typer

from service.commands._help import plain
from service.commands.bench import bench
from service.commands.compare import compare
from service.commands.data import data_app
from service.commands.detect import detect
from service.commands.evaluate import evaluate
from service.commands.models import models_app
from service.commands.quantize import quantize
from service.commands.serve import serve_command
from service.commands.train import train
from service.errors import ServiceError
from service.logs import TextFormatter

app = typer.Typer(
    name="roiserve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(f"roiserve {version('roiserve')}")
        raise typer.Exit


@app.callback()
@plain
def roiserve(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Detections from images: serve, train, evaluate and manage models of the R-CNN family."""


app.command("serve")(serve_command())
app.add_typer(models_app)
app.add_typer(data_app, name="data")
for command in (detect, train, evaluate, compare, quantize, bench):
    app.command(command.__name__)(plain(command))


# A disk that is full or may not be written to is nobody's bug, wherever a command meets it.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def let_waiting_threads_sleep() -> None:
    """Have PyTorch's waiting threads leave their cores to others, in this process and those that it starts.

    Call this before torch is imported: OpenMP reads its variables when its library is loaded. A variable that is set
    stays.
    """
    # Threads that wait for PyTorch's next loop would otherwise spin for milliseconds on the cores where OpenVINO, our
    # own kernels and the decoders run: OpenVINO's calls then take a sixth longer. Not 0: PyTorch's loops follow each
    # other closely, and waking threads for each costs more than so short a wait.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def import_nothing_from_here() -> None:
    """Keep the processes that this one starts from importing modules from the current folder."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def main() -> None:
    """Run the command line; an error of ours, or of the disk, is one line and status 1, not a traceback."""
    let_waiting_threads_sleep()
    import_nothing_from_here()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal lacks must not end a command, perhaps after hours.
            stream.reconfigure(errors="replace")
    # All commands but `serve` configure no log; their warnings go here, which by default leaves out the fields.
    if logging.lastResort:
        logging.lastResort.setFormatter(TextFormatter())
    try:
        app(prog_name="roiserve")
    except ServiceError as error:
        print(f"roiserve: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"roiserve: {error.filename or 'a file'}: cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
