"""The worker of `_peer_servers.run_mosec`, in a module of its own, since mosec's processes import it by name."""

from __future__ import annotations

from mosec import Worker

from benchmarks._peer_answers import service


class DetectWorker(Worker):  # type: ignore[misc] # mosec is not installed where types are checked
    def __init__(self) -> None:
        super().__init__()
        service()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        return service().answer(data)

    def serialize(self, data: bytes) -> bytes:
        return data
