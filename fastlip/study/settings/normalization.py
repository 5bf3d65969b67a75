"""The normalisation of the input of checkpoints that the study did not train."""

from fastlip.data import CHANNEL_STATISTICS
from fastlip.study.errors import StudyError

Channels = tuple[float, float, float]

_NONE: tuple[Channels, Channels] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def statistics(normalize: str, dataset: str) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel by the setting ``normalize``, for images of ``dataset``.

    Raises:
        StudyError: it is neither a known name nor two triples of numbers, or a standard deviation is not positive.
    """
    name = normalize or _default(dataset)
    if name in CHANNEL_STATISTICS:
        return CHANNEL_STATISTICS[name]
    if name == "none":
        return _NONE
    try:
        means, deviations = ([float(part) for part in half.split(",")] for half in name.split("/"))
        (r, g, b), (s, t, u) = means, deviations
        if not all(abs(v) < 1e6 for v in means) or not all(1e-6 < v < 1e6 for v in deviations):
            raise ValueError
    except ValueError:
        known = ", ".join([*CHANNEL_STATISTICS, "none"])
        raise StudyError(
            f"--set normalize={normalize}: expected {known}, or means and standard deviations as in "
            "0.5,0.5,0.5/0.25,0.25,0.25",
            status=2,
        ) from None
    return (r, g, b), (s, t, u)


def in_words(normalize: str, dataset: str) -> str:
    """The normalisation as the report states it."""
    name = normalize or _default(dataset)
    if name == "none":
        return "input not normalised"
    return f"input normalised by {name}" + ("" if normalize else ", the default for this target")


def _default(dataset: str) -> str:
    return dataset if dataset in CHANNEL_STATISTICS else "imagenet"
