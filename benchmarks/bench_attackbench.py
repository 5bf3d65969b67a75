"""min_norm inside AttackBench's harness, beside the attacks that AttackBench brings.

    FASTLIP_DATA=DIR python benchmarks/bench_attackbench.py plain.safetensors

AttackBench (Cinà et al. 2025) gives every attack the same forward and backward passes for an image (``--budget``, both
counted), takes the smallest misclassified image that the model saw in them, and judges success itself. Its attacks have
AttackBench's own settings but for the number of steps, which is half of the budget. The images are those of CIFAR-10's
test set from ``--first`` on. ``optimality`` is AttackBench's local optimality: how far the area under the curve of
robust accuracy by radius comes down to that of the best attack for each image, 1 at best. Needs ``attackbenchlib`` and
``adv-lib``.
"""

import argparse
import inspect
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _timing import Results, environment
from bench_strength import median
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from train_cnn import test_images, trained_cnn

from fastlip import attacks
from fastlip.integrations.attackbench import as_attackbench
from fastlip.ops import Norm

RESULTS = Path(__file__).parent / "results"
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
Attack = Callable[..., Tensor]


def contestants(norm: Norm, budget: int) -> dict[str, Attack]:
    """The attacks by name, as AttackBench calls them."""
    from attackbench.attacks.adv_lib import configs, wrapper

    def theirs(name: str) -> Attack:
        """An attack of adversarial-library with AttackBench's settings."""
        known = (f"adv_lib_{name}_{norm}", f"adv_lib_{name}")
        settings = next(getattr(configs, key) for key in known if hasattr(configs, key))()
        getter = getattr(configs, f"get_adv_lib_{name}")
        settings |= {"num_steps": budget // 2, "threat_model": norm}
        takes = inspect.signature(getter).parameters
        return partial(wrapper.adv_lib_wrapper, attack=getter(**{k: v for k, v in settings.items() if k in takes}))

    names = {"fmn": "FMN", "alma": "ALMA", "ddn": "DDN", "pdpgd": "PDPGD"}
    # ALMA's code has no Linf, and DDN is an attack in L2.
    chosen = {"linf": ("fmn", "pdpgd"), "l2": tuple(names), "l1": ("fmn", "alma", "pdpgd")}[norm]
    # Of our passes two are the estimate's, and eight or so pull back what was found and make it hold.
    ours = as_attackbench(attacks.min_norm, fmn_steps=budget // 2 - 5)
    return {"fastlip min_norm": ours, **{names[name]: theirs(name) for name in chosen}}


def run(model: nn.Module, loader: DataLoader, network: str, norm: Norm, budget: int, out: Results) -> None:
    """Run all attacks in one norm and write a row for each."""
    import attackbench
    from attackbench.metrics.optimality import compute_local_optimality

    runs: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for name, attack in contestants(norm, budget).items():
        begin = time.process_time()
        runs[name] = attackbench.run_attack(
            model=model, dataset=loader, attack=attack, threat_model=norm, device=torch.device("cpu"),
            query_budget=budget, attack_name=name, attack_lib=name, model_name=network, dataset_name="cifar10",
        )  # fmt: skip
        seconds[name] = time.process_time() - begin
    for name, found in runs.items():
        right = torch.tensor(found["correct"])
        passes = {k: torch.tensor(found[f"num_{k}s"], dtype=torch.float64)[right] for k in ("forward", "backward")}
        distances = torch.tensor(found["distances"][norm], dtype=torch.float64)[right]
        local = compute_local_optimality(found, reference_results=list(runs.values()), use_wandb=False)
        row = {"network": network, "norm": norm, "budget": budget, "what": name, "images": int(right.sum())}
        row |= {k: v.mean().item() for k, v in passes.items()}
        row |= {"found": int(distances.isfinite().sum()), "median": median(distances)}
        row |= {"optimality": local["optimality"], "failures": sum(found["batch_failures"]), "cpu_s": seconds[name]}
        out.add(row)
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="+", help="networks of train_cnn.py")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--first", type=int, default=2000)
    parser.add_argument("--budget", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    images, labels = (t[args.first : args.first + args.images] for t in test_images(os.environ["FASTLIP_DATA"]))
    shared = environment("cpu") | {"attackbenchlib": version("attackbenchlib"), "adv_lib": version("adv-lib")}
    out = Results(RESULTS / "attackbench_cpu.csv", shared, keys=("network", "norm", "budget", "what"))
    for path in args.checkpoint:
        loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
        for norm in NORMS:
            run(trained_cnn(path), loader, path.stem, norm, args.budget, out)


if __name__ == "__main__":
    main()
