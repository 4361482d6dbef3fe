import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_mst.data import END_OF_TEXT, Documents, load_tokenizer, train_tokenizer, vocabulary_size
from lightning_mst.data import tokenizer as tokenizer_module
from lightning_mst.data.tokenizer import tokenizer_fingerprint


@pytest.fixture
def trainings(monkeypatch):
    """Count the calls that train."""
    calls = []
    train = tokenizer_module._train_bpe
    monkeypatch.setattr(
        tokenizer_module,
        "_train_bpe",
        lambda documents, *, vocab_size: calls.append(vocab_size) or train(documents, vocab_size=vocab_size),
    )
    return calls


def test_any_text_decodes_to_itself(small_tokenizer):
    for text in ("the cat sat", "def f(x):\n\treturn  x\r\n", "größe 漢字 🦊 \x00", "  leading and trailing  "):
        assert small_tokenizer.decode(small_tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_vocabulary_has_every_byte_the_end_token_and_merges(small_tokenizer):
    assert vocabulary_size(small_tokenizer) == len(small_tokenizer) == 300
    assert small_tokenizer.eos_token == small_tokenizer.bos_token == END_OF_TEXT
    assert small_tokenizer.convert_ids_to_tokens(small_tokenizer.eos_token_id) == END_OF_TEXT


def test_it_adds_no_token_by_itself(small_tokenizer):
    assert small_tokenizer.eos_token_id not in small_tokenizer("the cat")["input_ids"]


def test_training_twice_gives_the_same_tokenizer(stories, tmp_path):
    first, second = (
        train_tokenizer(Documents.from_texts(stories), vocab_size=400, cache_dir=tmp_path / name) for name in ("a", "b")
    )
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_trained_tokenizer_is_loaded_from_the_cache(stories, tmp_path, trainings):
    documents = Documents.from_texts(stories)
    first = train_tokenizer(documents, vocab_size=300, cache_dir=tmp_path)
    second = train_tokenizer(Documents.from_texts(stories), vocab_size=300, cache_dir=tmp_path)
    assert trainings == [300]
    assert first.get_vocab() == second.get_vocab()
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def test_other_text_vocabulary_or_tokenizers_version_trains_anew(stories, tmp_path, trainings, monkeypatch):
    train_tokenizer(Documents.from_texts(stories), vocab_size=300, cache_dir=tmp_path)
    train_tokenizer(Documents.from_texts(stories), vocab_size=301, cache_dir=tmp_path)
    train_tokenizer(Documents.from_texts(stories[1:]), vocab_size=300, cache_dir=tmp_path)
    monkeypatch.setattr(tokenizers, "__version__", "0")
    train_tokenizer(Documents.from_texts(stories), vocab_size=300, cache_dir=tmp_path)
    assert trainings == [300, 301, 300, 300]
    assert len(list(tmp_path.iterdir())) == 4


def test_default_cache_folder_is_used_when_none_is_given(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train_tokenizer(Documents.from_texts(stories), vocab_size=300)
    assert [file.suffix for file in (tmp_path / "lightning_mst").iterdir()] == [".json"]


def test_training_reads_no_more_than_its_share_of_a_large_corpus(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_CHARACTERS", 10)
    read = []

    def texts():
        for text in ("sixsix", "seven77", "never read"):
            read.append(text)
            yield text

    assert list(tokenizer_module._first_characters(texts(), 10)) == ["sixsix", "seve"]
    assert read == ["sixsix", "seven77"]


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary(tmp_path):
    tokenizer = train_tokenizer(Documents.from_texts(["aaaa"]), vocab_size=8192, cache_dir=tmp_path)
    assert 257 <= vocabulary_size(tokenizer) < 265


def test_too_small_a_vocabulary_is_refused(stories, tmp_path):
    with pytest.raises(ValueError, match=r"at least 257 .* got 256"):
        train_tokenizer(Documents.from_texts(stories), vocab_size=256, cache_dir=tmp_path)


def test_a_saved_tokenizer_is_loaded_from_its_folder(small_tokenizer, tmp_path):
    small_tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded("two dogs")["input_ids"] == small_tokenizer("two dogs")["input_ids"]
    assert loaded.eos_token_id == small_tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["missing", "nobody/nothing"])
def test_a_missing_tokenizer_is_named(name):
    with pytest.raises(FileNotFoundError, match=rf"(?s)no tokenizer under '{name}'.*tokenizer=None"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer under"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_token_is_refused(small_tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no end-of-text token \(eos_token\)"):
        load_tokenizer(str(tmp_path))


def test_vocabulary_size_covers_ids_with_gaps():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b")) == 10


def test_cutting_a_long_text_for_training_does_not_change_the_tokenizer(stories, tmp_path, monkeypatch):
    documents = Documents.from_texts(["\n".join(stories)])
    whole = train_tokenizer(documents, vocab_size=400, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(tokenizer_module, "_PIECE", 700)
    cut = train_tokenizer(documents, vocab_size=400, cache_dir=tmp_path / "cut")
    assert cut.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
