"""The strategies' names, and what importing the package costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mst.training.registration import STRATEGIES

LOOK = """
import json
from lightning.pytorch.strategies import StrategyRegistry
print(json.dumps(sorted(StrategyRegistry.available_strategies())))
"""
OURS_FIRST = """
import sys
import lightning_mst
assert not {"torch", "lightning", "transformers"} & sys.modules.keys(), sorted(sys.modules)
from lightning_mst.cli import main
assert not {"torch", "lightning", "transformers"} & sys.modules.keys(), sorted(sys.modules)
assert lightning_mst.apply_mst and "lightning" not in sys.modules
"""
OURS_LAST = """
import lightning.pytorch
import lightning_mst
"""
IMPORTED_THROUGH_US = """
import lightning_mst
import lightning.pytorch.strategies as strategies
# Whoever asks the module for its source still finds it.
assert strategies.__spec__.loader is strategies.__loader__
assert "StrategyRegistry" in strategies.__loader__.get_source("lightning.pytorch.strategies")
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("first", [OURS_FIRST + IMPORTED_THROUGH_US, OURS_LAST], ids=["ours first", "Lightning first"])
def test_all_names_are_registered_whichever_package_is_imported_first(first: str) -> None:
    """And ours alone imports neither torch nor Lightning."""
    names = json.loads(run(first + LOOK).splitlines()[-1])
    assert set(STRATEGIES) <= set(names)
    assert {"ddp", "fsdp"} <= set(names)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_name_makes_the_strategy_that_its_description_says(name: str) -> None:
    from lightning.pytorch.strategies import Strategy, StrategyRegistry

    from lightning_mst import strategies

    class_name, _ = STRATEGIES[name]
    if "deepspeed" in name:
        pytest.importorskip("deepspeed")
    strategy = StrategyRegistry.get(name)
    assert type(strategy) is getattr(strategies, class_name)
    assert isinstance(strategy, Strategy)
    assert class_name in StrategyRegistry[name]["description"]


def test_the_options_of_a_name_reach_its_strategy() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    assert StrategyRegistry.get("mst_ddp_find_unused_parameters_true")._ddp_kwargs == {"find_unused_parameters": True}
    assert StrategyRegistry.get("mst_ddp_spawn")._start_method == "spawn"


PROGRAM = """
import sys
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


class Program(LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=61)
        self.model = LlamaForCausalLM(config).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.randint(61, (4, 21)), batch_size=2)


def run(*args):
    always = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=1", "--trainer.logger=false",
              "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(Program, args=["fit", *always, *args], save_config_callback=None)
    strategy = cli.trainer.strategy
    print("ran", type(strategy).__name__, getattr(strategy, "mst", None), cli.trainer.global_step)


by_path = "--trainer.strategy.class_path=lightning_mst.strategies.MSTDDPStrategy"
mst = "--trainer.strategy.init_args.mst"
run("--trainer.strategy=mst")
run(by_path)
run(by_path, f"{mst}.mlp_chunks=3", f"{mst}.checkpoint_layers=none")
run(by_path, f"{mst}.class_path=lightning_mst.MSTConfig", f"{mst}.init_args.checkpoint_layers=[1]")
run("--trainer.callbacks=lightning_mst.MSTCallback", "--trainer.callbacks.mlp_chunks=5")
"""


def test_lightning_cli_takes_the_strategies_by_name_and_by_path_with_settings(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    script = tmp_path / "program.py"
    script.write_text("import lightning_mst\n" + PROGRAM)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert lines[:2] == ["ran MSTSingleDeviceStrategy None 1", "ran MSTDDPStrategy None 1"]
    assert lines[2].startswith("ran MSTDDPStrategy MSTConfig(mlp_chunks=3, ")
    assert "checkpoint_layers='none'" in lines[2]
    assert "checkpoint_layers=[1]" in lines[3]
    assert lines[4] == "ran SingleDeviceStrategy None 1"
    # Each rewrote its model by its own settings.
    assert done.stdout.count("Mini-sequence form of Program") == 5
    assert [done.stdout.count(f"M = {chunks} ") for chunks in (3, 5)] == [1, 1]
