"""How well the norms that ``constrain_norms`` tracks in training follow the certified ones.

    FASTLIP_DATA=DIR python benchmarks/bench_constrain_tracking.py      # CSV under benchmarks/results, twelve minutes

The small network of ``train_cnn.py`` on CIFAR-10, every layer constrained to 1, SGD with momentum on batches of 128, at
two learning rates and from several seeds. At every tenth of the first 500 steps, and every fiftieth later, when vectors
may rest for longer, the norm by which a layer's weight was scaled is compared with both certified sides of that
weight's norm. A row has the layer that was furthest below at that step. The last one of a run, ``step`` "certified",
has in ``upper`` the largest certified norm that any of these layers has in eval mode after the training.
"""

import argparse
import itertools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import Results, environment
from train_cnn import BATCH, augmented, small_cnn

from fastlip import layer_norms
from fastlip.data import cifar10
from fastlip.norms import constrain_norms, operator_norms
from fastlip.norms._constrain.whole_model import constrained_layers

SHAPE = (3, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.01, 0.1], help="learning rates, a run for each")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3], help="a run for each, at each rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train = cifar10(os.environ["FASTLIP_DATA"], train=True)
    results = Results(args.out / "constrain_tracking.csv", environment("cpu"), digits=5)
    for rate, seed in itertools.product(args.rates, args.seeds):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = constrain_norms(small_cnn(), SHAPE, bound=1.0, generator=generator).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        constrained = constrained_layers(model)
        for step in range(1, args.steps + 1):
            rows = torch.randint(len(train.labels), (BATCH,), generator=generator)
            loss = F.cross_entropy(model(augmented(train.images[rows], generator)), train.labels[rows])
            if step % (10 if step <= 500 else 50) == 0:
                # The weights are still those of the forward pass.
                norms = operator_norms([c.operator(weight.detach()) for c, weight in constrained], rtol=1e-3)
                worst = min(
                    zip(constrained, norms, strict=True), key=lambda pair: pair[0][0].tracking.norm / pair[1].upper
                )
                (constraint, _), norm = worst
                row = {"rate": rate, "seed": seed, "step": step, "loss": loss.item(), "layer": constraint.name}
                row |= {"tracked": constraint.tracking.norm, "lower": norm.lower, "upper": norm.upper}
                results.add(row | {"x_upper": constraint.tracking.norm / norm.upper})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report = layer_norms(model.eval(), SHAPE, fold_batchnorm=False, rtol=1e-3)
        name, norm = max(((c.name, report[c.name]) for c, _ in constrained), key=lambda item: item[1].upper)
        certified = {"rate": rate, "seed": seed, "step": "certified", "loss": "", "layer": name, "tracked": ""}
        results.add(certified | {"lower": norm.lower, "upper": norm.upper, "x_upper": ""})
        print(certified, norm)


if __name__ == "__main__":
    main()
