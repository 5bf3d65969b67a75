"""Pixels of an image file of any size and mode."""

from typing import Any

import numpy as np


def rgb(image: Any, size: int) -> np.ndarray:
    """The pixels of a Pillow image as [3, size, size] uint8.

    Grey-scale images have three equal channels, and transparency is dropped. An image of another size is cut to its
    central square and resized (bicubic, with antialiasing).

    Raises:
        ValueError: its pixels have more than 8 bits, which a conversion would clip.
        OSError: its file is truncated or damaged.
    """
    from PIL import Image, ImageOps

    if image.mode[0] in "IF":
        raise ValueError(f"it has pixels of mode {image.mode}, more than 8 bits")
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    return np.array(image).transpose(2, 0, 1)
