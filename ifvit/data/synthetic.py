"""Synthetic fingerprints: master fingers, impressions of them, and the map between the two.

A finger is grown once: singular points give the ridge orientation (zero-pole model of Sherlock and Monro,
IEEE PAMI 1993, with a smooth lift at the sides in the spirit of Vizcaya and Gerhardt, Pattern Recognition
1996), and noise filtered again and again with a Gabor filter tuned to each place turns into ridges with
minutiae (Cappelli et al., Handbook of Fingerprint Recognition, ch. 6). Every impression then shows it
displaced, distorted, partly in contact, dry or wet, through one of several sensors.

Everything is a pure function of (seed, finger, impression), non-negative integers.
"""

import errno
import functools
import logging
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.special import expit

from ifvit.data.canvases import writing_to
from ifvit.files import whole

VERSION = 2  # part of the cache's name: raise it whenever any picture changes
_FOLDER = f"synthetic_v{VERSION}_"
PPI = 500
BYTES = 50_000  # of an impression's file, at least; most have more
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
log = logging.getLogger("ifvit")
HEIGHT, WIDTH = 560, 420  # master frame, px

# Natural frequencies of the patterns (Wilson et al., J. Artificial Neural Networks 1993).
PATTERNS = {"arch": 0.037, "tented arch": 0.029, "left loop": 0.338, "right loop": 0.317, "whorl": 0.279}

# What a sensor makes of contact; each drawn between its bounds. Grey levels lie in [0, 1], blur is in px; ink
# is the share of the background's light that a ridge takes away, hardness how steeply contact turns into ink,
# edge_grain and noise are per pixel, stripes per column. The bounds span, with a margin, the looks of these:
# optical CrossMatch and SFinGe, shaded FVC2000 DB3, capacitive FVC2000 DB2, soft FVC2000 DB1.
SENSORS = {
    "optical": dict(
        background=(0.96, 1.04),
        shade=(0, 0.01),
        ink=(0.4, 0.9),
        ink_spread=(0, 0.2),
        ink_grain=(0, 0.2),
        hardness=(5, 18),
        edge_grain=(0, 0.3),
        blur=(0.3, 0.7),
        noise=(0, 0.025),
        stripes=(0, 0),
    ),
    "shaded": dict(
        background=(0.6, 1.0),
        shade=(0.02, 0.1),
        ink=(0.7, 0.97),
        ink_spread=(0, 0.1),
        ink_grain=(0, 0.15),
        hardness=(5, 18),
        edge_grain=(0, 0.25),
        blur=(0.35, 0.8),
        noise=(0.01, 0.035),
        stripes=(0, 0),
    ),
    "capacitive": dict(
        background=(0.82, 1.08),
        shade=(0, 0.05),
        ink=(0.4, 0.75),
        ink_spread=(0, 0.1),
        ink_grain=(0, 0.1),
        hardness=(5, 18),
        edge_grain=(0, 0.5),
        blur=(0.2, 0.5),
        noise=(0, 0.035),
        stripes=(0, 0.012),
    ),
    "soft": dict(
        background=(0.8, 1.0),
        shade=(0.01, 0.05),
        ink=(0.22, 0.55),
        ink_spread=(0.05, 0.3),
        ink_grain=(0, 0.05),
        hardness=(1.5, 4),
        edge_grain=(0, 0),
        blur=(0.7, 1.3),
        noise=(0.002, 0.02),
        stripes=(0, 0),
    ),
}

# Random streams: one tag each, so that no draw of one stage moves another's.
_PATTERN, _FIELD, _RIDGES, _SKIN, _SENSOR, _POSE, _PRINT = range(1, 8)


@dataclass(frozen=True)
class MasterFinger:
    """The whole skin of one fingertip, at 500 ppi; its arrays are (H, W), float32 but for the mask."""

    ridges: np.ndarray  # in [-1, 1]: ridge +1 (dark in prints), valley -1
    mask: np.ndarray  # bool, the outline of the finger
    pattern: str  # a key of PATTERNS
    orientation: np.ndarray  # in [-pi/2, pi/2): ridges run along (cos, sin), x right and y down
    period: np.ndarray  # px from ridge to ridge
    relief: np.ndarray  # height that lasting roughness (+ and -) and creases (-) add to ridges
    pores: np.ndarray  # in [0, 1], 1 at the middle of a pore


def pattern(seed: int, finger: int) -> str:
    """The finger's pattern, drawn with its natural frequency."""
    return str(_rng(seed, finger, _PATTERN).choice(list(PATTERNS), p=list(PATTERNS.values())))


def master_finger(seed: int, finger: int) -> MasterFinger:
    """The finger itself, as every impression of it shows it; 560x420 px."""
    from scipy.signal import resample

    kind = pattern(seed, finger)
    rng = _rng(seed, finger, _FIELD)
    y, x = np.mgrid[:HEIGHT:2, :WIDTH:2].astype(np.float32)  # grown at half the resolution
    orientation = _orientation(rng, kind, x, y)
    mean = np.clip(rng.normal(8.7, 1.0), 7.2, 11)
    slope = 1 + rng.uniform(0.02, 0.18) * np.clip((y - 0.55 * HEIGHT) / (0.45 * HEIGHT), 0, 1)
    period = mean * slope * (1 + 0.08 * _smooth(rng, y.shape, (5, 4)))
    wave, size = _grow(_rng(seed, finger, _RIDGES), orientation, period / 2)

    # Unit amplitude but at the minutiae, where the amplitude of the wave is 0. Of few px a period,
    # the wave needs band-limited interpolation: splines are too coarse.
    wave = resample(resample(wave, HEIGHT), WIDTH, axis=1)
    ridges = wave / np.maximum(_bilinear_twice(size), 0.35 * size.mean())
    ridges = np.clip(ridges, -1, 1).astype(np.float32)
    orientation = np.angle(_bilinear_twice(np.exp(2j * orientation))) / 2
    mask = _outline(*np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)[::-1]) > 0
    fields = orientation.astype(np.float32), _bilinear_twice(period).astype(np.float32)
    return MasterFinger(ridges, mask, kind, *fields, *_skin(_rng(seed, finger, _SKIN), ridges))


def true_map(seed: int, finger: int, impression: int) -> np.ndarray:
    """(H, W, 2) float32: the master-frame (x, y), px, that each pixel of the impression shows."""
    return np.stack(_place(seed, finger, impression)[:2], axis=-1)


def impression(master: MasterFinger, seed: int, finger: int, impression: int) -> np.ndarray:
    """One impression, (H, W) uint8 grey at 500 ppi, ridges dark; at most 512x512."""
    x, y, contact = _place(seed, finger, impression)
    shape, sensor = _sensor(seed, finger, impression)
    rng = _rng(seed, finger, _PRINT, impression)
    ridges, relief, pores = _sample((master.ridges, master.relief, master.pores), x, y)

    grain = functools.partial(_grain, rng, shape)
    # Wetness runs from dry (below 0) to wet: it widens ridges and calms their roughness.
    wetness, rough = rng.normal(0.05, 0.4), rng.lognormal(-0.4, 0.65)
    dry, wet = max(-wetness, 0), max(wetness, 0)
    height = ridges + rng.uniform(0.6, 1.3) * relief - rng.uniform(0, 3) * pores
    height += rough * (0.1 + 0.45 * dry) * grain(1.0) + sensor.edge_grain * grain(0)
    height += rough * (0.12 + 0.4 * dry + 0.15 * wet) * grain(2.5)
    height += wetness - 0.1 + rng.uniform(0.08, 0.3) * _smooth(rng, shape, (6, 6))
    # Pressed hardest in the middle; over some ridges at the rim they thin, break and end.
    height += np.minimum(contact * rng.uniform(3, 9) - 0.4, rng.uniform(0, 0.4) * contact)
    dark = expit(sensor.hardness * height) * expit(60 * contact + 3 * grain(2.5))

    ink = sensor.ink * (1 + sensor.ink_spread * _smooth(rng, shape, (5, 5))) + sensor.ink_grain * grain(1.0)
    if rng.random() < 0.15:  # what the finger before left on the glass
        dark = np.maximum(dark, rng.uniform(0.03, 0.15) * dark[::-1, ::-1] * (grain(1.0) > 0.3))
    dust = rng.uniform(0, 0.3) * np.maximum(grain(1.0) - 2.2, 0)
    back = sensor.background + sensor.shade * _smooth(rng, shape, (3, 3))
    grey = back * (1 - dark * np.clip(ink, 0, 1) - dust)
    grey = ndimage.gaussian_filter(grey, sensor.blur, truncate=2.5)
    grey += sensor.noise * grain(0) + sensor.stripes * _grain(rng, (1, shape[1]), 1.0)
    return np.clip(255 * grey + 0.5, 0, 255).astype(np.uint8)


def prints(seed: int, fingers: int, impressions: int, cache_dir: str | os.PathLike, workers: int = 1) -> list[Path]:
    """Impressions 1..impressions of fingers 1..fingers as PNG files, finger by finger.

    They lie in cache_dir/synthetic_v{VERSION}_{seed}/{finger}_{impression}.png; those there, and whole, are used.
    UserError where the cache cannot be written.
    """
    folder = Path(cache_dir) / f"{_FOLDER}{seed}"
    paths = {f: [folder / f"{f}_{i}.png" for i in range(1, impressions + 1)] for f in range(1, fingers + 1)}
    job = functools.partial(_write_finger, seed)
    missing = [(f, files) for f, files in paths.items() if not all(map(_whole, files))]
    if not missing:
        return sum(paths.values(), [])
    if damaged := [path for _, files in missing for path in files if path.exists() and not _whole(path)]:
        log.warning("%d generated prints in the cache are damaged and made again, such as %s", len(damaged), damaged[0])
    with writing_to(folder, BYTES * sum(not _whole(path) for _, files in missing for path in files)):
        if workers == 1 or len(missing) < 2:
            list(map(job, missing))
        else:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                list(pool.map(job, missing))
    return sum(paths.values(), [])


def numbers(path: str | os.PathLike) -> tuple[int, int, int]:
    """Seed, finger and impression of a file that `prints` has made."""
    path = Path(path)
    finger, impression = path.stem.split("_")
    return int(path.parent.name.removeprefix(_FOLDER)), int(finger), int(impression)


def _whole(path: Path) -> bool:
    """Whether a PNG file is there to its end."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        if e.errno != errno.EINVAL:  # shorter than that
            raise
        return False


def _write_finger(seed: int, finger_and_files: tuple[int, list[Path]]) -> None:
    """Those of a finger's impressions that are not there yet."""
    finger, files = finger_and_files
    master = master_finger(seed, finger)
    for i, path in enumerate(files, 1):
        if not _whole(path):
            with whole(path) as part:  # others see a whole file or none
                Image.fromarray(impression(master, seed, finger, i)).save(part, format="PNG", dpi=(PPI, PPI))


def _orientation(rng, kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ridge orientation from the singular points, radians in y-down axes."""
    cx, cy = WIDTH / 2 + rng.normal(0, 14), 0.43 * HEIGHT + rng.normal(0, 18)
    u, v = x - cx, cy - y  # v is up while the formulas of the model are in use
    if kind == "arch":
        rise = rng.uniform(1.0, 1.5) * np.clip((v + 0.3 * HEIGHT) / (0.5 * HEIGHT), 0.02, 1)  # 0 at the joint
        angle = -np.arctan(rise * np.sin(np.clip(u / (0.5 * WIDTH), -1, 1) * np.pi * 0.72))
    else:
        down = rng.uniform(90, 150)
        if kind == "tented arch":
            cores, deltas = [(0, 0)], [(rng.normal(0, 5), -rng.uniform(55, 115))]
        elif kind == "whorl":
            apart, lean = rng.uniform(8, 50), rng.normal(0, 10)
            cores = [(-lean / 2, apart / 2), (lean / 2, -apart / 2)]
            deltas = [(s * rng.uniform(90, 150), -down + rng.normal(0, 15)) for s in (-1, 1)]
        else:
            side = 1 if kind == "left loop" else -1  # a left loop opens left, its delta is right
            cores, deltas = [(0, 0)], [(side * rng.uniform(65, 125), -down)]
        points = [(c, 1) for c in cores] + [(d, -1) for d in deltas]
        angle = sum(sign * (np.arctan2(v - py, u - px) + np.pi) / 2 for (px, py), sign in points)
        # The bare model levels out far from the points; real flanks stay steep above the deltas.
        steep = rng.uniform(0.5, 0.75) if kind != "whorl" else rng.uniform(0.15, 0.35)
        angle -= steep * np.tanh(u / 110) / (1 + np.exp(-(v + 0.6 * down) / 40))
    angle = angle + 0.09 * _smooth(rng, x.shape, (5, 4)) + rng.normal(0, 0.04)
    return (-angle + np.pi / 2) % np.pi - np.pi / 2


def _grow(rng, orientation: np.ndarray, period: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise, filtered until ridges fill the frame: their wave and its amplitude, both (H, W)."""
    sigma, radius, passes = 2.1, 5, 44  # wider or more: fewer minutiae
    fx, fy = -np.sin(orientation) / period, np.cos(orientation) / period
    reach = range(-radius, radius + 1)
    offsets = [(i, j) for i in reach for j in reach if (i, j) > (0, 0)]
    i, j = np.array(offsets, np.float32).T[:, :, None, None]
    bell = np.exp(-(i * i + j * j) / (2 * sigma**2))
    phase = 2 * np.pi * (fx * j + fy * i).astype(np.float32)
    even, odd = bell * np.cos(phase), bell * np.sin(phase)  # for one of each two opposite offsets
    level = (1 + 2 * even.sum(0)) / (1 + 2 * bell.sum())  # the response to an even grey,
    even -= bell * level  # taken away here and at the centre
    h, w = orientation.shape

    def filtered(wave, weights, sign):
        padded = np.pad(wave, radius, mode="reflect")
        out = (1 - level) * wave if sign > 0 else np.zeros_like(wave)
        for weight, (i, j) in zip(weights, offsets):
            ahead = padded[radius + i : radius + i + h, radius + j : radius + j + w]
            behind = padded[radius - i : radius - i + h, radius - j : radius - j + w]
            out += weight * (ahead + sign * behind)
        return out

    wave = rng.standard_normal((h, w)).astype(np.float32)
    for _ in range(passes):
        wave = filtered(wave, even, 1)
        wave = np.tanh(2 * wave / wave.std())
    inphase = filtered(wave, even, 1)
    return inphase, np.hypot(inphase, filtered(wave, odd, -1))


def _outline(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Positive within the finger: a dome over straight flanks, open to the joint at the bottom."""
    dome = np.minimum(y - 0.45 * HEIGHT, 0) / (0.44 * HEIGHT)
    return np.minimum(_oval((x - WIDTH / 2) / (0.46 * WIDTH), dome), (0.98 * HEIGHT - y) / 200)


def _oval(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 at the origin, 0 on a unit circle drawn a little square, negative beyond."""
    x, y = x * x, y * y
    return 1 - np.sqrt(np.sqrt(x * x + y * y + 1.5 * x * y))


def _skin(rng, ridges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Relief and pores (see MasterFinger) that go with these ridges."""
    relief = 0.16 * _grain(rng, ridges.shape, 2.5) + 0.06 * _grain(rng, ridges.shape, 1.0)
    scars = [(rng.uniform(25, 220), rng.uniform(0.8, 2.2)) for _ in range(rng.poisson(2.5))]
    wrinkles = rng.poisson(rng.uniform(10, 90)) if rng.random() < 0.5 else 0  # as of age or dry skin
    scars += [(rng.uniform(10, 60), rng.uniform(0.6, 1.0)) for _ in range(wrinkles)]
    for length, width in scars:
        angle = rng.normal(0, 0.6) if rng.random() < 0.7 else rng.uniform(-1.6, 1.6)
        t = np.linspace(-0.5, 0.5, int(length))
        bend = rng.normal(0, 0.24) * length * t * t
        px, py = _turned(length * t, bend, angle)
        px, py = px + rng.uniform(30, WIDTH - 30), py + rng.uniform(40, HEIGHT - 40)
        inside = (px > 8) & (px < WIDTH - 8) & (py > 8) & (py < HEIGHT - 8)
        px, py = px[inside].astype(int), py[inside].astype(int)
        x0, y0 = px.min() - 8, py.min() - 8
        line = np.zeros((py.max() + 9 - y0, px.max() + 9 - x0), np.float32)
        line[py - y0, px - x0] = 2.5 * width
        line = np.minimum(ndimage.gaussian_filter(line, width), 1)
        relief[y0 : y0 + len(line), x0 : x0 + line.shape[1]] -= rng.uniform(0.8, 3) * line
    # About one pore in 9 px of ridge, on the crest: the highest of four places in each cell.
    cells = np.mgrid[: HEIGHT - 8 : 9, : WIDTH - 8 : 9].reshape(2, -1, 1)
    places = cells + rng.integers(0, 9, (*cells.shape[:2], 4))
    best = ridges[*places].argmax(axis=1)
    py, px = places[:, np.arange(len(best)), best]
    pores = np.zeros_like(ridges)
    pores[py, px] = rng.uniform(3, 10, py.shape) * (ridges[py, px] > 0.6)
    return relief, np.minimum(ndimage.gaussian_filter(pores, 1.1, truncate=3), 1)


def _sensor(seed: int, finger: int, impression: int) -> tuple[tuple[int, int], SimpleNamespace]:
    """Shape, px, and properties (see SENSORS) of the finger's usual sensor or, one time in four, another."""
    rng = _rng(seed, finger, _SENSOR, impression)
    if rng.random() < 0.75:
        rng = _rng(seed, finger, _SENSOR)
    shape = (int(rng.integers(288, 481)), int(rng.integers(256, 449)))
    ranges = SENSORS[rng.choice(list(SENSORS), p=[0.4, 0.2, 0.2, 0.2])]
    return shape, SimpleNamespace(**{name: rng.uniform(*r) for name, r in ranges.items()})


def _place(seed: int, finger: int, impression: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(H, W) each: master-frame x and y, px, and contact, positive where skin touches, 1 in its middle."""
    rng = _rng(seed, finger, _POSE, impression)
    (h, w), _ = _sensor(seed, finger, impression)
    x = np.arange(w, dtype=np.float32)[None] - w // 2
    y = np.arange(h, dtype=np.float32)[:, None] - h // 2
    turn = float(np.clip(rng.normal(0, 0.16), -0.6, 0.6))
    partial = rng.random() < 0.25
    spread = (60, 80) if partial else (18, 35)  # of what lies at the canvas's middle, mostly near the core
    mid_x, mid_y = rng.normal((0.5 * WIDTH, 0.5 * HEIGHT), spread).tolist()
    wide, tall = (1 + rng.normal(0, 0.015, 2)).tolist()
    amount = min(rng.gamma(2.0, 1.3), 4.5)  # of skin distortion; peaks are two to three times this
    at_x, at_y = _turned(x, y, turn)
    at_x = mid_x + wide * at_x + amount * _smooth(rng, (h, w), (4, 4))
    at_y = mid_y + tall * at_y + amount * _smooth(rng, (h, w), (4, 4))

    scale = rng.uniform(0.65, 0.9, 2) if partial else rng.uniform(0.95, 1.15, 2)
    half_x, half_y = (scale * rng.uniform((0.2, 0.27), (0.38, 0.43)) * (WIDTH, HEIGHT)).tolist()
    lean = turn + rng.normal(0, 0.1)
    x, y = _turned(x - rng.normal(0, 12), y - rng.normal(0, 12), lean)
    contact = np.minimum(_oval(x / half_x, y / half_y), _outline(at_x, at_y))
    contact += rng.uniform(0.01, 0.05) * _smooth(rng, (h, w), (6, 6))
    inside = (at_x >= 0) & (at_x <= WIDTH - 1) & (at_y >= 0) & (at_y <= HEIGHT - 1)
    return at_x, at_y, np.where(inside, contact, np.float32(-1))


def _turned(x, y, angle: float):
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _sample(channels, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The (H, W) channels, bilinearly, at (x, y); one set of weights for all."""
    h, w = channels[0].shape
    flat = np.stack(channels).reshape(len(channels), -1)
    x, y = np.clip(x, 0, w - 1.01), np.clip(y, 0, h - 1.01)
    column, row = np.floor(x), np.floor(y)
    corner = row.astype(np.intp) * w + column.astype(np.intp)

    def along_row(left):
        here = flat.take(left, axis=1)
        return here + (x - column) * (flat.take(left + 1, axis=1) - here)

    top = along_row(corner)
    return top + (y - row) * (along_row(corner + w) - top)


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng([len(key), *key])  # or a key and the key with a 0 more are one


def _smooth(rng, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Smooth noise of variance about 1, cells[0] x cells[1] hills over the shape."""
    rows, columns = (_spline(n, c) for n, c in zip(shape, cells))
    right = rng.standard_normal((rows.shape[1], columns.shape[1])).astype(np.float32) @ columns.T
    # In slices too small for BLAS to wake its threads, which cost more than they bring here.
    return np.concatenate([rows[i : i + 32] @ right for i in range(0, len(rows), 32)])


@functools.lru_cache(maxsize=4096)
def _spline(length: int, cells: int) -> np.ndarray:
    """(length, cells + 3) cubic B-spline basis, scaled to keep unit variance on average."""
    a = np.abs(np.linspace(0, cells, length)[:, None] - np.arange(-1, cells + 2))
    basis = np.where(a < 1, 2 / 3 - a**2 + a**3 / 2, np.where(a < 2, (2 - a) ** 3 / 6, 0))
    return (basis / np.sqrt((basis**2).sum(1).mean())).astype(np.float32)


def _grain(rng, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Gaussian noise of unit variance blurred by sigma px: a random window of a fixed tile."""
    tile = _tile(sigma)
    top, left = rng.integers(0, 1024 - shape[0]), rng.integers(0, 1024 - shape[1])
    window = tile[top : top + shape[0], left : left + shape[1]]
    return window[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]


@functools.cache
def _tile(sigma: float) -> np.ndarray:
    noise = _rng(round(100 * sigma)).standard_normal((1024, 1024)).astype(np.float32)
    noise = ndimage.gaussian_filter(noise, sigma, mode="wrap")
    return noise / noise.std()


def _bilinear_twice(field: np.ndarray) -> np.ndarray:
    """To (HEIGHT, WIDTH), for fields smooth enough."""
    return ndimage.zoom(field, 2, order=1, mode="nearest", grid_mode=True)
