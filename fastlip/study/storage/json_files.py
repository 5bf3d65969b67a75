"""Reading JSON files of a run, each checked against the type that it was written as."""

from pathlib import Path
from typing import Any

from fastlip.study.errors import StudyError
from fastlip.study.json_types import require, shown
from fastlip.study.storage.files import AGAIN, damaged, read_json
from fastlip.study.storage.schema import SCHEMA, Results


def read(path: Path, hint: Any, remedy: str = AGAIN) -> Any:
    """The contents of the JSON file at ``path``, checked against the type ``hint``.

    ``remedy`` tells the user what to do about a damaged file.

    Raises:
        StudyError: the file is missing, not JSON or of another structure.
    """
    plain = read_json(path, remedy)
    try:
        require(plain, hint, path.stem)
    except ValueError as error:
        raise damaged(path, error, remedy) from None
    return plain


def read_results(path: Path, names: list[str]) -> Results:
    """The results.json of a run whose models have these ``names``.

    Raises:
        StudyError: the file is missing, of another version or structure, or its parts contradict each other.
    """
    plain = read_json(path)
    version = plain.get("schema") if isinstance(plain, dict) else None
    if isinstance(version, str) and version != SCHEMA:
        raise StudyError(
            f"{path} has schema {shown(version)}, this fastlip reads {SCHEMA!r}; use the version that wrote it, or "
            f"{AGAIN}"
        )
    results: Results = read(path, Results)
    wrong = _inconsistent(results, names)
    if wrong:
        raise damaged(path, wrong)
    return results


def _inconsistent(results: Results, names: list[str]) -> str | None:
    """The first contradiction between parts of the results, in a few words; None where there is none."""
    models = results["models"]
    if [m["name"] for m in models] != names:
        return f"its models are not {', '.join(names)}"
    if [v["number"] for v in results["verdicts"]] != [1, 2, 3, 4]:
        return "its verdicts are not those of questions 1 to 4"
    known = {m["arm"] for m in models}
    for i, comparison in enumerate(results["comparisons"]):
        if not {comparison["arm"], comparison["against"]} <= known:
            return f"comparisons[{i}] is about an arm that no model has"
    for i, pair in enumerate(results["transfer"]):
        if not {pair["source"], pair["target"]} <= set(names):
            return f"transfer[{i}] is about a model that the run does not have"
    attacks = [(a["attack"], a["norm"], a["strength"]) for a in models[0]["attacks"]]
    for m in models:
        training, points = m["training"], len(m["depth_points"])
        if m["name"] not in (f"{m['arm']}-s{m['seed']}", m["arm"]):
            return f"{m['name']} has another arm or seed"
        if training and not len(training["loss"]) == len(training["accuracy"]) == training["epochs"]:
            return f"training of {m['name']} has not one loss and accuracy for each epoch"
        if [(a["attack"], a["norm"], a["strength"]) for a in m["attacks"]] != attacks:
            return f"{m['name']} was attacked otherwise than {names[0]}"
        for depth in [s["depth"] for s in (*m["attacks"], m["smallest_pgd"], m["smallest_gaussian"])]:
            if not len(depth["mean"]) == len(depth["largest"]) in (0, points):
                return f"depths of {m['name']} are not its depth_points"
        if not m["weights"]:
            return f"{m['name']} has no weights"
        if any(len(w["profile"]) != 11 for w in (*m["weights"], *m["features"])):
            return f"a profile of {m['name']} has not eleven ranks"
        for layer in m["lipschitz"]["layers"]:
            if not 0 <= layer["lower"] <= layer["upper"]:
                return f"the norm of {m['name']}, {layer['name']}, is no interval"
    return None
