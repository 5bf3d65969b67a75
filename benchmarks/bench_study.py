"""The time that a preset of the study would take, from a few minutes of its stages; and whether training stalls.

    python benchmarks/bench_study.py --device cuda --limit 170       # CSV under benchmarks/results; with FASTLIP_DATA
    python benchmarks/bench_study.py --images 256 --attacked 12 ...  # the set's own images in place of generated ones

Stages are those of ``fastlip.study.pipeline`` for the preset, run by its own code on fewer images: training goes on
until it is stopped, of each kind of measurement one is made. Without FASTLIP_DATA the images are generated ones with
the names of ten classes; pre-trained weights are random ones, which take as long. Rows, in order of value:

- training: images/s of the study's loop, and of a plain loop over the same network, batches and precision, its images
  on the device, which neither shuffles nor augments nor keeps count; ``x_plain`` is the first over the second.
  ``waits`` is the share of a step's time in which a GPU had nothing to do: ``device_ms`` is what the step takes between
  CUDA events when all of it was launched ahead. ``worst`` is the slowest step over the median. Not compiled at first,
  then compiled as the preset has it on a GPU; then the other arms, not compiled, and a run that saves its state after
  every step (``save_s`` is what a save adds);
- evaluation: one measurement of each kind, by a network whose own decisions are the labels, at the smallest radius: an
  image that falls costs less, so that times are upper ones. PGD also by ``fast``, which the study does not use;
- prediction: seconds of all stages of the preset, by their number, epochs and images there; ``missing`` names the kinds
  that were not measured. Smaller networks are counted as the large one in evaluation.
"""

import argparse
import math
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _timing import Results, Session, environment, percentiles
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastlip import attacks
from fastlip.data import ImageSet
from fastlip.models import save_checkpoint
from fastlip.study.pipeline import start_or_resume
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.stage import Stage
from fastlip.study.pipeline.stages import stages
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.settings.machine import this_machine
from fastlip.study.settings.settings import Settings
from fastlip.study.settings.training import REFERENCES, Schedule
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel
from fastlip.study.training.architectures import SOURCE, build

#: What of the strong suite's and of smoothing's work is measured.
PART = 10
#: Arms whose steps take another time than those of scratch.
_OTHERS = (*REFERENCES, "linear", "partial", "constrained")
CLASSES = tuple(f"class {i}" for i in range(10))


class Enough(Exception):
    """Training has been watched for long enough."""


class Clock:
    """Called after each step of a training loop; raises :class:`Enough` in the end.

    First come ``warm`` steps, then those of ``seconds``, then on a GPU ``held`` ones that are launched while it is held
    up, so that their time on the device has no gap in which it waits for the host.
    """

    def __init__(self, device: str, seconds: float, warm: int, held: int = 9) -> None:
        self.cuda, self.seconds, self.warm, self.held = device == "cuda", seconds, warm, held
        self.begun = time.perf_counter()
        self.first_s = self.start = self.end = math.nan
        self.done = self.steps = 0
        self.marks: list[Any] = []
        self.alone: list[float] = []
        self._open: Any = None

    def __call__(self, *progress: object) -> None:
        self.done += 1
        if self.done == 1:
            self._wait()
            self.first_s = time.perf_counter() - self.begun
        if self.done < self.warm:
            return
        if self.done == self.warm:
            self._wait()
            self.start = time.perf_counter()
        if math.isnan(self.end):
            self._mark()
            late = time.perf_counter() - self.start >= self.seconds
            if len(self.marks) < 4 or not late:
                return
            self._wait()
            self.end, self.steps = time.perf_counter(), len(self.marks) - 1
            if not self.cuda or self.held == 0:
                raise Enough
        self._hold()

    @property
    def ms(self) -> float:
        """Of a step, by the wall's clock."""
        return (self.end - self.start) * 1e3 / self.steps

    @property
    def device_ms(self) -> float | None:
        return percentiles(self.alone)[0] if self.alone else None

    @property
    def worst(self) -> float:
        """The slowest step over the median, but for the first, which began with the device idle."""
        pairs = zip(self.marks[1:], self.marks[2:], strict=False)
        ms = [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairs]
        return max(ms) / percentiles(ms)[0]

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def _hold(self) -> None:
        after = torch.cuda.Event(enable_timing=True)
        after.record()
        self._wait()
        if self._open is not None:
            self.alone.append(self._open.elapsed_time(after))
            if len(self.alone) == self.held:
                raise Enough
        # Several times as long as a step takes to launch; 2 GHz is about what these devices run at.
        torch.cuda._sleep(int(max(3 * self.ms, 20.0) * 2e6))
        self._open = torch.cuda.Event(enable_timing=True)
        self._open.record()


def plain(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    precision: torch.dtype,
    compiled: bool,
    clock: Clock,
) -> None:
    """What a training loop needs at least: batches in their order, forward, backward and the optimiser's step."""
    device = next(model.parameters()).device
    x = images.to(device).float().div(255).contiguous(memory_format=torch.channels_last)
    y, size = labels.to(device), min(schedule.batch_size, len(images))
    model.to(memory_format=torch.channels_last).train()
    network = torch.compile(model) if compiled else model
    # Small enough for a network to learn something without a schedule.
    optimiser = torch.optim.SGD(model.parameters(), 0.02, momentum=schedule.momentum, nesterov=True)
    while True:
        for first in range(0, len(images) - size + 1, size):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                logits = network(x[first : first + size])
            loss = cross_entropy(logits.float(), y[first : first + size])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            clock()


class Shaped(Inputs):
    """Inputs of the study in the shape of CIFAR-10's: ten classes, of which generated images have six."""

    def target_train(self, arm: str) -> ImageSet:
        return _ten(super().target_train(arm))

    @cached_property
    def target_clean(self) -> ImageSet:
        return _ten(self._target_test(self.settings.evaluation.clean_images))

    @cached_property
    def target_attacked(self) -> ImageSet:
        """The first of the clean ones."""
        return self.target_clean.subset(torch.arange(self.settings.evaluation.images))

    def relabel(self, labels: Tensor) -> None:
        """Let ``labels`` [N] be those of the attacked images."""
        self.target_attacked = replace(self.target_attacked, labels=labels)


def _ten(images: ImageSet) -> ImageSet:
    return images if len(images.classes) == len(CLASSES) else replace(images, classes=CLASSES)


def fewer(full: Settings, images: int, attacked: int, data: bool) -> Settings:
    """The preset on fewer images, with long measurements cut in proportion."""

    def cut(schedule: Schedule) -> Schedule:
        return replace(schedule, images=min(schedule.images, images))

    e = full.evaluation
    evaluation = replace(
        e,
        images=min(e.images, attacked),
        clean_images=min(e.clean_images, max(4 * attacked, min(e.images, attacked))),
        snapshot_images=min(e.snapshot_images, attacked),
    )
    smoothing = replace(
        full.smoothing,
        selection=max(1, full.smoothing.selection // PART),
        samples=max(1, full.smoothing.samples // PART),
    )
    strong = replace(full.strong, steps=max(1, full.strong.steps // PART), queries=max(1, full.strong.queries // PART))
    return replace(
        full,
        dataset="cifar10" if data else "generated",
        source="checkpoint" if data else "generated",
        scratch=cut(full.scratch),
        finetune=cut(full.finetune),
        reference=cut(full.reference),
        evaluation=evaluation,
        smoothing=smoothing,
        strong=strong,
        examples=0,
    )


def kind_of(measurement: str) -> str:
    """The measurement's name without its strength: "pgd" for "pgd-linf-0.25" and for "pgd-l2-0.1"."""
    return re.sub(r"-(linf-|l2-|l1-)?[0-9.e+-]+$", "", measurement)


def arm_of(model: TrainedModel) -> str:
    """The arm that trains as this one does: the same network, the same parts of it, and as free."""
    return model.arm if model.arm in _OTHERS else "scratch"


class Bench:
    """The preset, a run of it on fewer images, and what has been measured."""

    def __init__(self, args: argparse.Namespace, folder: Path, results: Results) -> None:
        self.device, self.seconds, self.warm, self.results = args.device, args.seconds, args.warm, results
        assignments = [*(args.set or []), f"device={args.device}"]
        self.full = overrides.override(presets.preset(args.preset), assignments)
        data = os.environ.get("FASTLIP_DATA")
        self.settings = fewer(self.full, args.images, args.attacked, bool(data))
        self.weights = folder / "source.safetensors"
        save_checkpoint(self.weights, build(self.settings, SOURCE, 12, 0))
        paths = InputPaths(Path(data), self.weights, download=False) if data else InputPaths(download=False)
        self.inputs = Shaped(self.settings, paths)
        self.folder = folder
        self.step_ms: dict[tuple[str, bool], float] = {}  # by arm, and whether it is compiled
        self.first_s: dict[tuple[str, bool], float] = {}
        self.save_s = 0.0
        self.stage_s: dict[str, float] = {}  # by kind, of a stage of the preset
        self.trained: nn.Module | None = None
        self.predicted: dict[str, dict[str, Any]] = {}

    def run(self, compiled: bool, save_seconds: float = 1e9) -> RunDirectory:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.begun, folder, dirs_exist_ok=True)
        found = RunDirectory(folder)
        found.settings = replace(self.settings, compile="on" if compiled else "off", save_seconds=save_seconds)
        found.machine = this_machine(found.settings)
        for source in found.sources:
            found.checkpoint(source).parent.mkdir(exist_ok=True)
            found.checkpoint(source).write_bytes(self.weights.read_bytes())
        return found

    @cached_property
    def begun(self) -> Path:
        """A run that has only begun: its power note, some seconds of simulations, is made once."""
        folder = self.folder / "begun"
        start_or_resume.open_or_create(folder, self.settings, self.inputs.fingerprints(), "bench_study.py")
        return folder

    def stages(self, run: RunDirectory) -> dict[str, Stage]:
        return {stage.name: stage for stage in stages(run, self.inputs)}

    def train(self, arm: str, compiled: bool, save: bool = False) -> None:
        """Watch the study train one arm."""
        run = self.run(compiled, save_seconds=0.0 if save else 1e9)
        stage = self.stages(run)[self.training_of(arm, run)]
        clock = Clock(self.device, 0.0, 2, held=0) if save else Clock(self.device, self.seconds, self.warm)
        self.watch(clock, lambda: stage.run(clock))
        if save:
            self.save_s = max(clock.ms - self.step_ms[arm, compiled], 0.0) / 1e3
        else:
            self.step_ms[arm, compiled], self.first_s[arm, compiled] = clock.ms, clock.first_s
        loop = "study, saving after every step" if save else "study"
        self.add_training(loop, arm, run, clock, {"save_s": self.save_s} if save else {})

    @staticmethod
    def training_of(arm: str, run: RunDirectory) -> str:
        """Name of the first stage that trains like ``arm``; without "linear" the head is trained by LP-FT."""
        for model in run.models:
            if arm_of(model) == arm:
                return f"{model.name}: training"
        return next(f"{model.name}: training of the head" for model in run.models if model.arm == "lpft")

    def plain(self, compiled: bool) -> None:
        """Watch a plain loop train the first arm's network."""
        s, run = self.settings, self.run(compiled)
        images = self.inputs.target_train("scratch")
        model = build(s, "scratch", len(images.classes), 0).to(self.device)
        precision = getattr(torch, run.machine.precision)
        clock = Clock(self.device, self.seconds, self.warm)
        self.watch(clock, lambda: plain(model, images.images, images.labels, s.scratch, precision, compiled, clock))
        self.step_ms["plain", compiled] = clock.ms
        if self.trained is None:
            self.trained = model.eval()  # labels are this one's decisions: no later one takes its place
        self.add_training("plain", "scratch", run, clock, {})

    def watch(self, clock: Clock, loop: Callable[[], Any]) -> None:
        try:
            loop()
        except Enough:
            return
        raise AssertionError(f"training ended after {clock.done} steps, before enough of it was seen")

    def add_training(self, loop: str, arm: str, run: RunDirectory, clock: Clock, more: dict[str, Any]) -> None:
        schedule, compiled = self.settings.schedule(arm), run.machine.compiled
        batch, device_ms = min(schedule.batch_size, schedule.images), clock.device_ms
        row: dict[str, Any] = {"what": "training", "kind": arm, "how": loop, "compiled": compiled}
        row |= {"precision": run.machine.precision, "images": batch * clock.steps, "seconds": clock.end - clock.start}
        row |= {"images_per_s": batch * 1e3 / clock.ms, "batch": batch, "ms": clock.ms, "first_s": clock.first_s}
        row |= {"device_ms": device_ms, "waits": None if device_ms is None else 1.0 - device_ms / clock.ms}
        row |= {"worst": clock.worst, "save_s": None, "x_plain": None}
        if (beside := self.step_ms.get(("plain", compiled))) is not None and (arm, loop) == ("scratch", "study"):
            row["x_plain"] = beside / clock.ms
        self.add(row | more)
        self.predict()

    def add(self, row: dict[str, Any]) -> None:
        self.results.add({name: "" if value is None else value for name, value in row.items()})
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    @cached_property
    def evaluated(self) -> dict[str, Stage]:
        """Stages of a run whose networks exist and classify every attacked image correctly."""
        assert self.trained is not None, "no network was trained"
        s, run, images = self.settings, self.run(compiled=False), self.inputs.target_attacked
        with torch.no_grad():
            parts = [self.trained(x.to(self.device).float().div(255)).argmax(1) for x in images.images.split(500)]
        self.inputs.relabel(torch.cat(parts).cpu())
        for model in [*run.models, *run.snapshots]:
            if model.seed != s.seed:
                continue
            run.checkpoint(model.name).parent.mkdir(parents=True, exist_ok=True)
            other = model.arm in REFERENCES  # of which transfer alone is measured
            network = build(s, model.arm, len(images.classes), 0) if other else self.trained
            save_checkpoint(run.checkpoint(model.name), network)
        found = self.stages(run)
        for model in run.models if s.transfer.l2 else ():
            if model.seed == s.seed and model != next(self.representatives(run)):
                found[f"{model.name}: transfer images"].run(lambda *progress: None)
        return found

    def representatives(self, run: RunDirectory) -> Iterator[TrainedModel]:
        """The model at the end of its training, and one on its way."""
        yield next(m for m in run.models if arm_of(m) == "scratch")
        yield from [m for m in run.snapshots if arm_of(m) == "scratch"][:1]

    def measurements(self) -> list[tuple[str, str]]:
        """Each kind with the name of its first stage; the kinds that take most of the preset's time come first."""
        run, found = RunDirectory(self.begun), {}
        for model in self.representatives(run):
            for name in self.stages(run):
                head, _, measurement = name.partition(": ")
                if head == model.name and measurement != "training":
                    found.setdefault(("" if model.epoch is None else "snapshot ") + kind_of(measurement), name)
        first = ("pgd", "strong", "smallest-pgd", "smoothing", "norms", "snapshot smallest-pgd", "snapshot norms")
        return sorted(found.items(), key=lambda item: first.index(item[0]) if item[0] in first else len(first))

    def measure(self, kind: str, name: str) -> None:
        """Run one stage of the evaluation as the study would."""
        stage = self.evaluated[name]
        if kind == "pgd":
            self.evaluated[name.partition(": ")[0] + ": clean-attacked"].run(lambda *progress: None)  # warms up
        begin = time.perf_counter()
        stage.run(lambda *progress: None)
        seconds = time.perf_counter() - begin
        images, factor = self.work(kind)
        self.stage_s[kind] = seconds * factor
        row: dict[str, Any] = {"what": "evaluation", "kind": kind, "how": "study", "images": images}
        row |= {"seconds": seconds, "images_per_s": images / seconds, "stage_s": seconds * factor}
        self.add(row)
        self.predict()

    def work(self, kind: str) -> tuple[int, float]:
        """Images measured, and how many times that a stage of the preset takes."""
        s, full = self.settings, self.full
        part = kind.removeprefix("snapshot ")
        if kind != part:
            n, whole = s.evaluation.snapshot_images, full.evaluation.snapshot_images
        elif part == "clean":
            n, whole = s.evaluation.clean_images, full.evaluation.clean_images
        elif part in ("jacobian", "smoothing", "corruptions", "feature spectra", "transfer images", "transfer"):
            wanted = {
                "transfer images": full.transfer.images,
                "transfer": full.transfer.images,
                "jacobian": full.lipschitz.jacobian_images,
                "smoothing": full.smoothing.images,
                "corruptions": full.corruptions.images,
                "feature spectra": full.features.images,
            }[part]
            n, whole = min(wanted, s.evaluation.images), min(wanted, full.evaluation.images)
        else:
            n, whole = s.evaluation.images, full.evaluation.images
        if part in ("norms", "weight spectra"):
            return 1, 1.0
        factor = whole / n
        if part == "strong":
            factor *= max(full.strong.steps / s.strong.steps, full.strong.queries / s.strong.queries)
        if part == "smoothing":
            here, there = (v.smoothing.selection + v.smoothing.samples for v in (s, full))
            factor *= there / here
        return n, factor

    def attack(self, fast: bool) -> None:
        """The study's PGD alone on one batch, with and without ``fast``."""
        assert self.trained is not None, "no network was trained"
        _ = self.evaluated  # labels
        size, model = self.settings.evaluation.batch_size, self.trained.requires_grad_(False)
        images = self.inputs.target_attacked
        x = images.images[:size].to(self.device).float().div(255).contiguous(memory_format=torch.channels_last)
        y, (norm, _, eps) = images.labels[:size].to(self.device), self.settings.pgd.grid[0]
        network = attacks.prepare(model, x, fast=fast)
        steps, loss = self.settings.pgd.steps, self.settings.pgd.loss
        spent = []
        for repeat in range(3):
            begin = time.perf_counter()
            generator = torch.Generator(self.device).manual_seed(repeat)
            found = attacks.pgd(network, x, y, norm=norm, eps=eps, steps=steps, loss=loss, generator=generator)
            float(found[0, 0, 0, 0])  # waits for the device
            spent.append(time.perf_counter() - begin)
        seconds = min(spent)
        row: dict[str, Any] = {"what": "evaluation", "kind": "pgd alone", "how": "fast" if fast else "study"}
        self.add(row | {"images": len(x), "seconds": seconds, "images_per_s": len(x) / seconds})

    def predict(self) -> None:
        """Replace the prediction of the preset's time by one from all that was measured so far."""
        run = RunDirectory(self.begun)
        parts = {"training": self.predict_training(run), "evaluation": self.predict_evaluation(run)}
        whole = {"stage_s": sum(p["stage_s"] for p in parts.values())}
        whole["missing"] = " ".join(dict.fromkeys(" ".join(p["missing"] for p in parts.values()).split()))
        for kind, part in (parts | {"whole": whole}).items():
            row = {"what": "prediction", "kind": kind, "how": self.full.preset, **part}
            row["hours"] = row["stage_s"] / 3600
            if kind in self.predicted:
                self.results.rows[self.results.rows.index(self.predicted[kind])] = row
            else:
                self.results.rows.append(row)
            self.predicted[kind] = row
        self.results.rewrite()

    def predict_training(self, run: RunDirectory) -> dict[str, Any]:
        seconds, missing, arms = 0.0, [], set()
        for model in run.models:
            # LP-FT trains the head first, as the linear arm does.
            for arm in [arm_of(model), *(["linear"] if model.arm == "lpft" else [])]:
                schedule = self.full.schedule(model.arm)
                steps = schedule.epochs * (schedule.images // min(schedule.batch_size, schedule.images))
                compiled = (arm, True) in self.step_ms
                if (arm, compiled) not in self.step_ms:
                    missing.append(f"training:{arm}")
                    continue
                spent = steps * self.step_ms[arm, compiled] / 1e3
                seconds += spent + self.save_s * int(spent / self.full.save_seconds)
                if arm not in arms:  # networks alike are compiled once
                    seconds += self.first_s[arm, compiled]
                arms.add(arm)
        return {"stage_s": seconds, "missing": " ".join(dict.fromkeys(missing))}

    def predict_evaluation(self, run: RunDirectory) -> dict[str, Any]:
        seconds, missing = 0.0, []
        for (kind, reference), count in self.evaluation_stages(run).items():
            if kind not in self.stage_s:
                missing.append(kind.replace(" ", "-"))
            elif reference and (reference, False) not in self.step_ms:
                missing.append(f"training:{reference}")
            else:
                seconds += count * self.stage_s[kind] * self.relative_cost(reference)
        return {"stage_s": seconds, "missing": " ".join(dict.fromkeys(missing))}

    def relative_cost(self, reference: str) -> float:
        """What an image costs in training on a small reference, relative to the large network; without a name 1."""
        if not reference:
            return 1.0
        s = self.settings
        images = {arm: min(s.schedule(arm).batch_size, s.schedule(arm).images) for arm in ("scratch", reference)}
        steps = {arm: self.step_ms[arm, False] for arm in images}
        return (steps[reference] / images[reference]) / (steps["scratch"] / images["scratch"])

    def evaluation_stages(self, run: RunDirectory) -> Counter[tuple[str, str]]:
        """Number of stages of each kind in the preset, by the small reference that is measured, or none."""
        whose = {m.name: ("", m.arm if m.arm in REFERENCES else "") for m in run.models}
        whose |= {m.name: ("snapshot ", "") for m in run.snapshots}
        found: Counter[tuple[str, str]] = Counter()
        for name in self.stages(run):
            model, _, measurement = name.partition(": ")
            if model in whose and not measurement.startswith("training"):
                prefix, reference = whose[model]
                found[prefix + kind_of(measurement), reference] += 1
        return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--preset", default="full")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="override a setting of the preset")
    parser.add_argument("--images", type=int, default=20_000, help="to train on, at most")
    parser.add_argument("--attacked", type=int, default=500, help="images to evaluate on, at most")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each training loop")
    parser.add_argument("--warm", type=int, default=10, help="steps before those")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no measurement after so many seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    session, shared = Session(args.limit), environment(args.device)
    print(f"{shared['device']}, torch {shared['torch']}, preset {args.preset}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder), Results(args.out / f"study_{args.device}.csv", shared))
        session.attempt("plain loop", lambda: bench.plain(False))
        session.attempt("scratch", lambda: bench.train("scratch", False))
        names: list[tuple[str, str]] = []
        session.attempt("names of the stages", lambda: names.extend(bench.measurements()))
        for kind, name in names[:2]:
            session.attempt(kind, lambda kind=kind, name=name: bench.measure(kind, name))
        if args.device == "cuda" and not args.no_compile:
            session.attempt("plain loop, compiled", lambda: bench.plain(True), 30.0)
            session.attempt("scratch, compiled", lambda: bench.train("scratch", True), 15.0)
        for kind, name in names[2:]:
            session.attempt(kind, lambda kind=kind, name=name: bench.measure(kind, name))
        heads = {"linear", "lpft"} & set(bench.full.arms)
        for arm in _OTHERS:
            if arm in bench.full.arms or (arm == "linear" and heads):
                session.attempt(arm, lambda arm=arm: bench.train(arm, False))
        session.attempt("saving", lambda: bench.train("scratch", False, save=True))
        for fast in (False, True):
            session.attempt(f"pgd alone, fast={fast}", lambda fast=fast: bench.attack(fast))
        for kind, row in bench.predicted.items():
            missing = f", without {row['missing']}" if row["missing"] else ""
            print(f"{args.preset}, {kind}: {row['hours']:.2f} h predicted{missing}")
    session.close()


if __name__ == "__main__":
    main()
