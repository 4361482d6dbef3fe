import math

import pytest
import torch
import torchmetrics.text
from torch.nn.functional import cross_entropy

from lightning_mst.metrics import Perplexity


@pytest.fixture
def batches():
    """Logits and labels of unequal batches, each with another number of ignored labels, one with all ignored."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for size, ignored in ((4, 0.0), (2, 0.5), (1, 0.9), (3, 1.0), (5, 0.1)):
        logits = 3 * torch.randn(size, 17, 29, generator=generator)
        labels = torch.randint(29, (size, 17), generator=generator)
        labels[torch.rand(size, 17, generator=generator) < ignored] = -100
        made.append((logits, labels))
    return made


def summed(logits, labels):
    loss_sum = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss_sum, (labels != -100).sum()


def test_equals_torchmetrics_on_logits_with_ignored_labels(batches):
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity(ignore_index=-100)
    for logits, labels in batches:
        ours.update(*summed(logits, labels))
        theirs.update(logits, labels)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_tokens_weigh_equally_whatever_their_batch():
    metric = Perplexity()
    metric.update(torch.tensor(30.0), torch.tensor(10))
    metric.update(torch.tensor(1.0), torch.tensor(1))
    assert metric.compute().item() == pytest.approx(math.exp(31 / 11), rel=1e-12)


def test_numbers_and_tensors_of_any_dtype_are_taken():
    metric = Perplexity()
    metric.update(2.0, 1)
    metric.update(torch.tensor([2.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor(1, dtype=torch.int32))
    assert metric.compute().item() == pytest.approx(math.exp(2), rel=1e-12)
    assert not metric.loss_sum.requires_grad


def test_forward_returns_the_batch_value_and_adds_to_the_total():
    metric = Perplexity()
    assert metric(4.0, 2).item() == pytest.approx(math.exp(2))
    assert metric(1.0, 2).item() == pytest.approx(math.exp(0.5))
    assert metric.compute().item() == pytest.approx(math.exp(5 / 4))


def test_merged_processes_give_the_value_of_all_their_batches(batches):
    alone, first, second = Perplexity(), Perplexity(), Perplexity()
    for number, batch in enumerate(batches):
        alone.update(*summed(*batch))
        (second if number % 2 else first).update(*summed(*batch))
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(alone.compute().item(), rel=1e-12)
    assert first.num_tokens == alone.num_tokens


def test_synchronisation_sums_the_states_of_all_processes():
    gathered = {torch.float64: [torch.tensor(6.0).double(), torch.tensor(2.0).double()]}
    gathered[torch.int64] = [torch.tensor(2), torch.tensor(2)]
    metric = Perplexity(dist_sync_fn=lambda state, group: gathered[state.dtype], distributed_available_fn=lambda: True)
    metric.update(6.0, 2)
    assert metric.compute().item() == pytest.approx(math.exp(8 / 4))
    assert metric.num_tokens == 2  # the own state is back after the synchronised value


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.float(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.float32),
    ],
    ids=["half", "bfloat16", "float", "double", "to dtype", "to device and dtype", "type"],
)
def test_casts_of_the_module_that_holds_it_keep_the_precision(cast):
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "perplexity": Perplexity()})
    metric = module["perplexity"]
    metric.update(1 / 3, 2**40 + 1)
    cast(module)
    assert (metric.loss_sum.dtype, metric.num_tokens.dtype) == (torch.float64, torch.int64)
    assert metric.loss_sum.item() == 1 / 3
    assert metric.num_tokens.item() == 2**40 + 1
    metric.reset()
    assert (metric.loss_sum.dtype, metric.num_tokens.dtype) == (torch.float64, torch.int64)


def test_moves_of_the_module_move_it():
    metric = torch.nn.ModuleDict({"perplexity": Perplexity()}).to("meta")["perplexity"]
    assert metric.loss_sum.device.type == metric.num_tokens.device.type == "meta"


def test_set_dtype_is_the_way_to_change_the_dtype():
    assert Perplexity().set_dtype(torch.float32).loss_sum.dtype == torch.float32


def test_single_tokens_count_after_many():
    metric = Perplexity()
    metric.update(2.0**30, 2**30)
    metric.update(1.0, 1)
    assert metric.num_tokens == 2**30 + 1
    assert metric.loss_sum == 2**30 + 1


def test_reset_forgets_everything():
    metric = Perplexity()
    metric.update(5.0, 1)
    metric.reset()
    metric.update(1.0, 1)
    assert metric.compute().item() == pytest.approx(math.e)


def test_no_live_tokens_give_nan_and_a_warning():
    metric = Perplexity()
    metric.update(0.0, 0)
    with pytest.warns(UserWarning, match="before any live token was seen"):
        assert metric.compute().isnan()


def test_losses_that_are_not_summed_are_refused():
    with pytest.raises(ValueError, match=r"`loss_sum` must be a single number .* shape \[4, 17\]"):
        Perplexity().update(torch.zeros(4, 17), 68)
    with pytest.raises(ValueError, match=r"`num_tokens` must be a single number .* shape \[4\]"):
        Perplexity().update(torch.tensor(1.0), torch.zeros(4))
