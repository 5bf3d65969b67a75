"""The study: does what Szegedy et al. (2013) found still hold for bigger and for pre-trained models?

``python -m fastlip.study --preset demo`` runs the study. Everything that it measures comes from fastlip's public
functions. It needs the packages of the extra ``study``. :func:`frame` and :func:`image_frame` load a run's numbers into
pandas.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlip.study.report.data_frames import frame, image_frame

__all__ = ["frame", "image_frame"]


def __getattr__(name: str) -> Any:
    # On first use, because torch must not be imported before the command line has prepared its environment.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastlip.study.report import data_frames

    return getattr(data_frames, name)
