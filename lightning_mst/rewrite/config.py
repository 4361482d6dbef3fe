"""The settings of a rewrite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_mst.ops.chunking import Chunks, check_chunks
from lightning_mst.units import parse_bytes


@dataclass(frozen=True)
class MSTConfig:
    """What ``apply_mst`` rewrites, and how.

    Args:
        mlp_chunks: the paper's M for MLPs: a number of mini-sequences, ``"auto"`` (bounds the bytes of the
            intermediates, never splits where that would cost memory or time), ``"paper"`` (D tokens per
            mini-sequence), or ``None`` to leave MLPs alone.
        lm_head_chunks: the same for the LM head with its loss (``"paper"``: M = V / D).
        checkpoint_layers: which decoder layers recompute their activations in the backward pass: ``"all"``, ``"none"``
            (leave the model's own setting as it is), a whole number n for every n-th layer, a list of layer indices,
            or ``"auto"`` for as few as the device's memory allows; where all are not enough, with whole layers in
            mini-sequences, and then with their inputs on the host.
        layer_chunks: the same as ``mlp_chunks`` for the other token-wise parts of each decoder layer: its norms, the
            projections around attention and the rotary embedding. ``None`` leaves them as they are.
        checkpoint_offload: what checkpointed layers keep in the host's memory: ``None`` (nothing), ``"inputs"`` (each
            layer's input, from the end of its forward pass until shortly before its backward pass), or
            ``"inputs+attention"`` (also the attention's output and log-sum-exp, so that attention is not recomputed).
        offload_fraction: for ``checkpoint_offload="inputs+attention"``: the fraction of the tokens whose queries, keys,
            values and attention projections are moved to the host as well instead of being recomputed, from 0 to 1, or
            ``"auto"`` for as many as can be copied behind the computation and fit into the host's memory.
        mlp_modules: name patterns (``"*.mlp"``, as in ``fnmatch``) that say which modules are MLPs, instead of
            discovery.
        lm_head_module: a name pattern that says which modules are LM heads, instead of discovery.
        device_memory: for ``checkpoint_layers="auto"``: of each device, ``"80GiB"`` (2**30 bytes each), ``"80GB"``
            (10**9 each), or bytes. Default: what the accelerator has.
        sequence_length: for ``checkpoint_layers="auto"``: tokens in the longest sequences. Default: in those of the
            first batch.
        batch_size: for ``checkpoint_layers="auto"``: sequences of that length on each device.

    Raises:
        ValueError: for a value that is none of these.
    """

    mlp_chunks: Chunks = "auto"
    lm_head_chunks: Chunks = "auto"
    checkpoint_layers: Literal["all", "none", "auto"] | int | Sequence[int] = "all"
    layer_chunks: Chunks = None
    checkpoint_offload: Literal["inputs", "inputs+attention"] | None = None
    offload_fraction: float | Literal["auto"] = 0.0
    mlp_modules: str | Sequence[str] | None = None
    lm_head_module: str | None = None
    device_memory: str | int | None = None
    sequence_length: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        check_chunks("mlp_chunks", self.mlp_chunks)
        check_chunks("lm_head_chunks", self.lm_head_chunks)
        check_chunks("layer_chunks", self.layer_chunks)
        _check_checkpoint_layers(self.checkpoint_layers)
        self._check_offload()
        self._check_sizes()
        for name in ("mlp_modules", "lm_head_module"):
            _check_patterns(name, getattr(self, name))
        if self.mlp_modules is not None and self.mlp_chunks is None:
            raise ValueError("mlp_modules names MLPs, but mlp_chunks=None leaves MLPs alone. Drop one of the two.")
        if self.lm_head_module is not None and self.lm_head_chunks is None:
            raise ValueError(
                "lm_head_module names the head, but lm_head_chunks=None leaves it alone. Drop one of them."
            )

    @classmethod
    def for_memory(
        cls, device_memory: str | int, *, sequence_length: int | None = None, batch_size: int = 1, **options: Any
    ) -> MSTConfig:
        """Settings that recompute only as many layers as a device requires.

        Where all are not enough, whole layers run in mini-sequences, and then their inputs go to the host.

        Args:
            device_memory: of each device, such as ``"80GiB"``.
            sequence_length: tokens in the longest sequences; default: in those of the first batch.
            batch_size: sequences of that length on each device.
            **options: other fields.

        Returns:
            A config for ``MSTCallback`` and the strategies, which choose the layers when they know the training step.
            Without Lightning, ``lightning_mst.memory.settle`` chooses them.
        """
        given = {"device_memory": device_memory, "sequence_length": sequence_length, "batch_size": batch_size}
        return cls(checkpoint_layers="auto", **given, **options)  # type: ignore[arg-type]

    def _check_offload(self) -> None:
        if self.checkpoint_offload not in (None, "inputs", "inputs+attention"):
            raise ValueError(
                f"checkpoint_offload={self.checkpoint_offload!r} is not known. Expected None, 'inputs' or "
                "'inputs+attention'."
            )
        if self.checkpoint_offload is not None and self.checkpoint_layers == "none":
            raise ValueError(
                f"checkpoint_offload={self.checkpoint_offload!r} moves what checkpointed layers keep, but "
                "checkpoint_layers='none' checkpoints none. Drop one of the two."
            )
        fraction = self.offload_fraction
        is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if fraction != "auto" and not (is_number and 0 <= fraction <= 1):
            raise ValueError(f"offload_fraction={fraction!r} is not a fraction. Expected 0 to 1, or 'auto'.")
        if fraction != 0 and self.checkpoint_offload != "inputs+attention":
            raise ValueError(
                f"offload_fraction={fraction!r} needs checkpoint_offload='inputs+attention'; got "
                f"{self.checkpoint_offload!r}."
            )
        if fraction != 0 and self.layer_chunks is None:
            raise ValueError(
                f"offload_fraction={fraction!r} moves results of mini-sequences around attention, but layer_chunks="
                "None makes none. Set layer_chunks='auto' as well."
            )

    def _check_sizes(self) -> None:
        for name, least in (("sequence_length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if (name, value) != ("sequence_length", None) and not (
                isinstance(value, int) and not isinstance(value, bool) and value >= least
            ):
                raise ValueError(f"{name}={value!r} is not a whole number of at least {least}.")
        if self.device_memory is not None:
            parse_bytes(self.device_memory)
            if self.checkpoint_layers != "auto":
                raise ValueError(
                    f"device_memory={self.device_memory!r} is for checkpoint_layers='auto', but checkpoint_layers="
                    f"{self.checkpoint_layers!r}. Drop one of the two."
                )

    @property
    def asks_for_nothing(self) -> bool:
        """Whether everything is off, as for a baseline."""
        chunks = (self.mlp_chunks, self.lm_head_chunks, self.layer_chunks)
        return all(setting is None for setting in chunks) and self.checkpoint_layers == "none"

    @property
    def mlp_patterns(self) -> list[str] | None:
        """``mlp_modules`` as a list."""
        if self.mlp_modules is None:
            return None
        return [self.mlp_modules] if isinstance(self.mlp_modules, str) else list(self.mlp_modules)


def _check_checkpoint_layers(value: object) -> None:
    if isinstance(value, str):
        valid = value in ("all", "none", "auto")
    elif isinstance(value, int):
        valid = not isinstance(value, bool) and value >= 1
    elif isinstance(value, Sequence):
        valid = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
        valid = valid and len(set(value)) == len(value) > 0
    else:
        valid = False
    if not valid:
        raise ValueError(
            f"checkpoint_layers={value!r} is not a choice of layers. Expected 'all', 'none', 'auto', a whole number n "
            "of at least 1 (every n-th layer), or a list of different layer indices from 0 on."
        )


def _check_patterns(name: str, value: object) -> None:
    if value is None:
        return
    patterns = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if name == "lm_head_module" and not isinstance(value, str):
        raise ValueError(f"lm_head_module={value!r} is not a module name or pattern, such as 'lm_head' or '*.head'.")
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{name}={value!r} is not a name pattern or a list of them, such as '*.mlp'.")
