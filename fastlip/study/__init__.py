"""The study: does what Szegedy et al. (2013) found still hold for bigger and for pre-trained models?

``python -m fastlip.study --preset demo`` runs it; everything it measures comes from fastlip's public functions.
The packages of the extra ``study`` are needed.
:func:`frame` and :func:`image_frame` give a run's numbers to pandas.
"""

from fastlip.study.report.data_frames import frame, image_frame

__all__ = ["frame", "image_frame"]
