"""The parts of a network, found in one forward pass: its stages, the blocks in them, and its head."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlip.models._calls import Call, calls

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a network, by the names of its modules.

    Attributes:
        stages: modules whose outputs are the feature maps, in order: the stem, every stage, and what the head sees.
            Neither the images themselves nor the logits are among them.
        points: the same with every block in place of the stage that it is in, and without what the head sees.
        head: the module that gives the logits.
        tail: the outermost modules that run from the last stage on, among them the head, which "the last stage and the
            head" trains.
        beside: further layers with an output per class that reach the logits on ways around the head, as in networks
            that add the logits of two heads; most networks have none.
    """

    stages: list[str]
    points: list[str]
    head: str
    tail: list[str]
    beside: list[str]


def anatomy(model: nn.Module, image_shape: Sequence[int], stages: Sequence[str] = (), head: str = "") -> Anatomy:
    """The parts of ``model``, which runs once and is left as it was.

    The stages are the modules of several layers that run one after the other in the trunk of the network. Where none
    are larger than a layer, they are the layers, each with the activation and the pool behind it. Of neighbours whose
    feature maps have one shape only the last counts, unless all have (the blocks of a transformer). The head is the
    last linear layer or 1x1 convolution with an output per class that the logits depend on.

    Args:
        model: from images to logits [B, classes].
        image_shape: [C, H, W] of one image.
        stages: names of the stages, in place of those found; a name may leave out the leading "network.".
        head: name of the head, likewise.

    Raises:
        ValueError: a name is unknown or does not fit, or there is no module that gives the logits.

    Example:
        >>> import fastlip
        >>> model = fastlip.models.build_model("fastlip:mlp", 10, image_size=8, mean=[0.5] * 3, std=[0.25] * 3)
        >>> print(fastlip.models.anatomy(model, (3, 8, 8)).head)
    """
    return _Search(model, image_shape, head).result(stages)


class _Search:
    """One forward pass, and the search for parts in it."""

    def __init__(self, model: nn.Module, image_shape: Sequence[int], head: str) -> None:
        self._model = model
        ran, logits = calls(model, image_shape)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"a model must give logits [B, classes], got {got}")
        if not logits.requires_grad:
            raise ValueError("the model's logits have no gradient with respect to the image: its forward cuts it off")
        self._logits = logits
        outputs = {
            id(call.output): call.output for call in ran if call.output is not None and call.output.requires_grad
        }
        slopes = torch.autograd.grad(logits.sum(), list(outputs.values()), allow_unused=True, retain_graph=True)
        self._feeding = {key for key, slope in zip(outputs, slopes, strict=True) if slope is not None}
        self._ran = {call.name: call for call in ran if call.times == 1}
        self._called = {call.name for call in ran}
        self._order = sorted(ran, key=lambda call: call.start)
        self.head = self._given_head(head) if head else self._find_head(ran)

    def result(self, given: Sequence[str]) -> Anatomy:
        if given:
            stages = [self._given_stage(name) for name in given]
            last = stages[-1]
        else:
            stages, last = self._find_stages()
        points = [point for name in stages for point in self._blocks_in(name)]
        tail = self._from(last)
        seen = [] if given else self._seen_by_head(stages)
        return Anatomy([*stages, *seen], points, self.head, tail, self._beside())

    def _given_head(self, name: str) -> str:
        call = self._resolved(name, "head")
        if not any(True for _ in call.module.parameters()):
            raise ValueError(f"head={name} has no weights to train; name the module that gives the logits")
        return call.name

    def _given_stage(self, name: str) -> str:
        call = self._resolved(name, "stages")
        if call.output is None or call.output.dim() < 2 or len(call.output) != len(self._logits):
            raise ValueError(f"stages: {name} gives no tensor with a row per image, and cannot be a feature map")
        return call.name

    def _resolved(self, name: str, setting: str) -> Call:
        """The call of the module that a setting names."""
        for full in (name, f"network.{name}"):
            if full in self._ran:
                return self._ran[full]
        known = [shown for shown in map(short_name, self._ran) if shown]
        runs = any(full in dict(self._model.named_modules()) for full in (name, f"network.{name}"))
        if runs:
            raise ValueError(f"{setting}: module {name} does not run exactly once in a forward pass")
        close = difflib.get_close_matches(short_name(name), known, n=3, cutoff=0.4)
        hint = f"; the closest are {', '.join(close)}" if close else ""
        raise ValueError(f"{setting}: the model has no module {name!r}{hint}")

    def _find_head(self, ran: list[Call]) -> str:
        """The last linear layer or 1x1 convolution that runs and has an output per class."""
        for call in reversed(ran):
            if self._gives_logits(call):
                return call.name
        raise ValueError(
            f"no linear layer or 1x1 convolution with {self._logits.shape[1]} outputs gives the logits; name it with "
            "head=NAME"
        )

    def _gives_logits(self, call: Call) -> bool:
        """Whether a linear layer or 1x1 convolution has an output per class that the logits depend on."""
        module, wide = call.module, 0
        if isinstance(module, nn.Linear):
            wide = module.out_features
        elif isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}:
            wide = module.out_channels
        return wide == self._logits.shape[1] and call.times == 1 and self._feeds(call)

    def _beside(self) -> list[str]:
        """The names of further layers like the head, neither in front of it nor behind it."""
        head = self._ran[self.head]
        likely = [call for call in self._order if call is not head and self._gives_logits(call)]
        return [call.name for call in likely if not (self._depends(head, call) or self._depends(call, head))]

    @staticmethod
    def _depends(later: Call, earlier: Call) -> bool:
        """Whether what a module returned depends on what another one did."""
        ends = (later.output, earlier.output)
        if any(end is None or not end.requires_grad for end in ends):
            return False
        of, to = (end for end in ends if end is not None)
        return torch.autograd.grad(of.sum(), to, retain_graph=True, allow_unused=True)[0] is not None

    def _feeds(self, call: Call) -> bool:
        """Whether the logits depend on what a module returned."""
        return id(call.output) in self._feeding

    def _children(self, name: str) -> list[Call]:
        """The calls of a module's children that returned a feature map, in order; lists of modules are seen through."""
        found: list[Call] = []
        for child, module in self._model.get_submodule(name).named_children():
            full = f"{name}.{child}" if name else child
            if full not in self._called:
                found += self._children(full) if any(True for _ in module.children()) else []
            elif full in self._ran and self._is_feature_map(self._ran[full]):
                found.append(self._ran[full])
        return sorted(found, key=lambda call: call.start)

    def _is_feature_map(self, call: Call) -> bool:
        output = call.output
        return output is not None and output.dim() >= 2 and len(output) == len(self._logits) and self._feeds(call)

    def _layers_in(self, name: str) -> int:
        """Number of layers with weights that run in a module, the head apart."""
        inside = f"{name}." if name else ""
        return sum(
            isinstance(call.module, _LAYERS)
            for other, call in self._ran.items()
            if (other == name or other.startswith(inside)) and other != self.head
        )

    def _containers(self, children: Iterable[Call]) -> list[Call]:
        """Those of several layers, apart from what holds the head."""
        return [c for c in children if self._layers_in(c.name) > 1 and not f"{self.head}.".startswith(f"{c.name}.")]

    def _find_stages(self) -> tuple[list[str], str]:
        """The names of the stem and the stages, and that of the first module of the last stage, or of the head."""
        found: list[str] = []
        trunk = ""
        while True:
            children = self._children(trunk)
            holding = [c for c in children if self._layers_in(c.name) > 1]
            containers = self._containers(children)
            if not containers and len(holding) == 1 and not self._is_layer(holding[0].module):
                trunk = holding[0].name  # all there is
                continue
            if len(containers) != 1:
                break
            if not self._containers(self._children(containers[0].name)) and not self._is_chain(containers[0]):
                break
            found += self._before(children, containers[0])
            trunk = containers[0].name
        if containers:
            found += self._before(children, containers[0])
            containers = [inner for c in containers for inner in self._smaller_and_smaller(c)]
            found += self._where_shapes_change(containers)
            return found, found[-1]
        groups = self._groups(children)
        return [*found, *groups], list(groups.values())[-1] if groups else self.head

    @staticmethod
    def _is_layer(module: nn.Module) -> bool:
        return isinstance(module, _LAYERS)

    def _before(self, children: list[Call], container: Call) -> list[str]:
        """The last child before a container, where weights ran before it: the stem."""
        earlier = children[: children.index(container)]
        if not any(self._layers_in(call.name) for call in earlier):
            return []
        return [earlier[-1].name]

    def _smaller_and_smaller(self, call: Call) -> list[Call]:
        """The stages inside a container, if it is a chain of them, with outputs of several shapes; else itself."""
        inner = self._containers(self._children(call.name)) if self._is_chain(call) else []
        shapes = {None if c.output is None else c.output.shape for c in inner}
        return [found for c in inner for found in self._smaller_and_smaller(c)] if len(shapes) > 1 else [call]

    @staticmethod
    def _where_shapes_change(containers: list[Call]) -> list[str]:
        """The last of consecutive containers with outputs of one shape; all of them where no shape ever changes."""
        shapes = [None if c.output is None else c.output.shape for c in containers]
        if len(set(shapes)) == 1:
            return [c.name for c in containers]
        following = [*shapes[1:], None]
        return [c.name for c, own, later in zip(containers, shapes, following, strict=True) if own != later]

    def _groups(self, children: list[Call]) -> dict[str, str]:
        """Each layer with what follows it up to the next one, without the head: the last name and the layer's."""
        found: list[tuple[str, str]] = []
        for call in children:
            if f"{self.head}.".startswith(f"{call.name}."):
                break
            if self._layers_in(call.name):
                found.append((call.name, call.name))
            elif found and not isinstance(call.module, nn.Flatten):
                found[-1] = (call.name, found[-1][1])
        return dict(found)

    def _seen_by_head(self, stages: Sequence[str]) -> list[str]:
        """The last module with a feature map before the head, where any weights ran before it and it is no stage."""
        head, last, weights = self._ran[self.head], None, False
        for call in self._order:
            if call.start >= head.start:
                break
            weights |= self._is_layer(call.module)
            leaf = not any(True for _ in call.module.children())
            if weights and leaf and call.times == 1 and self._is_feature_map(call):
                last = call
        if last is None:
            return []
        # Its name as that of the outermost module that returns this very map, but not one around stages or the head.
        inside = (*stages, self.head)
        around = [
            c.name
            for c in self._ran.values()
            if c.output is last.output
            and c.start <= last.start
            and last.name.startswith(f"{c.name}.")
            and not any(n.startswith(f"{c.name}.") for n in inside)
        ]
        name = min((n for n in around if n), key=len, default=last.name)
        return [] if name in stages else [name]

    def _is_chain(self, call: Call) -> bool:
        """Whether a module runs its children one on the output of the other, and returns that of the last."""
        children = self._children(call.name)
        if not children:
            return False
        given = [child.input for child in children]
        returned = [call.input, *(child.output for child in children)]
        return all(a is b for a, b in zip(given, returned, strict=False)) and returned[-1] is call.output

    def _blocks_in(self, name: str) -> list[str]:
        """The blocks of a stage: its children of several layers, if it runs them one after the other."""
        call = self._ran[name]
        children = self._children(name) if self._is_chain(call) else []
        containers = self._containers(children)
        if containers:
            # A layer in front of the blocks may make the map smaller; one behind a container belongs to a single block.
            later = children[children.index(containers[0]) :]
            containers = containers if all(c in containers or not self._layers_in(c.name) for c in later) else []
        found = [inner for block in containers for inner in self._blocks_in(block.name)]
        return found if len(found) > 1 else [name]

    def _from(self, name: str) -> list[str]:
        """The outermost modules with weights that run from ``name`` on."""
        start = self._ran[name].start
        first: dict[str, int] = {}
        for call in self._order:
            first.setdefault(call.name, call.start)
        later = {
            n for n, at in first.items() if at >= start and any(True for _ in self._model.get_submodule(n).parameters())
        }
        return [n for n in first if n in later and not any(n.startswith(f"{around}.") for around in later)]


def short_name(name: str) -> str:
    """A module's name as the network itself has it, without the leading "network.".

    Example:
        >>> import fastlip
        >>> print(fastlip.models.short_name("network.layer1.0"))  # layer1.0
    """
    return name.removeprefix("network.")
