"""The LightningDataModule: documents, tokenizer and packing behind one object."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from lightning_mst.data.documents import FILE_SOURCES, Documents, check_source, load_documents
from lightning_mst.data.encoding import encode_documents
from lightning_mst.data.packing import PackedDataset
from lightning_mst.data.resumable import EpochSampler, ResumableDataLoader
from lightning_mst.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, train_tokenizer, vocabulary_size

_log = logging.getLogger(__name__)


class TextDataModule(LightningDataModule):
    """Real text for next-token training, packed into sequences of ``sequence_length`` tokens.

    1. Load the documents of ``source`` and shuffle them by ``seed``.
    2. Split them into training and validation, by documents.
    3. Train a byte-level BPE tokenizer on the training documents, or load the one that ``tokenizer`` names.
    4. Encode each side into one stream, an end-of-text token after every document.
    5. Cut each stream into sequences; the remainder is dropped, logged and counted in ``dropped_tokens``.

    The default needs no download: the source of Python's standard library, about 12 MB and 3 million tokens, ready
    in about ten seconds. It differs between versions of Python, so compare losses on one version only. Steps 3 and 4
    are cached on disk, so the next run starts at once.

    A model is built for a vocabulary, so a program usually needs the tokenizer before it has a Trainer. Call
    ``prepare_data()`` and ``setup()`` first; the Trainer's own calls then find the work done::

        data = TextDataModule(sequence_length=16384)
        data.prepare_data()
        data.setup()
        model = build_model(vocab_size=data.vocab_size)
        Trainer().fit(model, datamodule=data)

    Batches are ``{"input_ids": [bsz, seq_len], "labels": [bsz, seq_len]}``, int64 and equal; models of transformers
    shift the labels inside their loss. The last batch may be smaller.

    Args:
        source: ``"stdlib"`` (the standard library of the running Python), ``"text"`` (each UTF-8 file is a
            document), ``"jsonl"``, ``"parquet"`` (each row is one), or ``"hub"`` (each row of a data set that
            ``datasets.load_dataset`` finds). The last three need ``pip install 'lightning-mst[data]'``.
        paths: For ``text``, ``jsonl``, ``parquet``: files, globs or folders.
        path: For ``hub``: a data set's name, or a local folder.
        name: For ``hub``: the data set's configuration.
        split: For ``hub``: the split to train on.
        text_column: For ``jsonl``, ``parquet``, ``hub``: the column that holds the text.
        validation_fraction: Share of the documents, in (0, 1), that goes to validation. A single document is cut in
            two. Not used if ``validation_paths`` or ``validation_split`` is given.
        validation_paths: For ``text``, ``jsonl``, ``parquet``: files, globs or folders to validate on.
        validation_split: For ``hub``: the split to validate on.
        tokenizer: ``None`` trains one on the training documents; else a name on the hub or a local folder.
        vocab_size: Tokens of a trained tokenizer, at most (a small text gives fewer). Not used with ``tokenizer``.
        sequence_length: Tokens per sequence.
        batch_size: Sequences per batch and process.
        max_documents: Use only so many documents of each source, chosen by the shuffle.
        max_tokens: Use only the first so many tokens on each side, training and validation.
        num_workers: Worker processes per DataLoader. Reading a mapped file is cheap: 0 is usually fastest.
        cache_dir: Folder for tokenizers and tokens; ``None`` is ``$XDG_CACHE_HOME/lightning_mst`` or
            ``~/.cache/lightning_mst``. Data sets and hub tokenizers stay in the Hugging Face cache.
        seed: Decides the documents' order, the split and the order of training sequences.

    Attributes:
        train_dataset: The training sequences; after ``setup``.
        validation_dataset: The validation sequences; after ``setup``.

    Raises:
        ValueError: An argument is out of range or does not fit the source. Errors of the data itself (see
            :func:`~lightning_mst.data.load_documents`), or too little text for a sequence on each side, come from
            ``prepare_data`` and ``setup``.
    """

    def __init__(
        self,
        *,
        source: str = "stdlib",
        paths: str | Sequence[str] | None = None,
        path: str | None = None,
        name: str | None = None,
        split: str = "train",
        text_column: str = "text",
        validation_fraction: float = 0.05,
        validation_paths: str | Sequence[str] | None = None,
        validation_split: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        sequence_length: int = 1024,
        batch_size: int = 1,
        max_documents: int | None = None,
        max_tokens: int | None = None,
        num_workers: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_source(source, paths=paths, path=path)
        if validation_paths and source not in FILE_SOURCES:
            raise ValueError(
                f"validation_paths needs a source that reads files ({', '.join(FILE_SOURCES)}), got {source!r}. "
                "Use validation_split for 'hub', else validation_fraction."
            )
        if validation_split and source != "hub":
            raise ValueError(f"validation_split needs source='hub', got {source!r}. Use validation_fraction.")
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie between 0 and 1, both excluded, got {validation_fraction}. To validate "
                "on other text, give validation_paths or validation_split."
            )
        if sequence_length < 2:
            raise ValueError(
                f"sequence_length must be at least 2 (a token and the next one to predict), got {sequence_length}."
            )
        if tokenizer is None and vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and the end-of-text token), got {vocab_size}."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, or None for all, got {max_documents}.")
        if max_tokens is not None and max_tokens < sequence_length:
            raise ValueError(
                f"max_tokens must be at least sequence_length={sequence_length}, or None for all, got {max_tokens}."
            )
        self.source = source
        self.paths = paths
        self.path = path
        self.name = name
        self.split = split
        self.text_column = text_column
        self.validation_fraction = validation_fraction
        self.validation_paths = validation_paths
        self.validation_split = validation_split
        self.tokenizer_name = tokenizer
        self.requested_vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.max_documents = max_documents
        self.max_tokens = max_tokens
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.seed = seed
        self.train_dataset: PackedDataset | None = None
        self.validation_dataset: PackedDataset | None = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
            RuntimeError: The data is not prepared yet.
        """
        self._require_setup()
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """How many rows the model's embedding needs, largest token id + 1; see ``requested_vocab_size``.

        Raises:
            RuntimeError: The data is not prepared yet.
        """
        return vocabulary_size(self.tokenizer)

    @property
    def dropped_tokens(self) -> dict[str, int]:
        """Tokens that did not fill a sequence, as ``{"train": n, "validation": n}``.

        Raises:
            RuntimeError: The data is not prepared yet.
        """
        self._require_setup()
        assert self.train_dataset is not None
        assert self.validation_dataset is not None
        return {
            "train": self.train_dataset.dropped_tokens,
            "validation": self.validation_dataset.dropped_tokens,
        }

    def prepare_data(self) -> None:
        """Download, train the tokenizer and encode, into the caches; the Trainer calls this once per node.

        A second call returns at once. Every error that the data can cause is raised here.
        """
        self._build()

    def setup(self, stage: str | None = None) -> None:
        """Open the cached tokens as ``train_dataset`` and ``validation_dataset``, in every process.

        A second call returns at once, whatever ``stage`` is.
        """
        self._build()

    def train_dataloader(self) -> DataLoader:
        """Return the training sequences, in a new order each epoch that ``seed`` decides.

        In a Trainer that has this data module, each process gets its own share of them, and a fit that resumes within
        an epoch goes on with the batch after the last one that the checkpoint has seen.
        """
        self._require_setup()
        if self.trainer is None:
            # A Trainer that is given the loader alone must see a sampler that it may replace, or it shares nothing out.
            return DataLoader(self.train_dataset, shuffle=True, **self._loader_options())
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = EpochSampler(self.train_dataset, seed=self.seed, **share)
        return ResumableDataLoader(
            self.train_dataset, sampler=sampler, batches_done=self._batches_done, **self._loader_options()
        )

    def val_dataloader(self) -> DataLoader:
        """Return the validation sequences, in order."""
        self._require_setup()
        return DataLoader(self.validation_dataset, **self._loader_options())

    def _batches_done(self) -> int:
        assert self.trainer is not None
        return self.trainer.fit_loop.batch_idx + 1  # before the batch is counted that is being asked for

    def _build(self) -> None:
        # The processes that did not run prepare_data find everything in the cache and end up with the same objects.
        if self.validation_dataset is not None:
            return
        train_documents, validation_documents = self._split_documents()
        tokenizer = (
            train_tokenizer(train_documents, vocab_size=self.requested_vocab_size, cache_dir=self.cache_dir)
            if self.tokenizer_name is None
            else load_tokenizer(self.tokenizer_name)
        )
        train_tokens = encode_documents(
            train_documents, tokenizer, max_tokens=self.max_tokens, cache_dir=self.cache_dir
        )
        validation_tokens = encode_documents(
            validation_documents, tokenizer, max_tokens=self.max_tokens, cache_dir=self.cache_dir
        )
        self._check_length(len(train_tokens), len(validation_tokens))
        self._tokenizer = tokenizer
        self.train_dataset = PackedDataset(train_tokens, sequence_length=self.sequence_length)
        self.validation_dataset = PackedDataset(validation_tokens, sequence_length=self.sequence_length)
        _report("training", train_documents, self.train_dataset)
        _report("validation", validation_documents, self.validation_dataset)

    def _split_documents(self) -> tuple[Documents, Documents]:
        documents = self._shuffled(self._load(paths=self.paths, split=self.split))
        if self.validation_paths or self.validation_split:
            validation = self._load(paths=self.validation_paths, split=self.validation_split or self.split)
            return documents, self._shuffled(validation)
        if len(documents) == 1:
            return _cut_in_two(next(iter(documents)), last=self.validation_fraction)
        count = round(len(documents) * self.validation_fraction)
        count = min(max(count, 1), len(documents) - 1)
        positions = np.arange(len(documents))
        return documents.select(positions[count:]), documents.select(positions[:count])

    def _load(self, *, paths: str | Sequence[str] | None, split: str) -> Documents:
        return load_documents(
            self.source,
            paths=paths,
            path=self.path,
            name=self.name,
            split=split,
            text_column=self.text_column,
        )

    def _shuffled(self, documents: Documents) -> Documents:
        order = np.random.default_rng(self.seed).permutation(len(documents))
        return documents.select(order[: self.max_documents])

    def _check_length(self, train_tokens: int, validation_tokens: int) -> None:
        smallest = min(train_tokens, validation_tokens)
        if smallest >= self.sequence_length:
            return
        message = (
            f"One sequence of sequence_length={self.sequence_length} tokens must fit on each side, but the training "
            f"text has {train_tokens} tokens and the validation text {validation_tokens}. Lower sequence_length to at "
            f"most {smallest}, or give more text"
        )
        total = train_tokens + validation_tokens
        one_source = not (self.validation_paths or self.validation_split)
        if one_source and self.max_tokens is None and total >= 3 * self.sequence_length:
            # Half more than needed: a share of the documents is only about the same share of the tokens.
            fitting = 1.5 * self.sequence_length / total
            fitting = fitting if validation_tokens < train_tokens else 1 - fitting
            message += f", or set validation_fraction to about {fitting:.2g} (now {self.validation_fraction})"
        raise ValueError(message + ".")

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Without a generator of its own, a loader draws from the one that dropout draws from.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _require_setup(self) -> None:
        if self.validation_dataset is None:
            raise RuntimeError(
                "The data is not prepared yet: call prepare_data() and setup() first, or let the Trainer call them."
            )


def _cut_in_two(text: str, *, last: float) -> tuple[Documents, Documents]:
    """Split one text near ``1 - last`` of its length, at a line's start if there is one."""
    cut = int(len(text) * (1 - last))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return Documents.from_texts([text[:cut]]), Documents.from_texts([text[cut:]])


@rank_zero_only
def _report(side: str, documents: Documents, dataset: PackedDataset) -> None:
    _log.info(
        "%s: %d documents, %d sequences of %d tokens, %d tokens dropped because they do not fill a sequence",
        side,
        len(documents),
        len(dataset),
        dataset.sequence_length,
        dataset.dropped_tokens,
    )
