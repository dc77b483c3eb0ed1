"""One loaded model on one device: pixels in, detections out. Knows networks and devices; knows nothing of
HTTP or queues.
"""
