"""Real text for next-token training, packed into sequences of one length."""

from lightning_mst.data.cache import default_cache_dir
from lightning_mst.data.datamodule import TextDataModule
from lightning_mst.data.documents import SOURCES, Documents, load_documents
from lightning_mst.data.encoding import encode_documents
from lightning_mst.data.packing import PackedDataset
from lightning_mst.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer, vocabulary_size

__all__ = [
    "END_OF_TEXT",
    "SOURCES",
    "Documents",
    "PackedDataset",
    "TextDataModule",
    "default_cache_dir",
    "encode_documents",
    "load_documents",
    "load_tokenizer",
    "train_tokenizer",
    "vocabulary_size",
]
