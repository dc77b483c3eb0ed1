"""Decode bytes to upright RGB pixels (`decode.py`), and draw detections on a picture (`overlay.py`). Knows file formats
and their attacks; knows no HTTP, models or queues.

decode.py       the whole path: sniff, read the container, check the limits, decode, convert, turn upright
formats.py      which formats we read, and which one these bytes are
containers/     one file a format: its header without decoding, and a copy without what pictures do not need
pixels.py       any of Pillow's modes to RGB
jpeg_check.py   compares a device's JPEG decoder with the CPU's
quiet.py        keeps decoders from writing to standard error
overlay.py      boxes, captions and masks on the picture
"""
