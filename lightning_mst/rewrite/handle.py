"""``apply_mst``: the rewrite of a whole model, its table, and the way back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_mst.rewrite.checkpointing import (
    checkpoint_layer,
    choose_layers,
    is_checkpointed,
    is_checkpointed_by_itself,
    release_host_memory,
    switch_models,
    why_not_checkpointed,
)
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.discovery import Candidate, find_layers, find_mlps, match_mlps
from lightning_mst.rewrite.heads import find_lm_heads, match_lm_heads
from lightning_mst.rewrite.joining import FirstForm
from lightning_mst.rewrite.layer_parts import LayerParts, find_layer_parts
from lightning_mst.rewrite.mlp import MLPForm
from lightning_mst.rewrite.offloading import Offload
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.shadow import forms, lifted, restore, shadowed


@dataclass(frozen=True)
class Row:
    """What became of one module.

    Attributes:
        block: ``"MLP"``, ``"LM head"``, ``"attention"``, ``"norm"`` or ``"layer"``.
        name: the module's dotted name, or ``""`` where there is none.
        module: its class.
        form: what it is now: ``"M = 8"`` or ``"M = auto"`` mini-sequences, ``"checkpointed"``, or ``"as it was"``.
        reason: why it was left as it was, or what joined it.
    """

    block: str
    name: str
    module: str
    form: str
    reason: str = ""

    @property
    def rewritten(self) -> bool:
        """Whether anything changed."""
        return self.form != _LEFT


_LEFT = "as it was"
_CHECKPOINTED = {
    None: "checkpointed",
    "inputs": "checkpointed, input on the host",
    "inputs+attention": "checkpointed, input and attention on the host",
}


class MSTHandle:
    """A rewritten model: shows what was done, changes it, takes it back.

    Attributes:
        model: the model.
        config: the settings in force; ``None`` after ``remove``.
        rows: a ``Row`` for every module that was rewritten or considered.
        layers: the model's repeated layers, in order.
        pace: what the number of mini-sequences is adapted to while the model trains.
    """

    def __init__(self, model: nn.Module, config: MSTConfig) -> None:
        self.model = model
        self.config: MSTConfig | None = None
        self.rows: list[Row] = []
        self.layers: list[nn.Module] = []
        self.pace = Pace()
        self._verdicts: dict[object, Any] = {}
        self._apply(config)

    def update(self, config: MSTConfig | None = None, **options: Any) -> MSTHandle:
        """Changes the settings in place.

        Args:
            config: new settings; default: those in force.
            **options: fields of ``MSTConfig`` to change in them.

        Returns:
            The handle itself.

        Raises:
            ValueError: as ``apply_mst``; the model then keeps the form that it had.
        """
        self._apply(make_config(config or self.config, options))
        return self

    def remove(self) -> None:
        """Gives back the model as it was before ``apply_mst``."""
        self._restore()
        self.config, self.rows, self.layers = None, [], []

    def table(self) -> Table:
        """What was rewritten, what was not and why; equal modules of several layers share a line."""
        title = f"Mini-sequence form of {type(self.model).__name__}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
        for column in ("block", "modules", "class", "form"):
            table.add_column(column, overflow="fold")
        for (block, name, module, form, reason), count in _grouped(self.rows).items():
            names = f"{count} x {name}" if count > 1 else name or "-"
            what = f"{form}: {reason}" if reason else form
            table.add_row(block, names, module, what, style="yellow" if form == _LEFT else None)
        return table

    def print(self) -> None:
        """Prints the table to the terminal."""
        Console().print(self.table())

    def __str__(self) -> str:
        """The table as plain text."""
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def _restore(self) -> None:
        release_host_memory(self.model)
        for module in list(shadowed(self.model)):
            restore(module)

    def _apply(self, config: MSTConfig) -> None:
        # First the plan, so that an error leaves the model in the form that it has.
        with lifted(self.model):
            plan = _Plan(self.model, config, self._verdicts)
        self._restore()
        plan.carry_out()
        for form in forms(self.model):
            if hasattr(form, "pace"):
                form.pace = self.pace
        self.config, self.rows, self.layers = config, plan.rows, plan.layers


class _Plan:
    """Everything is decided, and every error raised, before the first module is touched."""

    def __init__(self, model: nn.Module, config: MSTConfig, verdicts: dict[object, Any]) -> None:
        self._model = model
        self._config = config
        self._verdicts = verdicts
        self._layers = find_layers(model)
        self.rows: list[Row] = []
        self._mlps = self._choose_mlps(model)
        self._heads = self._choose_heads(model)
        self._parts = self._choose_parts(model)
        self._unfit = {
            index: reason
            for index, (_, layer) in enumerate(self._layers)
            if (reason := why_not_checkpointed(model, layer)) is not None
        }
        self._chosen = choose_layers(config.checkpoint_layers, len(self._layers)) - self._unfit.keys()
        self.layers = [layer for _, layer in self._layers]
        self._describe_layers()
        wanted = any(c is not None for c in (config.mlp_chunks, config.lm_head_chunks, config.layer_chunks))
        if wanted and not (self._mlps or self._heads or self._parts.attentions):
            raise ValueError(
                f"Nothing to rewrite in {type(model).__name__}: "
                + "; ".join(dict.fromkeys(f"{r.block}: {r.reason}" for r in self.rows if r.reason))
                + ". Name the modules (mlp_modules='*.mlp', lm_head_module='lm_head'), or switch all blocks off "
                "(mlp_chunks=None, lm_head_chunks=None, layer_chunks=None)."
            )
        if not wanted and config.checkpoint_layers != "none" and not self._layers:
            raise ValueError(
                f"checkpoint_layers={config.checkpoint_layers!r}, but {type(model).__name__} has no repeated layers: "
                "no transformers layer and no ModuleList or Sequential of equal blocks."
            )

    def carry_out(self) -> None:
        config = self._config
        for blocks, chunks in (
            (self._mlps, config.mlp_chunks),
            (self._heads, config.lm_head_chunks),
            (self._parts.attentions, config.layer_chunks),
            # After the MLPs: a norm that joins one may do more than that.
            (self._parts.norms, config.layer_chunks),
        ):
            for block in blocks:
                assert block.rewrite is not None
                assert chunks is not None
                block.rewrite(chunks)
        if config.checkpoint_layers != "none":
            switch_models(self._model, bool(self._chosen))
            what = config.checkpoint_offload
            offload = None if what is None else Offload(what, len(self._chosen), config.offload_fraction)
            for index, (_, layer) in enumerate(self._layers):
                checkpoint_layer(layer, index in self._chosen, offload)
        for _, layer in self._layers:
            for form in forms(layer):
                if isinstance(form, (MLPForm, FirstForm)):
                    form.in_checkpoint = is_checkpointed(layer)

    def _choose_mlps(self, model: nn.Module) -> list[Candidate]:
        config = self._config
        if config.mlp_chunks is None:
            return []
        patterns = config.mlp_patterns
        if patterns is None:
            candidates = find_mlps(model, self._layers, self._verdicts)
        else:
            candidates = match_mlps(model, patterns, self._verdicts)
        if not candidates:
            self._left("MLP", Candidate("", "", None, "no layer holds an up and a down projection"))
        for candidate in candidates:
            if candidate.rewrite is None and patterns is not None:
                raise ValueError(f"{_cannot(candidate)} Take it out of mlp_modules.")
            if candidate.refused:
                raise ValueError(
                    f"{_cannot(candidate)} Set mlp_chunks=None to rewrite the LM head alone, or name dense MLPs in "
                    "mlp_modules."
                )
        return self._choose("MLP", candidates, config.mlp_chunks)

    def _choose_heads(self, model: nn.Module) -> list[Candidate]:
        config = self._config
        if config.lm_head_chunks is None:
            return []
        if config.lm_head_module is None:
            return self._choose("LM head", find_lm_heads(model, self._layers), config.lm_head_chunks)
        candidates = match_lm_heads(model, config.lm_head_module)
        for candidate in candidates:
            if candidate.rewrite is None:
                raise ValueError(f"{_cannot(candidate)} Take it out of lm_head_module.")
        return self._choose("LM head", candidates, config.lm_head_chunks)

    def _choose_parts(self, model: nn.Module) -> LayerParts:
        chunks = self._config.layer_chunks
        if chunks is None:
            return LayerParts()
        found = find_layer_parts(model, self._layers, self._verdicts)
        if not found.attentions:
            self._left("attention", Candidate("", "", None, "no attention found in the layers"))
        return LayerParts(
            self._choose("attention", found.attentions, chunks), self._choose("norm", found.norms, chunks)
        )

    def _choose(self, block: str, candidates: list[Candidate], chunks: int | str) -> list[Candidate]:
        for candidate in candidates:
            if candidate.rewrite is None:
                self._left(block, candidate)
            else:
                form = f"M = {chunks}"
                self.rows.append(Row(block, candidate.name, candidate.class_name, form, candidate.reason))
        return [candidate for candidate in candidates if candidate.rewrite is not None]

    def _describe_layers(self) -> None:
        if self._config.checkpoint_layers == "none":
            return
        if not self._layers:
            self._left("layer", Candidate("", "", None, "no repeated layers found, so nothing is checkpointed"))
        for index, (name, layer) in enumerate(self._layers):
            if index in self._chosen:
                form = _CHECKPOINTED[self._config.checkpoint_offload]
                self.rows.append(Row("layer", name, type(layer).__name__, form))
            else:
                reason = self._unfit.get(index) or f"not chosen by checkpoint_layers={self._config.checkpoint_layers!r}"
                form = "not checkpointed" if is_checkpointed_by_itself(layer) else _LEFT
                self.rows.append(Row("layer", name, type(layer).__name__, form, reason))

    def _left(self, block: str, candidate: Candidate) -> None:
        self.rows.append(Row(block, candidate.name, candidate.class_name, _LEFT, candidate.reason))


def _cannot(candidate: Candidate) -> str:
    return f"{candidate.name} ({candidate.class_name}) can't run in mini-sequence form: {candidate.reason}."


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str, str, str], int]:
    groups: dict[tuple[str, str, str, str, str], int] = {}
    for row in rows:
        key = (row.block, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name), row.module, row.form, row.reason)
        groups[key] = groups.get(key, 0) + 1
    return groups


def make_config(config: MSTConfig | None, options: dict[str, Any]) -> MSTConfig:
    """A config with some fields changed.

    Args:
        config: where to start; default: the default settings.
        options: fields of ``MSTConfig`` to change.

    Raises:
        TypeError: for a ``config`` that is no ``MSTConfig``, or an option that is no field of it.
        ValueError: for a value that a field can't have.
    """
    if config is not None and not isinstance(config, MSTConfig):
        raise TypeError(f"Expected an MSTConfig; got {type(config).__name__}. Options are given by keyword.")
    known = [f.name for f in fields(MSTConfig)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"Unknown option {unknown[0]!r}. The options are {', '.join(known)}.")
    return replace(config or MSTConfig(), **options)


def apply_mst(model: nn.Module, config: MSTConfig | None = None, **options: Any) -> MSTHandle:
    """Lets a model's MLPs and LM head run over mini-sequences, and checkpoints its decoder layers.

    The model computes the same function and the same gradients; its parameters, ``state_dict``, module names and
    classes stay as they are. Works on any ``nn.Module``, with or without Lightning, before or after it is wrapped for
    distribution. Applying again replaces the earlier settings.

    Args:
        model: the model, or a module that holds it. Discovery finds transformers models and plain PyTorch ones.
        config: the settings; default ``MSTConfig()``.
        **options: fields of ``MSTConfig``, changed in ``config``.

    Returns:
        A handle that prints what was done, changes it and takes it back.

    Raises:
        TypeError: for an unknown option, or a ``model`` that is no ``nn.Module``.
        ValueError: for a wrong value, a pattern that matches nothing, experts that take a limited number of tokens,
            or a model in which there is nothing to rewrite. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_mst needs an nn.Module; got {type(model).__name__}.")
    return MSTHandle(model, make_config(config, options))
