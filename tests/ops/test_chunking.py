import pytest

from lightning_mst.ops.chunking import (
    BlockCost,
    check_chunks,
    chunk_bounds,
    few_logits,
    lm_head_split,
    mlp_num_chunks,
    resolve_num_chunks,
)

FREE = BlockCost(1, 0)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64, 1000, 1001])
@pytest.mark.parametrize("wanted", [1, 2, 3, 8, 999, 5000])
def test_chunks_hold_every_token_once_and_differ_by_at_most_one_in_length(num_tokens: int, wanted: int) -> None:
    num_chunks = resolve_num_chunks(num_tokens, num_chunks=wanted, chunk_tokens=None)
    bounds = chunk_bounds(num_tokens, num_chunks)
    assert [t for start, stop in bounds for t in range(start, stop)] == list(range(num_tokens))
    lengths = [stop - start for start, stop in bounds]
    assert len(lengths) == min(wanted, num_tokens)
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


def test_no_tokens_are_one_empty_chunk() -> None:
    assert resolve_num_chunks(0, num_chunks=4, chunk_tokens=None) == 1
    assert resolve_num_chunks(0, num_chunks=None, chunk_tokens=4) == 1
    assert chunk_bounds(0, 1) == [(0, 0)]


@pytest.mark.parametrize(("num_tokens", "chunk_tokens"), [(10, 3), (9, 3), (1, 3), (1000, 7), (5, 100)])
def test_chunk_tokens_is_the_most_that_a_chunk_holds(num_tokens: int, chunk_tokens: int) -> None:
    num_chunks = resolve_num_chunks(num_tokens, num_chunks=None, chunk_tokens=chunk_tokens)
    lengths = [stop - start for start, stop in chunk_bounds(num_tokens, num_chunks)]
    assert max(lengths) <= chunk_tokens
    # One chunk fewer would not do.
    assert (num_chunks - 1) * chunk_tokens < num_tokens


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "2"])
@pytest.mark.parametrize("name", ["num_chunks", "chunk_tokens"])
def test_a_wrong_number_of_chunks_is_refused_by_name_and_value(name: str, value: object) -> None:
    both = {"num_chunks": None, "chunk_tokens": None, name: value}
    with pytest.raises(ValueError, match=name) as error:
        resolve_num_chunks(10, **both)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [None, 2])
def test_exactly_one_of_num_chunks_and_chunk_tokens_must_be_given(value: int | None) -> None:
    with pytest.raises(ValueError, match="exactly one of num_chunks and chunk_tokens"):
        resolve_num_chunks(10, num_chunks=value, chunk_tokens=value)


@pytest.mark.parametrize("value", [1, 7, "auto", "paper", None])
def test_valid_chunk_settings_pass(value: object) -> None:
    check_chunks("mlp_chunks", value)


@pytest.mark.parametrize("value", [0, -3, True, False, 1.5, "Auto", "8", [4]])
def test_an_invalid_chunk_setting_is_refused_with_its_name_its_value_and_the_choices(value: object) -> None:
    with pytest.raises(ValueError, match="lm_head_chunks=") as error:
        check_chunks("lm_head_chunks", value)
    for part in (repr(value), "'auto'", "'paper'", "None", "at least 1"):
        assert part in str(error.value)


@pytest.mark.parametrize("hidden_size", [64, 4096])
def test_the_papers_mlp_rule_gives_mini_sequences_of_hidden_size_tokens(hidden_size: int) -> None:
    def chunks(num_tokens: int) -> int:
        return mlp_num_chunks("paper", num_tokens=num_tokens, hidden_size=hidden_size)

    assert chunks(1) == 1
    assert chunks(hidden_size - 1) == 1
    assert chunks(hidden_size) == 1
    assert chunks(16 * hidden_size) == 16
    for num_tokens in (hidden_size + 1, 3 * hidden_size - 1, 16 * hidden_size + 5):
        lengths = [stop - start for start, stop in chunk_bounds(num_tokens, chunks(num_tokens))]
        assert max(lengths) <= hidden_size


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "expected"),
    [(4096, 128256, 32), (3584, 256000, 72), (4096, 32000, 8), (4096, 4096, 1), (4096, 1000, 1)],
    ids=["Llama-3", "Gemma-2-9B", "Llama-2", "V equals D", "V below D"],
)
def test_the_papers_head_rule_gives_vocabulary_over_hidden_size_rounded_up(
    hidden_size: int, vocab_size: int, expected: int
) -> None:
    split = lm_head_split("paper", hidden_size=hidden_size, vocab_size=vocab_size, num_tokens=10**6, cost=FREE)
    assert split == {"num_chunks": expected}


@pytest.mark.parametrize("hidden_size", [64, 1024, 4096])
def test_auto_splits_an_mlp_only_from_twice_the_hidden_size_and_2048_tokens_on(hidden_size: int) -> None:
    smallest = max(hidden_size, 1024)

    def chunks(num_tokens: int) -> int:
        return mlp_num_chunks("auto", num_tokens=num_tokens, hidden_size=hidden_size)

    assert {chunks(n) for n in (0, 1, smallest, smallest + 1, 2 * smallest - 1)} == {1}
    assert chunks(2 * smallest) == 2
    for num_tokens in (2 * smallest, 3 * smallest - 1, 10 * smallest + 7, 100 * smallest):
        lengths = [stop - start for start, stop in chunk_bounds(num_tokens, chunks(num_tokens))]
        assert min(lengths) >= smallest
        assert max(lengths) < 2 * smallest


@pytest.mark.parametrize(("hidden_size", "expected"), [(64, 512), (2048, 512), (4096, 1024), (8192, 2048)])
def test_the_auto_head_chunk_stays_the_same_as_sequences_grow(hidden_size: int, expected: int) -> None:
    longest = []
    for num_tokens in (8192, 65536, 1048576):
        split = lm_head_split("auto", hidden_size=hidden_size, vocab_size=128256, num_tokens=num_tokens, cost=FREE)
        num_chunks = resolve_num_chunks(num_tokens, num_chunks=None, **split)
        longest.append(max(stop - start for start, stop in chunk_bounds(num_tokens, num_chunks)))
    assert longest == [expected] * 3


def test_auto_splits_an_mlp_only_where_that_saves_more_than_the_sums_of_its_gradients_take() -> None:
    cost = BlockCost(per_token=100, per_split=100 * 6000)

    def chunks(num_tokens: int) -> int:
        return mlp_num_chunks("auto", num_tokens=num_tokens, hidden_size=1024, cost=cost)

    assert [chunks(n) for n in (2048, 4096, 7168, 8192)] == [1, 1, 7, 8]


def test_auto_splits_a_frozen_mlp_into_chunks_of_1024_tokens_however_wide_it_is() -> None:
    frozen, trained = BlockCost(100, 0), BlockCost(100, 1)
    assert mlp_num_chunks("auto", num_tokens=8192, hidden_size=4096, cost=frozen) == 8
    assert mlp_num_chunks("auto", num_tokens=8192, hidden_size=4096, cost=trained) == 2


def test_auto_splits_a_head_only_where_its_logits_outweigh_the_sums_of_its_gradients() -> None:
    def split(num_tokens: int, per_split: int) -> dict[str, int]:
        cost = BlockCost(per_token=2 * 1000, per_split=per_split)
        return lm_head_split("auto", hidden_size=4096, vocab_size=1000, num_tokens=num_tokens, cost=cost)

    sums = 4 * 1000 * 4096
    assert split(8191, sums) == {"num_chunks": 1}
    assert split(8192, sums) == {"chunk_tokens": 1024}
    assert split(1, 0) == {"chunk_tokens": 1024}


@pytest.mark.parametrize("setting", [1, 5])
def test_a_number_of_chunks_is_obeyed(setting: int) -> None:
    assert mlp_num_chunks(setting, num_tokens=100, hidden_size=4096) == setting
    split = lm_head_split(setting, hidden_size=4096, vocab_size=128256, num_tokens=10**6, cost=FREE)
    assert split == {"num_chunks": setting}
    assert mlp_num_chunks(setting, num_tokens=1, hidden_size=4096) == 1


@pytest.mark.parametrize("setting", ["auto", "paper"])
def test_logits_of_at_most_16_mib_are_few(setting: str) -> None:
    limit = 16 * 2**20 // (4 * 1024)
    assert few_logits(setting, num_tokens=limit, vocab_size=1024, element_size=4)
    assert not few_logits(setting, num_tokens=limit + 1, vocab_size=1024, element_size=4)
    assert few_logits(setting, num_tokens=2 * limit, vocab_size=1024, element_size=2)


def test_logits_are_never_few_where_a_number_of_chunks_was_asked_for() -> None:
    assert not few_logits(4, num_tokens=1, vocab_size=10, element_size=2)
