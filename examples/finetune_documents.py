"""Fine-tune a language model on long documents; save it, load it again and let it write.

As it stands it makes a small model and a few documents of its own, so that nothing is downloaded. The real size, on a
GPU::

    python finetune_documents.py --model Qwen/Qwen3-0.6B --documents books.jsonl more.jsonl --length 65536 \
        --precision bf16-true --learning-rate 1e-5 --steps 500

A line of a JSONL file is a document, ``{"text": "..."}``. Documents are packed one after another into sequences of
``--length`` tokens. ``lightning-mst plan model=hf model.name=... precision=bf16-true`` tells which length fits a GPU.

Needs ``pip install 'lightning-mst[data]'``.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lightning_mst import MSTCallback
from lightning_mst.causal_lm import CausalLM
from lightning_mst.data import TextDataModule, load_documents, train_tokenizer
from lightning_mst.models import from_pretrained


def small_documents(file: Path) -> str:
    """Writes a JSONL file with real text: long modules of Python's standard library."""
    texts = [text for text in load_documents("stdlib") if 20_000 < len(text) < 60_000][:20]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(file)


def small_model(folder: Path, documents: list[str]) -> str:
    """Writes a model with random weights and a tokenizer for the documents, as they would come from the hub."""
    tokenizer = train_tokenizer(load_documents("jsonl", paths=documents), vocab_size=512)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a language model on long documents.")
    parser.add_argument("--model", help="a name on the Hugging Face hub, or a folder (default: a small new model)")
    parser.add_argument("--documents", nargs="+", help="JSONL files (default: a small one, written here)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(default: %(default)s)")
    parser.add_argument("--precision", default="32-true", help="such as bf16-true (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="a folder (default: %(default)s)")
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    documents = options.documents or [small_documents(Path("documents.jsonl"))]
    name = options.model or small_model(Path("small_model"), documents)

    data = TextDataModule(source="jsonl", paths=documents, tokenizer=name, sequence_length=options.length)
    trainer = pl.Trainer(
        max_steps=options.steps,
        devices=1,
        precision=options.precision,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=4,
        callbacks=[MSTCallback()],
    )
    with trainer.init_module():  # weights in the Trainer's precision, on its device
        model = from_pretrained(name)
    module = CausalLM(model, optimizer=partial(torch.optim.AdamW, lr=options.learning_rate))
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    print(f"held-out loss: {before['val_loss']:.4f} before, {after['val_loss']:.4f} after {options.steps} steps")

    # The model has been its ordinary self again since training ended, so everything of transformers works on it.
    model.save_pretrained(options.output)
    data.tokenizer.save_pretrained(options.output)

    with trainer.init_module():
        loaded = from_pretrained(str(options.output))
    (again,) = trainer.validate(CausalLM(loaded), datamodule=data, verbose=False)
    print(f"held-out loss: {again['val_loss']:.4f} of {options.output}, loaded again")

    tokenizer = AutoTokenizer.from_pretrained(options.output)
    prompt = tokenizer("import ", return_tensors="pt").to(loaded.device)
    tokens = loaded.eval().generate(**prompt, max_new_tokens=32, do_sample=False)
    print("it writes:", repr(tokenizer.decode(tokens[0], skip_special_tokens=True)))


if __name__ == "__main__":
    main()
