"""All layers of a model kept below a bound together."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from fastlip._arguments import integer
from fastlip.norms._constrain.choice import Layers, constrainable_layers
from fastlip.norms._constrain.constraint import (
    FoldedConstraint,
    NormConstraint,
    certify,
    certify_in_compiled_code,
    track,
)
from fastlip.norms._constrain.one_layer import SizeWatch, positive_bound
from fastlip.norms._models.wrappers import bare_model
from fastlip.norms._options import NormKeywords, NormOptions, chosen_options


def constrain_norms(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    bound: float = 1.0,
    layers: Layers | None = None,
    fold_batchnorm: bool = False,
    iterations: int = 1,
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> nn.Module:
    """Keep the norms of a model's Conv, ConvTranspose and Linear modules below ``bound``, on the inputs they have.

    What :func:`constrain_norm` does for one layer, this does for all of them, in less time. Each layer's ``weight`` is
    parametrised (``torch.nn.utils.parametrize``): it is scaled by min(1, bound / norm), with the gradient of that.

    In training the norm is <u, A v> with singular vectors u and v that follow the weight: a Krylov iteration with thick
    restarts goes on from the last two right singular vectors, at first those of a certified solver, and each group of a
    grouped convolution has vectors of its own. The norm is computed for the weight as it is in each forward, and
    approached from below: while another singular value becomes the largest, the weight's norm may exceed the bound by
    some percent. The steps are one operation for all layers, which runs when the model is called. On a GPU, and in
    compiled code, every layer takes part each time. On a CPU a layer's vectors rest as long as steps hardly raise its
    norm and that stays within 0.2%, for up to a sixteenth of the forwards so far and at most 64, and then take up to
    four steps at once; what grows in other directions meanwhile is seen with the next of them. There the symbols of
    convolutions on larger inputs are followed as well, as a wave of another frequency may overtake that no step would
    meet. A layer that is called without the model takes its steps by itself. Second derivatives in the weights are
    refused by torch.

    In eval mode the weights are scaled by certified upper sides instead, computed for all layers together whenever a
    weight has changed, so that the bound holds for all with ``confidence``. Use :func:`unconstrain` before what
    rewrites layers or makes another program of them: ``torch.export``, ``torch.jit``, quantisation, pruning, fusing
    convolutions with BatchNorms; and to vectorise over several models (``torch.func.stack_module_state``). Convert
    BatchNorms to SyncBatchNorm before constraining layers together with them.

    The bound holds on inputs of the size that the layer had. On another size, or once its stride, padding or the like
    is another one, a layer warns once in training, and in eval mode refuses its input by name. Layers that do not run
    on such an input, that are empty, and weights that are not those of such modules, stay as they are. A layer that
    takes the place of a constrained one has no bound, of which a warning says so.

    Args:
        model: the model, changed in place and returned; in what ``torch.compile`` made, the model inside. Constrain it
            before it is wrapped in ``DistributedDataParallel``.
        input_shape: shape of one input without the batch axis, such as (3, 32, 32).
        bound: positive upper bound for each norm.
        fold_batchnorm: whether a layer is constrained together with the BatchNorm that takes its output, if there is
            one: the norm is that of the layer with the BatchNorm's factors gamma / sqrt(var + eps), with the running
            variance, and the BatchNorm's weight is scaled in place of the layer's. In training mode a BatchNorm undoes
            any other scale of the layer. A BatchNorm that stands elsewhere stays as it is, and where a layer's output
            goes elsewhere as well, it is bounded on the way through the BatchNorm alone.
        layers: which to constrain: qualified names, or a function of the name and the module that is true for them; by
            default all.
        iterations: Krylov steps for each forward, each one product with the convolution and one with its adjoint.
        options: how to compute the certified upper sides in eval mode.
        keywords: fields of :class:`NormOptions`, in place of ``options``.

    Raises:
        TypeError: an argument is of the wrong type, or a weight no floating-point tensor; the message names it.
        ValueError: an argument is wrong, the model does not run on such inputs, or a layer that was chosen cannot be
            constrained: it is used on several sizes or in several ways, does something else than its class says, its
            weight is parametrised already, or it has no name in ``model``; or the BatchNorm that is folded into it has
            no weight, is behind other layers too, or is parametrised; the message names the layer.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
        >>> model = fastlip.norms.constrain_norms(model, (3, 8, 8), bound=1.0)
        >>> print(fastlip.layer_norms(model.eval(), (3, 8, 8)))  # at most 1, but for rtol
    """
    bound, iterations = positive_bound(bound), integer(iterations, "iterations")
    chosen = chosen_options("constrain_norms", options, keywords)
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model must be constrained before it is wrapped in DistributedDataParallel")
    root = bare_model(model)
    found = constrainable_layers(root, input_shape, layers, fold_batchnorm)
    generator = chosen.resolved([]).generator
    with torch.inference_mode(False):  # training changes the vectors
        starts = [layer.start_vectors(generator).clone() for layer in found]
    for place, (layer, vectors) in enumerate(zip(found, starts, strict=True)):
        given = (layer.name, layer.geometry, vectors, bound, iterations, chosen)
        module, constraint = layer.module, NormConstraint(*given)
        if layer.batchnorm is not None:
            module = layer.batchnorm
            constraint = FoldedConstraint(*given, layer.module, module, layer.transposed)
        constraint.place, constraint.of = place, len(found)
        constraint.train(module.training)
        # The check of what the parametrisation returns would take a step, or certify.
        parametrize.register_parametrization(module, "weight", constraint, unsafe=True)
        if layer.input_size:
            layer.module.register_forward_pre_hook(SizeWatch(layer.module, layer.input_size, layer.name))
    if found and prepare not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(prepare)
        root.register_forward_hook(finish, always_call=True)
    return model


def unconstrain(model: nn.Module) -> nn.Module:
    """Remove the constraints of :func:`constrain_norms` and :func:`constrain_norm`; the weights stay scaled.

    They are scaled by certified upper sides, as in eval mode, so that the bound still holds for the weights as they are
    left. Parameters stay the same objects, except that of a weight which layers share each gets one of its own.

    Args:
        model: the model, changed in place and returned.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a weight holds NaN or infinite values, or a layer's weight is parametrised once more since; the
            message names it.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = fastlip.norms.constrain_norms(nn.Sequential(nn.Linear(4, 3)), (4,))
        >>> model = fastlip.norms.unconstrain(model)
        >>> print(type(model[0].weight))
    """
    root = bare_model(model)
    certify(constrained_layers(root))
    constrained: list[nn.Module] = []
    plain = [module for module in root.modules() if not isinstance(module, ParametrizationList)]
    seen = {id(parameter) for module in plain for parameter in module._parameters.values()}
    for module in root.modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        held = module.get_submodule("parametrizations.weight")
        assert isinstance(held, ParametrizationList)
        if not isinstance(held[0], NormConstraint):
            continue
        if id(held.original) in seen:
            held.original = nn.Parameter(held.original.detach().clone(), held.original.requires_grad)
        seen.add(id(held.original))
        held.eval()
        constrained.append(module)
    for module in constrained:
        # What deepcopy made shares the class, whose property for the weight is removed.
        cls = type(module)
        shared = ("__dict__", "__weakref__")
        module.__class__ = type(cls.__name__, cls.__bases__, {k: v for k, v in vars(cls).items() if k not in shared})
        parametrize.remove_parametrizations(module, "weight")
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, SizeWatch) or hook is prepare or hook is finish:
                    del hooks[key]
    return model


def constrained_layers(model: nn.Module) -> list[tuple[NormConstraint, Tensor]]:
    """The constraints of all layers below a module, and the weights that they scale.

    Raises:
        ValueError: a weight is parametrised once more since, so that nothing is known of the norm; the message names
            the layer.
    """
    found = []
    for constraint, held in _constraints(model):
        if len(held) > 1:
            raise ValueError(f"layer {constraint.name}: its weight was parametrised once more, after its constraint")
        found.append((constraint, held.original))
    return found


def _constraints(model: nn.Module) -> Iterator[tuple[NormConstraint, ParametrizationList]]:
    for module in model.modules():
        if isinstance(module, ParametrizationList) and isinstance(module[0], NormConstraint):
            yield module[0], module


def prepare(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Before the model's forward: takes the steps that are due, and has those in eval mode certified at once.

    Raises:
        ValueError: as for :func:`constrained_layers`; or the layer in front of a constrained BatchNorm was replaced.
    """
    found = constrained_layers(model)
    for constraint, weight in found:
        constraint.require_one(weight)
    if not torch.compiler.is_compiling():
        _warn_of_missing([constraint for constraint, _ in found])
    folded = [constraint for constraint, _ in found if isinstance(constraint, FoldedConstraint)]
    if folded and not torch.compiler.is_compiling() and not getattr(model, "_is_replica", False):
        present = set(model.modules())
        for batchnorm in folded:
            if batchnorm.layer not in present:
                raise ValueError(
                    f"layer {batchnorm.name}: it was replaced after its constraint, which reads the former one; call "
                    "unconstrain and constrain again"
                )
    fixed = [(constraint, weight) for constraint, weight in found if not constraint.training]
    moving = [
        (constraint, weight)
        for constraint, weight in found
        if constraint.training and not constraint.is_recomputed(weight)
    ]
    due = [(constraint, weight) for constraint, weight in moving if constraint.due(weight)]
    if due:
        track(due)
    for constraint, _ in found:
        constraint.tracking.prepared, constraint.tracking.together = None, [] if constraint.training else fixed
    if fixed and torch.compiler.is_compiling():
        certify_in_compiled_code(fixed)
    for constraint, weight in moving:
        constraint.tracking.prepared = constraint.state(weight)


def _warn_of_missing(found: Sequence[NormConstraint]) -> None:
    """Warn of layers that were constrained together with others and no longer are."""
    together: dict[int, list[NormConstraint]] = {}
    for constraint in found:
        together.setdefault(id(constraint.options), []).append(constraint)
    for own in together.values():
        if (missing := own[0].of - len(own)) > 0:
            warnings.warn(
                f"{missing} of {own[0].of} layers that were constrained together no longer are, as they were replaced "
                "or unconstrained, and have no bound: call unconstrain and constrain_norms again",
                stacklevel=2,
            )


def finish(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook after the model's forward, or its failure."""
    for constraint, _ in _constraints(model):
        constraint.tracking.prepared, constraint.tracking.together = None, []
        if torch.compiler.is_compiling():
            # What compiled code computes is for this forward alone.
            constraint.tracking.gradient = constraint.tracking.found = constraint.tracking.scale = None
