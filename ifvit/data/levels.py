"""From whatever pixels a file holds to 8-bit grey: colours, palettes, transparency, wide and floating-point levels."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

WHOLE = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # the highest level of 8, 10, 12, 14 and 16 bits
OVERSHOOT = 1.25  # floating-point levels may go so far beyond the range that they are meant in


def grey_levels(image: Image.Image) -> UInt8[np.ndarray, "H W"]:
    """The grey levels of a loaded image, 0 black and 255 white.

    Palettes are looked up, colour becomes luma, transparency is laid on white, wider levels become 8 bits.
    """
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
    if image.mode.startswith("I"):
        return _eight_bits(np.asarray(image).astype(np.float32), _whole_range, white_is_zero)
    if image.mode == "F":
        return _eight_bits(np.asarray(image), _float_range, white_is_zero)
    if image.mode == "LAB":
        return np.array(image.getchannel("L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1]:  # all transparent: an empty channel beside pixels that are there
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    return np.array(image.convert("L"))


def _eight_bits(values: Float[np.ndarray, "H W"], range_of, white_is_zero: bool) -> UInt8[np.ndarray, "H W"]:
    """Levels of the range that `range_of` finds for the finite ones as 0 to 255; white where a level is no number."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.full(values.shape, 255, np.uint8)
    bottom, top = range_of(finite)
    with np.errstate(invalid="ignore"):
        grey = np.clip(np.rint((values - bottom) * (255.0 / (top - bottom))), 0, 255)
    grey = 255 - grey if white_is_zero else grey
    return np.nan_to_num(grey, nan=255).astype(np.uint8)


def _whole_range(values: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """8 to 14 bits in 16, as sensors write them, fill the range; with negative levels what is there does."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return low, max(high, low + 1)
    return 0.0, next((top for top in WHOLE if high <= top), high)


def _float_range(values: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """0 to 1, or to the top of 8 to 16 bits, and what goes a little beyond; of other levels what is there.

    An enhancement overshoots at sharp ridges, so that a highest level of 1.02 is still that of 0 to 1. One
    pixel in a thousand at either end decides nothing.
    """
    low, high = (float(v) for v in np.percentile(values, [0.1, 99.9]))
    top = next((top for top in (1.0, *WHOLE) if high <= OVERSHOOT * top), high)
    usual = high > top / 5 and low > (1 - OVERSHOOT) * top
    if high < 1:  # a faint picture of 0 to 1, unless there is nothing in it
        usual = low > (1 - OVERSHOOT) and high > 0.05
    if usual:
        return min(low, 0.0), max(high, top)
    return (low, high) if high > low else (low, low + 1)
