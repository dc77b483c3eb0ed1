"""Draw the example pictures: fluorescing and stained cell nuclei, and blood smears. They are made up, the same on every
run, and close enough to real micrographs that models trained on those find the cells.

    python examples/render.py [FOLDER]      writes the pictures into FOLDER, by default the one of this script

Shapes: H x W a picture. Light is 0 (black) to 255 (white), stain an optical density, a shape 0 (outside) to 1 (inside).
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Field = NDArray[np.floating]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, rgb in render().items():
        is_grey = bool((rgb == rgb[..., :1]).all())
        options = [cv2.IMWRITE_JPEG_QUALITY, 92] if name.endswith(".jpg") else []
        cv2.imwrite(str(folder / name), rgb[..., 0] if is_grey else rgb[..., ::-1], options)  # OpenCV writes BGR


def render() -> dict[str, NDArray[np.uint8]]:
    """All pictures by file name, (H, W, 3) RGB."""
    random = np.random.default_rng
    return {
        "nuclei-1.png": fluorescence(
            random(1),
            (256, 256),
            count=38,
            radius=7.5,
            stretch=1.35,
            brightness=80,
            background=13,
            softness=0.9,
            grain=1,
        ),
        "nuclei-2.png": fluorescence(
            random(2), (256, 256), count=46, radius=6, stretch=1.8, brightness=62, background=4, softness=1.8, grain=0.2
        ),
        "nuclei-dense.png": fluorescence(
            random(3),
            (520, 696),
            count=140,
            radius=10.5,
            stretch=1.6,
            brightness=48,
            background=18,
            softness=1.2,
            grain=0.6,
        ),
        "nuclei-stained.png": stained(random(4), (256, 320), count=46, radius=9.5),
        "blood-smear-1.jpg": blood_smear(random(5), num_red=19, num_platelets=3, white_at=(400, 300)),
        "blood-smear-2.jpg": blood_smear(random(6), num_red=14, num_platelets=4, white_at=(190, 170)),
    }


def fluorescence(
    rng: Generator,
    size: tuple[int, int],
    *,
    count: int,
    radius: float,
    stretch: float,
    brightness: float,
    background: float,
    softness: float,
    grain: float,
) -> NDArray[np.uint8]:
    """Nuclei that shine on a dark field: light adds up, and a little of each spreads around it.

    Args:
        size: (H, W).
        count: how many nuclei to try to place; they touch but hardly overlap.
        radius: their usual shorter radius in pixels.
        stretch: the largest ratio of their longer radius to the shorter.
        brightness: their usual light above the background.
        softness: how far their edges are out of focus, in pixels.
        grain: how strongly the chromatin in them is structured, 0 to 1.
    """
    texture = 1 + grain * (0.14 * smooth_noise(rng, size, 1.2) + 0.12 * smooth_noise(rng, size, 3))
    light: Field = np.zeros(size, np.float32)
    for centre in places(rng, size, count, distance=2.1 * radius, clustering=0.3):
        across = radius * rng.lognormal(0, 0.16)
        long = across * rng.uniform(1.0, stretch)
        level = brightness * rng.lognormal(0, 0.3)
        if rng.random() < 0.07:  # dividing, so condensed and bright
            long, across, level = 0.75 * long, 0.65 * across, 2.4 * level
        nucleus = level * blob(rng, size, centre, long, across, wobble=0.05, softness=softness)
        light = np.maximum(light, nucleus) + 0.25 * np.minimum(light, nucleus)
    glow = blurred(light, 1.2 * radius)
    light = blurred(light * texture + 0.10 * glow, 0.6)
    light += background * (1 + 0.06 * smooth_noise(rng, size, 60))
    light += rng.normal(0, 0.3 + 0.01 * light)
    return to_uint8(np.repeat(light[..., None], 3, axis=2))


def stained(rng: Generator, size: tuple[int, int], *, count: int, radius: float) -> NDArray[np.uint8]:
    """Nuclei that are stained purple in lilac tissue: each dye takes its share of the light that passes."""
    tissue = 0.05 * smooth_noise(rng, size, 18) + 0.05 * smooth_noise(rng, size, 4) + 0.02 * smooth_noise(rng, size, 1)
    grains = 0.25 * np.maximum(smooth_noise(rng, size, 1.1), -0.3) + 0.16 * np.maximum(smooth_noise(rng, size, 3), -1)
    purple: Field = np.zeros(size, np.float32)
    for centre in places(rng, size, count, distance=2.1 * radius, clustering=0.5):
        across = radius * rng.lognormal(0, 0.2)
        shape = blob(rng, size, centre, across * rng.uniform(1.2, 2.1), across, wobble=0.06, softness=1)
        rim = shape - without_rim(shape, 1.5)
        nucleus = rng.uniform(0.5, 1.25) * shape * (0.9 + grains) + 0.25 * rim
        purple = np.maximum(purple, nucleus) + 0.35 * np.minimum(purple, nucleus)
    lilac, ink = np.array([186, 167, 214], np.float32), np.array([0.90, 1.85, 0.19], np.float32)
    light = lilac * np.exp(-ink * purple[..., None] - tissue[..., None] * np.array([0.5, 0.7, 0.2], np.float32))
    light = blurred(light, 0.7)
    return to_uint8(light + rng.normal(0, 0.8, light.shape))


def blood_smear(rng: Generator, *, num_red: int, num_platelets: int, white_at: tuple[int, int]) -> NDArray[np.uint8]:
    """Red cells with paler centres, a white cell with a lobed purple nucleus, platelets; 640 x 480 pixels.

    Args:
        white_at: (x, y) of the white cell's centre.
    """
    size = (480, 640)
    absorbed: Field = np.zeros((*size, 3), np.float32)  # optical density of each colour
    white = blob(rng, size, white_at, 85, 80, wobble=0, softness=4)
    for centre in places(rng, size, num_red, distance=76, clustering=0.6, keep_free=white):
        cell = red_cell(rng, size, centre)
        absorbed = np.maximum(absorbed, cell) + 0.35 * np.minimum(absorbed, cell)  # thinner where they overlap
    occupied = np.maximum(white, 4 * absorbed[..., 1])
    for centre in places(rng, size, num_platelets, distance=150, clustering=0, keep_free=occupied):
        absorbed += platelet(rng, size, centre)
    absorbed = white_cell(rng, size, white_at, absorbed)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    lamp = np.dstack([200 + 0.006 * (x - 320), 200 - 0.004 * (y - 240), 193 - 0.008 * (x - 320)])
    light = lamp * np.exp(-absorbed) * (1 + 0.012 * smooth_noise(rng, size, 40)[..., None])
    light = blurred(light, 1.5)
    grain = blurred(rng.normal(0, 5, light.shape), 0.9)
    return to_uint8(light + grain)


def red_cell(rng: Generator, size: tuple[int, int], centre: tuple[float, float]) -> Field:
    across = rng.normal(48, 4)
    long = across * rng.uniform(1.0, 1.25)
    disc = blob(rng, size, centre, long, across, wobble=0.04, softness=2)
    rim = disc - without_rim(disc, 5)
    pallor = rng.uniform(0.25, 0.55)
    off_centre = (centre[0] + rng.normal(0, 5), centre[1] + rng.normal(0, 5))
    hollow = blob(rng, size, off_centre, pallor * long, pallor * across, wobble=0.12, softness=rng.uniform(3, 9))
    depth = rng.uniform(0.2, 0.95)
    halo = blurred(disc, 4) * (1 - disc)  # a bright line around the cell, refracted at its edge
    density = rng.uniform(0.8, 1.1) * disc * (1 - depth * hollow)
    colours: Field = (
        density[..., None] * np.array([0.11, 0.27, 0.29], np.float32)
        + rim[..., None] * np.array([0.02, 0.07, -0.10], np.float32)
        - halo[..., None] * np.array([0.09, 0.09, 0.06], np.float32)
    )
    return colours


def white_cell(rng: Generator, size: tuple[int, int], centre: tuple[int, int], absorbed: Field) -> Field:
    """Lay the cell over what is there: it is thick, and red cells give way to it."""
    body = blob(rng, size, centre, 80, 73, wobble=0.03, softness=3)
    nucleus: Field = np.zeros(size, np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    for lobe in range(4):  # on an arc, so that they join to a horseshoe
        angle = turn + lobe * 1.1
        at = (centre[0] + 36 * np.cos(angle), centre[1] + 34 * np.sin(angle))
        shape = blob(rng, size, at, rng.uniform(27, 32), rng.uniform(22, 26), wobble=0.1, softness=2.5)
        nucleus = np.maximum(nucleus, shape)
    grains = 0.10 * smooth_noise(rng, size, 2.5) + 0.14 * smooth_noise(rng, size, 12)
    cytoplasm = np.array([0.10, 0.28, -0.03], np.float32) * (1 + grains[..., None])
    chromatin = np.array([0.52, 0.90, -0.06], np.float32) * (1 + 0.09 * smooth_noise(rng, size, 6)[..., None])
    cell = cytoplasm * (1 - nucleus[..., None]) + chromatin * nucleus[..., None]
    covered: Field = absorbed * (1 - body[..., None]) + cell * body[..., None]
    return covered


def platelet(rng: Generator, size: tuple[int, int], centre: tuple[float, float]) -> Field:
    shape = blob(rng, size, centre, rng.uniform(16, 21), rng.uniform(13, 17), wobble=0.12, softness=3.5)
    density = shape * (1 + 0.15 * smooth_noise(rng, size, 3))
    return density[..., None] * np.array([0.40, 0.42, -0.09], np.float32)


def blob(
    rng: Generator,
    size: tuple[int, int],
    centre: tuple[float, float],
    long: float,
    across: float,
    *,
    wobble: float,
    softness: float,
) -> Field:
    """An ellipse in a random direction whose outline wobbles: 1 inside, 0 outside, soft in between.

    Args:
        centre: (x, y) in pixels.
        long: the longer radius in pixels.
        across: the shorter.
        wobble: how far the outline strays, as a part of the radius.
        softness: half the width of the edge, in pixels.
    """
    turn = rng.uniform(0, np.pi)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    dx, dy = x - centre[0], y - centre[1]
    u, v = (dx * np.cos(turn) + dy * np.sin(turn)) / long, (dy * np.cos(turn) - dx * np.sin(turn)) / across
    angle, outline = np.arctan2(v, u), np.ones(size, np.float32)
    for waves in (2, 3, 4, 5):
        outline += wobble * rng.normal(0, 1.2 / waves) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    distance = (outline - np.hypot(u, v)) * np.sqrt(long * across)
    shape: Field = 1 / (1 + np.exp(np.clip(-2.2 * distance / softness, -30, 30)))
    return shape.astype(np.float32)


def without_rim(shape: Field, width: float) -> Field:
    """The shape without a soft rim of about this width in pixels."""
    inside: Field = np.clip(2 * blurred(shape, width) - 1, 0, 1) * shape
    return inside


def blurred(field: Field, scale: float) -> Field:
    """The field out of focus by a Gaussian of deviation `scale`, in pixels."""
    smooth: Field = cv2.GaussianBlur(field.astype(np.float32), (0, 0), scale).astype(np.float32)
    return smooth


def smooth_noise(rng: Generator, size: tuple[int, int], scale: float) -> Field:
    """Noise with deviation 1 whose grains are about `scale` pixels wide."""
    noise = blurred(rng.normal(0, 1, size), scale)
    standard: Field = (noise - noise.mean()) / noise.std()
    return standard


def places(
    rng: Generator,
    size: tuple[int, int],
    count: int,
    *,
    distance: float,
    clustering: float,
    keep_free: Field | None = None,
) -> list[tuple[float, float]]:
    """Choose up to `count` centres (x, y), some just outside, none closer than `distance` to another.

    Args:
        clustering: the share of centres that are put right beside an earlier one.
        keep_free: (H, W), above 0.5 where no centre may be.
    """
    chosen: list[tuple[float, float]] = []
    for _ in range(60 * count):
        if len(chosen) == count:
            break
        x, y = rng.uniform(-5, size[1] + 5), rng.uniform(-5, size[0] + 5)
        if chosen and rng.random() < clustering:
            near = chosen[rng.integers(len(chosen))]
            angle = rng.uniform(0, 2 * np.pi)
            x, y = near[0] + 1.08 * distance * np.cos(angle), near[1] + 1.08 * distance * np.sin(angle)
        if not (-5 < x < size[1] + 5 and -5 < y < size[0] + 5):
            continue
        row, column = (int(np.clip(value, 0, limit - 1)) for value, limit in zip((y, x), size, strict=True))
        is_free = keep_free is None or keep_free[row, column] < 0.5
        if is_free and all(np.hypot(x - other[0], y - other[1]) >= distance for other in chosen):
            chosen.append((x, y))
    return chosen


def to_uint8(light: Field) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.clip(np.rint(light), 0, 255).astype(np.uint8)
    return pixels


if __name__ == "__main__":
    main()
