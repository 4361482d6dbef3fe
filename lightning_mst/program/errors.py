"""Mistakes in a configuration, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException, InstantiationException

__all__ = ["ConfigurationError", "configuration_of"]


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
        mistakes = (ValueError, OSError, ImportError, StrictDataclassError, MisconfigurationException)
        if isinstance(cause, (*mistakes, InstantiationException)) or "unexpected keyword argument" in str(cause):
            raise ConfigurationError(f"{part}: {cause}") from cause
        raise cause from cause.__cause__
