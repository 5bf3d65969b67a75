"""The result of an evaluation as RobustBench's model information in JSON."""

import json
import os
from pathlib import Path
from typing import Any

from fastlip._files import replacing
from fastlip.attacks import EvaluationResult

_THREATS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def model_info(
    evaluation: EvaluationResult,
    *,
    dataset: str,
    eps: float,
    link: str = "",
    name: str = "",
    authors: str = "",
    additional_data: bool | None = None,
    number_forward_passes: int | None = 1,
    venue: str = "",
    architecture: str = "",
    footnote: str | None = None,
) -> dict[str, Any]:
    """The entry of RobustBench's ``model_info``: accuracies are percentages with two digits, as strings.

    ``autoattack_acc`` is the robust accuracy of ``evaluation``, whose attacks resemble AutoAttack's but are not the
    same; the footnote says so unless another one is given. What is not given is empty: RobustBench's readers take
    strings, and an empty ``venue`` for unpublished.
    """
    said = f"worst case over {', '.join(evaluation.attacks)} of fastlip on {len(evaluation.clean)} images"
    return {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": f"{eps:.10g}",
        "clean_acc": f"{100 * evaluation.clean_accuracy:.2f}",
        "reported": f"{100 * evaluation.robust_accuracy:.2f}",
        "autoattack_acc": f"{100 * evaluation.robust_accuracy:.2f}",
        "footnote": said if footnote is None else footnote,
    }


def write_model_info(
    folder: str | os.PathLike[str], model: str, norm: str, evaluation: EvaluationResult, *, dataset: str, **info: Any
) -> Path:
    """Write :func:`model_info` to ``folder/dataset/Linf/model.json``, where RobustBench reads it; return the path.

    ``folder`` is RobustBench's ``model_info``; ``name`` is that of the model unless it is given.

    Raises:
        ValueError: the norm is unknown.
        OSError: the file cannot be written.
    """
    if norm not in _THREATS:
        raise ValueError(f"norm must be one of {', '.join(_THREATS)}, got {norm!r}")
    path = Path(folder) / dataset / _THREATS[norm] / f"{model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model_info(evaluation, dataset=dataset, **{"name": model} | info), indent=2)
    with replacing(path) as temporary:
        temporary.write_text(text)
    return path
