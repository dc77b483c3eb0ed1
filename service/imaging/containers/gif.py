"""GIF: a screen, then extensions and frames. Only the first frame is decoded, with its transparency; the comments
before it and its disposal method are left out.
"""

from __future__ import annotations

import struct

from service.errors import InvalidImageError
from service.imaging.containers.container import Container

# Before the first frame. Embedded XMP of several hundred KiB fits.
MAX_EXTENSION_BLOCKS = 65_536

_EXTENSION, _FRAME = 0x21, 0x2C
_GRAPHIC_CONTROL = 0xF9


def read_gif(data: bytes) -> Container:
    """Read the size of screen and first frame, and leave out the extensions between them."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    screen_end = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    position = screen_end
    graphic_control = b""
    num_blocks = 0
    while data[position] == _EXTENSION:
        if data[position + 1] == _GRAPHIC_CONTROL and data[position + 2] == 4:
            graphic_control = _transparency_only(data[position : position + 8])
        position += 2
        length = -1
        while length != 0:
            length = data[position]
            position += 1 + length
            num_blocks += 1
            if num_blocks > MAX_EXTENSION_BLOCKS:
                raise InvalidImageError(f"the GIF data hold over {MAX_EXTENSION_BLOCKS} extension blocks")
    if data[position] != _FRAME:
        raise InvalidImageError("the GIF data hold no picture")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
    # A frame may extend beyond the screen; browsers and Pillow then enlarge the screen.
    image_size = max(height, top + frame_height), max(width, left + frame_width)
    return Container(image_size, data[:screen_end] + graphic_control + data[position:])


def _transparency_only(graphic_control: bytes) -> bytes:
    """The extension without disposal and delay: what comes after the first frame is never shown."""
    return graphic_control[:3] + bytes([graphic_control[3] & 1, 0, 0]) + graphic_control[6:]
