"""How far apart a print's ridges are, measured on its pixels: the check of a resolution that a file or a user tells.

Each window's power spectrum has a peak where the ridges are; the print's period is the median over windows.
"""

import numpy as np
import scipy.fft
from jaxtyping import Float, UInt8

LOOKS = (64, 32)  # px, sides of the windows of the first look; the smaller where ridges are too fine for the larger
FIRST, SECOND = 16, 32  # that many windows are looked at, spread over those with contrast
SHORTEST, LONGEST = 2.2, 25.0  # px, ridge periods that the first look knows
PERIODS = 8  # that many fit in a window of the second look
PEAK_SHARE = 0.2  # of a window's power that its peak holds, where there are ridges


def ridge_period(grey: UInt8[np.ndarray, "H W"]) -> float | None:
    """The distance from ridge to ridge in pixels of the image, the median over windows; None where no ridges are seen.

    Nothing need be known of the resolution: a first look with windows of 64 px finds the period roughly, a
    second one measures it with windows of eight periods. Large images are made smaller before.
    """
    height, width = grey.shape
    shrink = max(1, round(min(height, width) / 700))
    if shrink > 1:
        whole = grey[: height // shrink * shrink, : width // shrink * shrink]
        grey = whole.reshape(height // shrink, shrink, width // shrink, shrink).mean((1, 3), dtype=np.float32)
    side = min(grey.shape)
    for window in LOOKS:
        window = min(window, side)
        # `rise`: pressure and light change slowly over a print, and their power falls off with it.
        rough = _median_period(grey, window, max(1 / LONGEST, 2.5 / window), 1 / SHORTEST, FIRST, 1.5)
        if rough is not None:
            break
    else:
        return None
    window = min(max(16, 2 * round(PERIODS * rough / 2)), 128, side)
    fine = _median_period(grey, window, 1 / (1.6 * rough), min(1.6 / rough, 0.48), SECOND, 0)
    return float(shrink * (fine or rough))


def fine_detail(grey: UInt8[np.ndarray, "H W"]) -> float:
    """The power of the finest detail (beyond 0.38 cycles a pixel) in that of all, a pixel of the spectrum: below
    0.02 where a picture was enlarged, as interpolation adds none; 1 where nothing can be measured."""
    window = min(LOOKS[0], *grey.shape)
    if window < 12:
        return 1.0
    power = _spectra(grey, window, 16)[0].mean(0)
    frequency = np.hypot(np.fft.fftfreq(len(power))[:, None], np.fft.rfftfreq(len(power))[None])
    fine, all_ = power[(frequency > 0.38) & (frequency < 0.5)].mean(), power[frequency > 0.04].mean()
    return float(fine / all_) if all_ > 0 else 1.0


def _median_period(grey: np.ndarray, window: int, low: float, high: float, most: int, rise: float) -> float | None:
    """1 / frequency of the highest peak from `low` to `high`, in cycles a pixel: the median over windows.

    A window counts by its peak's power, and the more the nearer it is to the print's middle: towards the rim
    ridges blur, and below the first joint they are wider. Peaks are compared times the frequency to the power `rise`.
    """
    if window < 12 or low >= high:
        return None
    power, nearness = _spectra(grey, window, most)
    size = power.shape[1]
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    band = (frequency >= low) & (frequency <= high)
    peak = (power * (frequency**rise * band)).reshape(len(power), -1).argmax(1)
    row, column = np.unravel_index(peak, frequency.shape)
    at, height = _peak(power, row, column)
    ridges = height > PEAK_SHARE * (power * (frequency >= low)).sum((1, 2))
    if ridges.sum() < max(1, 0.1 * len(ridges)):
        return None
    order = np.argsort(at[ridges])
    weight = np.cumsum((height * nearness)[ridges][order])
    return 1 / at[ridges][order][np.searchsorted(weight, weight[-1] / 2)]


def _spectra(grey: np.ndarray, window: int, most: int) -> tuple[Float[np.ndarray, "N F H"], Float[np.ndarray, " N"]]:
    """Power spectra of windows that overlap by half, at most so many of those with contrast.

    H = F // 2 + 1, as `rfft2` gives them. And how near each is to the middle of them all: 1 there, falling to the rim.
    """
    starts = [np.linspace(0, n - window, max(1, 2 * n // window - 1)).astype(int) for n in grey.shape]
    windows = np.lib.stride_tricks.sliding_window_view(grey, (window, window))[np.ix_(*starts)]
    windows = windows.reshape(-1, window, window)
    contrast = windows[:, ::2, ::2].astype(np.float32).var((1, 2))
    there = np.flatnonzero(contrast >= 0.3 * np.percentile(contrast, 80))
    if len(there) > most:
        there = there[np.linspace(0, len(there) - 1, most).astype(int)]
    levels = windows[there].astype(np.float32)
    levels -= levels.mean((1, 2), keepdims=True)
    taper = np.hanning(window + 2)[1:-1].astype(np.float32)
    size = scipy.fft.next_fast_len(window, real=True)
    spectrum = scipy.fft.rfft2(levels * (taper[:, None] * taper), (size, size))
    power = spectrum.real**2 + spectrum.imag**2
    places = np.stack(np.meshgrid(*starts, indexing="ij")).reshape(2, -1)[:, there]
    away = ((places - places.mean(1, keepdims=True)) ** 2).sum(0)
    return power, np.exp(-0.15 * away / max(1.0, away.mean()))


def _peak(power, row, column) -> tuple[np.ndarray, np.ndarray]:
    """In each spectrum the peak's frequency by a parabola through the logarithms, and the power around it."""
    size, last = power.shape[1], power.shape[2] - 1
    down, across = np.mgrid[-1:2, -1:2][..., None]
    r, c = row + down, column + across
    beyond = (c < 0) | (c > last)  # the other half of the plane is this one turned by 180°
    c = np.where(c < 0, -c, np.where(c > last, size - c, c))
    near = power[np.arange(len(power)), np.where(beyond, -r, r) % size, c]  # (3, 3, N)

    def vertex(before: np.ndarray, here: np.ndarray, after: np.ndarray) -> np.ndarray:
        bend = before - 2 * here + after
        return np.where(bend < -1e-6, 0.5 * (before - after) / np.minimum(bend, -1e-6), 0).clip(-0.5, 0.5)

    height = np.log(near + 1e-6)
    y = np.where(row > size // 2, row - size, row) + vertex(*height[:, 1])
    x = column + vertex(*height[1])
    return np.hypot(y, x) / size, near.sum((0, 1))
