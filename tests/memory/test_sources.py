"""A model can be named in every way that a user has at hand, and a name that leads nowhere is explained."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from memory_tools import SIZES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_mst.memory.sources import builder_of

CONFIG = transformers.LlamaConfig(**SIZES)


@pytest.fixture
def folder(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    return tmp_path


def size_of(source) -> tuple[str, int]:
    name, build = builder_of(source)
    with FakeTensorMode():
        return name, sum(p.numel() for p in build().parameters())


def test_a_folder_its_file_a_configuration_and_a_function_are_the_same_model(folder):
    def my_model() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_config(CONFIG)

    sizes = {size_of(source)[1] for source in (folder, str(folder), folder / "config.json", CONFIG, my_model)}

    assert len(sizes) == 1
    assert builder_of(my_model)[0] == "my_model"
    assert builder_of(CONFIG)[0] == "llama"


def test_the_names_of_conf_model_are_known_and_take_no_memory():
    assert size_of("llama3_8b") == ("llama3_8b", 8_030_261_248)
    assert size_of("llama_small")[0] == "llama_small"


def test_a_folder_without_a_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No causal language model can be built from .*Expected one of .*llama3_8b"):
        builder_of(tmp_path)


@pytest.mark.parametrize("lost", [["hidden_size"], ["num_hidden_layers", "vocab_size"]])
def test_a_configuration_that_lacks_a_size_is_refused_instead_of_filled_in(folder, lost):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in lost}))

    with pytest.raises(ValueError, match="does not say " + ", ".join(sorted(lost, reverse=True))):
        builder_of(folder)


@pytest.mark.parametrize("family", ["GPT2", "Bloom", "OPT", "MT5", "Gemma3", "NemotronH"])
def test_sizes_under_other_names_are_found(family, tmp_path):
    from lightning_mst.memory.sources import check_fields

    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    check_fields(str(tmp_path))


@pytest.mark.parametrize("text", ["{", '{"model_type": "unheard_of"}', '{"hidden_size": 8}'])
def test_a_configuration_that_cannot_be_read_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="No causal language model can be built from"):
        builder_of(tmp_path)


def test_what_is_no_model_at_all_is_named():
    with pytest.raises(TypeError, match=r"got float: 8\.0"):
        builder_of(8.0)
    with pytest.raises(ValueError, match="stands for any model of the hub"):
        builder_of("hf")[1]()


def test_building_leaves_the_default_dtype_alone(folder):
    before = torch.get_default_dtype()
    size_of(folder)
    assert torch.get_default_dtype() == before
