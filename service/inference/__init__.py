"""One loaded model on one device: pixels in, detections out. Knows networks and devices; knows nothing of
HTTP or queues.
"""

import sys

# OpenVINO's Python parts report to their makers when they are imported: they write an identifier into the home folder
# and look up a name on the internet. Where this package is missing they have a stand-in of their own that does nothing.
# None makes Python say that it is missing. It has to be here before anything imports OpenVINO, which torch may do too.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as the import system documents it
