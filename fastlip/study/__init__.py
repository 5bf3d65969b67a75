"""The study: does what Szegedy et al. (2013) found still hold for bigger and for pre-trained models?

``python -m fastlip.study --preset demo`` runs the study. Everything that it measures comes from fastlip's public
functions. It needs the packages of the extra ``study``. :func:`frame` and :func:`image_frame` load a run's numbers into
pandas.
"""

from fastlip.study.report.data_frames import frame, image_frame

__all__ = ["frame", "image_frame"]
