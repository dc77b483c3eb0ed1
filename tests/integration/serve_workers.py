"""The service as `roiserve serve` runs it, with a fake model in worker processes."""

from __future__ import annotations

import sys

from service.app import create_app
from service.commands._server import serve_app
from service.logs import configure_logging
from service.settings import Settings
from tests.fakes import load_fakes

if __name__ == "__main__":
    settings = Settings()
    configure_logging(log_format=settings.log_format, log_level="info")
    sys.exit(serve_app(create_app(settings, predictor_factory=load_fakes)))
