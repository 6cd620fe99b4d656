"""The chunked losses are the naive ones: values, gradients, and no more logits than a chunk's."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from offramp.tune.data import Example
from offramp.tune.losses import CHUNK, Term, exit_losses
from offramp.tune.network import Net
from offramp.tune.packing import Batch, collate
from tests.families import build

FAMILIES = ("llama", "gemma2", "granite", "gpt2", "opt", "qwen3")
EXITS = (2, 4)


def _batch(vocabulary: int) -> Batch:
    draw = torch.Generator().manual_seed(1)
    sizes = ((9, 3), (7, 1), (12, 5), (5, 4))
    examples = [
        Example(torch.randint(vocabulary, (size,), generator=draw).tolist(), first)
        for size, first in sizes
    ]
    return collate([[0, 1], [2, 3]], examples)


def _naive(
    model: PreTrainedModel, net: Net, batch: Batch, weights: dict[int, tuple[float, float]]
) -> Tensor:
    """Return the loss with every row's logits at once, by autograd alone."""
    states = net.states(batch, [*EXITS, net.num_layers])
    last = net.adapter.readout(states.rows[net.num_layers]).log_softmax(-1).detach()
    total = torch.zeros(())
    for depth, (hard, soft) in weights.items():
        logs = net.adapter.readout(states.rows[depth]).log_softmax(-1)
        total = total + hard * functional.nll_loss(logs, states.labels, reduction="sum")
        total = total + soft * functional.kl_div(logs, last, reduction="sum", log_target=True)
    return total


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [3, 1000])
def test_gradients_are_those_of_the_naive_computation(family: str, chunk: int) -> None:
    """Whatever norm, head, scale and soft cap a family has, and however rows are cut."""
    model = build(family).eval()
    net = Net(model, EXITS)
    batch = _batch(model.config.get_text_config().vocab_size)
    weights = {2: (0.3, 0.5), 4: (0.0, 0.7), net.num_layers: (1.0, 0.0)}
    naive = _naive(model, net, batch, weights)
    naive.backward()
    expected = _gradients(model)
    model.zero_grad()
    states = net.states(batch, sorted(weights))
    terms = [Term(d, states.rows[d], net.reader(d), *weights[d]) for d in weights]
    teacher = (states.rows[net.num_layers], net.adapter.readout)
    losses = exit_losses(terms, states.labels, net.speaking(terms), teacher, chunk)
    (losses.total * 2).backward()  # an upstream gradient is passed on
    found = _gradients(model)
    assert losses.total.item() == pytest.approx(naive.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    bound = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] / 2 - gradient).abs().max().item() <= bound, name


def test_a_small_divergence_is_told() -> None:
    """Of sure rows and of broad ones; a difference of sums over all rows would lose it."""
    draw = torch.Generator().manual_seed(3)
    taught = torch.randn(600, 2000, generator=draw) * torch.linspace(0.1, 3, 600)[:, None]
    said = taught + 3e-3 * torch.randn(600, 2000, generator=draw)
    expected = functional.kl_div(
        said.double().log_softmax(-1),
        taught.double().log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    term = Term(1, said, lambda rows: rows, 0.0, 1.0)
    labels = torch.zeros(600, dtype=torch.long)
    losses = exit_losses([term], labels, [], (taught, lambda rows: rows))
    assert losses.soft[1] == pytest.approx(expected.item(), rel=0.05)


def test_gradients_from_a_teacher_of_another_depth_are_the_naive_ones() -> None:
    """It has its own head and norm, and its states keep no graph."""
    student, teacher = build("llama", layers=3).eval(), build("llama", layers=6, seed=1).eval()
    net = Net(student, (2,), teacher=teacher)
    batch = _batch(student.config.vocab_size)
    states = net.states(batch, [2, 3])
    whole = Net(teacher, ())
    rows = whole.states(batch, [6]).rows[6]
    last = whole.adapter.readout(rows).log_softmax(-1).detach()
    total = torch.zeros(())
    for depth in (2, 3):
        logs = net.adapter.readout(states.rows[depth]).log_softmax(-1)
        total = total + functional.kl_div(logs, last, reduction="sum", log_target=True)
    total.backward()
    expected = _gradients(student)
    student.zero_grad()
    net.losses(net.states(batch, [2, 3]), {}, {2: 1.0, 3: 1.0}, net.teach(batch)).total.backward()
    found = _gradients(student)
    assert found.keys() == expected.keys()
    bound = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() <= bound, name
    assert not any(p.grad is not None for p in teacher.parameters())


def test_no_more_logits_than_a_chunk_exist_at_once() -> None:
    """However many exits there are: what is read out is never longer than a chunk."""
    rows = torch.randn(10, 8, requires_grad=True)
    head = torch.nn.Parameter(torch.randn(50, 8))
    seen: list[int] = []

    def read(part: Tensor) -> Tensor:
        seen.append(len(part))
        return part @ head.T

    terms = [Term(depth, rows, read, 1.0, 0.0) for depth in range(1, 6)]
    exit_losses(terms, torch.arange(10), [head], None, chunk=4)
    assert set(seen) == {4}
    assert len(seen) == 5 * 3, "each row is read once per exit"


@pytest.mark.parametrize("chunk", [CHUNK, 100])
def test_logits_come_in_few_sizes(chunk: int) -> None:
    """Of however many rows: arrays of ever other sizes fill memory with holes that none fits."""
    head = torch.nn.Parameter(torch.randn(50, 8))
    seen: set[int] = set()

    def read(part: Tensor) -> Tensor:
        seen.add(len(part))
        return part @ head.T

    for count in range(1, 700, 7):
        rows = torch.randn(count, 8, requires_grad=True)
        term = Term(1, rows, read, 0.5, 0.5)
        exit_losses([term], torch.arange(count) % 50, [head], (torch.randn(count, 8), read), chunk)
    assert len(seen) <= 16


def test_a_part_without_labels_costs_nothing_and_teaches_nothing() -> None:
    """As in a process that has no rows left in a step."""
    model = build("llama")
    net = Net(model, EXITS)
    batch = _batch(model.config.vocab_size)
    batch.labels.fill_(-100)
    losses = net.losses(net.states(batch, [2, 6]), {2: 1.0, 6: 1.0}, {})
    losses.total.backward()
    assert losses.total.item() == 0
    assert all(not gradient.any() for gradient in _gradients(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_do_not_see_each_other(family: str) -> None:
    """Their losses at every exit are those of each example alone."""
    model = build(family).eval()
    net = Net(model, EXITS)
    draw = torch.Generator().manual_seed(2)
    vocabulary = model.config.get_text_config().vocab_size
    examples = [
        Example(torch.randint(vocabulary, (size,), generator=draw).tolist(), 2)
        for size in (9, 6, 8)
    ]
    assert net.isolation != "rows"
    weights = dict.fromkeys((*EXITS, net.num_layers), 1.0)

    def sums(packs: list[list[int]]) -> Tensor:
        batch = collate(packs, examples)
        losses = net.losses(net.states(batch, list(weights)), weights, {})
        return torch.tensor([losses.hard[depth] for depth in weights])

    together = sums([[0, 1, 2]])
    apart = sum((sums([[i]]) for i in range(3)), torch.zeros(3))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["affine", "head", "block"])
def test_an_exits_own_readout_learns_and_the_model_does_not(kind: str) -> None:
    """Gradients reach every parameter of the readouts, and none of the model's."""
    model = build("llama").requires_grad_(False)
    net = Net(model, EXITS, kind)  # type: ignore[arg-type]
    net.readouts.requires_grad_()
    batch = _batch(model.config.vocab_size)
    before = copy.deepcopy(model.state_dict())
    states = net.states(batch, [*EXITS, net.num_layers])
    net.losses(states, {}, dict.fromkeys(EXITS, 1.0)).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in net.readouts.parameters())
    assert not _gradients(model)
    assert all(
        torch.equal(a, b)
        for a, b in itertools.zip_longest(before.values(), model.state_dict().values())
    )


@pytest.mark.parametrize(("kind", "depth"), [("affine", 2), ("head", 2), ("block", 3)])
def test_an_own_readout_starts_as_the_model_would_speak(kind: str, depth: int) -> None:
    """An affine map as none, a head as the model's; a block as one more layer would."""
    model = build("llama").requires_grad_(False)
    net = Net(model, EXITS, kind)  # type: ignore[arg-type]
    batch = _batch(model.config.vocab_size)
    states = net.states(batch, [2])
    found = net.reader(2)(states.rows[2])
    if kind == "block":  # a copy of the last layer, put behind layer 2
        plain = copy.deepcopy(model)
        plain.model.layers[2] = copy.deepcopy(plain.model.layers[-1])
        model = plain
    expected = Net(model, ())
    torch.testing.assert_close(
        found, expected.adapter.readout(expected.states(batch, [depth]).rows[depth])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_held_as_it_is_multiplied_computes_the_same(family: str) -> None:
    """Bit for bit, embeddings and norms left as they were; a model that is trained is not held."""
    batch = _batch(build(family).config.get_text_config().vocab_size)
    found = []
    for held in (False, True):
        net = Net(build(family).eval(), EXITS, "block", build(family, seed=1).eval())
        net.requires_grad_(False)
        net.readouts.requires_grad_()
        if held:
            net.hold_frozen(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            states = net.states(batch, [*EXITS, net.num_layers])
            losses = net.losses(states, {}, dict.fromkeys(EXITS, 1.0), net.teach(batch))
        losses.total.backward()
        found.append(
            (losses.total, [p.grad for p in net.readouts.parameters() if p.grad is not None])
        )
        linear = [m.weight.dtype for m in net.model.modules() if isinstance(m, nn.Linear)]
        assert not held or set(linear) <= {torch.bfloat16}
        assert net.model.get_input_embeddings().weight.dtype == torch.float32
    (expected, gradients), (loss, same) = found
    assert torch.equal(expected, loss)
    assert gradients
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    trained = Net(build(family), EXITS)
    trained.hold_frozen(torch.bfloat16)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
