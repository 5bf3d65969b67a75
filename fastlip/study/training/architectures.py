"""The networks of the study: each arm's, by the settings, and their parts."""

from collections.abc import Sequence

from torch import nn

from fastlip.lipschitz import require_rules
from fastlip.models import Anatomy, anatomy, build_model, dead_share, live_taps, short_name
from fastlip.study.errors import StudyError, first_line
from fastlip.study.settings.settings import Settings

#: What stands for an arm where the source's network is meant.
SOURCE = "source"


def build(settings: Settings, arm: str, classes: int, seed: int) -> nn.Sequential:
    """The network of an arm, of a checkpoint or of the source, with random initial weights, on the CPU.

    Raises:
        StudyError: there is no such network, or the stem, the scale or the image size does not fit it.
    """
    spec = _architecture(settings, arm)
    stem, scale = _stem_and_scale(settings, spec)
    try:
        return build_model(spec, classes, image_size=settings.image_size, stem=stem, scale=scale, seed=seed)
    except (ValueError, ImportError) as error:
        raise StudyError(f"--model {spec}: {first_line(error)}", status=2) from None


def description(settings: Settings, arm: str) -> dict[str, str]:
    """What a checkpoint says about its network, whose weights alone do not tell its stem and its scale."""
    spec = _architecture(settings, arm)
    stem, scale = _stem_and_scale(settings, spec)
    return {"model": spec, "stem": stem, "scale": str(scale)}


def parts(settings: Settings, arm: str, network: nn.Module) -> Anatomy:
    """The stages and the head of a network of :func:`build`, found or as the settings name them.

    Raises:
        StudyError: the settings name modules that it has not, or it has no head that can be found.
    """
    spec = _architecture(settings, arm)
    named = spec == settings.model
    try:
        return anatomy(
            network,
            image_shape(settings),
            settings.stages if named else (),
            settings.head if named else "",
        )
    except ValueError as error:
        raise StudyError(f"--model {spec}: {first_line(error)}", status=2) from None


def image_shape(settings: Settings) -> tuple[int, int, int]:
    """[C, H, W] of one image."""
    return 3, settings.image_size, settings.image_size


def check_networks(settings: Settings, arms: Sequence[str], classes: int) -> list[str]:
    """Build the networks of ``arms``, each once, and return what is to be warned of, a line for each.

    Raises:
        StudyError: one of them cannot be built, its parts cannot be found or leave nothing for "partial" to freeze, an
            arm that starts from a source has several heads, or there is no certified Lipschitz bound.
    """
    found = []
    first = {_architecture(settings, arm): arm for arm in reversed(arms)}
    for spec, arm in first.items():
        network = build(settings, arm, classes, 0)
        its = parts(settings, arm, network)
        if settings.transfers and spec == settings.model and its.beside:
            heads = ", ".join(map(short_name, (its.head, *its.beside)))
            raise StudyError(
                f"--model {spec}: its logits come from several heads ({heads}), and arms that start from a source "
                "replace one; leave these arms out, or measure checkpoints of it",
                status=2,
            )
        if "partial" in settings.arms and spec == settings.model:
            last = {id(p) for name in its.tail for p in network.get_submodule(name).parameters()}
            if all(id(p) in last for p in network.parameters()):
                raise StudyError(
                    f"--set arms: partial would train all of {spec}, which has no stage before the last; name stages "
                    "with --set stages=..., or leave it out",
                    status=2,
                )
        try:
            require_rules(network, image_shape(settings))
        except ValueError as error:
            raise StudyError(f"{spec} has no certified Lipschitz bound: {first_line(error)}", status=2) from None
        live = live_taps(network, image_shape(settings))
        dead = dead_share(live, network)
        if dead > 0:
            worst = min(live, key=lambda name: live[name].double().mean().item())
            taps = live[worst]
            found.append(
                f"{spec} with stem={settings.stem} and scale={settings.scale}: on images of {settings.image_size} x "
                f"{settings.image_size}, {dead:.1%} of the convolutions' weights never touch the input (in "
                f"{worst.removeprefix('network.')} {taps.numel() - int(taps.sum())} of {taps.numel()} taps); another "
                "stem or a larger scale uses them"
            )
    return found


def _architecture(settings: Settings, arm: str) -> str:
    return settings.model if arm == SOURCE else settings.architecture_of(arm)


def _stem_and_scale(settings: Settings, spec: str) -> tuple[str, int]:
    """The small references take images as they are."""
    return ("imagenet", 1) if spec.startswith("fastlip:") else (settings.stem, settings.scale)
