"""Building and loading models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from transformers import GPT2Config, LlamaConfig

from lightning_mst.configurations import conf_dir
from lightning_mst.models import check_positions, check_vocabulary, from_config, from_pretrained


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def saved(config: LlamaConfig, tmp_path: Path) -> Path:
    from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_from_a_config_is_ready_to_train_in_the_default_dtype(config):
    model = from_config(config)

    assert model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"


def test_a_loaded_model_is_ready_to_train_whatever_mode_and_dtype_it_was_saved_in(saved):
    model = from_pretrained(str(saved))

    assert model.training
    assert model.dtype == torch.float32


def test_a_loaded_model_has_the_saved_weights_unless_random_ones_are_wanted(saved):
    first, second = from_pretrained(str(saved)), from_pretrained(str(saved))
    fresh = from_pretrained(str(saved), random_weights=True)

    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert fresh.lm_head.weight.shape == first.lm_head.weight.shape
    assert not torch.equal(first.lm_head.weight, fresh.lm_head.weight)
    assert fresh.training


def test_the_attention_implementation_can_be_chosen(config, saved):
    assert from_config(config, attn_implementation="eager").config._attn_implementation == "eager"
    assert from_pretrained(str(saved), attn_implementation="eager").config._attn_implementation == "eager"


def test_a_vocabulary_larger_than_the_embedding_raises_with_both_numbers(config):
    model = from_config(config)

    check_vocabulary(model, 50)
    with pytest.raises(ValueError, match=r"tokenizer has 51 entries.*only 50.*model.config.vocab_size=51"):
        check_vocabulary(model, 51)


def test_a_model_that_does_not_name_its_embedding_is_not_checked():
    check_vocabulary(nn.Linear(2, 2), 10**9)


def test_only_learned_positions_limit_the_sequence(config):
    learned = from_config(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))

    check_positions(learned, 16)
    with pytest.raises(ValueError, match=r"17 tokens.*only 16.*data.sequence_length=16"):
        check_positions(learned, 17)
    check_positions(from_config(config), 10**6)


@pytest.mark.parametrize("name", ["llama3_8b", "llama2_7b", "mistral_7b", "qwen2_7b", "gemma2_9b"])
def test_a_shrunk_model_has_the_proportions_of_the_large_one(name):
    def built(shrink: int) -> nn.Module:
        config = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
        config.shrink, config.config.num_hidden_layers = shrink, 2
        with torch.device("meta"):
            return instantiate(config, _convert_="all")

    large, small = built(1), built(16)

    for (key, weight), (_, shrunk) in zip(large.named_parameters(), small.named_parameters(), strict=True):
        assert tuple(shrunk.shape) == tuple(n // 16 for n in weight.shape), key
    groups = [m.config.num_attention_heads / m.config.num_key_value_heads for m in (large, small)]
    assert groups[0] == groups[1]
    eos = small.config.eos_token_id
    assert eos is None or eos < small.config.vocab_size


def test_a_shrunk_model_runs_and_leaves_its_configuration_as_it_was(config):
    small = from_config(config, shrink=2)

    tokens = torch.randint(25, (1, 8))
    small(input_ids=tokens, labels=tokens).loss.backward()
    assert (small.config.hidden_size, small.config.vocab_size, config.hidden_size) == (8, 25, 16)


@pytest.mark.parametrize(
    ("shrink", "message"),
    [
        (4, "shrink=4 would divide vocab_size=50 by 4: not whole numbers"),
        (0, "shrink should be a whole number, 1 or more, got 0"),
        (1.5, "shrink should be a whole number, 1 or more, got 1.5"),
    ],
)
def test_a_model_that_cannot_be_shrunk_so_far_says_which_size_does_not_divide(config, shrink, message):
    with pytest.raises(ValueError, match=message):
        from_config(config, shrink=shrink)


def test_a_configuration_without_the_sizes_to_shrink_says_which_it_lacks():
    with pytest.raises(ValueError, match=r"shrink=2: GPT2Config does not say .*num_key_value_heads"):
        from_config(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2), shrink=2)
