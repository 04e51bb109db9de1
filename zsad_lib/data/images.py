"""Image and mask files as tensors."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from zsad_lib.data.readers import Sample
from zsad_lib.errors import DataError

GREY16_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
EXIF_ORIENTATION = 0x0112
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")  # by content: a name may hide PostScript, which runs programs
MAX_PIXELS = 100_000_000


def read_image(path: Path | str, size: int | None = None) -> torch.Tensor:
    """An image file as float32 RGB [3,H,W] in [0,1]; with `size` as [3,size,size], whatever its aspect.

    Grey is repeated; 16-bit grey is divided by 65535 (PIL reads 16-bit colour at 8 bits); what is transparent is laid
    on white; CMYK goes through PIL's conversion, without a colour profile; the EXIF orientation is applied; of several
    frames the first is read. Resized by PIL's bilinear filter, antialiased when it shrinks, on floats.
    """
    image = _open(path)
    pixels = _grey16(path, image) if image.mode in GREY16_MODES else _colour8(path, image)
    if size is not None:
        planes = [Image.fromarray(plane) for plane in np.moveaxis(pixels, -1, 0)]
        pixels = np.stack([p.resize((size, size), Image.Resampling.BILINEAR) for p in planes], axis=-1).clip(0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_mask(path: Path | str, size: int | None = None, threshold: int = 127) -> torch.Tensor:
    """A mask file as bool [H,W] (or [size,size], nearest): where its grey value in 0..255 is above `threshold`.

    Masks are not always binary (the magnetic tiles have soft edges), so the threshold comes before the resize. Where
    no value is above 1, the mask is one of 0 and 1, and all above 0 is marked.
    """
    image = _open(path)
    grey = _grey16(path, image)[..., 0] * 255 if image.mode in GREY16_MODES else np.asarray(image.convert("L"))
    mask = grey > (threshold if grey.max() > 1 else 0)
    if size is not None:
        mask = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    return torch.from_numpy(mask.copy())


def load_images(samples: Sequence[Sample], size: int) -> torch.Tensor:
    """`read_image` of each sample: float32 [B,3,size,size] in [0,1]."""
    return torch.stack([read_image(sample.image_path, size) for sample in samples])


def load_masks(samples: Sequence[Sample], size: int, threshold: int = 127) -> torch.Tensor:
    """`read_mask` of each sample: bool [B,size,size], all False for a normal image."""
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


@contextmanager
def _opened(path) -> Iterator[Image.Image]:
    """The image of a file whose header is read and whose pixels are not; what is raised inside names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS takes its place
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
            yield image
    except FileNotFoundError:
        raise DataError(f"no file at {path}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is larger than the {MAX_PIXELS} pixels that are read ({error}): shrink it") from error
    except Exception as error:  # a broken file can raise nearly anything from inside its decoder
        raise DataError(f"cannot read image {path} ({error}): restore or remove the file") from error


def _open(path):
    with _opened(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _pixel_size(path):
    """(width, height) after the EXIF orientation, from the file's header alone."""
    with _opened(path) as image:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
        return image.size[::-1] if turned else image.size


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
