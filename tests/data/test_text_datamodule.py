import inspect
import json
import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_mst.data import END_OF_TEXT, TextDataModule
from lightning_mst.data import datamodule as datamodule_module


@pytest.fixture
def make(text_folder, cache_dir):
    """Build a small data module on the stories, or on what the arguments say."""

    def build(**arguments) -> TextDataModule:
        if "source" not in arguments:
            arguments = {"source": "text", "paths": str(text_folder), **arguments}
        defaults = {"vocab_size": 300, "sequence_length": 32, "batch_size": 2, "cache_dir": str(cache_dir)}
        return TextDataModule(**{**defaults, **arguments})

    return build


@pytest.fixture
def ready(make):
    def build(**arguments) -> TextDataModule:
        data = make(**arguments)
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def documents_of(data: TextDataModule, dataset) -> list[str]:
    """The texts of one side, the remainder included."""
    parts = data.tokenizer.decode(dataset.tokens.tolist()).split(END_OF_TEXT)
    assert parts.pop() == ""
    return parts


def sequences(loader) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in loader for row in batch["input_ids"].tolist()]


def test_standard_library_is_the_default_source(cache_dir):
    data = TextDataModule(vocab_size=300, max_documents=12, sequence_length=64, batch_size=3, cache_dir=cache_dir)
    assert data.source == "stdlib"
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 64)
    assert data.vocab_size == 300


def test_arguments_are_plain_and_keyword_only():
    parameters = inspect.signature(TextDataModule).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    assert json.loads(json.dumps({parameter.name: parameter.default for parameter in parameters}))


def test_batches_have_the_stated_shapes_and_types(ready):
    data = ready(batch_size=4)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 32)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["input_ids"].min() >= 0
        assert batch["input_ids"].max() < data.vocab_size


def test_every_document_is_on_exactly_one_side(ready, stories):
    data = ready(validation_fraction=0.2)
    train, validation = documents_of(data, data.train_dataset), documents_of(data, data.validation_dataset)
    assert len(validation) == 8
    assert sorted(train + validation) == sorted(stories)
    assert train + validation != sorted(train + validation)  # shuffled


def test_nothing_is_lost_but_the_reported_remainder(ready, caplog):
    with caplog.at_level(logging.INFO):
        data = ready(sequence_length=37)
    for side, dataset in (("train", data.train_dataset), ("validation", data.validation_dataset)):
        joined = np.concatenate([item["input_ids"].numpy() for item in dataset])
        assert joined.tolist() == dataset.tokens[: len(joined)].tolist()
        assert data.dropped_tokens[side] == len(dataset.tokens) - len(joined)
        assert data.dropped_tokens[side] < 37
        name = "training" if side == "train" else side
        assert f"{name}: " in caplog.text
        assert f"{len(dataset)} sequences of 37 tokens, {data.dropped_tokens[side]} tokens dropped" in caplog.text
    assert sum(data.dropped_tokens.values()) > 0


def test_tokenizer_learns_from_training_documents_only(make, monkeypatch):
    seen = []
    train = datamodule_module.train_tokenizer
    monkeypatch.setattr(
        datamodule_module, "train_tokenizer", lambda docs, **options: seen.extend(docs) or train(docs, **options)
    )
    data = make()
    data.prepare_data()
    assert sorted(seen) == sorted(documents_of(data, data.train_dataset))


def test_the_same_seed_gives_the_same_data_and_order(ready, tmp_path):
    first, second = ready(seed=3), ready(seed=3, cache_dir=str(tmp_path / "other cache"))
    assert sequences(first.train_dataloader()) == sequences(second.train_dataloader())
    assert sequences(first.val_dataloader()) == sequences(second.val_dataloader())


def test_another_seed_gives_another_split(ready):
    first, second = ready(seed=3), ready(seed=4)
    assert documents_of(first, first.validation_dataset) != documents_of(second, second.validation_dataset)


def test_training_order_changes_with_the_epoch_and_validation_order_does_not(ready):
    data = ready()
    train, validation = data.train_dataloader(), data.val_dataloader()
    first, second = sequences(train), sequences(train)
    assert first != second
    assert sorted(first) == sorted(second)
    assert sequences(validation) == sequences(validation)
    assert len(first) == len(data.train_dataset)  # the last, smaller batch included


def test_second_call_does_nothing(ready, monkeypatch, cache_dir, files_in):
    data = ready()
    before, dataset = files_in(cache_dir), data.train_dataset
    monkeypatch.setattr(datamodule_module, "load_documents", None)  # any work would fail
    data.prepare_data()
    data.setup("fit")
    data.setup("validate")
    assert data.train_dataset is dataset
    assert files_in(cache_dir) == before


def test_second_run_trains_and_encodes_nothing(ready, cache_dir, files_in):
    first = ready()
    before = files_in(cache_dir)
    second = ready()
    assert files_in(cache_dir) == before
    assert sequences(first.val_dataloader()) == sequences(second.val_dataloader())


def test_another_sequence_length_uses_the_same_cache(ready, cache_dir, files_in):
    ready(sequence_length=32)
    before = files_in(cache_dir)
    assert ready(sequence_length=64).train_dataset[0]["input_ids"].shape == (64,)
    assert files_in(cache_dir) == before


def test_a_process_that_only_calls_setup_gets_the_same_data(ready, make):
    prepared, other = ready(), make()
    other.setup("fit")
    assert sequences(other.val_dataloader()) == sequences(prepared.val_dataloader())
    assert other.vocab_size == prepared.vocab_size


def test_changed_files_are_noticed(ready, text_folder):
    before = ready().train_dataset.num_tokens
    for file in list(text_folder.glob("*.txt"))[:10]:
        file.unlink()
    assert ready().train_dataset.num_tokens < before


def test_jsonl_rows_arrive_in_batches(ready, write_jsonl, stories):
    data = ready(source="jsonl", paths=[str(write_jsonl(stories, column="body"))], text_column="body")
    both = documents_of(data, data.train_dataset) + documents_of(data, data.validation_dataset)
    assert sorted(both) == sorted(stories)


def test_parquet_rows_arrive_in_batches(ready, tmp_path, stories):
    import datasets

    datasets.Dataset.from_dict({"text": stories}).to_parquet(tmp_path / "rows.parquet")
    data = ready(source="parquet", paths=str(tmp_path / "*.parquet"))
    both = documents_of(data, data.train_dataset) + documents_of(data, data.validation_dataset)
    assert sorted(both) == sorted(stories)


def test_hub_data_set_with_its_own_validation_split(ready, write_jsonl, tmp_path, stories):
    write_jsonl(stories[:30], file="set/train.jsonl")
    write_jsonl(stories[30:], file="set/validation.jsonl")
    data = ready(source="hub", path=str(tmp_path / "set"), validation_split="validation")
    assert sorted(documents_of(data, data.train_dataset)) == sorted(stories[:30])
    assert sorted(documents_of(data, data.validation_dataset)) == sorted(stories[30:])


def test_rows_are_cached_between_runs(ready, write_jsonl, stories, cache_dir, files_in):
    path = str(write_jsonl(stories))
    ready(source="jsonl", paths=path)
    before = files_in(cache_dir)
    ready(source="jsonl", paths=path)
    assert files_in(cache_dir) == before


def test_validation_paths_are_the_validation_side(ready, text_folder, tmp_path, stories):
    (tmp_path / "held out.txt").write_text("the held out text " * 20)
    data = ready(validation_paths=str(tmp_path / "held out.txt"))
    assert documents_of(data, data.validation_dataset) == ["the held out text " * 20]
    assert sorted(documents_of(data, data.train_dataset)) == sorted(stories)


def test_a_single_document_is_cut_in_two_at_a_line(ready, tmp_path, stories):
    (tmp_path / "book.txt").write_text("".join(stories))
    data = ready(paths=str(tmp_path / "book.txt"), validation_fraction=0.25)
    (train,), (validation,) = (documents_of(data, side) for side in (data.train_dataset, data.validation_dataset))
    assert train + validation == "".join(stories)
    assert train.endswith("\n")
    assert 0.24 < len(validation) / len(train + validation) < 0.28


def test_a_named_tokenizer_is_used_instead_of_training_one(ready, small_tokenizer, tmp_path, cache_dir):
    small_tokenizer.save_pretrained(tmp_path / "saved")
    trained = set(cache_dir.glob("tokenizer-*"))
    data = ready(tokenizer=str(tmp_path / "saved"), vocab_size=1)  # vocab_size plays no role then
    assert data.tokenizer.get_vocab() == small_tokenizer.get_vocab()
    assert data.vocab_size == 300
    assert set(cache_dir.glob("tokenizer-*")) == trained


def test_max_documents_takes_some_of_the_shuffled_documents(ready, stories):
    data = ready(max_documents=10, validation_fraction=0.3)
    train, validation = documents_of(data, data.train_dataset), documents_of(data, data.validation_dataset)
    assert (len(train), len(validation)) == (7, 3)
    assert set(train + validation) < set(stories)
    assert sorted(train + validation) != sorted(stories)[:10]


def test_max_tokens_limits_each_side(ready):
    whole, data = ready(), ready(max_tokens=100)
    assert data.train_dataset.tokens.tolist() == whole.train_dataset.tokens[:100].tolist()
    assert data.validation_dataset.tokens.tolist() == whole.validation_dataset.tokens[:100].tolist()
    assert data.dropped_tokens == {"train": 4, "validation": 4}


def test_worker_processes_give_the_same_batches(ready):
    assert sequences(ready(num_workers=1).val_dataloader()) == sequences(ready().val_dataloader())


def test_vocabulary_and_loaders_before_preparation_are_a_clear_error(make):
    data = make()
    for use in (
        lambda: data.vocab_size,
        lambda: data.tokenizer,
        lambda: data.dropped_tokens,
        data.train_dataloader,
        data.val_dataloader,
    ):
        with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
            use()


def test_a_trainer_fits_and_validates_on_it(ready):
    class Bigram(LightningModule):
        def __init__(self, vocab_size: int) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(vocab_size, vocab_size)
            self.losses: list[float] = []

        def loss(self, batch):
            logits = self.table(batch["input_ids"][:, :-1])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

        def training_step(self, batch, _):
            return self.loss(batch)

        def validation_step(self, batch, _):
            self.losses.append(self.loss(batch).item())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    data = ready()  # before there is a Trainer, since the model needs the vocabulary
    model = Bigram(data.vocab_size)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
    )
    trainer.fit(model, datamodule=data)
    batches = len(data.val_dataloader())
    assert len(model.losses) == 3 * batches
    assert sum(model.losses[-batches:]) < 0.8 * sum(model.losses[:batches])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "csv"}, r"Unknown source 'csv'; expected one of stdlib, text, jsonl, parquet, hub"),
        ({"source": "text"}, "source='text' needs paths"),
        ({"source": "hub"}, "source='hub' needs path"),
        ({"source": "stdlib", "validation_paths": "a.txt"}, "validation_paths needs a source that reads files"),
        ({"source": "stdlib", "validation_split": "test"}, "validation_split needs source='hub'"),
        ({"validation_fraction": 0.0}, r"validation_fraction must lie between 0 and 1.* got 0\.0"),
        ({"validation_fraction": 1.0}, r"validation_fraction .* got 1\.0"),
        ({"validation_fraction": -0.1}, r"validation_fraction .* got -0\.1"),
        ({"sequence_length": 1}, r"sequence_length must be at least 2 .* got 1"),
        ({"vocab_size": 256}, r"vocab_size must be at least 257 .* got 256"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_documents": 0}, r"max_documents must be at least 1.* got 0"),
        ({"max_tokens": 31}, r"max_tokens must be at least sequence_length=32.* got 31"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_too_short_a_text_says_how_many_tokens_there_are(make, ready, tmp_path):
    data = ready(validation_fraction=0.1)
    train, validation = len(data.train_dataset.tokens), len(data.validation_dataset.tokens)
    with pytest.raises(
        ValueError, match=f"training text has {train} tokens and the validation text {validation}.*at most {validation}"
    ) as caught:
        make(validation_fraction=0.1, sequence_length=10 * train).prepare_data()
    assert "validation_fraction to" not in str(caught.value)  # no split of so little text would do
    assert len(ready(validation_fraction=0.1, sequence_length=validation).validation_dataset) == 1


@pytest.mark.parametrize("fraction", [0.05, 0.95])
def test_too_small_a_side_gets_a_fraction_that_works(make, ready, fraction):
    whole = ready(validation_fraction=fraction)
    length = min(len(whole.train_dataset.tokens), len(whole.validation_dataset.tokens)) * 3
    with pytest.raises(ValueError, match="validation_fraction to about") as caught:
        make(validation_fraction=fraction, sequence_length=length).prepare_data()
    advised = float(str(caught.value).split("validation_fraction to about ")[1].split()[0])
    data = ready(validation_fraction=advised, sequence_length=length)
    assert len(data.train_dataset) >= 1
    assert len(data.validation_dataset) >= 1


def test_errors_of_the_data_come_before_training(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        make(paths=str(tmp_path / "missing.txt")).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"held\.txt"):
        make(validation_paths=str(tmp_path / "held.txt")).prepare_data()
    with pytest.raises(FileNotFoundError, match="no tokenizer under"):
        make(tokenizer=str(tmp_path)).prepare_data()
