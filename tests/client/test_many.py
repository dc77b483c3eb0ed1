"""Many images: bounded concurrency, outcomes as they come, and files that go on after a break."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

import roiserve_client
from roiserve_client import (
    Answer,
    AsyncClient,
    Client,
    FolderSummary,
    Outcome,
    ProblemError,
    ResultsFileError,
    UnreachableError,
    read_results,
    write_coco_results,
)
from roiserve_client.cli import main
from roiserve_client.progress import ProgressLine
from tests.client.conftest import Connect, Driver
from tests.fakes import picture
from tests.integration.conftest import Live

PICTURE = picture(red=204)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(roiserve_client.__file__).parent.parent)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, one of them broken, one below, and a file that is none."""
    root = tmp_path / "pictures"
    (root / "below").mkdir(parents=True)
    for name in ("a.png", "c.PNG", "below/d.png"):
        (root / name).write_bytes(PICTURE)
    (root / "b.png").write_bytes(b"broken")
    (root / "notes.txt").write_text("no picture")
    return root


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_thousand_files_with_a_broken_one_in_the_middle(live: Live, connect: Connect, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(1000)]
    for path in paths:
        path.write_bytes(PICTURE)
    paths[500].write_bytes(b"broken")
    paths[800].unlink()
    outcomes = connect(live.url).many(paths, masks="none", max_detections=1)
    assert [one.index for one in outcomes] == list(range(1000))
    assert [one.image for one in outcomes] == paths
    failed = {one.index: one.error for one in outcomes if one.answer is None}
    assert set(failed) == {500, 800}
    assert isinstance(failed[500], ProblemError)
    assert failed[500].code == "unsupported_image"
    assert isinstance(failed[800], FileNotFoundError)
    assert {tuple(one.answer.labels) for one in outcomes if one.answer} == {("cat",)}
    with pytest.raises(FileNotFoundError):
        outcomes[800].result()


def test_so_many_at_a_time_and_images_taken_as_they_are_needed(serve: Callable[..., Live], connect: Connect) -> None:
    live = serve(max_batch_size=1)
    taken: list[int] = []

    def endless() -> Iterator[bytes]:
        for index in itertools.count():
            taken.append(index)
            yield PICTURE

    def release_when_three_wait() -> None:
        live.wait_for_metric(DEPTH, 3)
        live.release_device()

    first = live.hold_device()
    driver = connect(live.url)
    seen: list[Outcome] = []
    watching = threading.Thread(target=release_when_three_wait)
    watching.start()
    take(driver, endless(), seen, 5)
    watching.join()
    assert len(seen) == 5
    assert len(taken) <= 5 + 2 * 3
    assert first.result().status_code == 200


DEPTH = 'roiserve_queue_depth{model="fake@1"}'


def take(driver: Driver, images: Iterator[bytes], seen: list[Outcome], number: int) -> None:
    """Take so many outcomes of three at a time, and leave."""
    if isinstance(driver.client, Client):
        outcomes = driver.client.detect_many(images, concurrency=3, masks="none")
        seen += itertools.islice(outcomes, number)
        outcomes.close()
        return
    client = driver.client

    async def some() -> None:
        outcomes = client.detect_many(images, concurrency=3, masks="none")
        async for outcome in outcomes:
            seen.append(outcome)
            if len(seen) == number:
                break
        await outcomes.aclose()

    driver._run(some())


def test_error_of_the_source_is_the_callers(live: Live, connect: Connect) -> None:
    def source() -> Iterator[bytes]:
        yield PICTURE
        raise RuntimeError("the camera broke")

    with pytest.raises(RuntimeError, match="the camera broke"):
        connect(live.url).many(source())


@pytest.mark.parametrize("concurrency", [0, -1])
def test_no_concurrency_is_refused(connect: Connect, concurrency: int) -> None:
    with pytest.raises(ValueError, match="a concurrency of at least 1"):
        connect("http://127.0.0.1:9").many([], concurrency=concurrency)


async def test_cancelled_async_run_leaves_nothing_behind(serve: Callable[..., Live]) -> None:
    live = serve()
    first = live.hold_device()
    async with AsyncClient(live.url) as client:

        async def run() -> None:
            async for _ in client.detect_many([PICTURE] * 50):
                raise AssertionError("nothing can come")

        task = asyncio.create_task(run())
        while await asyncio.to_thread(live.metric, DEPTH) < 8:
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
    live.release_device()
    assert first.result().status_code == 200


def test_folder_becomes_lines(live: Live, connect: Connect, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    summary = connect(live.url).detect_folder(folder, out, score_thresh=0.5, labels=["cat"])
    assert summary == FolderSummary(answered=3, failed=1, skipped=0)
    found = {one["file"]: one for one in lines(out)}
    assert set(found) == {"a.png", "b.png", "c.PNG", "below/d.png"}
    assert found["b.png"]["error"]["code"] == "unsupported_image"
    assert found["b.png"]["error"]["request_id"]
    assert found["below/d.png"]["detections"][0]["label"] == "cat"
    assert {json.dumps(one["options"]) for one in lines(out)} == {'{"score_thresh": 0.5, "labels": ["cat"]}'}


def test_second_run_does_only_what_is_left(live: Live, connect: Connect, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    client = connect(live.url)
    client.detect_folder(folder, out)
    whole = out.read_bytes()
    cut = whole[: whole.rindex(b"\n", 0, -1) + 30]  # as a crash leaves it
    out.write_bytes(cut)
    lost = json.loads(whole.splitlines()[-1])["file"]
    (folder / "b.png").write_bytes(PICTURE)
    (folder / "new.png").write_bytes(PICTURE)
    summary = client.detect_folder(folder, out)
    redone = {"b.png", "new.png", lost}
    assert summary == FolderSummary(answered=len(redone), failed=0, skipped=5 - len(redone))
    assert {one["file"] for one in lines(out)[3:]} >= {"new.png"}
    results = dict(read_results(out))
    assert len(results) == 5
    assert all(isinstance(one, Answer) for one in results.values())
    assert client.detect_folder(folder, out) == FolderSummary(0, 0, 5)


def test_file_of_other_options_is_not_continued(live: Live, connect: Connect, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    client = connect(live.url)
    client.detect_folder(folder, out, score_thresh=np.float32(0.5))
    before = out.read_bytes()
    with pytest.raises(ResultsFileError, match=r"written with the options \{'score_thresh': 0\.5\}, not \{\}"):
        client.detect_folder(folder, out)
    assert out.read_bytes() == before
    (tmp_path / "x").write_text("{}\n")
    with pytest.raises(ResultsFileError, match="is not a file of results"):
        client.detect_folder(folder, tmp_path / "x")
    with pytest.raises(NotADirectoryError, match="no such folder"):
        client.detect_folder(tmp_path / "no", out)


@pytest.mark.parametrize("content", [b'{"images": [], "categories": []}', b"\x89PNG", b'{"fil', b""])
def test_only_an_unfinished_line_of_results_is_cut_off(
    live: Live, connect: Connect, folder: Path, tmp_path: Path, content: bytes
) -> None:
    (out := tmp_path / "val.json").write_bytes(content)
    client = connect(live.url)
    if b'{"file":'.startswith(content):
        assert client.detect_folder(folder, out).answered == 3
        assert len(lines(out)) == 4
    else:
        with pytest.raises(ResultsFileError, match="is not a file of results"):
            client.detect_folder(folder, out)
        assert out.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "code"), [({"model": "x"}, "model_not_found"), ({"score_thresh": 7}, "invalid_request")]
)
def test_error_that_all_pictures_would_meet_ends_the_run(
    live: Live, connect: Connect, folder: Path, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ProblemError) as raised:
        connect(live.url).detect_folder(folder, tmp_path / "r.jsonl", **options)
    assert raised.value.code == code
    assert (tmp_path / "r.jsonl").read_bytes() == b""


def test_empty_picture_fails_alone(live: Live, connect: Connect, folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").write_bytes(b"")
    summary = connect(live.url).detect_folder(folder, tmp_path / "r.jsonl")
    assert (summary.answered, summary.failed) == (3, 1)


def test_server_that_is_gone_ends_the_run(connect: Connect, folder: Path, tmp_path: Path) -> None:
    client = connect("http://127.0.0.1:9", retries=0)
    with pytest.raises(UnreachableError):
        client.detect_folder(folder, tmp_path / "r.jsonl")


def test_results_are_what_pycocotools_reads(live: Live, folder: Path, tmp_path: Path) -> None:
    results, annotations, out = (tmp_path / name for name in ("r.jsonl", "val.json", "coco.json"))
    images = [
        {"id": 7, "file_name": "elsewhere/a.png", "height": 48, "width": 64},
        {"id": 9, "file_name": "below/d.png", "height": 48, "width": 64},
        {"id": 11, "file_name": "b.png", "height": 48, "width": 64},
        {"id": 12, "file_name": "c.PNG", "height": 48, "width": 64},
    ]
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    annotations.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    with Client(live.url) as client:
        client.detect_folder(folder, results)
    assert write_coco_results(results, annotations, out) == ["b.png"]
    truth = COCO(str(annotations))
    found = truth.loadRes(str(out))
    assert sorted(found.getImgIds(catIds=[17])) == [7, 9, 12]
    [cat] = found.loadAnns(found.getAnnIds(imgIds=[7], catIds=[17]))
    assert cat["bbox"] == [0, 0, 32, 48]
    assert truth.annToMask(cat).sum() > 0
    annotations.write_text(json.dumps({"images": images[1:], "categories": categories}))
    with pytest.raises(ResultsFileError, match=r"no image called a\.png"):
        write_coco_results(results, annotations, out)
    annotations.write_text(json.dumps({"images": images, "categories": categories[1:]}))
    with pytest.raises(ResultsFileError, match="no category is called 'cat'"):
        write_coco_results(results, annotations, out)


def test_progress_says_how_far_it_is() -> None:
    stream = io.StringIO()
    line = ProgressLine(4, stream)
    for has_failed in (False, True, False, False):
        line.add(has_failed=has_failed)
    line.finish()
    shown = stream.getvalue()
    assert shown.startswith("\r[######..................] 1/4, ")
    assert " left" in shown
    last = shown.rsplit("\r", 1)[1]
    assert last.startswith("[########################] 4/4, ")
    assert last.rstrip().endswith("/s, 1 failed")


def test_progress_of_nothing_is_no_error() -> None:
    stream = io.StringIO()
    ProgressLine(0, stream).finish()
    assert "0/0" in stream.getvalue()


def test_command(live: Live, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    arguments = ["detect", str(folder), "--out", str(out), "--url", live.url, "--label", "cat", "--masks", "rle"]
    assert main([*arguments]) == 1
    assert capsys.readouterr().out == f"3 answered, 1 failed, 0 were there: {out}\n"
    (folder / "b.png").unlink()
    assert main([*arguments]) == 0
    assert capsys.readouterr().out == f"0 answered, 0 failed, 3 were there: {out}\n"
    annotations = tmp_path / "val.json"
    images = [{"id": index, "file_name": name} for index, name in enumerate(("a.png", "c.PNG", "d.png", "e.png"))]
    annotations.write_text(json.dumps({"images": images, "categories": [{"id": 3, "name": "cat"}]}))
    assert main(["coco", str(out), str(annotations), "--out", str(tmp_path / "c.json")]) == 1
    assert capsys.readouterr().err == "1 annotated images have no answer, such as e.png\n"
    assert {one["category_id"] for one in json.loads((tmp_path / "c.json").read_text())} == {3}


def test_interrupted_command_does_not_wait_for_answers(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        arguments = ["detect", str(folder), "--out", str(tmp_path / "r.jsonl"), "--url", url, "--timeout", "1000"]
        # A shell's background jobs ignore SIGINT, and so do the processes that they start.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        command = subprocess.Popen([sys.executable, "-m", "roiserve_client.cli", *arguments], env=ENVIRONMENT)
        signal.signal(signal.SIGINT, previous)
        try:
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(1)
                command.send_signal(signal.SIGINT)
                assert command.wait(timeout=100) == 130
        finally:
            command.kill()
            command.wait()


def test_command_says_what_was_wrong(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", str(tmp_path / "no"), "--out", str(tmp_path / "r"), "--url", live.url]) == 2
    assert main(["models", "--url", "x"]) == 2
    words = capsys.readouterr()
    assert words.err.startswith("roiserve-client: no such folder: ")
    assert "expected a URL such as http://127.0.0.1:8000, got 'x'" in words.err
    for content in ("", "[]", '{"images": []}', '{"images": [7], "categories": []}'):
        (tmp_path / "val.json").write_text(content)
        (tmp_path / "r.jsonl").touch()
        assert main(["coco", str(tmp_path / "r.jsonl"), str(tmp_path / "val.json"), "--out", str(tmp_path / "c")]) == 2
        assert "val.json: expected COCO's JSON with images and categories" in capsys.readouterr().err
    assert main(["models", "--url", live.url]) == 0
    words = capsys.readouterr()
    assert words.out.splitlines()[0] == "fake@1: mask_rcnn, eager float32, default"


def test_command_takes_its_key_from_the_environment(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(api_keys="alpha").url
    assert main(["models", "--url", url]) == 2
    monkeypatch.setenv("ROISERVE_API_KEY", "alpha")
    assert main(["models", "--url", url]) == 0
