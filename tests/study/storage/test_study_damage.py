"""Damaged files of a run: one line names each and its remedy, the remedy works, and nothing else is lost."""

import builtins
import copy
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlip.models import load_checkpoint, resnet18, save_checkpoint
from fastlip.study import cli, frame
from fastlip.study.errors import StudyError
from fastlip.study.report.compare import compare
from fastlip.study.report.html_report import all_tables
from fastlip.study.report.long_csv import long_csv
from fastlip.study.storage import digests
from fastlip.study.storage.files import read_arrays, write_arrays
from fastlip.study.storage.run_directory import RunDirectory

DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "null": lambda data: b"null",
    "list": lambda data: b"[]",
    "nested": lambda data: b"[" * 100_000,
    "early byte": lambda data: flipped(data, len(data) // 5),
    "late byte": lambda data: flipped(data, len(data) * 4 // 5),
}

#: Files that resuming looks at; timings have no record, and a changed digit of theirs is seen by nobody.
RESUMED = (
    "config.json",
    "results.json",
    "report.html",
    "tables/results.csv",
    "training/scratch-s0.json",
    "lipschitz/scratch-s0-e1.json",
    "images/scratch-s0/clean-attacked.npz",
    "images/finetune-s0/corruptions.npz",
    "images/softmax-s0/transfer-images.npz",
    "images/scratch-s0/transfer.npz",
    "spectra/scratch-s0/weights.npz",
    "checkpoints/source.safetensors",
    "checkpoints/scratch-s0-e1.safetensors",
    ".sha256",
)

#: Files that the report reads.
REPORTED = ("config.json", "results.json", "images/scratch-s0/clean-attacked.npz", "images/scratch-s0/smallest-pgd.npz")


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture(scope="module")
def shared(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "run"
    shutil.copytree(finished.path, path)
    return path


@pytest.fixture
def run(shared, finished):
    """A finished run, put back as it was afterwards; file by file, for its checkpoints are large."""
    before = states(shared)
    yield shared
    for path in [path for path, state in states(shared).items() if before.get(path) != state]:
        path.unlink()
    for path in [path for path in before if not path.is_file()]:
        original = finished.path / path.relative_to(shared)
        for place in (*reversed(path.relative_to(shared).parents), path.relative_to(shared)):
            if (shared / place).exists() and (shared / place).is_dir() != (finished.path / place).is_dir():
                (shared / place).rmdir() if (shared / place).is_dir() else (shared / place).unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(original, path)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process; its exit status and what it wrote to stderr."""
    monkeypatch.delenv("FASTLIP_DATA", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastlip.study", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().err

    return call


def same_arrays(path, original):
    found, expected = read_arrays(path), read_arrays(original)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def harmless(path, original):
    """Whether the archive reads as if nothing had happened: a byte of its directory that says nothing was hit."""
    try:
        same_arrays(path, original)
    except StudyError:
        return False
    return True


def states(run):
    """What shows that a file was written, by file."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_ino) for path in files}


def is_one_line(found, *words):
    code, said = found
    assert code in (1, 2), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(c.isprintable() for c in said.rstrip("\n"))
    for word in words:
        assert word in said


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_finds_every_damage_and_changes_nothing(command, run, finished, micro_arguments, monkeypatch, name):
    if not name.startswith("checkpoints"):  # which take their time
        monkeypatch.setattr("fastlip.study.pipeline.finished_outputs.weights_at", lambda path: {})
    whole = (run / name).read_bytes()
    for damage in DAMAGES.values():
        (run / name).write_bytes(damage(whole))
        before = states(run)
        if name.endswith(".npz") and harmless(run / name, finished.path / name):
            continue
        is_one_line(command("--out", run, *micro_arguments), str(run / name), "damaged")
        assert states(run) == before


@pytest.mark.parametrize("name", REPORTED)
def test_the_report_finds_every_damage_and_changes_nothing(command, run, finished, name):
    whole = (run / name).read_bytes()
    for damage in DAMAGES.values():
        (run / name).write_bytes(damage(whole))
        before = states(run)
        if name.endswith(".npz") and harmless(run / name, finished.path / name):
            continue
        is_one_line(command("report", run), str(run / name), "damaged")
        if name.endswith(".json"):
            is_one_line(command("compare", run, run), str(run / name), "damaged")
        assert states(run) == before


@pytest.mark.parametrize("name", [n for n in RESUMED if n not in ("config.json", ".sha256")])
def test_deleting_what_is_damaged_and_running_again_ends_in_the_same(command, run, finished, micro_arguments, name):
    (run / name).write_bytes((run / name).read_bytes()[:-40])
    found = command("--out", run, *micro_arguments)
    if name in ("report.html", "tables/results.csv"):
        is_one_line(found, f"python -m fastlip.study report {run} writes it anew")
        assert command("report", run)[0] == 0
    else:
        is_one_line(found, f"{name} is", "damaged", "delete it and run the study in its directory again")
        (run / name).unlink()
    assert command("--out", run, *micro_arguments) == (0, "")
    assert (run / "results.json").read_bytes() == finished.results.read_bytes()
    if name.endswith(".npz"):
        same_arrays(run / name, finished.path / name)
    if name.endswith(".safetensors"):
        again, before = load_checkpoint(run / name)[0], load_checkpoint(finished.path / name)[0]
        assert all(torch.equal(again[key], values) for key, values in before.items())
    assert command("report", run) == (0, "")


def test_damaged_records_are_told_from_damaged_files(command, run, micro_arguments):
    records = run / digests.NAME
    records.write_bytes(flipped(records.read_bytes(), 3))
    before = states(run)
    is_one_line(command("--out", run, *micro_arguments), f"{records} is damaged", "delete it alone")
    is_one_line(command("compare", run, run), f"{records} is damaged", "delete it alone")
    records.unlink()
    assert command("--out", run, *micro_arguments) == (0, "")
    assert command("compare", run, run) == (0, "")
    assert states(run) == {path: state for path, state in before.items() if path != records}


@pytest.mark.parametrize("text", ["", "null", "[]", '{"results": "x"}', "[" * 100_000, '{"results": NaN}', '{"results'])
def test_damaged_timings_may_be_deleted(command, run, micro_arguments, text):
    timings = run / "timings.json"
    timings.write_text(text)
    for arguments in (("report", run), ("--out", run, *micro_arguments)):
        is_one_line(command(*arguments), f"{timings} is damaged", "delete it", "run the same command again")
    timings.unlink()
    assert command("--out", run, *micro_arguments) == (0, "")


def test_a_damaged_configuration_can_be_put_back(command, run, finished, micro_arguments):
    (run / "config.json").write_bytes(b"")
    is_one_line(command("--out", run, *micro_arguments), "put back a copy of it, or begin anew with another --out")
    shutil.copy(finished.path / "config.json", run)
    assert command("--out", run, *micro_arguments) == (0, "")


def test_a_changed_configuration_is_damaged_rather_than_another(command, run, micro_arguments):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(
        text.replace('"threads": 1', '"threads": 2').replace('"examples": 2', '"examples": 3')
    )
    assert (run / "config.json").read_text() != text
    is_one_line(command("--out", run, *micro_arguments), "config.json is damaged", "SHA-256", "examples", "put back")
    is_one_line(command("report", run), "config.json is damaged", "SHA-256", "put back")


def places(value, at=()):
    """Where values of plain JSON are; of a list the first item stands for all."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed(value, at, new):
    """A copy with ``new`` at a place, or without that place where it is ``...``."""
    if not at:
        return new
    found = copy.deepcopy(value)
    inner = found
    for key in at[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return found


def value_at(value, at):
    for key in at:
        value = value[key]
    return value


def others(value):
    """Values of every other type, and numbers that are none."""
    kinds = [[[1]], {"x": 1}, "x", True, 0.5, 10**400, float("nan"), float("inf")]
    found = [kind for kind in kinds if type(kind) is not type(value) or kind != kind or kind in (float("inf"), 10**400)]
    # A whole number is a number.
    return [kind for kind in found if not (isinstance(value, float) and kind == 0.5)]


@pytest.fixture
def unrecorded(run):
    """A run as earlier versions wrote it, of whose files there are no digests."""
    (run / digests.NAME).unlink()
    return run


#: All combinations of places and values take minutes; every third of them still has each place and each value.
EVERY = pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
def test_every_field_of_results_of_another_type_is_refused(unrecorded, step):
    path = unrecorded / "results.json"
    results = json.loads(path.read_text())
    directory = RunDirectory(unrecorded)
    for number, at in enumerate(places(results)):
        value = value_at(results, at)
        for new in [*others(value), *([...] if at and isinstance(at[-1], str) else [])][number % step :: step]:
            if value is None:
                continue  # null stands for a number here
            path.write_text(json.dumps(changed(results, at, new)))
            with pytest.raises(StudyError, match=r"results\.json") as caught:
                directory.read_results()
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 600


@EVERY
@pytest.mark.parametrize(("first", "new"), list(enumerate([None, [], {}, "", -1])))
def test_results_that_pass_are_shown_without_a_traceback(unrecorded, first, new, step):
    path = unrecorded / "results.json"
    results = json.loads(path.read_text())
    passed = 0
    for at in list(places(results))[first % step :: step]:
        path.write_text(json.dumps(changed(results, at, new)))
        try:
            found = RunDirectory(unrecorded).read_results()
        except StudyError:
            continue
        passed += 1
        compare([unrecorded, unrecorded])
        assert [*all_tables(found), long_csv(found)]
    assert passed < len(list(places(results)))


#: What runs of before have not.
LATER = [("settings", "norm_bounds")]


@pytest.mark.parametrize("name", ["config.json", "training/scratch-s0.json", "lipschitz/scratch-s0.json"])
def test_every_field_of_the_other_files_of_another_type_is_refused(
    command, unrecorded, micro_arguments, monkeypatch, name
):
    monkeypatch.setattr("fastlip.study.pipeline.finished_outputs.weights_at", lambda path: {})
    path = unrecorded / name
    plain = json.loads(path.read_text())
    for at in places(plain):
        # What the build was is shown as it is.
        if at[:1] == ("build",) and len(at) > 1:
            continue
        wrong = {"x": 1} if not isinstance(value_at(plain, at), dict) else [1]
        for new in (
            wrong,
            *(
                [...]
                if at and at[0] not in ("inputs", "versions") and at not in LATER and isinstance(at[-1], str)
                else []
            ),
        ):
            path.write_text(json.dumps(changed(plain, at, new)))
            is_one_line(command("--out", unrecorded, *micro_arguments), str(path), "damaged")


def test_a_run_without_digests_resumes_and_reports(command, unrecorded, finished, micro_arguments):
    library = pytest.importorskip("safetensors.torch")
    for path in unrecorded.glob("checkpoints/*.safetensors"):
        tensors, meta = load_checkpoint(path)
        library.save_file(tensors, path, meta)
    before = states(unrecorded)
    assert command("--out", unrecorded, *micro_arguments) == (0, "")
    assert states(unrecorded) == before
    assert command("report", unrecorded) == (0, "")
    (unrecorded / "images/scratch-s0/clean.npz").unlink()
    (unrecorded / "results.json").write_text("")
    is_one_line(command("--out", unrecorded, *micro_arguments), "results.json is damaged (empty)", "delete it")
    (unrecorded / "results.json").unlink()
    assert command("--out", unrecorded, *micro_arguments) == (0, "")
    assert (unrecorded / "results.json").read_bytes() == finished.results.read_bytes()


@pytest.mark.parametrize("name", ["results.json", "report.html", "tables/results.csv", "lipschitz/scratch-s0.json"])
def test_an_empty_file_without_a_digest_does_not_count_as_done(command, unrecorded, micro_arguments, name):
    (unrecorded / name).write_bytes(b"")
    is_one_line(command("--out", unrecorded, *micro_arguments), str(unrecorded / name), "damaged")


@pytest.mark.parametrize("name", ["images", "images/scratch-s0", "tables", "lipschitz"])
def test_a_file_in_the_place_of_a_folder(command, run, micro_arguments, name):
    shutil.rmtree(run / name)
    (run / name).write_text("precious")
    before = states(run)
    is_one_line(command("--out", run, *micro_arguments), f"{run / name} is a file", "keeps a folder", "move it away")
    if name != "lipschitz":
        is_one_line(command("report", run), f"{run / name} is a file", "move it away")
    assert states(run) == before
    (run / name).rename(run.parent / "moved")
    assert command("--out", run, *micro_arguments) == (0, "")
    assert (run / name).is_dir()


@pytest.mark.parametrize(
    "name", ["results.json", "images/scratch-s0/clean-attacked.npz", "timings.json", "report.html"]
)
def test_a_folder_in_the_place_of_a_file(command, run, micro_arguments, name):
    (run / name).unlink()
    (run / name).mkdir()
    is_one_line(command("--out", run, *micro_arguments), f"{run / name} is a folder", "keeps a file", "move it away")
    is_one_line(command("report", run), f"{run / name} is", "folder")
    (run / name).rmdir()
    assert command("--out", run, *micro_arguments) == (0, "")


@pytest.mark.parametrize("name", ["config.json", "results.json", "images/scratch-s0/clean-attacked.npz", ".sha256"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(command, run, monkeypatch, name):
    real = io.open

    def refusing(file, *arguments, **options):
        if str(file) == str(run / name):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(io, "open", refusing)  # root may read everything
    monkeypatch.setattr(builtins, "open", refusing)
    found = command("report", run)
    is_one_line(found, "Permission denied", str(run / name))
    assert "damaged" not in found[1]


def test_a_source_of_another_network_is_named(command, unrecorded, micro_arguments):
    source = unrecorded / "checkpoints/source.safetensors"
    save_checkpoint(source, resnet18(3, stem="cifar", seed=0))
    (unrecorded / "spectra/finetune-s0/weights.npz").unlink()
    is_one_line(command("--out", unrecorded, *micro_arguments), str(source), "damaged", "delete it")
    source.unlink()
    assert command("--out", unrecorded, *micro_arguments) == (0, "")


def test_arrays_of_another_measurement(command, run):
    path = run / "images/scratch-s0/smallest-pgd.npz"
    arrays = read_arrays(path)
    for wrong in (
        {key: values for key, values in arrays.items() if key != "found"},
        arrays | {"found": arrays["found"].astype(float)},
        arrays | {"distortion": arrays["distortion"][:-1]},
        arrays | {"label": arrays["label"] + 1000},
        {key: values[:-2] for key, values in arrays.items()},
        arrays | {"image": arrays["image"][:, 0, 0, 0]},
    ):
        write_arrays(path, wrong)
        is_one_line(command("report", run), f"{path} is damaged")
    path.write_bytes(b"\x93NUMPY" + bytes(200))
    is_one_line(command("report", run), f"{path} is damaged")
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").rename(path)
    is_one_line(command("report", run), f"{path} is damaged (no archive)")


def test_the_table_of_every_number_is_looked_at_before_it_is_given_to_pandas(run):
    path = run / "tables" / "results.csv"
    whole = path.read_bytes()
    for damage in (DAMAGES["late byte"], DAMAGES["empty"]):
        path.write_bytes(damage(whole))
        with pytest.raises(StudyError, match=r"results\.csv is damaged.* report .* writes it anew"):
            frame(run)
    (run / digests.NAME).unlink()
    with pytest.raises(StudyError, match=r"results\.csv is damaged"):
        frame(run)


def test_strings_of_results_reach_no_terminal_as_commands(unrecorded, monkeypatch, capsys):
    path = unrecorded / "results.json"
    results = json.loads(path.read_text())
    results["dataset"] = results["verdicts"][0]["question"] = "\x1b[2J\u202e\x9b"
    path.write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["fastlip.study", "compare", str(unrecorded), str(unrecorded)])
    with pytest.raises(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_a_program_of_its_own_ends_in_one_line_and_a_status(run):
    (run / "results.json").write_text("[" * 100_000)
    for arguments in (["report", run], ["compare", run, run]):
        command = [sys.executable, "-W", "ignore", "-m", "fastlip.study", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        is_one_line((done.returncode, done.stderr), "results.json is damaged (nested too deep)")
