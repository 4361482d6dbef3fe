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
    is_checkpointed_by_itself,
    switch_models,
)
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.discovery import (
    Candidate,
    find_layers,
    find_lm_head,
    find_mlps,
    match_modules,
    post_norm_of,
    why_not_a_head,
)
from lightning_mst.rewrite.lm_head import rewrite_lm_head
from lightning_mst.rewrite.mlp import rewrite_mlp
from lightning_mst.rewrite.probe import why_not_token_wise
from lightning_mst.rewrite.shadow import restore, shadowed


@dataclass(frozen=True)
class Row:
    """What became of one module.

    Attributes:
        block: ``"MLP"``, ``"LM head"`` or ``"layer"``.
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


class MSTHandle:
    """A rewritten model: shows what was done, changes it, takes it back.

    Attributes:
        model: the model.
        config: the settings in force; ``None`` after ``remove``.
        rows: a ``Row`` for every module that was rewritten or considered.
    """

    def __init__(self, model: nn.Module, config: MSTConfig) -> None:
        self.model = model
        self.config: MSTConfig | None = None
        self.rows: list[Row] = []
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
        self.config, self.rows = None, []

    def table(self) -> Table:
        """What was rewritten, what was not and why; equal modules of several layers share a line."""
        title = f"Mini-sequence form of {type(self.model).__name__}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
        for column in ("block", "modules", "class", "form"):
            table.add_column(column, overflow="fold")
        for (block, name, module, form, reason), count in _grouped(self.rows).items():
            names = f"{count} x {name}" if count > 1 else name or "-"
            what = f"{form}: {reason}" if form == _LEFT else f"{form} {reason}".strip()
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
        for module in list(shadowed(self.model)):
            restore(module)

    def _apply(self, config: MSTConfig) -> None:
        # First the plan, so that an error leaves the model in the form that it has.
        plan = _Plan(self.model, config)
        self._restore()
        plan.carry_out()
        self.config, self.rows = config, plan.rows


class _Plan:
    """Everything is decided, and every error raised, before the first module is touched."""

    def __init__(self, model: nn.Module, config: MSTConfig) -> None:
        self._model = model
        self._config = config
        self._layers = find_layers(model)
        self.rows: list[Row] = []
        self._mlps = self._choose_mlps(model)
        self._head = self._choose_head(model)
        self._chosen = choose_layers(config.checkpoint_layers, len(self._layers))
        self._describe_layers()
        wanted = config.mlp_chunks is not None or config.lm_head_chunks is not None
        if wanted and not self._mlps and self._head is None:
            raise ValueError(
                f"Nothing to rewrite in {type(model).__name__}: "
                + "; ".join(dict.fromkeys(f"{r.block}: {r.reason}" for r in self.rows if r.reason))
                + ". Name the modules (mlp_modules='*.mlp', lm_head_module='lm_head'), or switch both blocks off "
                "(mlp_chunks=None, lm_head_chunks=None)."
            )
        if not wanted and config.checkpoint_layers != "none" and not self._layers:
            raise ValueError(
                f"checkpoint_layers={config.checkpoint_layers!r}, but {type(model).__name__} has no repeated layers: "
                "no transformers layer and no ModuleList or Sequential of equal blocks."
            )

    def carry_out(self) -> None:
        config = self._config
        for mlp in self._mlps:
            assert config.mlp_chunks is not None
            rewrite_mlp(mlp.module, config.mlp_chunks, self._post_norm(mlp))
        if self._head is not None:
            assert config.lm_head_chunks is not None
            rewrite_lm_head(self._head.module, config.lm_head_chunks)
        if config.checkpoint_layers != "none":
            switch_models(self._model, bool(self._chosen))
            for index, (_, layer) in enumerate(self._layers):
                checkpoint_layer(layer, index in self._chosen)

    def _choose_mlps(self, model: nn.Module) -> list[Candidate]:
        config = self._config
        if config.mlp_chunks is None:
            return []
        patterns = config.mlp_patterns
        if patterns is None:
            candidates = find_mlps(model, self._layers)
            if not candidates:
                self._left("MLP", "", "", "no decoder layer holds an up and a down projection")
        else:
            candidates = match_modules(model, patterns, "mlp_modules")
        chosen: list[Candidate] = []
        verdicts: dict[object, str | None] = {}
        for candidate in candidates:
            reason = candidate.reason
            if reason is None:
                key = _signature(candidate.module)
                if key not in verdicts:
                    verdicts[key] = why_not_token_wise(candidate.module, candidate.hidden_size)
                reason = verdicts[key]
            class_name = type(candidate.module).__name__
            if reason is None:
                chosen.append(candidate)
                note = "with the norm after it" if self._post_norm(candidate) is not None else ""
                self.rows.append(Row("MLP", candidate.name, class_name, _mini(config.mlp_chunks), note))
            elif patterns is not None or "experts" in reason:
                raise ValueError(
                    f"{candidate.name} ({class_name}) can't run in mini-sequence form: {reason}. "
                    + (
                        "Take it out of mlp_modules."
                        if patterns is not None
                        else "Set mlp_chunks=None to rewrite the LM head alone, or name dense MLPs in mlp_modules."
                    )
                )
            else:
                self._left("MLP", candidate.name, class_name, reason)
        return chosen

    def _post_norm(self, candidate: Candidate) -> nn.Module | None:
        if self._config.mlp_modules is not None:
            return None
        for _, layer in self._layers:
            if candidate.module in layer.children():
                return post_norm_of(layer, candidate.module)
        return None

    def _choose_head(self, model: nn.Module) -> Candidate | None:
        config = self._config
        if config.lm_head_chunks is None:
            return None
        if config.lm_head_module is not None:
            matches = match_modules(model, [config.lm_head_module], "lm_head_module")
            if len(matches) > 1:
                raise ValueError(
                    f"lm_head_module={config.lm_head_module!r} matches {len(matches)} modules "
                    f"({', '.join(m.name for m in matches[:5])}); expected one."
                )
            found: Candidate | str = replace(matches[0], reason=why_not_a_head(matches[0].module))
        else:
            found = find_lm_head(model, self._layers)
        if isinstance(found, str):
            self._left("LM head", "", "", found)
            return None
        class_name = type(found.module).__name__
        if found.reason is None:
            self.rows.append(Row("LM head", found.name, class_name, _mini(config.lm_head_chunks)))
            return found
        if config.lm_head_module is not None:
            raise ValueError(f"{found.name} can't be a mini-sequence LM head: {found.reason}.")
        self._left("LM head", found.name, class_name, found.reason)
        return None

    def _describe_layers(self) -> None:
        if self._config.checkpoint_layers == "none":
            return
        if not self._layers:
            self._left("layer", "", "", "no repeated layers found, so nothing is checkpointed")
        for index, (name, layer) in enumerate(self._layers):
            if index in self._chosen:
                self.rows.append(Row("layer", name, type(layer).__name__, "checkpointed"))
            else:
                reason = f"not chosen by checkpoint_layers={self._config.checkpoint_layers!r}"
                form = "not checkpointed" if is_checkpointed_by_itself(layer) else _LEFT
                self.rows.append(Row("layer", name, type(layer).__name__, form, reason))

    def _left(self, block: str, name: str, class_name: str, reason: str) -> None:
        self.rows.append(Row(block, name, class_name, _LEFT, reason))


def _mini(chunks: int | str) -> str:
    return f"M = {chunks}"


def _signature(module: nn.Module) -> object:
    """Equal for modules that one probe can speak for."""
    shapes = tuple((name, tuple(p.shape), p.dtype, p.device) for name, p in module.named_parameters())
    return type(module), repr(module), shapes


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
        ValueError: for a wrong value, a pattern that matches nothing, mixture-of-experts blocks, or a model in which
            there is nothing to rewrite. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_mst needs an nn.Module; got {type(model).__name__}.")
    return MSTHandle(model, make_config(config, options))
