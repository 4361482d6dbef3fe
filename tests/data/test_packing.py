import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mst.data import PackedDataset


@pytest.fixture
def mapped(tmp_path):
    np.arange(1000, 1103, dtype=np.uint16).tofile(tmp_path / "tokens")
    return np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")


def test_sequences_in_order_are_the_stream(mapped):
    dataset = PackedDataset(mapped, sequence_length=10)
    assert len(dataset) == 10
    joined = torch.cat([item["input_ids"] for item in dataset])
    assert joined.tolist() == list(range(1000, 1100))


def test_remainder_is_counted(mapped):
    dataset = PackedDataset(mapped, sequence_length=10)
    assert (dataset.num_tokens, dataset.dropped_tokens) == (100, 3)
    assert PackedDataset(mapped[:100], sequence_length=10).dropped_tokens == 0
    assert PackedDataset(mapped, sequence_length=103).dropped_tokens == 0
    assert PackedDataset(mapped, sequence_length=102).dropped_tokens == 1


def test_items_are_int64_and_labels_equal_input_ids_without_sharing_memory(mapped):
    item = PackedDataset(mapped, sequence_length=10)[3]
    assert set(item) == {"input_ids", "labels"}
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert item["input_ids"].shape == item["labels"].shape == (10,)
    assert torch.equal(item["input_ids"], item["labels"])
    item["labels"][0] = -100
    assert item["input_ids"][0] == 1030


def test_large_token_ids_survive():
    tokens = np.array([4_000_000_000, 70_000], dtype=np.uint32)
    assert PackedDataset(tokens, sequence_length=2)[0]["input_ids"].tolist() == [4_000_000_000, 70_000]


def test_index_counts_from_the_end_too_and_stops_at_the_ends(mapped):
    dataset = PackedDataset(mapped, sequence_length=10)
    assert torch.equal(dataset[-1]["input_ids"], dataset[9]["input_ids"])
    for index in (10, -11):
        with pytest.raises(IndexError, match="10 sequences"):
            dataset[index]


def test_pickle_of_a_mapped_file_holds_its_name_not_its_content(mapped):
    dataset = PackedDataset(mapped, sequence_length=10)
    data = pickle.dumps(dataset)
    assert mapped[:50].tobytes() not in data
    copy = pickle.loads(data)
    assert isinstance(copy.tokens, np.memmap)
    assert copy.dropped_tokens == 3
    assert [item["input_ids"].tolist() for item in copy] == [item["input_ids"].tolist() for item in dataset]


@pytest.mark.parametrize("view", [slice(50, None), slice(None, None, -1), slice(None, 60)])
def test_pickle_of_a_view_of_a_mapped_file_gives_the_same_view(mapped, view):
    copy = pickle.loads(pickle.dumps(PackedDataset(mapped[view], sequence_length=10)))
    assert copy.tokens.tolist() == mapped[view].tolist()


def test_dataloader_with_a_worker_gives_the_same_batches_as_without(mapped):
    dataset = PackedDataset(mapped, sequence_length=10)
    context = {"num_workers": 1, "multiprocessing_context": "spawn"}
    for here, there in zip(
        DataLoader(dataset, batch_size=4), DataLoader(dataset, batch_size=4, **context), strict=True
    ):
        assert torch.equal(here["input_ids"], there["input_ids"])
        assert torch.equal(here["labels"], there["labels"])


def test_text_shorter_than_a_sequence_says_how_long_it_is(mapped):
    with pytest.raises(ValueError, match=r"103 tokens, fewer than one sequence of 104.*at most 103"):
        PackedDataset(mapped, sequence_length=104)


@pytest.mark.parametrize("length", [1, 0, -5])
def test_sequence_length_below_two_is_refused(mapped, length):
    with pytest.raises(ValueError, match=f"at least 2 .*got {length}"):
        PackedDataset(mapped, sequence_length=length)
