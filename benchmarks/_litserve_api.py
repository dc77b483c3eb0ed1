"""The API of `_peer_servers.run_litserve`, in a module of its own, since LitServe's processes import it by name.

Without postponed annotations: LitServe compares them with the classes.
"""

import base64

import litserve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks._peer_answers import as_json, service


class DetectAPI(litserve.LitAPI):  # type: ignore[misc] # LitServe is not installed where types are checked
    def setup(self, device: str) -> None:
        service()

    def decode_request(self, request: Request) -> bytes:
        return base64.b64decode(request["image"])  # by now it is the JSON of the body

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, x: list[bytes]) -> list[bytes]:
        return service().answer(x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return as_json(output)
