"""The service as `roiserve serve` runs it, with a fake model, for tests that send signals to it. Reads what to do with
the device from standard input, and repeats each line when it is done.
"""

from __future__ import annotations

import sys
import threading

from service.app import create_app
from service.commands._server import serve_app
from service.logs import configure_logging
from service.settings import Settings
from tests.fakes import FakePredictor


def obey(predictor: FakePredictor) -> None:
    for line in sys.stdin:
        if line == "hold\n":
            predictor.device_is_free.clear()
        elif line == "release\n":
            predictor.device_is_free.set()
        elif line == "wait until busy\n":
            predictor.device_is_busy.wait()
        print(line, end="", flush=True)


if __name__ == "__main__":
    configure_logging(log_format="text", log_level="info")
    fake = FakePredictor()
    threading.Thread(target=obey, args=(fake,), daemon=True).start()
    sys.exit(serve_app(create_app(Settings(), predictors=[fake])))
