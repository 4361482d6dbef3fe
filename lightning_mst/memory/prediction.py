"""The peak memory of one training step, and what it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_mst.memory.devices import Device
from lightning_mst.memory.distributed import is_sharded
from lightning_mst.memory.layers import Role, peaks_of
from lightning_mst.memory.rehearsal import Step, rehearse
from lightning_mst.memory.tensor_bytes import Peak

KINDS = (
    "weights",
    "gradients",
    "optimizer_states",
    "activations_kept",
    "activations_inside",
    "logits",
    "buffers",
    "overhead",
)
"""What memory is divided into, in the order of tables and figures."""


@dataclass(frozen=True)
class Prediction:
    """The peak of a training step on one device.

    Attributes:
        kinds: bytes of each of ``KINDS`` at the peak. ``"activations_inside"`` were made in this pass through the
            layer of the peak (or by the head, or the optimizer's step), ``"activations_kept"`` before it;
            ``"buffers"`` holds the batch as well; ``"overhead"`` is the device's own.
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        block: the block of the peak, such as ``"layer 31, mlp"``.
        host: the most bytes in the host's memory at any place of the step.
    """

    kinds: Mapping[str, int]
    phase: str
    block: str
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.kinds.values())

    @property
    def tensors(self) -> int:
        """Bytes of tensors on the device, without its overhead, as ``torch.cuda.max_memory_allocated`` counts them."""
        return self.total - self.kinds["overhead"]


def predict(
    model: nn.Module, step: Step, fake: FakeTensorMode, *, device: Device, vocab_size: int | None = None
) -> Prediction:
    """Predicts the peak memory of a training step.

    Args:
        model: with fake weights, in train mode, rewritten or not; as deep as it is, but only a few of its layers run.
        step: the step.
        fake: the mode of the weights.
        device: what it would run on.
        vocab_size: V, to tell logits from other activations. Default: the rows of the model's output embedding.

    Returns:
        The prediction.
    """
    vocab_size = vocab_size or vocab_size_of(model)
    # A sharded model gathers the next layer's weights ahead of time and reduces the last one's gradients behind.
    shallow = 4 if is_sharded(step.strategy) else 2
    peaks = peaks_of(model, lambda: rehearse(model, step, fake, vocab_size=vocab_size).peaks, shallow=shallow)
    role, peak = max(peaks.items(), key=lambda item: item[1].total)
    # What is on the host grows and shrinks on its own: where the device is fullest, it need not be.
    host = max(at.kinds.get("host", 0) for at in peaks.values())
    return Prediction(_divided(peak, device), role.phase, _describe(role), host)


def vocab_size_of(model: nn.Module) -> int | None:
    """V, if the model or a module in it names its output embedding."""
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        weight = getattr(get_head(), "weight", None) if get_head is not None else None
        if weight is not None:
            return int(weight.shape[0])
    return None


def _divided(peak: Peak, device: Device) -> dict[str, int]:
    kinds = {kind: peak.kinds.get(kind, 0) for kind in KINDS}
    kinds["activations_inside"] = peak.inside
    kinds["activations_kept"] = peak.kinds.get("activations", 0) - peak.inside
    kinds["overhead"] = device.overhead
    return kinds


def _describe(role: Role) -> str:
    if role.phase == "optimizer":
        return "optimizer step"
    if role.layer is None:
        return role.block or "loss"
    return f"layer {role.layer}, {role.block}" if role.block else f"layer {role.layer}"
