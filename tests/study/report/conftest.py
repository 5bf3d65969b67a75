"""Synthetic results.json of version 3: random, but with the structure and the consistency of real ones."""

import dataclasses
import random
import string
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fastlip.study.report import html_report
from fastlip.study.report.drawing import Figure
from fastlip.study.report.example_images import Example, PerturbedImage, data_uri
from fastlip.study.settings import presets, serialization
from fastlip.study.settings.serialization import dotted_names
from fastlip.study.settings.training import ARMS, REFERENCES, TRANSFER
from fastlip.study.storage import files
from fastlip.study.storage.schema import SCHEMA, Results

#: What names of checkpoints may hold and a report must show as it is.
NASTY = [
    "a_b",
    "50% & <b>bold</b>",
    "$x^2$ {curly}",
    r"back\slash \input{x}",
    "*stars* `ticks` _lines_",
    "a | pipe",
    "#1 ~tilde~ ^hat",
    "<script>alert(1)</script>",
    "[link](http://example.org)",
    "_leading",
    "naïve Müller Łódź ĳ",
    "模型 🤖",
    "NA",
    "007",
    '"quoted", with commas',
    "--double--dash ``quote''",
    "&amp; entity",
    "tab\tand\x1b[31m escape",
    "x" * 60,
    "https://example.org/model.safetensors",
]

BLOCKS = {"softmax": 0, "mlp": 2, "convnet": 4, "resnet18": 9}


@dataclass
class Synthetic:
    """Random results.

    Attributes:
        seed: of all random numbers.
        arms: names of the arms, or of checkpoints where they are none of the study's.
        seeds: number of models of each arm.
        gaps: probability of None wherever the schema allows it.
        layers: number of layers of a large network.
        snapshots: epochs at which runs have points.
    """

    seed: int = 0
    arms: tuple[str, ...] = ("scratch", "finetune")
    seeds: int = 1
    gaps: float = 0.0
    layers: int = 12
    snapshots: tuple[int, ...] = ()
    draws: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draws = random.Random(f"{self.seed} {self.arms} {self.seeds}")

    def some(self, value):
        """``value``, or None with the probability of a gap."""
        return None if self.draws.random() < self.gaps else value

    def near(self, value, spread=0.25):
        return value * float(np.exp(self.draws.gauss(0, spread)))

    def proportion(self, rate, n=200):
        if self.draws.random() < self.gaps:
            return {"k": 0, "n": 0, "value": None, "low": 0.0, "high": 1.0, "confidence": 0.95}
        k = sum(self.draws.random() < rate for _ in range(n))
        half = 1.96 * (0.25 / n) ** 0.5
        value = k / n
        return {
            "k": k,
            "n": n,
            "value": value,
            "low": max(0.0, value - half),
            "high": min(1.0, value + half),
            "confidence": 0.95,
        }

    def estimate(self, value, half=None, n=150):
        half = 0.1 * abs(value) if half is None else half
        if self.some(0) is None:
            return {"n": 0, "value": None, "low": None, "high": None, "confidence": 0.95}
        low, high = self.some(value - half), self.some(value + half * 1.1)
        return {"n": n, "value": value, "low": low, "high": high, "confidence": 0.95}

    def stretch(self, value):
        return {"mean": self.estimate(self.near(value)), "largest": self.some(self.near(2.5 * value))}

    def depth(self, points):
        if not points or self.some(0) is None:
            return {"mean": [], "largest": []}
        mean = [self.near(1.3, 0.1) for _ in points]
        return {"mean": mean, "largest": [2 * v for v in mean]}

    def profile(self):
        return [1.0, *sorted((self.draws.random() for _ in range(10)), reverse=True)]

    def attack(self, norm, strength, points):
        rate = 0.7 * float(np.exp(-strength * {"linf": 150, "l2": 2, "l1": 0.05, None: 3}[norm]))
        return {
            "attack": "gaussian" if norm is None else "pgd",
            "norm": norm,
            "strength": strength,
            "accuracy": self.proportion(rate),
            "noise_accuracy": None if norm is None else self.some(self.proportion(0.7)),
            "distortion": self.estimate(self.near(strength if norm in (None, "linf") else strength / 55)),
            "stretch": self.stretch(2.5 if norm else 0.3),
            "depth": self.depth(points),
        }

    def smallest(self, attack, value, points):
        return {
            "attack": attack,
            "found": self.proportion(0.95 if attack == "gaussian" else 0.99, 120),
            "median": self.estimate(value),
            "mean": self.estimate(1.2 * value),
            "ceiling": 0.4,
            "mean_with_ceiling": self.estimate(1.3 * value),
            "stretch": self.stretch(2.6 if attack == "pgd" else 0.3),
            "depth": self.depth(points),
        }

    def model(self, arm, seed):
        robust = 0.006 * (1.3 if arm in TRANSFER else 1.0) * (0.6 if arm == "softmax" else 1.0)
        known = arm in ARMS
        role = "reference" if arm in REFERENCES else "transfer" if arm in TRANSFER else "scratch"
        blocks = BLOCKS.get(arm, max(self.layers // 3, 1))
        layers = [f"network.layer{i}.conv" for i in range(max(blocks * 3, 1) - 1)] + ["network.head"]
        points = [f"network.block{i}" for i in range(blocks)]
        kinds = ["Conv2d 64→64 3×3 on 8×8 + BN", "Conv2d 64→256 1×1 on 8×8 + BN", "Conv2d 3→64 7×7 /2×2 on 32×32 + BN"]
        names = [("Linear 512→10" if name == layers[-1] else kinds[i % 3], name) for i, name in enumerate(layers)]
        stages = ["stem", "middle", "pooled", "logits"][-max(1, min(4, blocks)) :]
        accuracy = [0.2 + 0.6 * (1 - 0.7**e) for e in range(1, 5)]
        trained = {
            "images": 10000,
            "epochs": 4,
            "processes": 1,
            "loss": [self.near(1 / e) for e in range(1, 5)],
            "accuracy": accuracy,
        }
        clean = self.proportion(0.8, 5000)
        balls = [("linf", e / 255) for e in (0.5, 1.0, 2.0)] + [("l2", e) for e in (0.25, 0.5)]
        severities = (1, 3, 5)
        corrupted = [
            {
                "corruption": name,
                "severity": severity,
                "accuracy": self.proportion(0.8 - 0.1 * severity, 96),
                "distortion": self.estimate(0.02 * severity * (i + 1)),
                "stretch": self.stretch(0.4),
            }
            for i, name in enumerate(("gaussian_noise", "jpeg_compression", "contrast"))
            for severity in severities
        ]
        return {
            "name": f"{arm}-s{seed}" if known else arm,
            "title": f"ResNet-50, {arm}, seed {seed}" if known else arm,
            "arm": arm,
            "role": role if known else "checkpoint",
            "seed": seed,
            "dataset": "CIFAR-10",
            "architecture": "torchvision:resnet50",
            "parameters": self.draws.randrange(30_000, 25_000_000),
            "additional_data": arm in TRANSFER,
            "clean_acc": 80.0,
            "clean": clean | {"value": clean["value"] or 0.0},
            "attacked_clean": self.proportion(0.8),
            "training": trained if known else None,
            "attacks": [self.attack(None, s, points) for s in (0.02, 0.1)]
            + [self.attack(*ball, points) for ball in balls],
            "strong": [
                {
                    "norm": "linf",
                    "strength": 1 / 255,
                    "accuracy": self.proportion(0.3),
                    "members": [{"name": n, "accuracy": self.proportion(0.4)} for n in ("PGD", "APGD, targeted")],
                }
            ],
            "smallest_pgd": self.smallest("pgd", self.near(robust, 0.1), points),
            "smallest_gaussian": self.smallest("gaussian", self.near(30 * robust, 0.1), points),
            "gaussian_of_same_norm": self.proportion(0.98),
            "ratio_median": self.estimate(self.near(0.031, 0.1)),
            "flat_boundary": {"dimensions": 3072, "directions": 4, "ratio": 0.019},
            "largest_stretch": self.some(self.near(6.0)),
            "depth_points": points,
            "lipschitz": {
                "log10_upper": self.draws.uniform(1, 14),
                "log10_margin": self.draws.uniform(1, 14),
                "confidence": 1 - 8e-8,
                "log10_layer_product": self.some(self.draws.uniform(10, 30)),
                "layers": [
                    {
                        "name": name,
                        "kind": kind,
                        "lower": (upper := self.near(3.0, 0.4)) * 0.99,
                        "upper": upper,
                        "confidence": 1 - 1e-8,
                        "method": "lanczos",
                    }
                    for kind, name in names
                ],
            },
            "jacobian": {"mean": self.estimate(self.near(6.0)), "largest": self.near(11.0)},
            "weights": [
                {
                    "layer": name,
                    "rank": 64,
                    "largest": self.near(3.0),
                    "stable_rank": self.near(20.0),
                    "effective_rank": self.near(40.0),
                    "distance": None if name == layers[-1] else self.some(self.near(0.5 if arm == "finetune" else 2.0)),
                    "profile": self.profile(),
                }
                for name in layers
            ],
            "features": [
                {
                    "stage": stage,
                    "condition": condition,
                    "rank": 64,
                    "largest": self.near(100.0),
                    "stable_rank": self.near(3.0),
                    "effective_rank": self.near(20.0),
                    "profile": self.profile(),
                }
                for stage in stages
                for condition in ("clean", "gaussian", "pgd")
            ],
            "growth": [
                {"stage": stage, "condition": condition, "relative": self.estimate(self.near(0.05 * (i + 1)))}
                for i, stage in enumerate(stages)
                for condition in ("gaussian", "pgd")
            ],
            "corruptions": {
                "source": "generated",
                "rows": corrupted,
                "mean": self.estimate(0.6),
                "distortion": self.estimate(0.08),
            },
            "margins": {
                "log10_radius": self.some(-self.draws.uniform(1, 12)),
                "certified": [{"radius": 0.25, "accuracy": self.proportion(0.0)}],
            },
            "smoothing": {
                "sigma": 0.1,
                "samples": 128,
                "alpha": 0.001,
                "abstains": self.proportion(0.1, 20),
                "certified": [{"radius": r, "accuracy": self.proportion(0.4, 20)} for r in (0.0, 0.05, 0.1)],
            },
        }

    def point(self, model, epoch):
        return {
            "run": model["name"],
            "arm": model["arm"],
            "seed": model["seed"],
            "epoch": epoch,
            "accuracy": self.proportion(0.7),
            "log10_distortion": self.some(self.draws.uniform(-2.6, -1.9)),
            "reliability": self.some(self.draws.uniform(0.5, 1.0)),
            "log10_constant": self.some(self.draws.uniform(3, 12)),
            "log10_stretch": self.some(self.draws.uniform(-0.5, 1.0)),
            "log10_upper": self.draws.uniform(3, 12),
        }

    def comparisons(self):
        rise, ratio = ("log smallest distortion", "relative accuracy under PGD"), ("log ratio", "clean accuracy")
        seeds = [*range(self.seeds)]
        asked = [
            (arm, other, seed, measure)
            for arm in self.arms
            for other in self.arms
            for measure in (*rise, *ratio)
            for seed in ([*seeds, None] if measure in ratio and self.seeds > 1 else seeds)
            if (measure in rise and arm in TRANSFER and other in ("scratch", "matched"))
            or (measure in ratio and arm in ("scratch", "finetune") and other in REFERENCES)
        ]
        return [
            {
                "arm": arm,
                "against": other,
                "seed": seed,
                "measure": measure,
                "difference": self.estimate(self.draws.gauss(0.15, 0.1), 0.08, 95),
            }
            for arm, other, seed, measure in asked
        ]

    def results(self) -> Results:
        models = [self.model(arm, seed) for seed in range(self.seeds) for arm in self.arms]
        transfer = [
            {
                "source": a["name"],
                "target": b["name"],
                "strength": strength,
                "disjoint": "disjoint" in (a["arm"], b["arm"]) and a["arm"] != b["arm"],
                "fooled": self.proportion(1.0 if a is b else 0.4 * strength, 100),
                "noise": self.proportion(0.03, 100),
            }
            for a in models
            for b in models
            for strength in (0.5, 1.0)
            if len(models) > 1
        ]
        headlines = [
            "Adversarial perturbations were about 32 times smaller than noise; for softmax regression 34 times",
            "The fine-tuned network was fooled by a thirtieth of the noise it withstands",
            "Nobody can tell from 1 seed whether pre-training makes more robust",
            "Unstability and distortion: cannot be answered with these runs",
        ]
        verdicts = [
            {
                "number": i + 1,
                "question": f"Question {i + 1} of the study, as it is put?",
                "headline": headline,
                "rule": "Supported where the upper limit is at most the margin.",
                "verdict": ("supported", "contradicted", "undetermined")[i % 3],
                "because": "The upper limit of the paired difference is below the margin.",
                "change": "More seeds would.",
                "statistics": [
                    {"name": "ratio, scratch", "estimate": self.estimate(0.03), "p": self.some(self.draws.random())}
                ],
            }
            for i, headline in enumerate(headlines)
        ]
        return {
            "schema": SCHEMA,
            "preset": "quick",
            "dataset": "CIFAR-10",
            "classes": ["airplane", "automobile", "bird"],
            "generated": False,
            "source": "CIFAR-100, pre-trained here",
            "models": models,
            "points": [self.point(m, e) for m in models for e in (*self.snapshots, None)],
            "comparisons": self.comparisons(),
            "transfer": transfer,
            "verdicts": verdicts,
            "power": [
                {
                    "question": q,
                    "unit": "seeds",
                    "assumption": f"the true effect is {self.draws.random():.3f}",
                    "expected": "supported",
                    "needed": self.some(self.draws.randrange(2, 300)),
                    "had": self.some(self.draws.randrange(1, 12)),
                    "probability": self.draws.random(),
                }
                for q in (1, 2, 3, 4)
            ],
            "seed_deck": [
                {
                    "model": model,
                    "attack": attack,
                    "average_distortion": 33.7,
                    "upper_lipschitz_constant": 1.33,
                    "clean_accuracy": self.proportion(0.9375, 96),
                }
                for model in ("fine-tuned", "scratch")
                for attack in ("Gaussian", "PGD")
            ],
        }

    def distortions(self, results: Results) -> dict[str, dict[str, np.ndarray]]:
        found = {}
        for m in results["models"]:
            rng = np.random.default_rng(self.draws.randrange(2**32))
            adversarial = 0.006 * np.exp(rng.normal(0, 0.5, 100)) * (1.3 if m["arm"] in TRANSFER else 1)
            noise = adversarial * 30 * np.exp(rng.normal(0, 0.2, 100))
            noise[noise > 0.4] = np.inf
            few = 0 if self.draws.random() < self.gaps else 100
            found[m["name"]] = {"pgd": adversarial[:few], "gaussian": noise[:few]}
        return found


def examples(results: Results) -> list[Example]:
    """Examples that show a grey pixel."""
    pixel = data_uri(np.full((3, 1, 1), 0.5))
    shown = tuple(PerturbedImage(kind, pixel, pixel, 12.3, 0.005, "bird") for kind in ("PGD", "Gaussian"))
    first = [m for m in results["models"] if m["seed"] == results["models"][0]["seed"]]
    return [Example(i, m["title"], "airplane", pixel, shown) for i in range(3) for m in first]


@pytest.fixture(scope="session")
def synthetic() -> Callable[..., Synthetic]:
    return Synthetic


def worlds() -> list[Synthetic]:
    """Results of all sizes and shapes: 1 to 12 runs, 1 to 10 arms, with and without gaps, checkpoints of any name."""
    trained = ("softmax", "mlp", "convnet", "resnet18", "scratch", "disjoint", "matched", "finetune", "linear", "lpft")
    rng = random.Random(3)
    found = [
        Synthetic(0, ("scratch",)),
        Synthetic(1, ("scratch", "finetune"), seeds=6, layers=53, snapshots=(1, 2)),
        Synthetic(2, trained, layers=53),
        Synthetic(3, ("softmax", "scratch", "finetune", "matched"), seeds=3, gaps=0.2, snapshots=(1,)),
        Synthetic(4, ("scratch", "finetune"), seeds=2, gaps=1.0),
        Synthetic(5, tuple(NASTY[:10])),
        Synthetic(6, tuple(NASTY[10:]), gaps=0.3),
    ]
    for seed in range(7, 10):
        letters = string.printable + "äßł∞€漢"
        names = sorted({"".join(rng.choices(letters, k=rng.randint(1, 25))) for _ in range(rng.randint(1, 6))})
        found.append(Synthetic(seed, tuple(names), gaps=rng.random() * 0.5))
    return found


@pytest.fixture(scope="session", params=range(10), ids=lambda i: f"world{i}")
def world(request) -> tuple[Synthetic, Results]:
    """One of the synthetic results after the other."""
    made = worlds()[request.param]
    return made, made.results()


CONFIG = {
    "command": "python -m fastlip.study --preset quick --out 'a & b'",
    "seeds": [0],
    "machine": {"device": "cpu", "threads": 2, "precision": "float32"},
    "versions": {"torch": "2.11"},
    "inputs": {"target": "0123"},
    "build": {"avx2": True},
}


@dataclass(frozen=True)
class Page:
    """A report of synthetic results: its text, its figures, and what it was made of."""

    html: str
    figures: list[Figure]
    results: Results


@pytest.fixture(scope="session")
def render() -> Callable[[Results, list[Figure]], str]:
    """Makes the page of synthetic results with figures that are drawn."""

    def make(results: Results, figures: list[Figure]) -> str:
        settings = dotted_names(presets.preset("quick"))
        tables = html_report.all_tables(results)
        return html_report.page(results, tables, figures, examples(results), CONFIG, settings, {"norms": 1.0})

    return make


@pytest.fixture(scope="session", params=(1, 3, 4, 6), ids=lambda i: f"world{i}")
def page(request, render) -> Page:
    """The reports of some worlds: many runs; gaps; nothing but gaps; checkpoints of any name.

    A warning of matplotlib's is an error, for something would not be seen.
    """
    made = worlds()[request.param]
    results = made.results()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = html_report.all_figures(results, made.distortions(results))
    return Page(render(results, figures), figures, results)


@pytest.fixture
def written(tmp_path) -> Callable[..., Path]:
    """Writes a run directory of synthetic results with what the report reads; further settings by their names."""

    def write(made: Synthetic, name: str = "run", **changed) -> Path:
        results = made.results()
        run = tmp_path / name
        trained = all(arm in ARMS for arm in made.arms)
        names = {"arms": made.arms} if trained else {"arms": (), "checkpoints": made.arms}
        settings = dataclasses.replace(presets.preset("quick"), seeds=made.seeds, **names, **changed)
        config = CONFIG | {"settings": serialization.to_json(settings), "rules": [], "power": []}
        config |= {"machine": {"device": "cpu", "precision": "float32", "threads": 1, "compiled": False}}
        files.write_json(run / "config.json", config)
        files.write_json(run / "results.json", results)
        rng, n = np.random.default_rng(0), 6
        for m in results["models"]:
            decided = {"id": np.arange(n), "label": np.arange(n) % 3, "prediction": np.arange(n) % 3}
            image = rng.random((n, 3, 8, 8), dtype=np.float32)
            clean = decided | {"margin": np.ones(n), "image": (image * 255).astype(np.uint8)}
            fooled = decided | {"prediction": (np.arange(n) + 1) % 3, "found": np.ones(n, dtype=bool), "image": image}
            moved = fooled | {key: rng.random(n) for key in ("distortion", "stretch", "l2", "ceiling")}
            folder = run / "images" / m["name"]
            files.write_arrays(folder / "clean-attacked.npz", clean)
            for kind in ("pgd", "gaussian"):
                files.write_arrays(folder / f"smallest-{kind}.npz", moved)
        return run

    return write
