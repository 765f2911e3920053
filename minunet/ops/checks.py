"""What every op asks of its arguments before it works: the checks behind the ``ValueError`` of each op."""

from minunet.base.backend import Array, array_module


def check_images(name: str, x: Array) -> None:
    """Raise ValueError unless ``x`` is a non-empty (N, H, W, C) array of floats (complex ones for the complex step)."""
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (N, H, W, C) with no axis of length 0, got {x.shape}")
    if x.dtype.kind not in "fc":
        raise ValueError(f"{name} must be floating, got {x.dtype}; convert it first, for example x.astype('float32')")


def check_array(name: str, value: Array, shape: tuple[int, ...], dtype: object) -> None:
    """Raise ValueError unless ``value`` has this shape and dtype: no op broadcasts or promotes silently."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    check_dtype(name, value, dtype)


def check_dtype(name: str, value: Array, dtype: object) -> None:
    """Raise ValueError unless ``value`` has this dtype."""
    if value.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype}, got {value.dtype}")


def check_kernel(weight: Array, in_channels: int, dtype: object) -> None:
    """Raise ValueError unless ``weight`` is a (KH, KW, C_in, C_out) array for ``in_channels`` channels of ``dtype``."""
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (KH, KW, C_in, C_out) with no axis of length 0, got {weight.shape}")
    if weight.shape[2] != in_channels:
        raise ValueError(f"weight must have C_in = {in_channels} like x, got a weight of shape {weight.shape}")
    check_dtype("weight", weight, dtype)


def check_stride_and_padding(stride: int, padding: int | str) -> None:
    """Raise ValueError unless ``stride`` >= 1 and ``padding`` is "same" or a number of pixels >= 0."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if padding != "same" and (isinstance(padding, str) or padding < 0):
        raise ValueError(f"padding must be 'same' or a number of pixels >= 0, got {padding!r}")


def check_target(target: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``target`` is a mask of ``shape``, that of the prediction."""
    if target.shape != shape:
        raise ValueError(f"target must have the shape of the prediction, {shape}, got {target.shape}")
    low, high = target.real.min().item(), target.real.max().item()
    if not (low >= 0 and high <= 1):
        found = f"got values from {low} to {high}; divide a mask of 0 and 255 by 255"
        raise ValueError(f"target must lie in [0, 1], {found}")


def check_class_target(target: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``target`` (N, H, W, K) gives each pixel one class, or none: one-hot, or all 0."""
    check_target(target, shape)
    xp = array_module(target)
    sums = target.real.sum(axis=-1, dtype="float64")
    off = xp.minimum(xp.abs(sums), xp.abs(sums - 1)).max().item()
    if not off <= 1e-3:  # probabilities of classes, in float32 or rounded, are not one-hot but will do
        raise ValueError(
            "target must sum to 1 over the classes of a pixel, or to 0 where it is ignored, got sums from "
            f"{sums.min().item()} to {sums.max().item()}; masks that overlap need a sigmoid each"
        )
