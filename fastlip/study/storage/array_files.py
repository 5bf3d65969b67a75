"""Reading NumPy archives of a run, each checked for the expected names, kinds and shapes of its arrays."""

from pathlib import Path
from typing import Literal

import numpy as np

from fastlip.study.storage.files import damaged, read_arrays

#: Allowed :attr:`numpy.dtype.kind` of each array that is read back. All but "image" have one row per image.
_KINDS = {
    **dict.fromkeys(("label", "prediction", "noise_prediction"), "iu"),
    **dict.fromkeys(("margin", "distortion", "stretch", "l2", "radius", "norm", "ceiling"), "f"),
    "found": "b",
    "image": "uf",
}

_DECIDED = ("label", "prediction")

_MOVED = (*_DECIDED, "distortion", "stretch")

_READ = {
    "clean": _DECIDED,
    "clean-attacked": (*_DECIDED, "margin"),
    "smallest-pgd": (*_MOVED, "found", "ceiling", "l2"),
    "smallest-gaussian": (*_MOVED, "found", "ceiling"),
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
    """Decisions, distortion and stretch under common corruptions.

    Returns:
        "corruption" names [K], "severity" [S], "label" and "clean_prediction" [N], and "prediction", "distortion" and
        "stretch" [K, S, N].

    Raises:
        StudyError: the file is missing or damaged, or an array is of another shape.
    """
    measured = {"prediction": "iu", "distortion": "f", "stretch": "f"}
    arrays = _read_crossed(path, {"corruption": "U", "severity": "iu", "label": "iu"}, measured)
    _require_array(path, arrays, "clean_prediction", "iu", arrays["label"].shape)
    return arrays


def read_transfer_images(path: Path, norms: int) -> dict[str, np.ndarray]:
    """The adversarial images of one model at L norms: "perturbed" [N, L, C, H, W], the norms reached "l2" [N, L].

    Args:
        path: images/<model>/transfer-images.npz.
        norms: the number L.

    Raises:
        StudyError: the file is missing or damaged, or an array is of another shape.
    """
    arrays = read_arrays(path)
    _require_array(path, arrays, "label", "iu", (None,))
    n = len(arrays["label"])
    _require_array(path, arrays, "l2", "f", (n, norms))
    _require_array(path, arrays, "perturbed", "f", (n, norms, None, None, None))
    return arrays


def read_transfer(path: Path) -> dict[str, np.ndarray]:
    """Decisions of one model for the adversarial images of S models at L norms, and under noise of the same norms.

    Returns:
        "source" names [S], "strength" [L], "label" [N], and "prediction" and "noise_prediction" [S, L, N].

    Raises:
        StudyError: the file is missing or damaged, or an array is of another shape.
    """
    measured = {"prediction": "iu", "noise_prediction": "iu"}
    return _read_crossed(path, {"source": "U", "strength": "f", "label": "iu"}, measured)


def _read_crossed(path: Path, axes: dict[str, str], measured: dict[str, str]) -> dict[str, np.ndarray]:
    """Arrays ``measured`` over all combinations of the ``axes``; both map names to the allowed kinds of dtypes."""
    arrays = read_arrays(path)
    for name, kinds in axes.items():
        _require_array(path, arrays, name, kinds, (None,))
    shape = tuple(len(arrays[name]) for name in axes)
    for name, kinds in measured.items():
        _require_array(path, arrays, name, kinds, shape)
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
    _require_array(path, arrays, names, "U", (None,))
    for name in [prefix + name for prefix in prefixes for name in arrays[names].tolist()]:
        _require_array(path, arrays, name, "f", (None,))
    for name, dimensions in beside.items():
        _require_array(path, arrays, name, "f", (None,) * dimensions)
        if arrays[name].shape[-1] != len(arrays[names]) or len({len(arrays[name]) for name in beside}) > 1:
            raise damaged(path, f"{name!r} has the shape {list(arrays[name].shape)}")
    return arrays


def _require_array(
    path: Path, arrays: dict[str, np.ndarray], name: str, kinds: str, shape: tuple[int | None, ...]
) -> None:
    """Raise where the array ``name`` is missing, empty, or of another kind or shape; None stands for any length."""
    if name not in arrays:
        raise damaged(path, f"it has no {name!r}")
    values = arrays[name]
    fits = values.ndim == len(shape) and all(w in (None, n) for w, n in zip(shape, values.shape, strict=True))
    if values.dtype.kind not in kinds or not fits or not values.size:
        raise damaged(path, f"{name!r} is {values.dtype} of shape {list(values.shape)}")
