"""Networks whose layers' norms are kept below a bound in training (Gouk et al. 2021)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

from fastlip.norms import constrain_norms, unconstrain


class NormBound:
    """Keeps each layer of a network, with the BatchNorm behind it, below a bound while it is trained.

    Layers are those of :func:`fastlip.norms.constrain_norms`, on the inputs that they have in the network. A BatchNorm
    divides by what it sees, so that it undoes whatever scales the layer in front of it: its factors in evaluation mode,
    |weight| / sqrt(running_var + eps), are kept at 1 or below. A layer and the BatchNorm behind it, folded, then have a
    norm of at most the bound, as has the layer alone.

    Args:
        model: the network, on the device where it is trained; its weights are parametrised until :meth:`remove`.
        input_shape: [C, H, W] of one image.
        bound: of each norm.
        seed: of the start vectors of the iterations.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int], bound: float, seed: int) -> None:
        self._model = model
        generator = torch.Generator().manual_seed(seed)
        # In evaluation mode the trial run of the network leaves its BatchNorm statistics as they are.
        constrain_norms(model.eval(), input_shape, bound=bound, generator=generator)

    def restart(self, network: nn.Module) -> None:
        """Let the constraints of ``network``, the model or a copy of it, forget all but what their state dicts hold.

        On a CPU their vectors rest for a number of forwards that no state dict knows of: without this a resumed run
        would part from an uninterrupted one.
        """
        for module in network.modules():
            if isinstance(module, ParametrizationList):
                for constraint in module:
                    constraint.load_state_dict(constraint.state_dict())

    @torch.no_grad()
    def project(self) -> None:
        """Bring the BatchNorm factors to 1 or below, after a step of the optimiser."""
        for module in self._model.modules():
            if isinstance(module, _BatchNorm) and module.affine and module.running_var is not None:
                most = (module.running_var + module.eps).sqrt().to(module.weight.dtype)
                module.weight.clamp_(-most, most)

    def remove(self) -> None:
        """Leave plain weights, scaled by certified norms, so that the bound holds for the network as it is left."""
        self.project()
        unconstrain(self._model)
