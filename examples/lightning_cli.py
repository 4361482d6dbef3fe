"""LightningCLI: the model, the data, the Trainer and mini-sequences from the command line or a YAML file.

As it stands it runs the command line ``SMALL`` below, and leaves it as YAML. ``--print_config`` prints the YAML of any
other, for ``fit --config run.yaml``. Instead of the callback, a strategy::

    python lightning_cli.py fit --trainer.strategy=mst_ddp --trainer.devices=2 --trainer.max_steps=20
    python lightning_cli.py fit --trainer.strategy.class_path=lightning_mst.strategies.MSTDDPStrategy \
        --trainer.strategy.init_args.mst.mlp_chunks=8 --trainer.devices=2 --trainer.max_steps=20

The real size, on a GPU::

    python lightning_cli.py fit --trainer.callbacks=lightning_mst.MSTCallback --trainer.precision=bf16-true \
        --trainer.max_steps=500 --trainer.val_check_interval=100 \
        --model.name=Qwen/Qwen3-0.6B --data.tokenizer=Qwen/Qwen3-0.6B --data.sequence_length=65536 \
        --data.source=jsonl --data.paths=documents.jsonl --model.learning_rate=1e-5

Needs ``pip install 'jsonargparse[signatures]'``.
"""

import sys
from functools import partial

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers import LlamaConfig

from lightning_mst.causal_lm import CausalLM
from lightning_mst.data import TextDataModule
from lightning_mst.models import from_config, from_pretrained

SMALL = [
    "fit",
    "--seed_everything=0",
    "--trainer.callbacks=lightning_mst.MSTCallback",
    "--trainer.callbacks.mlp_chunks=4",
    "--trainer.callbacks.lm_head_chunks=4",
    "--trainer.max_steps=12",
    "--trainer.limit_val_batches=4",
    "--trainer.val_check_interval=12",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_checkpointing=false",
    "--data.max_documents=40",
    "--data.validation_fraction=0.2",
    "--data.vocab_size=512",
]


class LanguageModel(CausalLM):
    """A Llama with random weights, or a trained model.

    Args:
        name: On the Hugging Face hub, or a local folder; the three sizes are not used then.
        vocab_size: Follows ``--data.vocab_size``.
        hidden_size: D.
        num_layers: Decoder layers.
        learning_rate: Of AdamW.
    """

    def __init__(
        self,
        name: str | None = None,
        vocab_size: int = 512,
        hidden_size: int = 128,
        num_layers: int = 2,
        learning_rate: float = 3e-3,
    ) -> None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
        )
        model = from_pretrained(name) if name else from_config(config)
        super().__init__(model, optimizer=partial(torch.optim.AdamW, lr=learning_rate))


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size")


if __name__ == "__main__":
    cli = CLI(LanguageModel, TextDataModule, args=sys.argv[1:] or SMALL)
    folder = cli.trainer.log_dir  # on every device: they agree on it
    if cli.trainer.is_global_zero:
        for name, value in cli.trainer.callback_metrics.items():
            print(f"{name}: {value:.4f}")
        print(f"again: python lightning_cli.py fit --config {folder}/config.yaml")
