"""What a plan is made for: the ways to name a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from lightning_mst.configurations import conf_dir, names_of
from lightning_mst.models import from_config, from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T")

_DEFAULT_VOCABULARY = 8192


def builder_of(source: str | Path | PreTrainedConfig | Callable[[], nn.Module]) -> tuple[str, Callable[[], nn.Module]]:
    """A name for a model and a function that builds it.

    Args:
        source: the name of a file of ``conf/model``; a local folder or ``config.json``, or a name on the Hugging Face
            hub (of which only the configuration is read); a transformers configuration; or a function that builds a
            module, which will be called on fake tensors.

    Raises:
        ValueError: there is no such model, or its configuration lacks what a language model needs.
        TypeError: ``source`` is none of these.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        if name in names_of("model"):
            return name, _from_conf(name)
        check_fields(_folder(name))
        return name, lambda: _readable(lambda: from_pretrained(_folder(name), random_weights=True), name)
    if hasattr(source, "model_type"):
        return str(source.model_type), lambda: _readable(lambda: from_config(source), type(source).__name__)
    if callable(source):
        return getattr(source, "__name__", type(source).__name__), source
    raise TypeError(
        f"A plan needs a model's name, configuration or building function; got {type(source).__name__}: {source!r}"
    )


def check_fields(name: str, *, revision: str | None = None) -> None:
    """Makes sure that a configuration says how large its model is: transformers fills in its own sizes otherwise.

    Args:
        name: a name on the Hugging Face hub, or a local folder with a ``config.json``.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: there is no such configuration, it can't be read, or it lacks a size.
    """
    from transformers import AutoConfig

    config = _readable(lambda: AutoConfig.from_pretrained(name, revision=revision or "main"), name)
    given = _keys(type(config).get_config_dict(name, revision=revision or "main")[0])
    aliases = {**config.attribute_map, **getattr(getattr(config, "text_config", None), "attribute_map", {})}
    missing = [field for field in _SIZES if not {field, aliases.get(field)} & given]
    if any("layers" in key for key in given):  # some count theirs by another name
        missing = [field for field in missing if field != "num_hidden_layers"]
    if missing:
        raise ValueError(
            f"The configuration of {name!r} does not say {', '.join(missing)}: it has {', '.join(sorted(given))}. Add "
            "what is missing to its config.json."
        )


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


def _keys(config: Mapping[str, Any]) -> set[str]:
    """The names of all values, those of parts (a text model in a larger one) included."""
    return set(config).union(*(_keys(value) for value in config.values() if isinstance(value, Mapping)))


def _from_conf(name: str) -> Callable[[], nn.Module]:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
    if "_target_" not in config:
        raise ValueError(f"conf/model/{name}.yaml stands for any model of the hub: name that model or a local folder.")
    if OmegaConf.select(config, "config.vocab_size", default=0) is None:
        config.config.vocab_size = _DEFAULT_VOCABULARY
    return lambda: instantiate(config, _convert_="all")


def _folder(name: str) -> str:
    path = Path(name)
    return str(path.parent) if path.suffix == ".json" and path.is_file() else name


def _readable(read: Callable[[], T], name: str) -> T:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return read()
    except (OSError, KeyError, AttributeError, TypeError, ValueError, StrictDataclassError) as error:
        choices = ", ".join(name for name in names_of("model") if name != "hf")
        raise ValueError(
            f"No causal language model can be built from {name!r}: {' '.join(str(error).split())[:300]}. Expected one "
            f"of {choices}; a folder or a hub name whose config.json has model_type, hidden_size, num_hidden_layers "
            "and so on; or a function that builds the module."
        ) from error
