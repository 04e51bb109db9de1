"""zsad_lib.data.images"""

import numpy as np
import torch
from PIL import Image, ImageOps

from zsad_lib.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


GREY16_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}


EXIF_ORIENTATION = 0x0112


def read_image(path, size=None):
    """An image file as float32 RGB [3,H,W] in [0,1]; `size` makes it [3,size,size], whatever its aspect.

    Grey is repeated to RGB; 16-bit grey is divided by 65535 (16-bit colour is read by PIL at 8 bits);
    transparent pixels (RGBA, grey with alpha, palette) are laid on white; CMYK goes through PIL's conversion
    without a colour profile; the EXIF orientation is applied. Resizing is PIL's bilinear filter, antialiased
    when it shrinks, on float values, so the range stays in [0,1].
    Raises DataError, naming the file, when it is missing, not an image, truncated or of an unknown kind.
    """
    image = _open(path)
    pixels = _grey16(path, image) if image.mode in GREY16_MODES else _colour8(path, image)
    if size is not None:
        pixels = np.stack([_resize_plane(pixels[..., c], size) for c in range(3)], axis=-1)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_mask(path, size=None, threshold=127):
    """A mask file as bool [H,W]: True where its grey value (0 to 255) is greater than `threshold`.

    Masks are not always binary (the magnetic tiles have soft edges and compression noise), so the threshold
    is explicit and comes before the resize to [size,size], which takes the nearest pixel. threshold=0 counts
    every non-zero pixel. 16-bit masks are scaled to 0..255 first. Raises DataError as `read_image` does.
    """
    image = _open(path)
    if image.mode in GREY16_MODES:
        grey = _grey16(path, image)[..., 0] * 255
    else:
        grey = np.asarray(image.convert("L"))
    mask = grey > threshold
    if size is not None:
        mask = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    return torch.from_numpy(mask.copy())


def load_images(samples, size):
    """Images of the samples, float32 [B,3,size,size] in [0,1]; see `read_image`."""
    return torch.stack([read_image(sample.image_path, size) for sample in samples])


def load_masks(samples, size, threshold=127):
    """Masks of the samples, bool [B,size,size]; all False for normal images; see `read_mask`.

    Raises DataError for a sample whose truth is unknown (label -1), and for a mask whose pixel size is not
    that of its image.
    """
    return torch.stack([_load_mask(sample, size, threshold) for sample in samples])


def _load_mask(sample, size, threshold):
    if sample.label == 0:
        return torch.zeros(size, size, dtype=torch.bool)
    if sample.mask_path is None:
        raise DataError(f"no mask is known for {sample.image_path}: use a dataset that has masks")
    image, mask = _pixel_size(sample.image_path), _pixel_size(sample.mask_path)
    if image != mask:
        raise DataError(
            f"mask {sample.mask_path} is {mask[0]}x{mask[1]} pixels, but its image is {image[0]}x{image[1]}: "
            f"they must cover the same frame"
        )
    return read_mask(sample.mask_path, size, threshold)


def _open(path):
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"no file at {path}") from None
    except Exception as error:  # a broken file can raise nearly anything from inside its decoder
        raise DataError(f"cannot read image {path} ({error}): restore or remove the file") from error


def _pixel_size(path):
    """(width, height) after the EXIF orientation, from the file's header alone."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except OSError:
        return _open(path).size  # says what is wrong with the file


def _grey16(path, image):
    values = np.asarray(image).astype(np.float32)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{path} holds values outside 0..65535: convert it to 16 or 8 bits")
    return np.repeat(values[..., None] / 65535, 3, axis=-1)


def _colour8(path, image):
    if image.mode == "F":
        raise DataError(f"{path} holds floats of unknown range: convert it to 16 or 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def _resize_plane(plane, size):
    resized = Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).clip(0, 1)
