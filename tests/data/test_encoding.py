import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_mst.data import END_OF_TEXT, Documents, encode_documents
from lightning_mst.data import encoding as encoding_module
from lightning_mst.data.pieces import cut_text


def reference(texts, tokenizer):
    """One document after the other, in plain Python."""
    stream = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return stream


def test_stream_is_every_document_followed_by_the_end_token(stories, small_tokenizer, cache_dir):
    tokens = encode_documents(Documents.from_texts(stories), small_tokenizer, cache_dir=cache_dir)
    assert tokens.tolist() == reference(stories, small_tokenizer)
    assert np.count_nonzero(tokens == small_tokenizer.eos_token_id) == len(stories)
    assert tokens[-1] == small_tokenizer.eos_token_id


def test_stream_decodes_to_the_text(stories, small_tokenizer, cache_dir):
    tokens = encode_documents(Documents.from_texts(stories), small_tokenizer, cache_dir=cache_dir)
    assert small_tokenizer.decode(tokens.tolist()).split(END_OF_TEXT) == [*stories, ""]


def test_documents_without_text_add_nothing(stories, small_tokenizer, cache_dir):
    with_gaps = ["", stories[0], " \n", stories[1], ""]
    tokens = encode_documents(Documents.from_texts(with_gaps), small_tokenizer, cache_dir=cache_dir)
    assert tokens.tolist() == reference(stories[:2], small_tokenizer)


def test_text_that_spells_the_end_token_does_not_end_a_document(small_tokenizer, cache_dir):
    text = f"before {END_OF_TEXT} after"
    tokens = encode_documents(Documents.from_texts([text]), small_tokenizer, cache_dir=cache_dir).tolist()
    assert tokens.count(small_tokenizer.eos_token_id) == 1
    assert small_tokenizer.decode(tokens[:-1]) == text


def test_max_tokens_keeps_the_start_of_the_stream(stories, small_tokenizer, cache_dir):
    documents = Documents.from_texts(stories)
    whole = encode_documents(documents, small_tokenizer, cache_dir=cache_dir)
    first = encode_documents(documents, small_tokenizer, max_tokens=101, cache_dir=cache_dir)
    assert first.tolist() == whole[:101].tolist()
    more = encode_documents(documents, small_tokenizer, max_tokens=10**9, cache_dir=cache_dir)
    assert more.tolist() == whole.tolist()


@pytest.mark.parametrize("batch", [1, 500, 10**9])
def test_batches_do_not_show_in_the_stream(stories, small_tokenizer, cache_dir, monkeypatch, batch):
    monkeypatch.setattr(encoding_module, "_BATCH", batch)
    tokens = encode_documents(Documents.from_texts(stories), small_tokenizer, cache_dir=cache_dir)
    assert tokens.tolist() == reference(stories, small_tokenizer)


@pytest.mark.parametrize("piece", [13, 40, 200])
def test_a_long_document_cut_into_pieces_gives_the_same_tokens(small_tokenizer, cache_dir, monkeypatch, piece):
    text = "the cat\n\n  sat on\n\n\na mat  \n \n\twhile two\ndogs ran \nover\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n" * 9
    monkeypatch.setattr(encoding_module, "_PIECE", piece)
    pieces = list(cut_text(text, piece))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= piece
    # At 13 characters the long run of line ends does not fit into one piece, so a cut inside it is allowed.
    if piece > 13:
        tokens = encode_documents(Documents.from_texts([text]), small_tokenizer, cache_dir=cache_dir)
        assert tokens.tolist() == reference([text], small_tokenizer)


def test_a_long_document_without_line_ends_is_cut_at_the_limit():
    assert list(cut_text("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(cut_text("   \n   \n   ", 4)) == ["   \n", "   \n", "   "]


def test_stream_is_two_bytes_per_token_until_the_vocabulary_needs_four(stories, small_tokenizer, cache_dir):
    documents = Documents.from_texts(stories)
    assert encode_documents(documents, small_tokenizer, cache_dir=cache_dir).dtype == np.uint16

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"cat": 70_000, "?": 1, "end": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="end")
    tokens = encode_documents(documents, large, cache_dir=cache_dir)
    assert tokens.dtype == np.uint32
    assert tokens.max() == 70_000


def test_second_call_reads_the_cache(stories, small_tokenizer, cache_dir, files_in, monkeypatch):
    first = encode_documents(Documents.from_texts(stories), small_tokenizer, cache_dir=cache_dir)
    before = files_in(cache_dir)
    monkeypatch.setattr(encoding_module, "_encode", None)  # encoding again would fail
    second = encode_documents(Documents.from_texts(stories), small_tokenizer, cache_dir=cache_dir)
    assert second.tolist() == first.tolist()
    assert files_in(cache_dir) == before
    assert isinstance(second, np.memmap)
    assert not second.flags.writeable


def test_other_text_tokenizer_or_limit_has_its_own_cache_entry(stories, small_tokenizer, cache_dir):
    other = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer, eos_token="a")
    for texts, tokenizer, limit in (
        (stories, small_tokenizer, None),
        (stories[::-1], small_tokenizer, None),
        (stories, small_tokenizer, 50),
        (stories, other, None),
    ):
        encode_documents(Documents.from_texts(texts), tokenizer, max_tokens=limit, cache_dir=cache_dir)
    assert len(list(cache_dir.glob("tokens-*"))) == 4


def test_documents_that_are_all_empty_are_an_error_and_leave_no_file(small_tokenizer, cache_dir):
    with pytest.raises(ValueError, match="The 2 documents hold no text"):
        encode_documents(Documents.from_texts(["", "\n"]), small_tokenizer, cache_dir=cache_dir)
    assert not list(cache_dir.glob("*tokens-*"))


def test_an_interrupted_run_leaves_no_broken_cache(stories, small_tokenizer, cache_dir, monkeypatch):
    def stop(*_, **__):
        yield np.zeros(3, dtype=np.uint16)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoding_module, "_encode", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_documents(Documents.from_texts(stories), small_tokenizer, cache_dir=cache_dir)
    assert not list(cache_dir.glob("*tokens-*"))
    tokens = encode_documents(Documents.from_texts(stories), small_tokenizer, cache_dir=cache_dir)
    assert tokens.tolist() == reference(stories, small_tokenizer)
