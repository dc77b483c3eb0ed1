"""One loaded model on one device: pixels in, detections out. Knows networks and devices; knows nothing of
HTTP or queues.
"""

import sys

# On import, OpenVINO's Python code sends telemetry: it writes an identifier into the home folder and looks up a host on
# the internet. If the telemetry package is missing, it falls back to a built-in stub that does nothing. None makes
# Python report the package as missing. This must run before anything imports OpenVINO, which torch may do too.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as the import system documents it
