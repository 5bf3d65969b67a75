"""Reading NumPy archives of a run, each checked for the expected names, kinds and shapes of its arrays."""

from pathlib import Path
from typing import Literal

import numpy as np

from fastlip.study.storage.files import damaged, read_arrays

#: Allowed :attr:`numpy.dtype.kind` of each array that is read back. All but "image" have one row per image.
_KINDS = {
    **dict.fromkeys(("label", "prediction", "noise_prediction"), "iu"),
    **dict.fromkeys(("margin", "distortion", "stretch", "l2", "radius", "norm"), "f"),
    "found": "b",
    "image": "uf",
}

_DECIDED = ("label", "prediction")

_MOVED = (*_DECIDED, "distortion", "stretch")

_READ = {
    "clean": _DECIDED,
    "clean-attacked": (*_DECIDED, "margin"),
    "smallest-pgd": (*_MOVED, "found", "l2"),
    "smallest-gaussian": (*_MOVED, "found"),
    "jacobian": ("norm",),
    "smoothing": (*_DECIDED, "radius"),
}


def read_measured(path: Path, n: int | None = None, *more: str) -> dict[str, np.ndarray]:
    """The per-image arrays of one measurement, which include all that the study reads of it and ``more``.

    Args:
        path: images/<model>/<measurement>.npz.
        n: number of images; any if None.
        more: names of further arrays that must be present.

    Raises:
        StudyError: the file is missing or damaged, or an array is of another shape.
    """
    arrays = read_arrays(path)
    for name in (*_READ.get(path.stem, _MOVED), *more):
        if name not in arrays:
            raise damaged(path, f"it has no {name!r}")
    for name in arrays.keys() & _KINDS.keys():
        values, count = arrays[name], len(arrays[name]) if arrays[name].ndim else -1
        n = count if n is None and name != "image" else n
        if values.dtype.kind not in _KINDS[name] or (values.ndim != 4 if name == "image" else values.shape != (n,)):
            raise damaged(path, f"{name!r} is {values.dtype} of shape {list(values.shape)}")
    return arrays


def read_corruptions(path: Path) -> dict[str, np.ndarray]:
    """Decisions under common corruptions: "prediction" [K, S, N], names of the corruptions [K], severities [S].

    Raises:
        StudyError: the file is missing or damaged, or an array is of another shape.
    """
    arrays = read_arrays(path)
    shapes = {"corruption": ("U", 1), "severity": ("iu", 1), "label": ("iu", 1), "prediction": ("iu", 3)}
    for name, (kinds, dimensions) in shapes.items():
        _require_array(path, arrays, name, kinds, dimensions)
    shape = tuple(len(arrays[name]) for name in ("corruption", "severity", "label"))
    if arrays["prediction"].shape != shape:
        raise damaged(path, f"'prediction' has the shape {list(arrays['prediction'].shape)}, not {list(shape)}")
    return arrays


def read_spectra(
    path: Path, names: Literal["layer", "stage"], prefixes: tuple[str, ...], beside: dict[str, int]
) -> dict[str, np.ndarray]:
    """Singular values of each layer or stage.

    Args:
        path: spectra/<model>/weights.npz or features.npz.
        names: name of the array that lists the layers or stages, [L].
        prefixes: of the names of arrays; prefix + layer holds that layer's singular values.
        beside: further arrays and their numbers of dimensions; the last dimension is L.

    Raises:
        StudyError: the file is missing or damaged, or an array is of another shape.
    """
    arrays = read_arrays(path)
    _require_array(path, arrays, names, "U", 1)
    for name in [prefix + name for prefix in prefixes for name in arrays[names].tolist()]:
        _require_array(path, arrays, name, "f", 1)
    for name, dimensions in beside.items():
        _require_array(path, arrays, name, "f", dimensions)
        if arrays[name].shape[-1] != len(arrays[names]) or len({len(arrays[name]) for name in beside}) > 1:
            raise damaged(path, f"{name!r} has the shape {list(arrays[name].shape)}")
    return arrays


def _require_array(path: Path, arrays: dict[str, np.ndarray], name: str, kinds: str, dimensions: int) -> None:
    if name not in arrays:
        raise damaged(path, f"it has no {name!r}")
    values = arrays[name]
    if values.dtype.kind not in kinds or values.ndim != dimensions or not values.size:
        raise damaged(path, f"{name!r} is {values.dtype} of shape {list(values.shape)}")
