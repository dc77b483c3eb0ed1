"""The command `roiserve-client`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from roiserve_client.async_client import AsyncClient
from roiserve_client.client import Client
from roiserve_client.errors import RoIServeError
from roiserve_client.results import FolderSummary, write_coco_results
from roiserve_client.version import __version__

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0, 1 if pictures failed, 2 if nothing could be done.
    """
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (RoIServeError, OSError, ValueError) as error:
        print(f"roiserve-client: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("roiserve-client", description="Ask a RoIServe server.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    detect = commands.add_parser(
        "detect",
        help="find the objects in a folder of pictures",
        description="Find the objects in all pictures of a folder, and write one JSON object a line. Run it again to "
        "go on after a break: pictures that have an answer in the file are left out. Exit status 1: some failed.",
    )
    detect.add_argument("folder", type=Path, metavar="FOLDER", help="the pictures, also those in folders below")
    detect.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the answers go")
    detect.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (8)")
    detect.add_argument("--timeout", type=float, metavar="SECONDS", help="for each picture (60)")
    detect.add_argument("--model", metavar="NAME[@VERSION]", help="the server's default if unset")
    detect.add_argument("--score-thresh", type=float, metavar="S", help="keep scores above this, 0 to 1")
    detect.add_argument("--max-detections", type=int, metavar="N", help="keep at most so many, best first")
    detect.add_argument("--label", action="append", metavar="NAME", help="keep only this label; may be repeated")
    detect.add_argument("--masks", choices=["rle", "polygons", "png", "crop", "none"], help="form of the masks")
    _add_server(detect)
    detect.set_defaults(run=_detect)

    models = commands.add_parser("models", help="list the loaded models")
    _add_server(models)
    models.set_defaults(run=_models)

    coco = commands.add_parser("coco", help="turn such a file into COCO's results, for pycocotools")
    coco.add_argument("results", type=Path, metavar="FILE.jsonl")
    coco.add_argument("annotations", type=Path, metavar="ANNOTATIONS.json", help="COCO's, with images and categories")
    coco.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    coco.set_defaults(run=_coco)
    return parser


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (http://127.0.0.1:8000)")
    parser.set_defaults(api_key=os.environ.get("ROISERVE_API_KEY"))
    parser.epilog = "A key is taken from the environment variable ROISERVE_API_KEY."


def _detect(given: argparse.Namespace) -> int:
    # Not by `Client`, whose requests under way would keep Ctrl+C waiting until their answers or their timeout.
    summary = asyncio.run(_detect_folder(given))
    print(f"{summary.answered} answered, {summary.failed} failed, {summary.skipped} were there: {given.out}")
    return 1 if summary.failed else 0


async def _detect_folder(given: argparse.Namespace) -> FolderSummary:
    async with AsyncClient(given.url, api_key=given.api_key) as client:
        return await client.detect_folder(
            given.folder,
            given.out,
            concurrency=given.concurrency,
            timeout=given.timeout,
            progress=sys.stderr.isatty(),
            model=given.model,
            score_thresh=given.score_thresh,
            max_detections=given.max_detections,
            labels=given.label,
            masks=given.masks,
        )


def _models(given: argparse.Namespace) -> int:
    with Client(given.url, api_key=given.api_key) as client:
        for model in client.models():
            default = ", default" if model.is_default else ""
            print(f"{model.name}@{model.version}: {model.architecture}, {model.engine} {model.precision}{default}")
    return 0


def _coco(given: argparse.Namespace) -> int:
    missing = write_coco_results(given.results, given.annotations, given.out)
    if missing:
        print(f"{len(missing)} annotated images have no answer, such as {missing[0]}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
