"""Small detectors as torchvision builds them, with weights at random, and what runs fast enough to compare them. A web
server of this machine to download from.
"""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from service.model_store.importing import ImportedModel
from service.modeling.build import build_model

Builder = Callable[..., nn.Module]
Detect = Callable[[nn.Module], dict[str, Tensor]]
Rebuild = Callable[[ImportedModel], nn.Module]


@pytest.fixture
def build() -> Builder:
    """A torchvision builder by its name: `build("maskrcnn_resnet50_fpn", num_classes=4)`."""

    def build(name: str, **options: object) -> nn.Module:
        torch.manual_seed(0)
        options = {"weights": None, "weights_backbone": None, **options}
        small = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10}
        model: nn.Module = getattr(detection, name)(**options, **small)
        return model.eval()

    return build


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Batch norms with statistics that matter, and a classifier that is sure enough to detect something."""

    def randomise(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                tensors["weight"].data.uniform_(0.2, 0.6)
                tensors["bias"].data.normal_(0, 0.1)
                tensors["running_mean"].normal_(0, 0.1)
                tensors["running_var"].uniform_(0.5, 1.5)
        model.roi_heads.box_predictor.cls_score.weight.data.mul_(100)  # type: ignore[operator,union-attr]  # a detector

    return randomise


@pytest.fixture
def rebuild() -> Rebuild:
    """Our network of an import, with the small sizes of `build`."""

    def rebuild(imported: ImportedModel) -> nn.Module:
        config = imported.config
        small = {
            "transform": config.transform.model_copy(update={"min_size": 64, "max_size": 96}),
            "rpn": config.rpn.model_copy(update={"post_nms_top_n_test": 30}),
            "detections": config.detections.model_copy(update={"detections_per_img": 10}),
        }
        model = build_model(config.model_copy(update=small)).eval()
        model.load_state_dict(imported.state_dict)
        return model

    return rebuild


@pytest.fixture
def detect() -> Detect:
    """What a detector finds in a picture of noise, at least three objects."""

    def detect(model: nn.Module) -> dict[str, Tensor]:
        image = torch.rand(3, 70, 100, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found: dict[str, Tensor] = model([image])[0]
        assert len(found["boxes"]) >= 3
        return found

    return detect


class FileServer:
    """An HTTP server of this machine with one file, that can be told to misbehave.

    Attributes:
        content: the file.
        cut_after_bytes: the next answers end after so many bytes, though their header promises the rest; one each.
        status: answered to all requests instead of the file.
        next_status: answered to the next request instead of the file.
        redirected: whether requests are sent on to the same path below `/elsewhere`.
        page: answered to all requests with status 200, as a proxy does that wants to be logged in to.
        silent_after_bytes: the answer stops there and the connection stays open, until the server ends.
        does_ranges: whether it answers a part when asked for one.
        asked: path and Range header of every request so far.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.cut_after_bytes: list[int] = []
        self.status: int | None = None
        self.next_status: int | None = None
        self.redirected = False
        self.page: bytes | None = None
        self.silent_after_bytes: int | None = None
        self.does_ranges = True
        self.ended = threading.Event()
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/models/"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Send the file, the asked part of it, or what a test wants instead."""
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked))
        if self.redirected and not request.path.startswith("/elsewhere"):
            request.send_response(302)
            request.send_header("Location", f"/elsewhere{request.path}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if self.page is not None:
            request.send_response(200)
            request.send_header("Content-Length", str(len(self.page)))
            request.end_headers()
            request.wfile.write(self.page)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.does_ranges else 0
        status, self.next_status = self.next_status or self.status or (206 if start else 200), None
        body = self.content[start:]
        if start and not body:
            status = 416
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        request.end_headers()
        if self.silent_after_bytes is not None:
            request.wfile.write(body[: self.silent_after_bytes])
            self.ended.wait()
            return
        request.wfile.write(body[: self.cut_after_bytes.pop(0)] if self.cut_after_bytes else body)
        request.close_connection = True


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """A running server with a file of 1 MB."""
    file_server = FileServer(bytes(range(256)) * 4096)
    thread = threading.Thread(target=file_server.server.serve_forever, args=(0.02,))
    thread.start()
    yield file_server
    file_server.ended.set()
    file_server.server.shutdown()
    file_server.server.server_close()
    thread.join()
