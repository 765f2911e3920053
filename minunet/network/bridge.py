"""The bridge to PyTorch: a network's arrays under PyTorch's names and in its layouts, and back; safetensors files.

The PyTorch module meant is the obvious one: its submodules are called as here (``down1.conv1``, ``bottleneck.norm2``,
``up1.up``, ``head``). It is written out, and compared with minunet, in ``tests/parity/torch_reference.py``::

    here                                               there
    conv1.weight, head.weight  (KH, KW, C_in, C_out)   conv1.weight, head.weight  (C_out, C_in, KH, KW)
    up.weight                  (KH, KW, C_in, C_out)   up.weight                  (C_in, C_out, KH, KW)
    conv1.bias, ...            (C_out,)                the same
    norm1.gamma, norm1.beta    (C,)                    norm1.weight, norm1.bias
    norm1.running_mean, norm1.running_var  (C,)        the same, beside norm1.num_batches_tracked, which is 0

Both libraries correlate rather than convolve, so no kernel is flipped, and the values stay what they are. What the
names do not say, and the module has to get right:

- **Alignment of the transposed convolution.** With kernel 3 and stride 2, "same" (of Keras, and here) drops the last
  row and column of the full result. PyTorch's usual ``padding=1, output_padding=1`` drops the first, so its image is
  shifted by one pixel, at every level. What reproduces it: ``ConvTranspose2d(..., 3, stride=2, padding=0)``, and then
  ``[:, :, :-1, :-1]``. A kernel of 2 drops nothing and needs no care.
- **The order of the concat** is [up, skip] here, along the channels. A module that puts the skip first loads the same
  file with ``strict=True`` and computes something else: the names and shapes are the same in either order.
- **eps of batch norm** is ``batch_norm_eps`` of the network, by default 1e-3 as in Keras; PyTorch's default is 1e-5.
- **Momentum of batch norm**: new = m * old + (1 - m) * batch here, as in Keras; PyTorch calls 1 - m the momentum.
- **The running variance**: both normalise by the batch's biased variance, and the biased one is averaged here, as in
  Keras; PyTorch averages the unbiased one, larger by n / (n - 1) for n values a channel. Each is a fair estimate: it is
  carried over as it is.
- **The module returns logits.** "output" of the network says what makes them probabilities: "sigmoid", each channel for
  itself, or "softmax" over the channels, axis 1 there.
- **Images** are (N, C, H, W) there: ``x.transpose(0, 3, 1, 2)``.
"""

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minunet.base.backend import Array, array_module, to_numpy
from minunet.base.durable import json_text, write_bytes
from minunet.base.errors import UserError
from minunet.base.version import __version__
from minunet.network.own_code import own_code, own_settings
from minunet.network.unet import UNet

_NAME = re.compile(r"((down[1-9]\d*|bottleneck|up[1-9]\d*)\.(conv[12]|norm[12])|up[1-9]\d*\.up|head)\.\w+")
_NORM_TO_TORCH = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
_NORM_FROM_TORCH = {theirs: ours for ours, theirs in _NORM_TO_TORCH.items()}
_COUNTER = "num_batches_tracked"  # PyTorch's count of training batches, which only its momentum=None reads

_DTYPES = {"float32": "F32", "float64": "F64"}  # what safetensors calls them


def to_torch_names(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Parameters, buffers or gradients of a ``UNet`` as the PyTorch module names and lays them out.

    ``arrays`` is all or a part of ``net.parameters() | net.buffers()``, or gradients by those names; of any dtype, on
    any device. Returns copies, C-contiguous and on the host, of the same dtype; each running mean brings the
    counter that PyTorch keeps beside it, so that the module loads the result with ``strict=True``::

        state = to_torch_names(net.parameters() | net.buffers())
        module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})

    :func:`from_torch_names` gives the same arrays back, bit for bit. Raises ValueError for a name that no array of
    a ``UNet`` has, and for a kernel that has not four axes.

    >>> arrays = {"up1.up.weight": np.zeros((3, 3, 16, 8)), "up1.norm1.gamma": np.ones(8)}
    >>> {name: array.shape for name, array in to_torch_names(arrays).items()}
    {'up1.up.weight': (16, 8, 3, 3), 'up1.norm1.weight': (8,)}
    """
    converted: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        layer, own = _split(name)
        host = to_numpy(array)
        if _is_norm(layer):
            if own not in _NORM_TO_TORCH:
                raise ValueError(_unknown(name))
            converted[f"{layer}.{_NORM_TO_TORCH[own]}"] = host.copy(order="C")
            if own == "running_mean":
                converted[f"{layer}.{_COUNTER}"] = np.zeros((), np.int64)
        else:
            converted[name] = _laid_out(name, host, (2, 3, 0, 1) if _is_transposed(layer) else (3, 2, 0, 1))
    return converted


def from_torch_names(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """The reverse of :func:`to_torch_names`: what a PyTorch module names and lays out its way, as a ``UNet`` does.

    ``arrays`` are NumPy's or CuPy's: ``{name: tensor.numpy() for name, tensor in module.cpu().state_dict().items()}``.
    Returns C-contiguous copies on the host, of the same dtype, without PyTorch's counters of batches.
    Raises ValueError for a name that the PyTorch module of a ``UNet`` has not, and for a kernel without four axes.

    >>> arrays = {"head.weight": np.zeros((1, 8, 3, 3)), "down1.norm1.bias": np.ones(8)}
    >>> {name: array.shape for name, array in from_torch_names(arrays).items()}
    {'head.weight': (3, 3, 8, 1), 'down1.norm1.beta': (8,)}
    """
    converted: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        layer, theirs = _split(name)
        host = to_numpy(array)
        if _is_norm(layer):
            if theirs == _COUNTER:
                continue
            if theirs not in _NORM_FROM_TORCH:
                raise ValueError(_unknown(name))
            converted[f"{layer}.{_NORM_FROM_TORCH[theirs]}"] = host.copy(order="C")
        else:
            converted[name] = _laid_out(name, host, (2, 3, 0, 1) if _is_transposed(layer) else (2, 3, 1, 0))
    return converted


def export_safetensors(path: str | os.PathLike[str], net: UNet) -> None:
    """Write the parameters and running statistics of ``net`` to ``path``, under PyTorch's names and in its layouts.

    In PyTorch: ``module.load_state_dict(safetensors.torch.load_file(path))``. The file's metadata says how to build the
    module: "config" is ``net.config`` as JSON, "batch_norm_eps" the eps, "concat" the order "up, skip", "output" what
    makes the logits probabilities. It is for other programs to read; a run goes on from a checkpoint
    (:mod:`minunet.training.checkpoint`), which has a checksum for each array. A safetensors file has none.

    Raises UserError if the package safetensors is missing, if ``net`` is not the package's own U-Net (whoever reads the
    file could not know what to build), and if the system refuses the write; the file that was there before is then
    unchanged.
    """
    safetensors = _safetensors()
    if found := own_code(net) or own_settings(net):
        raise UserError(f"{path}: only the package's own U-Net has a known PyTorch module ({found}), save a checkpoint")
    # C-contiguous by to_torch_names: safetensors writes the memory of a NumPy array as it lies, and of a transposed
    # one it would, without a word, write the values in the wrong order.
    state = to_torch_names(net.parameters() | net.buffers())
    data = safetensors.numpy.save(state, _metadata(net))
    write_bytes(path, data)


def _metadata(net: UNet) -> dict[str, str]:
    return {
        "format": "pt",  # "the layouts are PyTorch's": the loaders of other packages look for it
        "minunet": __version__,
        "config": json_text(net.config, indent=None),
        "batch_norm_eps": repr(net.config["batch_norm_eps"]),
        "concat": "up, skip",
        "output": net.config["output"],
    }


def import_safetensors(path: str | os.PathLike[str], net: UNet) -> None:
    """Copy the parameters and running statistics at ``path`` into ``net``: the reverse of :func:`export_safetensors`.

    The file has exactly the arrays that the export of ``net`` would have (the counters of batches may be missing), of
    the same shapes and dtype. Names, shapes and dtypes are checked before an array is read, and the values before one
    is changed: with an error, ``net`` is as it was. Where the file's metadata say what the eps of batch norm, the
    order of the concat and the output are, ``net`` must have the same.

    Raises UserError if the package safetensors is missing, if the file is missing, no safetensors file, or of another
    network, and if it holds a value that is NaN or infinite.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():  # opening a FIFO would wait for a writer, perhaps for ever
        raise UserError(f"{path}: no such file, give the path of a .safetensors file")
    live = net.parameters() | net.buffers()
    expected = {name: array for name, array in to_torch_names(live).items() if not name.endswith(_COUNTER)}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            _check_same(path, file, expected)
            _check_metadata(path, file.metadata() or {}, net)
            state = {name: file.get_tensor(name) for name in expected}
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read as safetensors ({reason}), export the weights again") from error
    for name, array in state.items():
        if bad := int(array.size - np.count_nonzero(np.isfinite(array))):
            raise UserError(f"{path}: {name} holds {bad} values that are NaN or infinite, export the weights again")
        if name.endswith("running_var") and array.min(initial=0) < 0:
            raise UserError(f"{path}: {name} is a variance below 0, export the weights again")
    for name, array in from_torch_names(state).items():
        live[name][...] = array_module(live[name]).asarray(array)


def _split(name: str) -> tuple[str, str]:
    """The layer and the array of a dotted name. Raises ValueError for a name that no layer of a ``UNet`` has."""
    if not _NAME.fullmatch(name):
        raise ValueError(_unknown(name))
    layer, _, own = name.rpartition(".")
    if not _is_norm(layer) and own not in ("weight", "bias"):
        raise ValueError(_unknown(name))
    return layer, own


def _unknown(name: str) -> str:
    return f"arrays must have the names of a UNet's, such as 'down1.conv1.weight', got {name!r}"


def _is_norm(layer: str) -> bool:
    return layer.endswith((".norm1", ".norm2"))


def _is_transposed(layer: str) -> bool:
    return layer.endswith(".up")


def _laid_out(name: str, array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """A copy of a bias, or of a kernel with its axes in that order."""
    if name.endswith(".bias"):
        return array.copy(order="C")
    if array.ndim != 4:
        raise ValueError(f"arrays[{name!r}] must have four axes, got shape {array.shape}")
    return array.transpose(axes).copy(order="C")


def _safetensors() -> Any:
    """The package, with its NumPy part."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError('safetensors: not installed, run pip install "minunet[bridge]"') from error
    return safetensors


def _check_metadata(path: Path, metadata: Mapping[str, str], net: UNet) -> None:
    """Raise UserError if what the file says of its network is not so of ``net``; a file may say nothing."""
    expected = _metadata(net)
    for entry in ("batch_norm_eps", "concat", "output"):
        if (stored := metadata.get(entry, expected[entry])) != expected[entry]:
            advice = "load it into a network like the one that it was exported from"
            raise UserError(
                f"{path}: its network has {entry} {reprlib.repr(stored)}, not {expected[entry]!r}; {advice}"
            )


def _check_same(path: Path, file: Any, expected: Mapping[str, np.ndarray]) -> None:
    """Raise UserError, naming the first difference, unless the open ``file`` has exactly the ``expected`` arrays."""
    names = set(file.keys())
    found = []
    for name, array in expected.items():
        if name not in names:
            found.append(f"{name} is not in the file")
            continue
        stored = file.get_slice(name)
        there, here = (stored.get_dtype(), tuple(stored.get_shape())), (_DTYPES.get(str(array.dtype)), array.shape)
        if there != here:
            found.append(f"{name} is {there[0]} {there[1]} in the file and {here[0]} {here[1]} here")
    extra = (name for name in names - expected.keys() if not name.endswith(f".{_COUNTER}"))
    found += [f"{name} is only in the file" for name in sorted(extra)]
    if found:
        more = f"; and {len(found) - 1} more arrays differ" if len(found) > 1 else ""
        advice = "build the network as its metadata's config says"
        raise UserError(f"{path}: holds another network ({found[0]}{more}), {advice}")
