"""The `roiserve` command: mounts the subcommands of `commands/` and turns our errors into words. Nothing heavy is
imported before a command runs.
"""

from __future__ import annotations

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


def main() -> None:
    """Run the command line; an error of ours is one line and status 1, not a traceback."""
    try:
        app(prog_name="roiserve")
    except ServiceError as error:
        print(f"roiserve: {error}", file=sys.stderr)
        sys.exit(1)
