"""Checkpoints: everything a run needs to go on, in one file that is whole or absent.

A checkpoint is a guarded archive (:mod:`minunet.base.archive`) with these arrays::

    parameters/down1.conv1.weight            the network
    buffers/down1.norm1.running_mean         its running statistics
    adamw/first_moment/down1.conv1.weight, adamw/second_moment/down1.conv1.weight
    ema/down1.conv1.weight                   the averaged network, if the run keeps one
                                             (with those arrays, too, that do not change and are not averaged)
    history/train_loss                       a column of the run's history: one value an epoch

Before the first array is read, the names, shapes and dtypes of all of them but the history are compared with those of
the network that they are meant for.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from minunet.base.archive import DAMAGED, Reader, Spec, not_finite, save
from minunet.base.backend import Array, array_module, to_numpy
from minunet.base.choices import check_choice
from minunet.base.environment import differences, environment
from minunet.base.errors import Diverged, UserError
from minunet.network.layers import Arrays
from minunet.network.own_code import class_name, own_code, own_settings
from minunet.network.unet import Dtype, UNet, topology
from minunet.training.optim import AdamW, WeightEMA

Weights = Literal["auto", "ema", "raw"]

_HISTORY = "history/"
_OTHER_NETWORK = "use the settings that it was trained with (config.json in its folder has them)"


def save_training(
    path: str | os.PathLike[str],
    *,
    net: UNet,
    optimizer: AdamW,
    ema: WeightEMA | None = None,
    history: Mapping[str, Array] | None = None,
    metadata: Mapping[str, Any],
) -> None:
    """Write all that :func:`load_training` needs to go on: network, optimiser and, if there is one, averaged weights.

    ``history`` has a column under each name, of one value an epoch; :func:`load_history` reads it back. (Arrays: a long
    run would outgrow the metadata.) To ``metadata`` it adds the entries "class", "own_code" (what in ``net`` is not the
    package's own, or None), "model" (``net.config``), "optimizer" (its steps), "ema" (its updates, or None) and
    "environment".

    Raises Diverged, and keeps the file that was there, if a value is NaN or infinite; else what
    :func:`minunet.base.archive.save` raises, and ValueError if ``metadata`` has one of those entries.
    """
    ours = {
        "class": class_name(type(net)),
        "own_code": _own(net),
        "model": net.config,
        "optimizer": {"steps": optimizer.steps},
        "ema": None if ema is None else {"updates": ema.updates},
        "environment": environment(),
    }
    if taken := sorted(ours.keys() & metadata.keys()):
        raise ValueError(f"metadata must not have the entries {taken}, which save_training writes itself")
    arrays = {name: to_numpy(array) for name, array in _training_arrays(net, optimizer, ema).items()}
    for name, array in arrays.items():
        if bad := not_finite(array):
            raise Diverged(f"{name}: {bad} of {array.size} values are NaN or infinite; {path} is not overwritten")
    save(path, arrays | _prefixed(_HISTORY, history or {}), {**metadata, **ours})


def load_training(
    path: str | os.PathLike[str], net: UNet, optimizer: AdamW, ema: WeightEMA | None = None
) -> dict[str, Any]:
    """Put the state that :func:`save_training` wrote into ``net``, ``optimizer`` and ``ema``, and return the metadata.

    Training then goes on bit for bit, given the same machine, versions and number of threads:
    ``differences(metadata["environment"], environment())`` says what is not the same. With an error, nothing has
    been changed.

    Raises UserError as :func:`minunet.base.archive.load` does, also if the file belongs to another network.
    """
    live = _training_arrays(net, optimizer, ema)
    with Reader(path) as reader:
        _check_class(reader, type(net))
        _check_own_code(reader, net)
        if changed := differences(_model(reader), net.config):
            raise UserError(f"{path}: holds another network ({'; '.join(changed)}), {_OTHER_NETWORK}")
        stored = {name: spec for name, spec in reader.specs.items() if not name.startswith(_HISTORY)}
        _check_same_arrays(reader.path, stored, _specs(live))
        steps = _count(reader, "optimizer", "steps")
        updates = 0 if ema is None else _count(reader, "ema", "updates")
        saved = {name: _read(reader, name) for name in live}
    for name, array in live.items():
        _copy_into(array, saved[name])
    optimizer.steps = steps
    if ema is not None:
        ema.updates = updates
    return reader.metadata


def load_history(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The columns of the history that :func:`save_training` wrote. Format 1 has none: there it is in the metadata.

    Raises UserError as :func:`minunet.base.archive.load` does.
    """
    with Reader(path) as reader:
        return {name.removeprefix(_HISTORY): reader.read(name) for name in reader.specs if name.startswith(_HISTORY)}


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a checkpoint. Raises UserError as :func:`minunet.base.archive.load` does."""
    with Reader(path) as reader:
        return reader.metadata


def load_net(
    path: str | os.PathLike[str], weights: Weights = "auto", *, network: type[UNet] = UNet
) -> tuple[UNet, dict[str, Any]]:
    """The network of a checkpoint, built as its metadata says, with its weights, on the CPU; and the metadata.

    ``weights`` is "ema" (averaged), "raw" (those of the last step) or "auto": "ema" if the file has them, else "raw".
    ``network`` is the class to build: one's own, if the checkpoint is of one.

    Raises UserError as :func:`minunet.base.archive.load` does, if the file is of another class, and if there are no
    averaged weights; ValueError for another ``weights``.
    """
    check_choice("weights", weights, Weights)
    with Reader(path) as reader:
        _check_class(reader, network)
        has_ema = any(name.startswith("ema/") for name in reader.specs)
        if weights == "ema" and not has_ema:
            raise UserError(f"{path}: holds no averaged weights (EMA), ask for the raw ones")
        groups = ("ema/",) if has_ema and weights != "raw" else ("parameters/", "buffers/")
        stored = {name: spec for name, spec in reader.specs.items() if name.startswith(groups)}
        net = _build_net(reader, network, sum(math.prod(spec.shape) for spec in stored.values()))
        live = _prefixed(groups[0], net.parameters()) | _prefixed(groups[-1], net.buffers())
        _check_same_arrays(reader.path, stored, _specs(live))
        _check_own_code(reader, net)
        for name, array in live.items():
            _copy_into(array, _read(reader, name))
    return net, reader.metadata


def load_weights(path: str | os.PathLike[str], net: UNet, weights: Weights = "auto") -> dict[str, Any]:
    """Put the weights and running statistics of a checkpoint into ``net``, for a new run; and return the metadata.

    ``weights`` as in :func:`load_net`. The two networks have the same channels, widths and kernels; the seed, the
    dropout and the dtype may be others, and stay those of ``net``. With an error, nothing has been changed.

    Raises what :func:`load_net` does, and UserError if the checkpoint is of a network with other arrays.
    """
    found, metadata = load_net(path, weights, network=type(net))
    there, free = found.config, ("seed", "dropout", "dtype")
    differ = [
        f"{name} is {there.get(name)} there and {value} here"
        for name, value in net.config.items()
        if name not in free and there.get(name) != value
    ]
    if differ:
        raise UserError(f"{path}: its weights do not fit ({'; '.join(differ)}), give a checkpoint of such a network")
    arrays = found.parameters() | found.buffers()
    for name, array in (net.parameters() | net.buffers()).items():
        _copy_into(array, arrays[name])
    return metadata


def _check_same_arrays(path: Path, stored: Mapping[str, Spec], expected: Mapping[str, Spec]) -> None:
    """Raise UserError, naming the first difference, unless the file has exactly the ``expected`` arrays."""
    found = [
        f"{name} is {stored[name]} in the file and {spec} here" if name in stored else f"{name} is not in the file"
        for name, spec in expected.items()
        if stored.get(name) != spec
    ]
    found += [f"{name} is only in the file" for name in stored if name not in expected]
    if found:
        more = f"; and {len(found) - 1} more arrays differ" if len(found) > 1 else ""
        raise UserError(f"{path}: holds another network or state ({found[0]}{more}), {_OTHER_NETWORK}")


def _training_arrays(net: UNet, optimizer: AdamW, ema: WeightEMA | None) -> Arrays:
    """The live arrays of a run, under the names that they have in a checkpoint."""
    return (
        _prefixed("parameters/", net.parameters())
        | _prefixed("buffers/", net.buffers())
        | _prefixed("adamw/first_moment/", optimizer.first_moment)
        | _prefixed("adamw/second_moment/", optimizer.second_moment)
        | _prefixed("ema/", {} if ema is None else net.parameters() | net.buffers() | ema.average)
    )


def _prefixed(prefix: str, arrays: Mapping[str, Array]) -> Arrays:
    return {prefix + name: array for name, array in arrays.items()}


def _specs(arrays: Mapping[str, Array]) -> dict[str, Spec]:
    return {name: Spec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}


def _read(reader: Reader, name: str) -> np.ndarray:
    """The array. Raises UserError if it is a variance below 0, which would make every prediction NaN."""
    array = reader.read(name)
    if name.endswith("running_var") and array.min(initial=0) < 0:
        raise UserError(f"{reader.path}: damaged checkpoint ({name} is negative), {DAMAGED}")
    return array


def _copy_into(target: Array, source: np.ndarray) -> None:
    target[...] = array_module(target).asarray(source)


def _count(reader: Reader, part: str, entry: str) -> int:
    """A number of steps or updates, from the metadata."""
    entries = reader.metadata.get(part)
    value = entries.get(entry) if isinstance(entries, dict) else None
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise UserError(f"{reader.path}: damaged checkpoint (its metadata lacks the {part}'s {entry}), {DAMAGED}")
    return value


def _check_class(reader: Reader, network: type[UNet]) -> None:
    """Raise UserError unless the checkpoint is of a ``network``."""
    saved, wanted = reader.metadata.get("class", class_name(UNet)), class_name(network)
    if saved != wanted:
        advice = f"load it in Python by load_net(..., network={str(saved).rpartition('.')[2]})"
        raise UserError(f"{reader.path}: holds a {saved}, not a {wanted}; {advice}")


def _own(net: UNet) -> str | None:
    """What ``type(net)(**net.config)`` would not have."""
    return own_code(net) or (own_settings(net) if type(net) is UNet else None)


def _check_own_code(reader: Reader, net: UNet) -> None:
    """Raise UserError if the network that was saved had code of its own that ``net`` has not, or the reverse."""
    saved, here = reader.metadata.get("own_code", _own(net)), _own(net)
    if saved != here:
        words = [found or "all code is the package's own" for found in (saved, here)]
        advice = "give the network a class of its own and load it by that (load_net's network)"
        raise UserError(f"{reader.path}: holds another network (there {words[0]}, here {words[1]}), {advice}")


def _model(reader: Reader) -> Any:
    """The network's settings; a file of an earlier version lacks those that have come since, with their defaults."""
    config = reader.metadata.get("model")
    return {"batch_norm_eps": 1e-3, "output": "sigmoid", **config} if isinstance(config, dict) else config


def _build_net(reader: Reader, network: type[UNet], stored_values: int) -> UNet:
    """``network(**metadata["model"])``, refused before it is built if it would be larger than what the file holds."""
    config = _model(reader)
    try:
        if not isinstance(config, dict) or config["dtype"] not in get_args(Dtype):
            raise ValueError("no settings of a network")
        # Of a class of one's own nothing is known but that its widths are those of arrays.
        if (_kernel_values(config) if network is UNet else max(config["widths"])) > stored_values:
            raise ValueError("the settings are those of a larger network than the arrays")
        return network(**config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{reader.path}: damaged checkpoint (model: {error}), {DAMAGED}") from error


def _kernel_values(config: Mapping[str, Any]) -> int:
    """How many numbers the kernels of ``UNet(**config)`` hold. Raises ValueError unless all sizes are positive ints."""
    channels_in, channels_out, widths = config["in_channels"], config["out_channels"], config["widths"]
    up, head = config["up_kernel"], config["head_kernel"]
    if not all(type(size) is int and size > 0 for size in (channels_in, channels_out, up, head, *widths)) or not widths:
        raise ValueError("sizes must be positive whole numbers")
    total = 0
    for _, kind, _, ins, outs in topology(channels_in, channels_out, widths):
        if kind == "head":
            total += head**2 * ins * outs
        else:  # two convolutions; those of an up take twice its outputs, one half from the skip
            total += 9 * outs * (outs + (ins if kind != "up" else 2 * outs))
            total += up**2 * ins * outs if kind == "up" else 0
    return total
