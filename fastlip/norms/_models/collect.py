"""The layers that models use, in order, as operators.

One model of each structure runs, its layers' outputs are compared with the maps whose norms will be reported, and the
weights of every model are put into those maps.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import nn

from fastlip.norms._models.agreement import require_agreement
from fastlip.norms._models.eval_mode import eval_mode, require_eval
from fastlip.norms._models.inputs import example_input, random_inputs, runs_on
from fastlip.norms._models.layer import Layer, LayerTemplate
from fastlip.norms._models.recording import Recording, record_layers
from fastlip.norms._models.structure import modules_of, structure
from fastlip.norms._models.weights import fill_templates
from fastlip.norms._operators.batchnorm import BATCHNORMS, NO_STATISTICS
from fastlip.norms._operators.modules import TRANSPOSED, describe_module, keeps_forward, module_operator


def collect_layers(
    models: Sequence[nn.Module], input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, running: ExitStack
) -> list[list[Layer]]:
    """The layers of each model that run, in order; nothing is read from the device of their weights.

    Of models of one structure only the first runs. The models that run are in eval mode until ``running`` ends, and
    the weights that their forwards compute or write are until then what they were in the run.

    Raises:
        ValueError: a model does not run, what it does depends on the batch or the mode, or a layer applies another map
            than its weight says.
    """
    templates: list[list[LayerTemplate]] = []
    known: dict[Hashable, list[LayerTemplate]] = {}
    for model in models:
        key, training = structure(model), model.training
        if key is None or key not in known:
            running.enter_context(eval_mode(model))
            try:
                found = _run_for_layers(model, input_shape, fold_batchnorm, check, len(models) > 1)
            except ValueError:
                # A BatchNorm that takes the batch's statistics may be why the model does not run.
                require_eval(model, training, model.modules())
                raise
            templates.append(found.templates)
            if key is not None and found.shared:
                known[key] = found.templates
        else:
            templates.append(known[key])
        held = modules_of(model)
        require_eval(model, training, [held[t.batchnorm] for t in templates[-1] if t.batchnorm is not None])
    return fill_templates(templates, [modules_of(model) for model in models])


class _Found(NamedTuple):
    """The layers of one model, and whether they are those of all models of its structure.

    They are where each layer ran with the weight that it holds, as no one else's could serve another model.
    """

    templates: list[LayerTemplate]
    shared: bool


def _run_for_layers(
    model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, several: bool
) -> _Found:
    """Run the model, which is in eval mode, and describe the layers it uses; ``several`` models may share them."""
    ran = _record(model, input_shape, fold_batchnorm, check, several)
    modules = dict(model.named_modules())
    shown = {name: name or type(model).__name__ for name in modules}
    for call in ran.calls:
        user = call.batchnorm or (call.name if isinstance(modules[call.name], BATCHNORMS) else None)
        if user is not None:
            _require_batchnorm(modules[user], shown[user], shown[call.name])
    index = {id(module): i for i, module in enumerate(modules_of(model))}
    repeats: Counter[str] = Counter()
    found: list[LayerTemplate] = []
    for call in ran.calls:
        repeats[call.name] += 1
        name = shown[call.name] + (f"#{repeats[call.name]}" if repeats[call.name] > 1 else "")
        module = modules[call.name]
        description, place = describe_module(module, call.input_shape), index[id(module)]
        if isinstance(module, BATCHNORMS):
            found.append(LayerTemplate(name, description, place, None, place))
            continue
        if call.batchnorm is not None:
            description += " + BN"
        try:
            size = call.output_shape[1:] if isinstance(module, TRANSPOSED) else None
            operator = module_operator(module, call.input_shape, output_size=size, finite=False)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
        geometry = operator.with_weight(operator.weight.new_empty(operator.weight.shape, device="meta"))
        follower = None if call.batchnorm is None else index[id(modules[call.batchnorm])]
        found.append(LayerTemplate(name, description, place, geometry, follower, isinstance(module, TRANSPOSED)))
    if check:
        require_agreement(ran.uses)
    return _Found(found, ran.own_weights)


def _record(
    model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, several: bool
) -> Recording:
    """Run the model, which is in eval mode, and record its layers, each call of one kind once.

    With ``check`` it runs on random inputs, in batches of two sizes, and what layers made of one input is kept.

    Raises:
        ValueError: the model does not run, or what it does depends on the batch.
    """
    x = random_inputs(model, input_shape, 2) if check else example_input(model, input_shape)
    with torch.no_grad(), runs_on(model, input_shape):
        first = record_layers(model, x, fold_batchnorm=fold_batchnorm, watch=several)
        if not check:
            return Recording(list(dict.fromkeys(first.calls)), [], first.own_weights)
        alone = record_layers(model, x[:1], fold_batchnorm=fold_batchnorm, keep=True)
    if alone.calls != first.calls:
        pairs = zip_longest(alone.calls, first.calls)
        name = next((one or other).name for one, other in pairs if one != other)
        raise ValueError(
            f"layer {name or type(model).__name__} is used otherwise in a batch of two inputs than in one of one, so "
            "that it has no norm for itself; check=False takes it as it is for one input"
        )
    return Recording(list(dict.fromkeys(alone.calls)), alone.uses, first.own_weights)


def _require_batchnorm(module: nn.Module, name: str, layer: str) -> None:
    """Raise ValueError unless a BatchNorm multiplies by its factors."""
    kind = next(cls for cls in BATCHNORMS if isinstance(module, cls))
    if not keeps_forward(module, kind):
        raise ValueError(
            f"layer {name}: {type(module).__name__} has another forward than {kind.__name__}, and may do something "
            "else than multiply by its factors"
        )
    if module.running_var is None:
        raise ValueError(f"layer {layer}: {NO_STATISTICS}")
