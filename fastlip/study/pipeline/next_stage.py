"""The stage that a process carries out next."""

import fnmatch
import time
from collections.abc import Callable, Sequence

from fastlip.study.errors import StudyError
from fastlip.study.pipeline.stage import Stage
from fastlip.study.storage.locks import StageLocks

#: Seconds between looks at what other processes have finished.
_WAIT = 1.0


def matching(all_stages: Sequence[Stage], patterns: Sequence[str]) -> list[int]:
    """Numbers of the stages whose names match one of the patterns; of all stages without patterns.

    Raises:
        StudyError: a pattern matches no stage.
    """
    names = [stage.name for stage in all_stages]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise StudyError(f"--only {pattern} matches no stage; they are: {'; '.join(names)}", status=2)
    return [n for n, name in enumerate(names) if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def next_stage(
    all_stages: Sequence[Stage], chosen: Sequence[int], stage_locks: StageLocks | None, notify: Callable[[str], None]
) -> int | None:
    """Number of the next of the ``chosen`` stages, locked; None if all are done.

    Waits while other processes carry out all that is left, and says so by ``notify``.

    Raises:
        StudyError: what the stages need is missing, and none of the chosen stages makes it.
    """
    told = False
    while True:
        left = [number for number in chosen if not all_stages[number].done]
        if not left:
            return None
        for number in left:
            if not all_stages[number].ready:
                continue
            if stage_locks is None:
                return number
            if stage_locks.acquire(all_stages[number].name):
                if not all_stages[number].done:
                    return number
                stage_locks.release()  # another process has just finished it
        stuck = all_stages[left[0]]
        if stage_locks is None:
            raise StudyError(f"the stage {stuck.name} cannot begin: what it needs was removed")
        makers = {path: stage.name for n, stage in enumerate(all_stages) if n not in chosen for path in stage.outputs}
        missing = [makers[path] for path in stuck.needs if path in makers and not path.exists()]
        if missing and not any(all_stages[number].ready for number in left):
            raise StudyError(f"the stage {stuck.name} needs what the stage {missing[0]} makes; run that first")
        if not told:
            notify(f"waiting for other processes, which carry out {stuck.name}")
            told = True
        time.sleep(_WAIT)
