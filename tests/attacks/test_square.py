from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlip import attacks
from fastlip.attacks import _square
from fastlip.attacks._batch import new_batch, put_rows_

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.15, "l2": 3.0, "l1": 50.0}
ORDER = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", NORMS)
def test_fells_images_without_gradients(cnn_problem, norm):
    model, inputs, labels = cnn_problem

    def blind(x):
        with torch.no_grad():
            return model(x)

    found = attacks.square(blind, inputs, labels, norm=norm, eps=EPS[norm], queries=400, generator=gen())
    assert (model(found).argmax(1) != labels).float().mean() > 0.5
    assert found.min() >= 0
    assert found.max() <= 1
    length = torch.linalg.vector_norm((found.double() - inputs.double()).flatten(1), ORDER[norm], dim=1)
    assert (length <= EPS[norm] * (1 + 1e-6) + 1e-5).all()


def test_draws_do_not_depend_on_the_default_dtype(cnn_problem):
    model, inputs, labels = cnn_problem
    call = {"eps": 0.01, "queries": 5}
    plain = attacks.square(model, inputs, labels, generator=gen(), **call)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = attacks.square(model, inputs, labels, generator=gen(), **call)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(plain, found)


@pytest.mark.parametrize("norm", NORMS)
def test_more_queries_fell_no_fewer(cnn_problem, norm):
    """Restarts are nested; the window schedule of a longer run is another one."""
    model, inputs, labels = cnn_problem
    fallen = []
    for restarts in (1, 3):
        found = attacks.square(
            model, inputs, labels, norm=norm, eps=EPS[norm] / 2, queries=60, restarts=restarts, generator=gen()
        )
        fallen.append(model(found).argmax(1) != labels)
    assert (fallen[1] | ~fallen[0]).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(9,), (3, 16), (3, 7, 9), (2, 3, 4, 5)])
def test_result_does_not_depend_on_the_batch_at_any_rank(linear_problem, norm, shape):
    model, inputs, labels = linear_problem(shape=shape)
    ids = torch.arange(100, 108)
    call = {"norm": norm, "eps": EPS[norm] / 20, "queries": 30}
    together = attacks.square(model, inputs, labels, ids=ids, generator=gen(), **call)
    order = torch.tensor([5, 2, 7])
    apart = attacks.square(model, inputs[order], labels[order], ids=ids[order], generator=gen(), **call)
    assert torch.equal(together[order], apart)
    assert not torch.equal(together, inputs)


def test_linf_moves_only_to_the_corners_of_the_ball(cnn_problem):
    model, inputs, labels = cnn_problem
    found = attacks.square(model, inputs, labels, eps=0.01, queries=50, generator=gen())
    moved = found - inputs
    inside = (found > 0) & (found < 1)
    torch.testing.assert_close(moved[inside].abs(), torch.full_like(moved[inside], 0.01))


def test_targets_are_reached(cnn_problem):
    model, inputs, labels = cnn_problem
    targets = (labels + 3) % 10
    found = attacks.square(model, inputs, labels, eps=0.5, queries=600, targets=targets, loss="ce", generator=gen())
    assert (model(found).argmax(1) == targets).float().mean() > 0.3


def test_queries_are_counted_and_stop(cnn_problem):
    model, inputs, labels = cnn_problem
    with attacks.count_forward_backward(model) as counts:
        attacks.square(model, inputs, labels, eps=1e-4, queries=25, generator=gen())
    assert (counts.forward, counts.backward) == (26 * 32, 0)
    with attacks.count_forward_backward(model) as counts:
        attacks.square(model, inputs, labels, eps=0.5, queries=400, generator=gen())
    assert counts.forward < 0.5 * 400 * 32


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_bumps_are_those_of_the_paper(norm):
    """eta(h, w)_{r,s} = sum over k <= M(r, s) of 1 / (n + 1 - k)^2, one half negative, of unit length."""
    side, power = 7, {"l2": 2, "l1": 4}[norm]

    def hill(h, w):
        n = max(h, w) // 2
        rows = []
        for r in range(h):
            ring = [max(abs(r - h // 2), abs(s - w // 2)) for s in range(w)]
            rows.append([sum((n + 1 - k) ** -power for k in range(n - m + 1)) for m in ring])
        return torch.tensor(rows)

    want = torch.cat([hill(side, side // 2), -hill(side, side - side // 2)], 1)
    want = want / torch.linalg.vector_norm(want, ORDER[norm])
    torch.testing.assert_close(_square._bump(side, side, norm, torch.zeros(1)), want)


def test_windows_follow_the_schedule():
    sides = [w[0] for w in _square._windows(torch.zeros(1, 3, 32, 32), 10_000, 0.8)]
    assert sides[0] == round((0.8 * 1024) ** 0.5)
    for at, halvings in ((11, 1), (51, 2), (201, 3), (501, 4), (1001, 5), (2001, 6), (4001, 7), (6001, 8), (8001, 9)):
        assert sides[at] == max(round((0.8 / 2**halvings * 1024) ** 0.5), 1)
        assert sides[at - 1] >= sides[at]


def test_sees_what_gradients_do_not(cnn_problem):
    model, inputs, labels = cnn_problem

    class Masked(nn.Module):
        def forward(self, x):
            return model((255 * x).round() / 255 + 0 * x)

    found = attacks.pgd(Masked(), inputs, labels, eps=0.2, generator=gen())
    assert (model(found).argmax(1) == labels).float().mean() > 0.5
    found = attacks.square(Masked(), inputs, labels, eps=0.2, queries=400, generator=gen())
    assert (model(found).argmax(1) == labels).float().mean() < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries must be"),
        ({"restarts": 0}, "restarts must be"),
        ({"share": 0.0}, "share must lie"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"norm": "l0"}, "norm must be one of"),
    ],
)
def test_errors_name_the_argument(cnn_problem, change, message):
    model, inputs, labels = cnn_problem
    with pytest.raises(ValueError, match=message):
        attacks.square(model, inputs, labels, **{"eps": 0.01} | change)


def test_empty_batch(cnn_problem):
    model, inputs, labels = cnn_problem
    assert attacks.square(model, inputs[:0], labels[:0], eps=0.1).shape == (0, 3, 12, 12)


def with_room(model, inputs, **options):
    """The model as one that has had a batch of 64, so that few images are asked several queries at once."""
    network = attacks.prepare(model, inputs, **{"fast": False} | options)
    network.largest = 64
    return network


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ("linf", {"loss": nn.CrossEntropyLoss(reduction="none"), "criterion": lambda z, y: z.argmax(1) != y}),
        ("l2", {}),
        ("l1", {"restarts": 2, "bounds": (torch.zeros(1, 3, 1, 1), torch.full((3, 1, 1), 0.99))}),
    ],
)
def test_queries_together_find_what_queries_in_turn_find(cnn_problem, norm, options):
    """In fewer calls of the model, at the price of more images in all."""
    model, inputs, labels = cnn_problem
    inputs = 0.9 * inputs[:3]
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    call = {"norm": norm, "eps": 0.6 * EPS[norm], "queries": 150, **options}
    sizes = {}
    found = {}
    for name, network in (("in turn", model), ("together", with_room(model, inputs))):
        sizes[name] = []
        hook = model.register_forward_hook(lambda module, args, out, name=name: sizes[name].append(len(out)))
        found[name] = attacks.square(network, inputs, labels, generator=gen(), **call)
        hook.remove()
    torch.testing.assert_close(found["together"], found["in turn"], rtol=0, atol=0)
    assert len(sizes["together"]) < 0.6 * len(sizes["in turn"])
    assert max(sizes["together"]) <= 64
    assert sum(sizes["together"]) < 2.5 * sum(sizes["in turn"])


def test_queries_together_follow_a_copy_and_ask_the_model(cnn_problem):
    model, inputs, labels = cnn_problem
    inputs = inputs[:4]
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    network = with_room(model, inputs, fast=True)
    call = {"eps": EPS["linf"], "queries": 150}
    found = attacks.square(network, inputs, labels, generator=gen(), **call)
    plain = attacks.square(model, inputs, labels, generator=gen(), **call)
    fell = model(plain).argmax(1) != labels
    assert fell.any()
    assert torch.equal(model(found).argmax(1) != labels, fell)


def test_queries_that_are_drawn_at_once_share_a_window():
    """And are 50 at most: one draw of the generator for them, whatever the batch."""
    windows = [(8, 8)] + 9 * [(6, 6)] + 120 * [(4, 4)]
    ends = [1]
    while ends[-1] < len(windows):
        ends.append(_square._end_of_span(windows, ends[-1]))
    assert ends == [1, 10, 60, 110, 130]


def test_advances_the_generator_by_one_for_all_that_is_drawn_at_once(cnn_problem):
    model, inputs, labels = cnn_problem
    generator, other = gen(), gen()
    attacks.square(model, inputs, labels, eps=1e-4, queries=40, generator=generator)
    windows = list(_square._windows(inputs, 40, 0.8))
    query, draws = 0, 0
    while query < 40:
        query, draws = (_square._end_of_span(windows, query) if query else 1), draws + 1
    assert draws < 15
    for _ in range(draws):
        torch.randint(2**63 - 1, (1,), generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("mask", [[False] * 3, [True] * 3, [True, False, True]])
def test_rows_are_put_where_a_mask_is_true(mask):
    target, source = torch.arange(6.0).reshape(3, 2), 10 + torch.arange(6.0).reshape(3, 2)
    mask = torch.tensor(mask)
    want = torch.where(mask[:, None], source, target)
    put_rows_(target, source, mask)
    assert torch.equal(target, want)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_window_gets_what_both_held_and_a_share_of_the_slack(norm):
    """Whether the windows are apart, touch, overlap or are the same one; the other one is empty afterwards."""
    order, eps, size = ORDER[norm], 40.0, (3, 4)
    begins = torch.tensor([[0, 0, 5, 5], [2, 3, 4, 4], [4, 4, 2, 3], [1, 6, 3, 2], [3, 3, 3, 3]])
    generator = gen()
    x0 = torch.rand(len(begins), 2, 8, 10, generator=generator, dtype=torch.float64)
    moved = x0 + torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    batch = new_batch(
        x0, torch.zeros(len(x0), dtype=torch.int64), None, eps=eps, step_size=0.0, bounds=(-9.0, 9.0), ids=None
    )
    moves = _square._Moves.drawn(batch, 1, size, norm, generator).at(0)
    moves = replace(moves, into=begins[:, :2].unbind(1), out=begins[:, 2:].unbind(1))
    found = _square._shifted(batch, moved.clone(), norm, moves) - x0
    for k, (top, left, row, column) in enumerate(begins.tolist()):
        into, out = (torch.zeros(8, 10, dtype=torch.bool) for _ in range(2))
        into[top : top + 3, left : left + 4] = True
        out[row : row + 3, column : column + 4] = True
        before = (moved - x0)[k].abs() ** order
        slack = max(eps**order - before.sum(), 0)
        want = (before[:, into | out].sum(1) + slack / 2) ** (1 / order)
        torch.testing.assert_close(torch.linalg.vector_norm(found[k][:, into], order, dim=1), want)
        assert (found[k][:, out & ~into].abs() < 1e-15).all()
        torch.testing.assert_close(found[k][:, ~(into | out)], (moved - x0)[k][:, ~(into | out)])
