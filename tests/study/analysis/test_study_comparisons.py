"""Comparisons and data points: what is compared with what, on which images, and what censoring does to it."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis.comparisons import Decided, compared, comparisons, log_ratios
from fastlip.study.analysis.points import points
from fastlip.study.analysis.statistics import split_half_reliability
from fastlip.study.pipeline import start_or_resume
from fastlip.study.settings import presets
from fastlip.study.settings.attacks import PgdSettings
from fastlip.study.settings.measurements import EvaluationSettings
from fastlip.study.settings.rules import Rules
from fastlip.study.storage.files import write_arrays, write_json
from fastlip.study.storage.run_directory import TrainedModel

IMAGES, SNAPSHOT, CLEAN = 40, 24, 60
UNDER = "pgd-linf-1"


def decided(rng, *, accuracy=0.8, n=IMAGES, **changes):
    right = rng.random(n) < accuracy
    pgd = np.exp(rng.normal(-4, 1, n))
    found = Decided(
        right=right,
        clean=rng.random(CLEAN) < accuracy,
        under_pgd=right & (rng.random(n) < 0.5),
        pgd=pgd,
        pgd_ceiling=np.ones(n),
        gaussian=np.minimum(30 * pgd * np.exp(0.3 * rng.normal(size=n)), 0.5),
        gaussian_ceiling=np.full(n, 0.6),
    )
    return found._replace(**changes)


def settings_of(**changes):
    rules = Rules(resamples=50, min_runs=changes.pop("min_runs", 6))
    return dataclasses.replace(
        presets.preset("demo"),
        evaluation=EvaluationSettings(images=IMAGES, clean_images=CLEAN, snapshot_images=SNAPSHOT),
        pgd=PgdSettings(linf_255=(1.0,), l2=(), l1=()),
        rules=rules,
        device="cpu",
        **changes,
    )


@pytest.fixture
def models():
    rng, made = np.random.default_rng(0), {}

    def find(arm, seed):
        return made.setdefault((arm, seed), decided(rng))

    return find


def test_every_large_arm_is_compared_with_what_its_questions_need(models):
    arms = ("softmax", "mlp", "scratch", "matched", "finetune")
    rows = compared(models, settings_of(arms=arms, seeds=2))
    large = ("scratch", "matched", "finetune")
    expected = [
        (arm, small, measure, seed)
        for measure in ("log ratio", "clean accuracy")
        for arm in large
        for small in ("softmax", "mlp")
        for seed in (0, 1, None)
    ]
    expected += [
        ("finetune", base, measure, seed)
        for base in ("scratch", "matched")
        for measure in ("log smallest distortion", "relative accuracy under PGD")
        for seed in (0, 1)
    ]
    found = [(c["arm"], c["against"], c["measure"], c["seed"]) for c in rows]
    assert len(found) == len(set(found))
    assert set(found) == set(expected)


def test_all_pairs_of_checkpoints_are_compared_in_every_measure(models):
    rows = compared(models, settings_of(arms=(), checkpoints=("a", "b", "c")))
    assert {(c["arm"], c["against"]) for c in rows} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert len(rows) == 3 * 4


def test_distances_and_accuracies_are_compared_on_the_right_images(models):
    settings = settings_of(arms=("scratch", "finetune", "softmax"))
    found = {(c["arm"], c["against"], c["measure"]): c["difference"] for c in compared(models, settings)}
    one, other, small = (models(arm, 0) for arm in ("finetune", "scratch", "softmax"))
    both = one.right & other.right
    d = np.log(one.pgd[both] / other.pgd[both])
    distance = found["finetune", "scratch", "log smallest distortion"]
    assert distance["n"] == both.sum()
    assert distance["value"] == pytest.approx(d.mean())
    limits = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert (distance["low"], distance["high"]) == pytest.approx((limits.low, limits.high))
    relative = found["finetune", "scratch", "relative accuracy under PGD"]
    assert relative["n"] == IMAGES
    assert relative["value"] == pytest.approx(
        one.under_pgd.sum() / one.right.sum() - other.under_pgd.sum() / other.right.sum()
    )
    clean = found["finetune", "softmax", "clean accuracy"]
    assert (clean["n"], clean["value"]) == (CLEAN, pytest.approx(one.clean.mean() - small.clean.mean()))
    both = one.right & small.right
    r = np.log(one.pgd / one.gaussian * small.gaussian / small.pgd)[both]
    ratio = found["finetune", "softmax", "log ratio"]
    assert (ratio["n"], ratio["value"]) == (both.sum(), pytest.approx(np.median(r)))
    limits = stats.quantile_test(r, p=0.5).confidence_interval(0.95)
    assert (ratio["low"], ratio["high"]) == pytest.approx((limits.low, limits.high))


def test_a_distance_that_was_not_found_counts_as_the_ceiling():
    rng = np.random.default_rng(0)
    full = np.ones(IMAGES, dtype=bool)
    one, other = (decided(rng, right=full) for _ in range(2))
    one = one._replace(pgd=np.where(np.arange(IMAGES) < 5, np.inf, one.pgd))
    found = {"finetune": one, "scratch": other}
    rows = compared(lambda arm, seed: found[arm], settings_of(arms=("scratch", "finetune")))
    expected = np.log(np.where(np.arange(IMAGES) < 5, 1.0, one.pgd) / other.pgd).mean()
    assert rows[0]["difference"]["value"] == pytest.approx(expected)


def test_a_censored_ratio_lies_between_its_bounds():
    model = decided(np.random.default_rng(0), n=4)._replace(
        pgd=np.array([0.01, 0.01, np.inf, np.inf]), gaussian=np.array([0.3, np.inf, 0.3, np.inf])
    )
    low, high = log_ratios(model._replace(pgd_ceiling=np.ones(4), gaussian_ceiling=np.full(4, 0.6)))
    expected = [
        (np.log(0.01 / 0.3), np.log(0.01 / 0.3)),
        (-np.inf, np.log(0.01 / 0.6)),  # noise beyond the ceiling makes the ratio smaller
        (np.log(1 / 0.3), np.inf),
        (-np.inf, np.inf),
    ]
    np.testing.assert_allclose(list(zip(low, high, strict=True)), expected)


def test_censored_noise_of_a_reference_does_not_help_the_large_network():
    # With the reference's noise censored, its ratio may be as small as it likes: the upper limit must rise.
    rng = np.random.default_rng(1)
    full = np.ones(IMAGES, dtype=bool)
    large, small = (decided(rng, right=full) for _ in range(2))

    def limits(reference):
        found = {"scratch": large, "softmax": reference}
        rows = compared(lambda arm, seed: found[arm], settings_of(arms=("softmax", "scratch")))
        return rows[0]["difference"]["low"], rows[0]["difference"]["high"]

    # The reference's largest ratios, which the upper limit would gain by losing.
    at = np.argsort(-small.pgd / small.gaussian)[:8]
    censored = small._replace(gaussian=np.where(np.isin(np.arange(IMAGES), at), np.inf, small.gaussian))
    assert limits(censored)[1] > limits(small)[1]


def test_over_seeds_an_image_counts_once_with_its_median():
    rng = np.random.default_rng(3)
    made = {(arm, seed): decided(rng) for arm in ("softmax", "scratch") for seed in range(3)}
    rows = compared(lambda *key: made[key], settings_of(arms=("softmax", "scratch"), seeds=3))
    d = np.full((3, IMAGES), np.nan)
    for seed in range(3):
        large, small = made["scratch", seed], made["softmax", seed]
        both = large.right & small.right
        d[seed, both] = np.log(large.pgd / large.gaussian * small.gaussian / small.pgd)[both]
    of_image = np.nanmedian(d[:, ~np.isnan(d).all(0)], axis=0)
    whole = next(c["difference"] for c in rows if c["seed"] is None and c["measure"] == "log ratio")
    limits = stats.quantile_test(of_image, p=0.5).confidence_interval(0.95)
    assert whole["n"] == len(of_image)
    assert (whole["low"], whole["high"]) == pytest.approx((limits.low, limits.high))
    clean = next(c["difference"] for c in rows if c["seed"] is None and c["measure"] == "clean accuracy")
    mean = [np.mean([made[arm, k].clean for k in range(3)], axis=0) for arm in ("scratch", "softmax")]
    assert (clean["n"], clean["value"]) == (CLEAN, pytest.approx((mean[0] - mean[1]).mean()))


def planted(folder, settings, scale=1.0):
    """The files of a run that comparisons and points read; ``scale`` multiplies the logits of every model."""
    run = start_or_resume.open_or_create(folder / "run", settings, {"target": "planted"}, "planted")
    rng = np.random.default_rng(0)
    for model in [*run.models, *run.snapshots]:
        n = IMAGES if model.epoch is None else SNAPSHOT
        label = np.arange(n) % 6
        wrong = (label + 1) % 6
        right = rng.random(n) < 0.9
        base = {"id": np.arange(n), "label": label}
        pgd = np.where(right, np.exp(rng.normal(-4, 1, n) + 0.1 * rng.normal()), 0.0)
        moved = base | {"prediction": wrong, "ceiling": np.full(n, 0.6), "found": np.ones(n, dtype=bool), "l2": pgd}
        clean = base | {"prediction": np.where(right, label, wrong), "margin": scale * rng.uniform(0.1, 2, n)}
        stretch = scale * rng.uniform(1, 9, n)
        written = {
            "clean-attacked": clean,
            "smallest-pgd": moved | {"distortion": pgd, "stretch": 1e6 * stretch},
            UNDER: base | {"prediction": wrong, "distortion": pgd, "stretch": stretch},
            "smallest-gaussian": moved | {"distortion": 30 * pgd, "stretch": stretch},
            "clean": {"id": np.arange(CLEAN), "label": np.zeros(CLEAN, int), "prediction": rng.integers(2, size=CLEAN)},
        }
        for name, arrays in list(written.items())[: 3 if model.epoch is not None else None]:
            write_arrays(run.images(model.name, name), arrays)
        upper = 12 + rng.normal() + np.log10(scale)
        bound = {"log10_upper": upper, "log10_margin": 20.0, "confidence": 1.0, "log10_layer_product": 19.0}
        write_json(run.lipschitz(model.name), bound | {"layers": []})
    return run


def arrays(run, model, name):
    with np.load(run.images(model.name, name)) as file:
        return dict(file)


@pytest.mark.parametrize(("seeds", "enough"), [(7, True), (3, False)])
def test_points_share_the_images_that_all_they_are_compared_with_classify_correctly(tmp_path, seeds, enough):
    settings = settings_of(arms=("scratch",), seeds=seeds)
    run = planted(tmp_path, settings)
    found = {(p["seed"], p["epoch"]): p for p in points(run)}
    assert list(found) == [(seed, epoch) for seed in range(seeds) for epoch in (1, None)]
    first = IMAGES if enough else SNAPSHOT
    together = run.models if enough else [*run.models, *run.snapshots]
    clean = [arrays(run, m, "clean-attacked") for m in together]
    common = np.logical_and.reduce([(c["prediction"] == c["label"])[:first] for c in clean])
    logs = {}
    for model in run.models:
        point = found[model.seed, None]
        logs[model.seed] = np.log10(arrays(run, model, "smallest-pgd")["distortion"][:first][common].clip(None, 0.6))
        margin = np.log10(np.median(arrays(run, model, "clean-attacked")["margin"][:first][common]))
        stretch = arrays(run, model, UNDER)["stretch"][:first][common].max()
        assert point["accuracy"]["n"] == first
        assert point["log10_distortion"] == pytest.approx(logs[model.seed].mean())
        assert point["log10_constant"] == pytest.approx(point["log10_upper"] - margin)
        assert point["log10_stretch"] == pytest.approx(np.log10(stretch) - margin)
    reliability = split_half_reliability(np.array(list(logs.values())))
    assert all(p["reliability"] == pytest.approx(reliability) for (_, epoch), p in found.items() if epoch is None)


def test_points_do_not_know_the_scale_of_the_logits(tmp_path):
    settings = settings_of(arms=("scratch",), seeds=3)
    one, other = (points(planted(tmp_path / f"{scale:g}", settings, scale)) for scale in (1.0, 100.0))
    for a, b in zip(one, other, strict=True):
        assert b["log10_upper"] == pytest.approx(a["log10_upper"] + 2)
        for name in ("log10_constant", "log10_stretch", "log10_distortion"):
            assert b[name] == pytest.approx(a[name])


def test_without_a_common_image_there_are_no_numbers(tmp_path):
    run = planted(tmp_path, settings_of(arms=("scratch",), seeds=1))
    snapshot = TrainedModel("scratch", 0, 1)
    clean = arrays(run, snapshot, "clean-attacked")
    write_arrays(run.images(snapshot.name, "clean-attacked"), clean | {"prediction": clean["label"] + 1})
    for point in points(run):
        assert (point["log10_distortion"], point["log10_constant"], point["log10_stretch"]) == (None, None, None)


def test_comparisons_read_the_files_of_a_run(tmp_path):
    run = planted(tmp_path, settings_of(arms=("softmax", "scratch", "finetune")))
    found = {(c["arm"], c["against"], c["measure"]): c["difference"] for c in comparisons(run)}
    one, other = (TrainedModel(arm, 0) for arm in ("finetune", "scratch"))
    right = [a["prediction"] == a["label"] for a in (arrays(run, m, "clean-attacked") for m in (one, other))]
    both = right[0] & right[1]
    a, b = (np.log(arrays(run, m, "smallest-pgd")["distortion"][both].clip(None, 0.6)) for m in (one, other))
    assert found["finetune", "scratch", "log smallest distortion"]["value"] == pytest.approx((a - b).mean())
    assert found["scratch", "softmax", "log ratio"]["value"] == pytest.approx(0.0)  # all ratios are one to thirty
    assert found["scratch", "softmax", "clean accuracy"]["n"] == CLEAN
