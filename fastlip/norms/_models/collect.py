"""The layers that models use, in order, as operators.

One model of each structure runs, what its layers and functions did is compared with the maps whose norms will be
reported, and the weights of every model are put into those maps.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from fastlip.norms._interval import DID_NOT_RUN
from fastlip.norms._models.agreement import disagreements
from fastlip.norms._models.closeness import agree
from fastlip.norms._models.eval_mode import eval_mode, require_eval
from fastlip.norms._models.held import HeldTensors, Source
from fastlip.norms._models.inputs import example_input, random_inputs, runs_on
from fastlip.norms._models.layer import LayerTemplate, ModelLayers
from fastlip.norms._models.recording import LayerCall, Recording, record_layers
from fastlip.norms._models.structure import modules_of, structure
from fastlip.norms._models.weights import fill_templates
from fastlip.norms._operators.modules import TRANSPOSED, module_operator
from fastlip.norms._operators.operator import Operator
from fastlip.norms._operators.registry import find_operator, registered_operator

#: Units of rounding by which a weight may differ that is computed again, as where a forward normalises it each time.
_FEW = 64
#: Why weights are left out beside ``DID_NOT_RUN``, which is no fault of the report's.
_UNSEEN = "no use of it was seen in the run, as inside TorchScript or functions that are not torch's"
_FOREIGN = "it is given a weight that is not made of tensors of the model's modules alone"
_PACKED = "its weight is packed for quantised arithmetic, and no tensor"
_BATCH = (
    "it is used otherwise in a batch of two inputs than in one of one, or with another weight for another input, so "
    "that it has no norm for itself; check=False takes it as it is for one input"
)


def collect_layers(
    models: Sequence[nn.Module], input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, running: ExitStack
) -> list[ModelLayers]:
    """The layers of each model that run, in order; nothing is read from the device of their weights.

    Of models of one structure only the first runs. The models that run are in eval mode until ``running`` ends, and
    the weights that their forwards compute or write are until then what they were in the run.

    Raises:
        ValueError: a model does not run, or what it does depends on the mode.
    """
    every: list[_Found] = []
    known: dict[Hashable, _Found] = {}
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
            every.append(found)
            if key is not None and found.shared:
                known[key] = found
        else:
            every.append(known[key])
        held = modules_of(model)
        require_eval(model, training, [held[t.batchnorm] for t in every[-1].templates if t.batchnorm is not None])
    filled = fill_templates([found.templates for found in every], [modules_of(model) for model in models])
    return [ModelLayers(layers, found.left_out) for layers, found in zip(filled, every, strict=True)]


def layers_that_run(
    model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool
) -> tuple[list[LayerTemplate], dict[str, str]]:
    """The layers of one model and the weights that they leave out, with the reason.

    Raises:
        ValueError: the model does not run.
    """
    with eval_mode(model):
        found = _run_for_layers(model, input_shape, fold_batchnorm, True, False)
    return found.templates, found.left_out


class _Found(NamedTuple):
    """The layers of one model, what they leave out, and whether that is so in all models of its structure.

    It is where each layer ran with the weight that it holds, as no one else's could serve another model.
    """

    templates: list[LayerTemplate]
    left_out: dict[str, str]
    shared: bool


def _run_for_layers(
    model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, several: bool
) -> _Found:
    """Run the model, which is in eval mode, and describe the layers it uses; ``several`` models may share them."""
    held = HeldTensors(model)
    ran, wrong = _record(model, held, input_shape, fold_batchnorm, check, several)
    wrong |= disagreements(ran.uses)
    operators: list[tuple[LayerCall, Operator | None]] = []
    for call in ran.calls:
        try:
            operators.append((call, _operator_of(call)))
        except (TypeError, ValueError) as error:
            wrong.setdefault(call.name, str(error))
    repeats: Counter[str] = Counter()
    found: list[LayerTemplate] = []
    covered: set[int] = set()
    computed = False
    for call, operator in operators:
        if call.name in wrong:
            continue
        covered |= call.covers
        repeats[call.name] += 1
        name = call.name + (f"#{repeats[call.name]}" if repeats[call.name] > 1 else "")
        place = None if call.batchnorm is None else held.place(call.batchnorm)
        folded = operator is not None and (place is not None or call.factors is not None)
        transposed = isinstance(call.module, TRANSPOSED) if call.map is None else call.map.transposed
        geometry = operator and operator.with_weight(operator.weight.new_empty(operator.weight.shape, device="meta"))
        description = call.description + (" + BN" if folded else "")
        weight = Source(computed=operator.weight) if operator is not None and call.weight is None else call.weight
        computed |= bool(call.computed) or weight is not call.weight
        found.append(LayerTemplate(name, description, weight, geometry, place, call.factors, transposed))
    for call in ran.calls:
        if call.name in wrong:
            for tensor in call.covers - covered:
                ran.left_out.setdefault(tensor, wrong[call.name])
    left_out = _left_out(model, held, ran, covered)
    for call in ran.calls:  # a layer whose weight is none of the model's tensors
        if call.name in wrong and not any(map(held.multiplies, call.covers)):
            left_out[call.name] = wrong[call.name]
    return _Found(found, left_out, ran.own_weights and not computed and not wrong)


def _operator_of(call: LayerCall) -> Operator | None:
    """The linear map of a call, None for factors alone.

    Raises:
        TypeError: what is registered for the layer is no operator.
        ValueError: there is no such map for the layer.
    """
    if call.map is not None:
        return call.map.operator
    if call.module is None:
        return None
    if find_operator(call.module) is not None:
        return registered_operator(call.module, call.input_shape)
    size = call.output_shape[1:] if isinstance(call.module, TRANSPOSED) else None
    return module_operator(call.module, call.input_shape, output_size=size, finite=False)


def _left_out(model: nn.Module, held: HeldTensors, ran: Recording, covered: set[int]) -> dict[str, str]:
    """The weights of which a part of the use is in no layer, by name, with the reason."""
    found: dict[str, str] = {}
    for tensor, name in held.parameters.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, (nn.ParameterList, nn.ParameterDict)):  # which have no forward
            owner = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        if not held.multiplies(tensor):
            continue
        if tensor in ran.left_out:
            found[name] = ran.left_out[tensor]
        elif tensor not in covered | ran.added:
            found[name] = _UNSEEN if id(owner) in ran.ran else DID_NOT_RUN
    for tensor, reason in ran.left_out.items():
        if tensor not in held.parameters and held.multiplies(tensor):
            found[held.name(tensor)] = reason
    found |= {f"{name}()": _FOREIGN for name in sorted(ran.foreign)}
    for name, module in model.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            layer = f".{name}".removesuffix("._packed_params")[1:]
            found[layer or held.model_name] = _PACKED
    return found


def _record(
    model: nn.Module, held: HeldTensors, input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, several: bool
) -> tuple[Recording, dict[str, str]]:
    """Run the model, which is in eval mode, and record its layers, each call of one kind once.

    With ``check`` it runs on random inputs, in batches of two sizes, and what layers made of one input is kept. Also
    returns the layers that did not do the same in both, with the reason.

    Raises:
        ValueError: the model does not run.
    """
    x = random_inputs(model, input_shape, 2) if check else example_input(model, input_shape)
    with torch.no_grad(), runs_on(model, input_shape):
        # In the batch another input comes first than alone: weights may be computed from the first.
        first = record_layers(model, held, x.flip(0), fold_batchnorm=fold_batchnorm, watch=several)
        first.calls = _distinct(first.calls)
        if not check:
            return first, {}
        alone = record_layers(model, held, x[:1], fold_batchnorm=fold_batchnorm, keep=True)
    alone.calls, alone.own_weights = _distinct(alone.calls), first.own_weights
    one, two = _by_name(alone.calls), _by_name(first.calls)
    differ = {name for name in one | two if not _are_alike(one[name], two[name])}
    alone.calls += [call for call in first.calls if call.name not in one]
    alone.left_out |= first.left_out
    alone.foreign |= first.foreign
    return alone, dict.fromkeys(differ, _BATCH)


def _distinct(calls: Iterable[LayerCall]) -> list[LayerCall]:
    """Each call of one kind once."""
    found: dict[Hashable, list[LayerCall]] = defaultdict(list)
    kept = []
    for call in calls:
        alike = found[call.key]
        if not any(_is_same(call, other) for other in alike):
            alike.append(call)
            kept.append(call)
    return kept


def _by_name(calls: Iterable[LayerCall]) -> dict[str, list[LayerCall]]:
    found: dict[str, list[LayerCall]] = defaultdict(list)
    for call in calls:
        found[call.name].append(call)
    return found


def _are_alike(ones: Sequence[LayerCall], others: Sequence[LayerCall]) -> bool:
    """Whether the calls of one layer in two runs are the same, but for rounding of weights that were computed."""
    return len(ones) == len(others) and all(map(_is_alike, ones, others))


def _is_alike(one: LayerCall, other: LayerCall) -> bool:
    return (
        one.key == other.key
        and len(one.computed) == len(other.computed)
        and all(agree(w, v, _FEW * torch.finfo(w.dtype).eps) for w, v in zip(one.computed, other.computed, strict=True))
    )


def _is_same(one: LayerCall, other: LayerCall) -> bool:
    """Whether two calls are of one map with one weight."""
    both = one.computed, other.computed
    return one.key == other.key and len(both[0]) == len(both[1]) and all(map(torch.equal, *both))
