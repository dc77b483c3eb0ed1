"""The page at `/`, used as a person uses it, in a real browser against the real app. Whatever a test does, the console
must stay empty (so the page keeps to its own content security policy), and no other server may be asked for anything.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect
from pycocotools import mask as coco

from service.imaging.overlay import _PALETTE
from service.structures import Detections, Query
from tests.fakes import FAKE_BOXES_INFO, FakePredictor, picture
from tests.integration.conftest import Live, running

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "service" / "api" / "page"
AXE = ROOT / ".tools" / "axe.min.js"
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HTML = {"Accept": "text/html,*/*"}
expect.set_options(timeout=60_000)


class TwoOperators(FakePredictor):
    """With `roi_pool`, boxes lie six pixels further to the right, and dogs are not found."""

    def _detect(self, query: Query) -> Detections:
        found = super()._detect(query)
        if query.options.roi_op != "roi_pool":
            return found
        cats = found[np.flatnonzero(found.labels == 1)]
        assert cats.masks is not None
        return Detections(cats.boxes + np.array([6, 0, 6, 0], np.float32), cats.labels, cats.scores, cats.masks)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with two models, which lets callers choose the operator."""
    with running(TwoOperators(), [FakePredictor(FAKE_BOXES_INFO)], allow_roi_op_override=True) as live:
        live.wait_until_ready()
        yield live


class Visit:
    """A tab of the browser with our page.

    Attributes:
        page: the tab.
        asked: the requests for detections, in order.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.asked: list[Request] = []
        self._errors: list[str] = []
        self._hosts: set[str] = set()
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self._errors.append(str(error)))
        self.page.on("request", self._watch)

    def _note(self, kind: str, text: str) -> None:
        # The browser itself logs every answer that is an error; those are what some tests are about.
        if kind == "error" and not text.startswith("Failed to load resource"):
            self._errors.append(text)

    def _watch(self, request: Request) -> None:
        if request.url.startswith("http"):
            self._hosts.add(request.url.split("/")[2])
        if "/v1/detect" in request.url:
            self.asked.append(request)

    def open(self, live: Live, hash: str = "", prefix: str = "") -> Page:
        self.page.goto(f"{live.url}{prefix}/{hash}")
        return self.page

    def give(self, content: bytes, name: str = "a.png", type: str = "image/png") -> None:
        """Choose a file."""
        self.page.locator("#file").set_input_files({"name": name, "mimeType": type, "buffer": content})

    def check(self) -> None:
        assert self._errors == []
        assert len(self._hosts) <= 1


@pytest.fixture
def visits(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens tabs, each in a browser profile of its own."""
    contexts: list[BrowserContext] = []
    made: list[Visit] = []

    def visit(**options: Any) -> Visit:
        contexts.append(browser.new_context(**{"viewport": DESK, **options}))
        made.append(Visit(contexts[-1]))
        return made[-1]

    yield visit
    for one in made:
        one.check()
    for context in contexts:
        context.close()


@pytest.fixture
def visit(visits: Callable[..., Visit]) -> Visit:
    return visits()


def status(page: Page) -> Locator:
    return page.locator("#status")


def rows(page: Page) -> Locator:
    return page.locator("#body tr:visible")


def farm(red: int = 204, green: tuple[int, int, int, int] = (40, 10, 60, 30)) -> bytes:
    """A picture with a cat of the score red / 255, its left half, and a dog, its green part, of a tenth of that."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[..., 0] = red
    x1, y1, x2, y2 = green
    pixels[y1:y2, x1:x2, 1] = 255
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def set_slider(page: Page, name: str, value: float) -> None:
    """Move a slider as the keyboard does: input events, then change."""
    slider = page.locator(f"#{name}")
    slider.evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true}));"
        "slider.dispatchEvent(new Event('change', {bubbles: true})); }",
        value,
    )


# Bringing a picture.


def test_example_takes_one_click(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    page.get_by_role("button", name="Blood smear").click()
    expect(status(page)).to_have_text("1 object above 0.50")
    assert "example=blood-smear-1.jpg" in page.url
    assert page.locator("#picture").get_attribute("aria-label") == "blood-smear-1.jpg with 1 object"


def test_file_drop_paste_and_camera_bring_a_picture(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    bring: dict[str, Callable[[], None]] = {
        "chosen.png": lambda: visit.give(farm(), "chosen.png"),
        "dropped.png": lambda: hand_over(page, "drop", "dataTransfer", "dropped.png"),
        "pasted.png": lambda: hand_over(page, "paste", "clipboardData", "pasted.png"),
        "camera.jpg": lambda: take_photo(page),
    }
    for name, act in bring.items():
        act()
        expect(page.locator("#picture")).to_have_attribute("aria-label", re.compile(rf"{name} with \d objects?"))
    assert [request.headers["content-type"] for request in visit.asked] == [*3 * ["image/png"], "image/jpeg"]


def hand_over(page: Page, event: str, carrier: str, name: str) -> None:
    page.evaluate(
        """([event, carrier, name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            const made = carrier === "dataTransfer" ? new DragEvent(event, {dataTransfer: data, bubbles: true})
                : new ClipboardEvent(event, {clipboardData: data, bubbles: true});
            document.body.dispatchEvent(made);
        }""",
        [event, carrier, name, list(farm())],
    )


def take_photo(page: Page) -> None:
    page.get_by_role("button", name="Camera").click()
    page.get_by_role("button", name="Take the picture").click()


def test_camera_that_is_slow_to_start_can_be_used_once_it_shows_something(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    page.evaluate(
        """() => {
            const track = new MediaStreamTrackGenerator({kind: "video"});
            const frames = track.writable.getWriter();
            const canvas = new OffscreenCanvas(64, 48);
            canvas.getContext("2d").fillRect(0, 0, 64, 48);
            navigator.mediaDevices.getUserMedia = async () => new MediaStream([track]);
            window.start = () => frames.write(new VideoFrame(canvas, {timestamp: 0}));
        }"""
    )
    page.get_by_role("button", name="Camera").click()
    shoot = page.get_by_role("button", name="Take the picture")
    expect(shoot).to_be_disabled()
    page.evaluate("start()")
    expect(shoot).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#picture")).to_have_attribute("aria-label", "camera.jpg with 0 objects")


def test_picture_that_the_browser_cannot_show_comes_from_the_server(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    visit.give(picture(red=204, image_format="TIFF"), "a.tif", "image/tiff")
    expect(page.locator("#picture")).to_have_attribute("aria-label", "a.tif with 1 object")
    assert colour_at(page, 48, 24)[:3] == [204, 0, 0]


def colour_at(page: Page, x: float, y: float) -> list[int]:
    """The colour on the screen at a place of a picture of 64 x 48 pixels, all of which is shown."""
    colour: list[int] = page.evaluate(
        """([x, y]) => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => {
            const canvas = document.getElementById("picture");
            const scale = Math.min(canvas.width / 64, canvas.height / 48);
            const at = [(canvas.width - 64 * scale) / 2 + x * scale, (canvas.height - 48 * scale) / 2 + y * scale];
            resolve([...canvas.getContext("2d").getImageData(...at, 1, 1).data]);
        })))""",
        [x, y],
    )
    return colour


def place_of(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where that place lies in the window."""
    box = page.locator("#picture").bounding_box()
    assert box is not None
    scale = min(box["width"] / 64, box["height"] / 48)
    left, top = box["x"] + (box["width"] - 64 * scale) / 2, box["y"] + (box["height"] - 48 * scale) / 2
    return left + x * scale, top + y * scale


# Looking at the answer.


def test_slider_and_labels_filter_without_asking_again(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    visit.give(farm())
    expect(rows(page)).to_have_count(1)
    set_slider(page, "score", 0.05)
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="cat 1").click()
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("dog")
    assert page.get_by_role("button", name="cat 1").get_attribute("aria-pressed") == "false"
    set_slider(page, "score", 0.9)
    expect(page.get_by_text("Nothing scores that high")).to_be_visible()
    assert len(visit.asked) == 1
    assert "score_thresh=0.05" in visit.asked[0].url


def test_pointer_and_focus_highlight_an_object_and_its_row_together(visit: Visit, live: Live) -> None:
    page = visit.open(live, "#score=0.05&opacity=0.4&names=0")
    visit.give(farm())
    cat, dog = page.locator("#body tr", has_text="cat"), page.locator("#body tr", has_text="dog")
    expect(dog).to_have_attribute("aria-selected", "false")
    plain = colour_at(page, 50, 20)
    page.mouse.move(*place_of(page, 50, 20))
    expect(dog).to_have_attribute("aria-selected", "true")
    assert colour_at(page, 50, 20) != plain
    page.mouse.move(*place_of(page, 10, 20))
    expect(cat).to_have_attribute("aria-selected", "true")
    expect(dog).to_have_attribute("aria-selected", "false")
    page.mouse.move(*place_of(page, 62, 40))
    expect(cat).to_have_attribute("aria-selected", "false")
    cat.focus()
    expect(cat).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowDown")
    expect(dog).to_be_focused()
    expect(dog).to_have_attribute("aria-selected", "true")
    assert colour_at(page, 50, 20) != plain


def test_picture_can_be_walked_and_zoomed_with_keys(visit: Visit, live: Live) -> None:
    page = visit.open(live, "#score=0.05&names=0")
    visit.give(farm(green=(40, 10, 46, 16)))
    expect(rows(page)).to_have_count(2)
    page.locator("#picture").focus()
    page.keyboard.press("ArrowRight")
    expect(status(page)).to_have_text("cat, score 0.80")
    page.keyboard.press("ArrowRight")
    expect(status(page)).to_have_text("dog, score 0.08")
    assert colour_at(page, 34, 24) == [204, 0, 0, 255]
    page.keyboard.press("Enter")  # now the dog is in the middle
    assert colour_at(page, 34, 24) != [204, 0, 0, 255]
    page.keyboard.press("0")
    assert colour_at(page, 34, 24) == [204, 0, 0, 255]


def test_everything_is_reached_with_tab(visit: Visit, live: Live) -> None:
    page = visit.open(live, "#compare=roi_pool")
    visit.give(farm())
    expect(page.locator("#sides")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
    controls = {"choose", "camera", "picture", "zoom-in", "model", "roi-op", "compare", "score", "opacity", "masks"}
    assert controls | {"boxes", "names", "side", "form", "snippet", "copy", "download"} <= reached


def test_masks_have_the_colours_of_the_annotated_picture(visit: Visit, live: Live) -> None:
    page = visit.open(live, "#score=0.05&opacity=1&names=0")
    visit.give(farm())
    expect(rows(page)).to_have_count(2)
    assert colour_at(page, 10, 20) == [*_PALETTE[0], 255]
    assert colour_at(page, 50, 20) == [*_PALETTE[1], 255]
    palette = (PAGE / "colours.js").read_text().partition("PALETTE = ")[2].partition(";")[0]
    assert json.loads(palette.replace(",\n]", "]")) == [list(colour) for colour in _PALETTE]


def test_bar_shows_the_time_of_each_stage(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    visit.give(farm())
    for stage in ("decode", "queue", "inference", "encode", "transfer"):
        expect(page.locator(f"#timings li.{stage}")).to_contain_text("ms")
    expect(page.get_by_role("img", name="Time by stage")).to_be_visible()


def test_options_stand_in_the_address_and_come_from_it(visit: Visit, live: Live) -> None:
    page = visit.open(live, "#model=fake&score=0.07&roi_op=roi_pool&masks=0&opacity=0.8&boxes=1")
    visit.give(farm())
    expect(rows(page)).to_have_count(1)
    assert "roi_op=roi_pool" in visit.asked[0].url
    assert page.locator("#masks").is_checked() is False
    assert page.locator("#boxes").is_checked() is True
    set_slider(page, "score", 0.3)
    set_slider(page, "opacity", 0.4)
    page.locator("#masks").check()
    page.select_option("#roi-op", "")
    expect(page).to_have_url(f"{live.url}/#model=fake&score=0.3&boxes=1")
    page.select_option("#model", "fake-boxes")
    expect(page.locator("#masks")).to_be_hidden()
    expect(status(page)).to_have_text("1 object above 0.50")
    assert "model=fake-boxes" in visit.asked[-1].url


# Two operators.


def test_two_operators_are_compared_at_one_place(visit: Visit, live: Live) -> None:
    page = visit.open(live, "#score=0.05&opacity=1&names=0")
    visit.give(farm())
    expect(rows(page)).to_have_count(2)
    page.select_option("#compare", "roi_pool")
    expect(page.locator("#comparison")).to_have_text(
        "1 in both, 1 only with roi_align, 0 only with roi_pool. Edges of boxes differ by 6.00 px at the median, "
        "6.00 px at most; scores by 0.000, 0.000 at most."
    )
    # The same request twice, but for the operator.
    first, second = (request.url for request in visit.asked[-2:])
    assert second == f"{first}&roi_op=roi_pool"
    expect(rows(page).first).to_contain_text("6.00")
    cat = [*_PALETTE[0], 255]
    assert (colour_at(page, 10, 20), colour_at(page, 1, 20)) == (cat, cat)
    page.locator("#sides").get_by_text("roi_pool").click()
    assert (colour_at(page, 10, 20), colour_at(page, 1, 20)) == (cat, [204, 0, 0, 255])
    page.get_by_text("Difference").click()
    within, only_first, only_second = (colour_at(page, x, 20) for x in (16, 1, 36))
    assert within[2] < 10
    assert only_first[2] > 150 > only_first[0]
    assert only_second[0] > 150 > only_second[2]
    page.get_by_text("Blink").click()
    shown = page.locator("#sides")
    expect(shown).to_have_attribute("data-side", "b")
    expect(shown).to_have_attribute("data-side", "a")
    expect(shown).to_have_attribute("data-side", "b")
    assert "show=blink" in page.url


def test_nothing_blinks_for_those_who_want_no_motion(visits: Callable[..., Visit], live: Live) -> None:
    visit = visits(reduced_motion="reduce")
    page = visit.open(live, "#compare=roi_pool&show=blink")
    visit.give(farm())
    expect(page.locator("#sides label")).to_have_count(3)
    expect(page.locator("#sides")).to_have_attribute("data-side", "a")


def test_server_that_keeps_its_operator_says_how_to_change_that(visit: Visit, serve: Callable[..., Live]) -> None:
    page = visit.open(serve())
    expect(page.locator("#roi-note")).to_contain_text("ROISERVE_ALLOW_ROI_OP_OVERRIDE=true")
    expect(page.locator("#compare")).to_be_disabled()


# Taking it along.


def test_commands_find_what_the_page_shows(visit: Visit, live: Live, tmp_path: Path) -> None:
    page = visit.open(live, "#score=0.06")
    content = farm()
    visit.give(content, "it's.png")
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="cat 1").click()
    (tmp_path / "it's.png").write_bytes(content)
    command = page.locator("#snippet").inner_text()
    found = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True).stdout
    [dog] = json.loads(found)["detections"]
    page.get_by_text("Python").click()
    program = page.locator("#snippet").inner_text()
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == f"dog {round(dog['score'], 3)} {dog['box']}\n"
    page.get_by_text("JSON", exact=True).click()
    assert json.loads(page.locator("#snippet").inner_text())["detections"] == [dog]


def test_coco_results_are_downloaded_as_pycocotools_reads_them(visit: Visit, live: Live) -> None:
    page = visit.open(live, "#score=0.06")
    visit.give(farm())
    expect(rows(page)).to_have_count(2)
    page.get_by_text("COCO").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    results = json.loads(Path(download.value.path()).read_text())
    assert [one["category_id"] for one in results] == [1, 2]
    assert results[1]["bbox"] == [40, 10, 20, 20]
    assert coco.area(results[1]["segmentation"]) == 400


def test_copy_puts_the_whole_text_on_the_clipboard(visits: Callable[..., Visit], live: Live) -> None:
    visit = visits(permissions=["clipboard-read", "clipboard-write"])
    page = visit.open(live)
    visit.give(farm())
    expect(rows(page)).to_have_count(1)
    page.get_by_role("button", name="Copy").click()
    expect(status(page)).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#snippet").inner_text()


# When something is wrong.


def notice(page: Page) -> Locator:
    return page.locator("#notice")


def test_file_that_is_no_picture_is_explained(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    visit.give(b"%PDF-1.7 nothing to see here", "a.pdf", "application/pdf")
    expect(notice(page)).to_contain_text("does not read this format")
    assert notice(page).get_attribute("role") == "alert"
    page.get_by_role("button", name="Convert it here").click()
    expect(notice(page)).to_contain_text("cannot read the picture either")
    visit.give(b"")
    expect(notice(page)).to_contain_text("The file is empty")
    assert len(visit.asked) == 1
    visit.give(farm())
    expect(notice(page)).to_be_hidden()
    expect(rows(page)).to_have_count(1)
    visit.give(farm()[:-40])
    expect(notice(page)).to_contain_text("damaged")
    # The picture before it is still there, and works.
    expect(page.locator("#picture")).to_have_attribute("aria-label", "a.png with 1 object")
    page.get_by_text("JSON", exact=True).click()
    assert len(json.loads(page.locator("#snippet").inner_text())["detections"]) == 1


def test_format_that_only_the_browser_reads_is_converted(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 48), (204, 0, 0)).save(file, "AVIF")
    visit.give(file.getvalue(), "a.avif", "image/avif")
    page.get_by_role("button", name="Convert it here").click()
    expect(page.locator("#picture")).to_have_attribute("aria-label", "a.png with 1 object")


@pytest.mark.parametrize("limit", [{"max_image_pixels": 5_000_000}, {"max_body_bytes": 20_000}])
def test_picture_that_is_too_large_can_be_sent_smaller(
    visit: Visit, serve: Callable[..., Live], limit: dict[str, int]
) -> None:
    page = visit.open(serve(**limit))
    visit.give(picture(red=204, height=2500, width=3000), "huge.png")
    expect(notice(page)).to_contain_text("too large for this server")
    assert visit.asked == []
    page.get_by_role("button", name="smaller copy").click()
    expect(page.locator("#picture")).to_have_attribute("aria-label", "huge.jpg with 1 object")


def test_server_that_wants_a_key_is_given_one_until_the_tab_closes(visit: Visit, serve: Callable[..., Live]) -> None:
    live = serve(api_keys="secret")
    page = visit.open(live, "#example=nuclei-1.png")
    for key in ("wrong", "schlüssel", "secret"):
        field = page.get_by_label("API key")
        if not field.is_visible():
            expect(notice(page)).to_contain_text("does not accept this key") if key != "wrong" else field.wait_for()
        if not field.is_visible():
            page.get_by_role("button", name="Enter a key").click()
        field.fill(key)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#key-dialog")).to_be_hidden()
        expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#picture")).to_have_attribute("aria-label", "nuclei-1.png with 0 objects")
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [["secret"], 0, ""]
    assert "secret" not in page.locator("#snippet").inner_text()
    assert "$ROISERVE_API_KEY" in page.locator("#snippet").inner_text()


def test_page_waits_for_a_server_that_is_loading(visit: Visit, serve: Callable[..., Live]) -> None:
    predictor = FakePredictor()
    predictor.may_warm_up.clear()
    live = serve(predictor, wait=False)
    page = visit.open(live)
    expect(notice(page)).to_contain_text("The server is not ready")
    expect(notice(page)).to_contain_text("Trying again in")
    predictor.may_warm_up.set()
    expect(page.locator("#model")).to_be_enabled()
    expect(notice(page)).to_be_hidden()


def test_busy_server_is_asked_again_after_the_seconds_that_it_names(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    busy = {"code": "overloaded", "title": "Too many requests", "detail": "the queue is full", "request_id": "1"}
    page.route(
        "**/v1/detect?*",
        lambda route: route.fulfill(
            status=429, headers={"Retry-After": "1"}, content_type="application/problem+json", body=json.dumps(busy)
        ),
        times=1,
    )
    visit.give(farm())
    expect(notice(page)).to_contain_text("The server is busy")
    expect(rows(page)).to_have_count(1)
    assert len(visit.asked) == 2


def test_server_that_has_gone_is_explained_and_found_again(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    expect(page.locator("#model")).to_be_enabled()
    page.route("**/v1/detect?*", lambda route: route.abort(), times=1)
    visit.give(farm())
    expect(notice(page)).to_contain_text("The server does not answer")
    page.get_by_role("button", name="Try again").click()
    expect(rows(page)).to_have_count(1)


def test_answer_of_something_on_the_way_is_explained(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    expect(page.locator("#model")).to_be_enabled()
    login = "<html>Log in to this network</html>"
    page.route("**/v1/detect?*", lambda route: route.fulfill(content_type="text/html", body=login), times=1)
    visit.give(farm())
    expect(notice(page)).to_contain_text("This answer is not the server's")
    expect(notice(page)).to_contain_text("perhaps a proxy")
    page.get_by_role("button", name="Try again").click()
    expect(rows(page)).to_have_count(1)


# For everybody.


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing(visits: Callable[..., Visit], live: Live, scheme: str, size: dict[str, int]) -> None:
    if not AXE.exists():
        pytest.skip("axe-core is not installed: tests/install_tools.sh")
    visit = visits(color_scheme=scheme, viewport=size)
    page = visit.open(live)
    expect(page.locator("#model")).to_be_enabled()
    page.evaluate(AXE.read_text())
    assert violations(page) == []
    visit.give(b"no picture")
    expect(notice(page)).to_be_visible()
    assert violations(page) == []
    visit.give(farm())
    page.select_option("#compare", "roi_pool")
    expect(page.locator("#comparison")).to_contain_text("in both")
    page.locator("#body tr").first.hover()
    assert violations(page) == []
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def violations(page: Page) -> list[str]:
    found: list[str] = page.evaluate(
        """async () => {
            const {violations} = await axe.run(document);
            return violations.flatMap(({id, nodes}) => nodes.map((node) => `${id}: ${node.html}`));
        }"""
    )
    return found


def test_form_works_without_javascript(visits: Callable[..., Visit], live: Live) -> None:
    page = visits(java_script_enabled=False).open(live)
    page.locator('form.plain input[type="file"]').set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": farm()}
    )
    with page.expect_response("**/v1/annotate") as response:
        page.get_by_role("button", name="Draw what is found").click()
    assert (response.value.status, response.value.headers["content-type"]) == (200, "image/png")


def test_page_works_behind_a_proxys_path(visit: Visit, serve: Callable[..., Live]) -> None:
    page = visit.open(serve(root_path="/behind/a/proxy"), prefix="/behind/a/proxy")
    page.get_by_role("button", name="Dense nuclei").click()
    expect(status(page)).to_contain_text("objects above")
    assert "/behind/a/proxy/v1/detect" in visit.asked[0].url
    assert "/behind/a/proxy/v1/detect" in page.locator("#snippet").inner_text()


# Masks.


def test_run_lengths_become_the_pixels_that_pycocotools_means(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    random = np.random.default_rng(0)
    shapes = [random.random((9, 7)) < share for share in (0.02, 0.3, 0.5, 0.9)]
    ring = np.zeros((40, 30), bool)
    ring[5:35, 5:25] = True
    ring[15:20, 10:20] = False
    for mask in (*shapes, ring, np.zeros((4, 5), bool), np.ones((4, 5), bool)):
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        pixels, loops, hits = page.evaluate(
            """async ([counts, height, width]) => {
                const {spansOf, forEachRun, traceOutlines} = await import("./page/masks.js");
                const {HitMap} = await import("./page/hits.js");
                const spans = spansOf(counts);
                const pixels = [];
                forEachRun(spans, height, (x, y1, y2) => { for (let y = y1; y < y2; y++) pixels.push([y, x]); });
                const map = new HitMap([{spans}], width, height);
                const hits = [];
                for (let y = 0; y < height; y++) {
                    for (let x = 0; x < width; x++) if (map.at(x + 0.5, y + 0.5)) hits.push([y, x]);
                }
                return [pixels, traceOutlines(spans, height), hits];
            }""",
            [rle["counts"].decode(), *mask.shape],
        )
        inside = sorted(map(list, np.argwhere(mask).tolist()))
        assert sorted(pixels) == hits == inside
        # Every corner of an outline is the middle of an edge between a pixel inside and one outside.
        padded = np.pad(mask, 1)
        for x, y in (point for loop in loops for point in loop):
            sides = [(y, x - 0.5), (y, x + 0.5)] if x % 1 == 0 else [(y - 0.5, x), (y + 0.5, x)]
            assert sum(padded[int(np.floor(a)) + 1, int(np.floor(b)) + 1] for a, b in sides) == 1
    assert len(loops) == 1
    assert len(traced(page, ring)) == 2


def test_outline_of_a_very_large_mask_has_the_same_area(visit: Visit, live: Live) -> None:
    page = visit.open(live)
    rows, columns = np.ogrid[:1700, :2100]
    disc = (rows - 850) ** 2 + (columns - 1000) ** 2 < 800**2
    [loop] = traced(page, disc)
    x, y = np.array(loop).T
    assert abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 == pytest.approx(disc.sum(), rel=0.01)


def traced(page: Page, mask: np.ndarray[Any, Any]) -> list[object]:
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    loops: list[object] = page.evaluate(
        """async ([counts, height]) => {
            const {spansOf, traceOutlines} = await import("./page/masks.js");
            return traceOutlines(spansOf(counts), height);
        }""",
        [rle["counts"].decode(), mask.shape[0]],
    )
    return loops


# What the server sends.


def test_files_are_sent_once_and_then_only_asked_about(live: Live) -> None:
    policy = live.client.get("/", headers=HTML).headers["Content-Security-Policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"):
        assert rule in policy.split("; ")
    assert "unsafe" not in policy
    types = {"": "text/html", "page/main.js": "text/javascript", "page/style.css": "text/css"}
    types |= {
        "page/icon.svg": "image/svg+xml",
        "page/nuclei-1.png": "image/png",
        "page/blood-smear-1.jpg": "image/jpeg",
    }
    for path, media_type in types.items():
        response = live.client.get(f"/{path}", headers=HTML)
        assert response.headers["Content-Type"].partition(";")[0] == media_type
        again = live.client.get(f"/{path}", headers={**HTML, "If-None-Match": response.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/page/nothing.js", "/page/index.html", "/page/..%2fstart.py", "/page/"):
        assert live.client.get(path).status_code == 404


def test_examples_are_those_of_the_repository(live: Live) -> None:
    names = [path.name for path in PAGE.iterdir() if path.suffix in (".png", ".jpg")]
    assert len(names) == 3
    for name in names:
        assert live.client.get(f"/page/{name}").content == (ROOT / "examples" / name).read_bytes()
    assert sum((PAGE / name).stat().st_size for name in names) < 200_000
