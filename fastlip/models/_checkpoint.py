"""Weights on disk: safetensors only, which hold numbers and can execute nothing."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlip._files import replacing
from fastlip._text import printable
from fastlip.models._extra import safetensors

#: Where a file's own SHA-256 stands among its metadata.
_DIGEST = "fastlip.sha256"


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, meta: Mapping[str, str] | None = None) -> None:
    """Write the model's state dict and ``meta`` to ``path``, all or nothing, with a SHA-256 over both.

    Args:
        path: file to write, replaced in one move once it is complete.
        model: the model.
        meta: strings to keep beside the weights.

    Raises:
        OSError: the file cannot be written.
        TypeError: ``meta`` holds something else than strings.
        ValueError: ``meta`` holds the key of the SHA-256.
        ImportError: safetensors is missing.

    Example:
        >>> import fastlip
        >>> model = fastlip.models.build_model("fastlip:mlp", 10, image_size=8, mean=[0.5] * 3, std=[0.25] * 3)
        >>> fastlip.models.save_checkpoint("model.safetensors", model, {"trained": "not at all"})
    """
    for key, value in (meta or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"meta must map strings to strings, got {key!r}: {value!r}")
        if key == _DIGEST:
            raise ValueError(f"meta must leave {_DIGEST!r} to the file's own SHA-256")
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    state = model.state_dict()
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    path = Path(path)
    data = safetensors().save(tensors, metadata={**(meta or {}), _DIGEST: _digest(tensors, meta or {})})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the state dict and the metadata of a safetensors file.

    Args:
        path: file that :func:`save_checkpoint`, or any other writer of safetensors, wrote.

    Returns:
        Tensors by name, on the CPU, and the strings beside them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged (where it holds its SHA-256, as :func:`save_checkpoint` writes it, to
            the last bit), or of another format; a pickle is refused, never executed.
        ImportError: safetensors is missing.

    Example:
        >>> import fastlip
        >>> model = fastlip.models.build_model("fastlip:mlp", 10, image_size=8, mean=[0.5] * 3, std=[0.25] * 3)
        >>> fastlip.models.save_checkpoint("model.safetensors", model)
        >>> weights, meta = fastlip.models.load_checkpoint("model.safetensors")
        >>> model.load_state_dict(weights)
    """
    path = Path(path)
    library = safetensors()
    with open(path, "rb") as file:
        start = file.read(4)
    # torch.save writes a zip archive or, of old, a bare pickle of protocol 2 to 5.
    if start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        raise ValueError(
            f"{path} is a pickle, which can execute code: load it yourself where you trust it and write it anew with "
            "safetensors.torch.save_file"
        )
    try:
        with library.safe_open(path, framework="pt") as opened:
            tensors, meta = {k: opened.get_tensor(k) for k in opened.keys()}, dict(opened.metadata() or {})
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{path} is truncated, damaged or no safetensors file: {printable(str(error))}") from None
    written = meta.pop(_DIGEST, None)
    if written is not None and written != _digest(tensors, meta):
        raise ValueError(f"{path} is damaged: it is not what its SHA-256 was taken of")
    return tensors, meta


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of contiguous CPU tensors, and over the strings beside them."""
    found = hashlib.sha256(repr(sorted(meta.items())).encode(errors="surrogatepass"))
    for name, value in sorted(tensors.items()):
        found.update(f"{name!r} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
