"""SHA-256 digests of a run's JSON, CSV and HTML files, recorded in ``.sha256``, which ``sha256sum -c .sha256`` checks.

Arrays and checkpoints carry checksums of their own. Run directories made before digests were recorded have none; their
files are accepted as they are.
"""

import hashlib
from pathlib import Path

from fastlip.study.errors import StudyError
from fastlip.study.storage.files import write_text

NAME = ".sha256"

#: Suffixes of files whose format has no checksum of its own.
KINDS = (".json", ".csv", ".html")


def recorded(root: Path) -> dict[str, str]:
    """Recorded digests by path within the run directory ``root``; empty where nothing is recorded.

    Raises:
        StudyError: the file of records is damaged.
    """
    try:
        text = (root / NAME).read_text()
    except FileNotFoundError:
        return {}
    except (IsADirectoryError, UnicodeDecodeError):
        text = ""
    body, mark, own = text.rpartition("# ")
    if not mark or own != f"{_of(body.encode())}\n":
        raise StudyError(
            f"{root / NAME} is damaged, which holds SHA-256 sums of files beside it; delete it alone and run the same "
            "command again, which takes them as they are"
        )
    return {name: digest for digest, name in (line.split("  ", 1) for line in body.splitlines())}


def record(root: Path, paths: list[Path], forget: bool = False) -> None:
    """Record the digests of ``paths``, or remove their records. Two processes must not call this at once."""
    before = recorded(root)
    names = [path.relative_to(root).as_posix() for path in paths if path.suffix in KINDS]
    found = before | {name: "" if forget else _of((root / name).read_bytes()) for name in names}
    found = {name: digest for name, digest in found.items() if digest}
    if found != before:
        body = "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))
        write_text(root / NAME, f"{body}# {_of(body.encode())}\n")


def intact(root: Path, path: Path) -> bool:
    """Whether the digest of ``path`` is the recorded one, or none is recorded."""
    digest = recorded(root).get(path.relative_to(root).as_posix())
    return digest is None or digest == _of(path.read_bytes())


def _of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
