import dataclasses

import pytest

from fastlip.study.errors import StudyError
from fastlip.study.settings import overrides, presets, serialization
from fastlip.study.settings.attacks import PgdSettings, SmallestSettings
from fastlip.study.settings.measurements import EvaluationSettings
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.settings import Settings
from fastlip.study.settings.training import Schedule


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_settings_survive_json(name):
    settings = presets.preset(name)
    assert serialization.from_json(serialization.to_json(settings)) == settings


def test_every_setting_can_be_overridden_by_the_text_of_its_value():
    settings = presets.preset("quick")
    for name, value in serialization.dotted_names(settings).items():
        if name not in overrides.FIXED:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert overrides.override(settings, [f"{name}={text}"]) == settings


def test_override_changes_one_setting_and_its_type():
    settings = overrides.override(presets.preset("demo"), ["pgd.steps=20", "pgd.l2=0.3", "scratch.flip=false"])
    assert (settings.pgd.steps, settings.pgd.l2, settings.scratch.flip) == (20, (0.3,), False)
    assert settings.finetune == presets.preset("demo").finetune


def test_settings_that_fit_each_other_are_taken_in_any_order():
    """Each of these alone is refused: a snapshot after the last epoch, and more attacked images than clean ones."""
    together = ["scratch.epochs=1", "scratch.snapshots=", "evaluation.images=500", "evaluation.clean_images=600"]
    quick = presets.preset("quick")
    forward, backward = (overrides.override(quick, order) for order in (together[2:] + together[:2], together[::-1]))
    assert forward == backward == overrides.override(quick, together)
    assert (forward.scratch.epochs, forward.scratch.snapshots, forward.evaluation.images) == (1, (), 500)
    assert overrides.override(quick, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("pgd.steps", "NAME=VALUE"),
        ("pgd.stepz=3", r"pgd.stepz: no such setting; did you mean pgd.steps\?"),
        ("magic=3", "magic: no such setting; --help lists them"),
        ("pgd=3", "pgd: no such setting"),
        ("preset=full", "no such setting"),
        ("source=folder", "no such setting"),
        ("pgd.steps=many", "expected int"),
        ("pgd.loss=hinge", "expected dlr or ce"),
        ("pgd.steps=0", "pgd"),
        ("smallest.levels=1", "smallest.levels"),
        ("arms=scratch,magic", "arms"),
        ("evaluation.images=100000", r"evaluation\.images: 1 to evaluation\.clean_images, 240"),
        ("rules.compared_linf_255=3", "rules.compared_linf_255"),
        ("scratch.flip=perhaps", "expected bool"),
        ("gaussian.sigmas=0.1,0.1", "gaussian.sigmas"),
        ("normalize=none", "normalize: is for checkpoints"),
        ("reference.snapshots=1", "reference.snapshots: those of the arms scratch and finetune"),
        ("pretrain.snapshots=1", "pretrain.snapshots"),
        ("norm_bounds=", "norm_bounds: finite numbers above 0"),
        ("norm_bounds=1,0", "norm_bounds: finite numbers above 0"),
        ("norm_bounds=-1", "norm_bounds: finite numbers above 0"),
        ("norm_bounds=inf", "norm_bounds: finite numbers above 0"),
        ("norm_bounds=nan", "norm_bounds: finite numbers above 0"),
        ("norm_bounds=one", "expected float"),
        ("norm_bounds=2,1,2", "norm_bounds: name each bound once"),
        ("norm_bound=2", r"norm_bound: no such setting; did you mean norm_bounds\?"),
        ("scratch.crop=32", "scratch.crop: must be below image_size"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(assignment, message):
    with pytest.raises(StudyError, match=message) as caught:
        overrides.override(presets.preset("demo"), [assignment])
    assert caught.value.status == 2
    assert "\n" not in str(caught.value)


def test_matched_is_close_to_the_compute_that_it_is_called_after():
    quick = presets.preset("quick")
    arms = dataclasses.replace(quick, source="cifar100", arms=("scratch", "matched", "finetune"))
    assert arms.schedule("matched").epochs == 4
    with pytest.raises(StudyError, match=r"matched would take 3\.4 epochs of scratch\.images"):
        overrides.override(arms, ["pretrain.images=11000"])
    assert overrides.override(quick, ["pretrain.images=11000"]).schedule("scratch") == quick.scratch


def test_the_seeds_take_the_bounds_on_norms_in_turn():
    settings = overrides.override(presets.preset("seeds"), ["norm_bounds=2,1.5", "seed=7"])
    assert [settings.norm_bound("constrained", seed) for seed in settings.all_seeds] == [2.0, 1.5] * 5
    assert {settings.norm_bound(arm, 7) for arm in settings.arms if arm != "constrained"} == {None}
    # It differs from scratch in the bound alone, and has no snapshots.
    assert settings.schedule("constrained") == dataclasses.replace(settings.scratch, snapshots=())
    assert settings.role_of("constrained") == "scratch"
    assert settings.training_images("constrained") == settings.training_images("scratch")


@pytest.mark.parametrize("name", ["demo", "quick", "overnight"])
def test_presets_of_one_seed_do_without_bounded_norms(name):
    assert "constrained" not in presets.preset(name).arms
    assert {"constrained"} <= set(presets.preset("seeds").arms) & set(presets.preset("full").arms)


def test_parts_are_named_of_a_network_that_the_run_has():
    own = {"arms": (), "checkpoints": ("a", "b"), "models": ("timm:resnet18", "torchvision:resnet18")}
    with pytest.raises(StudyError, match="stages and head are of one network"):
        dataclasses.replace(presets.preset("quick"), **own, head="fc")
    dataclasses.replace(presets.preset("quick"), **own, model="timm:resnet18", head="fc")


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(StudyError, match="demo or quick"):
        presets.preset("huge")


def test_settings_of_another_version_are_refused():
    plain = serialization.to_json(presets.preset("demo"))
    del plain["pgd"]["loss"]
    with pytest.raises(StudyError, match="another version"):
        serialization.from_json(plain)


def test_settings_from_before_there_were_bounds_on_norms_are_read():
    settings = presets.preset("quick")
    plain = serialization.to_json(settings)
    del plain["norm_bounds"]
    assert serialization.from_json(plain) == settings
    assert "norm_bounds" not in plain


def test_every_field_is_described():
    for kind in (Settings, Schedule, EvaluationSettings, PgdSettings, SmallestSettings, Rules):
        for field in dataclasses.fields(kind):
            assert f"{field.name}:" in kind.__doc__
