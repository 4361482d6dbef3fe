"""Mistakes in a configuration, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException, InstantiationException

__all__ = ["ConfigurationError", "configuration_of"]

# Packages that a plain installation does without -> the extra that brings them.
EXTRAS = {
    "bitsandbytes": "quantized",
    "datasets": "data",
    "deepspeed": "deepspeed",
    "peft": "peft",
    "tensorboard": "loggers",
    "torchao": "quantized",
    "wandb": "loggers",
}


class ConfigurationError(CompactHydraException):
    """What the user asked for cannot be done. Hydra prints its message without a stack trace."""


@contextmanager
def configuration_of(part: str) -> Iterator[None]:
    """Turn the errors that a wrong value causes into a :class:`ConfigurationError`; let all others pass as they are.

    Args:
        part: What is being built, such as ``"trainer"``: it starts the message.

    Raises:
        ConfigurationError: From a ``ValueError``, ``OSError``, ``ImportError``, Lightning's
            ``MisconfigurationException``, a refusal of a transformers configuration, or an unexpected keyword.
    """
    from huggingface_hub.errors import StrictDataclassError
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        # Hydra wraps whatever a constructor raises. The wrapped error is the one to judge, and to show.
        cause: BaseException = (error.__cause__ or error) if isinstance(error, InstantiationException) else error
        package = _missing_package(error)
        if package is not None:
            raise ConfigurationError(
                f"{part}: The package {package} is not installed: pip install 'lightning-mst[{EXTRAS[package]}]'"
            ) from error
        mistakes = (ValueError, OSError, ImportError, StrictDataclassError, MisconfigurationException)
        if isinstance(cause, (*mistakes, InstantiationException)) or "unexpected keyword argument" in str(cause):
            raise ConfigurationError(f"{part}: {cause}") from cause
        raise cause from cause.__cause__


def _missing_package(error: BaseException | None) -> str | None:
    """The optional package whose absence is behind an error, if that is the reason."""
    while error is not None:
        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if package in EXTRAS:
            return package
        error = error.__cause__
    return None
