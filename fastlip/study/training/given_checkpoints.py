"""Checkpoints of one's own, which the study measures without having trained them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlip._text import printable
from fastlip.models import load_checkpoint
from fastlip.study.errors import StudyError, first_line
from fastlip.study.settings import normalization
from fastlip.study.settings.settings import Settings
from fastlip.study.training.architectures import build, description

#: What DataParallel, torch.compile and the study's own normalisation put before the names of weights.
_WRAPPERS = ("module.", "_orig_mod.", "network.")

#: Names of the study's own normalisation in a checkpoint.
_MEAN, _STD = "normalize.mean", "normalize.std"

#: BatchNorm counts batches for a kind of average that it does not take here; old checkpoints lack the count.
_COUNT = "num_batches_tracked"


def given_network(settings: Settings, name: str, path: Path, classes: int) -> tuple[nn.Sequential, str]:
    """The network of one of the run's checkpoints, on the CPU, with the weights of the file at ``path``.

    The file holds the state dict of the network alone, or of the study's own models, whose normalisation is then
    taken. Prefixes of DataParallel and ``torch.compile`` are removed from its names. A checkpoint that the study wrote
    says which stem and scale its network has, which are not to be read off the weights.

    Args:
        settings: of the run.
        name: one of ``settings.checkpoints``.
        path: safetensors or a torch file, of which nothing is executed.
        classes: number of the target's classes.

    Returns:
        The network and its normalisation in words.

    Raises:
        StudyError: the file cannot be read, or is not of this network and so many classes.
    """
    model = settings.architecture_of(name)
    where = f"--checkpoint {name}={path}"
    state, said = _read(path, where)
    wanted_of = description(settings, name)
    for setting in ("stem", "scale") if said.get("model") == model else ():
        if said.get(setting, wanted_of[setting]) != wanted_of[setting]:
            raise StudyError(
                f"{where} was trained with {setting}={printable(said[setting])} and is to be measured with "
                f"{setting}={wanted_of[setting]}: give --set {setting}={printable(said[setting])}",
                status=2,
            )
    network = build(settings, name, classes, 0)
    bare = network.get_submodule("network")
    wanted = bare.state_dict()
    given, own = _unwrapped(state, wanted)
    wrong = _difference(given, wanted, classes)
    if wrong:
        raise StudyError(f"{where}: {wrong} (--model {model})", status=2)
    bare.load_state_dict(given, strict=False)
    mean, std = (torch.tensor(v) for v in normalization.statistics(settings.normalize, settings.dataset))
    words = normalization.in_words(settings.normalize, settings.dataset)
    if own:
        if not all(isinstance(v, Tensor) and v.numel() == 3 and v.isfinite().all() for v in own):
            raise StudyError(f"{where}: its normalisation is not three numbers for each of mean and std", status=2)
        given_mean, given_std = (v.flatten().float() for v in own)
        same = torch.allclose(given_mean, mean) and torch.allclose(given_std, std)
        if settings.normalize and not same:
            raise StudyError(f"{where} holds another normalisation than --normalize; leave that out", status=2)
        mean, std, words = given_mean, given_std, "input normalised as the checkpoint says"
    normalize = network.get_submodule("normalize")
    normalize.load_state_dict({"mean": mean.reshape(-1, 1, 1), "std": std.reshape(-1, 1, 1)})
    return network, words


def read_state_dict(path: Path, where: str) -> dict[str, Tensor]:
    """The state dict in a safetensors or torch file; no code in it is executed.

    Args:
        path: the file. A torch file holds a state dict or a dictionary with one among its values.
        where: the option that names it, for the error.

    Raises:
        StudyError: it cannot be read, or holds none or several.
    """
    return _read(path, where)[0]


def _read(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, and what a safetensors file says beside it."""
    if not path.is_file():
        raise StudyError(f"{where} is not a file", status=2)
    try:
        if path.suffix == ".safetensors":
            return load_checkpoint(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # What torch says of other files advises to load them unsafely.
        why = "it is none, or holds other objects" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise StudyError(
            f"{where} cannot be read; it must be safetensors or a torch file of tensors alone ({why})",
            status=2,
        ) from None
    if _is_state_dict(found):
        return dict(found), {}
    inner = {k: v for k, v in found.items() if _is_state_dict(v)} if isinstance(found, dict) else {}
    if not inner:
        raise StudyError(f"{where} holds no state dict", status=2)
    if len(inner) > 1:
        names = ", ".join(map(str, inner))
        raise StudyError(f"{where} holds several state dicts ({names}); save the one to take on its own", status=2)
    return dict(next(iter(inner.values()))), {}


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _unwrapped(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The state dict without prefixes and the study's normalisation, and that normalisation, if there is one."""
    own: list[Tensor] = []
    while not state.keys() & wanted.keys():
        if _MEAN in state and _STD in state:
            own = [state.pop(_MEAN), state.pop(_STD)]
        prefix = next((p for p in _WRAPPERS if state and all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, own


def _difference(given: dict[str, Tensor], wanted: dict[str, Tensor], classes: int) -> str | None:
    """What keeps the state dict from being one of the network, in a few words; None where nothing does."""
    missing = [name for name in wanted if name not in given and not name.endswith(_COUNT)]
    surplus = sorted(given.keys() - wanted.keys())
    if missing:
        there = f"; it has {surplus[0]}, which the network has not" if surplus else ""
        return f"it lacks {missing[0]}, one of {len(missing)} missing of the network's {len(wanted)} tensors{there}"
    if surplus:
        return f"it has {surplus[0]}, one of {len(surplus)} tensors that the network has not"
    other = [name for name, value in given.items() if value.shape != wanted[name].shape]
    rows = {given[name].shape[0] if given[name].dim() else 0 for name in other}
    heads = all(wanted[n].shape[:1] == (classes,) and given[n].shape[1:] == wanted[n].shape[1:] for n in other)
    if other and heads and len(rows) == 1:
        return f"it has {rows.pop()} classes where the target has {classes} ({', '.join(other)})"
    for name in other:
        return f"{name} has the shape {list(given[name].shape)} where the network's has {list(wanted[name].shape)}"
    for name, value in given.items():
        if value.is_floating_point() != wanted[name].is_floating_point():
            return f"{name} is {value.dtype} where the network's is {wanted[name].dtype}"
        if not value.isfinite().all():
            return f"{name} holds NaN or infinity"
    return None
