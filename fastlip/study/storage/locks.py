"""Who does which stage, where several processes share a run directory."""

import fcntl
import hashlib
import os
from pathlib import Path


class Claims:
    """Locks on single stages, held by this process and gone with it, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: int | None = None

    def take(self, name: str) -> bool:
        """Claim the stage ``name``; False where another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / hashlib.sha256(name.encode()).hexdigest()[:16]
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.held = descriptor
        return True

    def release(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None
