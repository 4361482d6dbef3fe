"""Mini-sequences under the Trainer of transformers: one line before it, and an evaluation that forms no logits.

As it stands it trains a small model on text of Python's standard library. The real size, on a GPU:

* ``model = lightning_mst.models.from_pretrained("my/model", dtype="bfloat16")``
* ``TextDataModule(source="jsonl", paths="documents.jsonl", tokenizer="my/model", sequence_length=65536)``
* ``apply_mst(model)`` without numbers, a learning rate of 1e-5, more steps
* several GPUs: ``torchrun --nproc-per-node 8 hf_trainer.py``

Leave ``gradient_checkpointing`` out of ``TrainingArguments``: ``apply_mst`` checkpoints the layers already, and
transformers' switch would overrule its ``checkpoint_layers``.

Needs ``pip install accelerate``, as transformers' Trainer does.
"""

import torch
from torch.utils.data import Subset
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from lightning_mst import apply_mst
from lightning_mst.data import TextDataModule

LENGTH = 1024


def best_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Runs over mini-sequences, so that evaluation keeps a number per token in place of its logits."""
    return logits.argmax(-1)


def accuracy(result: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((result.predictions[:, :-1] == result.label_ids[:, 1:]).mean())}


if __name__ == "__main__":
    set_seed(0)
    data = TextDataModule(max_documents=40, validation_fraction=0.2, vocab_size=512, sequence_length=LENGTH)
    data.prepare_data()
    data.setup()
    config = LlamaConfig(
        vocab_size=data.vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).train()

    # "auto", the default, would leave so short a sequence alone.
    handle = apply_mst(model, mlp_chunks=4, lm_head_chunks=4)
    handle.print()
    trainer = Trainer(
        model,
        args=TrainingArguments(
            "hf_trainer",
            max_steps=12,
            learning_rate=3e-3,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data.train_dataset,
        eval_dataset=Subset(data.validation_dataset, range(4)),
        data_collator=default_data_collator,
        # Without these two, set prediction_loss_only=True in the arguments: else evaluation keeps all logits.
        preprocess_logits_for_metrics=best_tokens,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    handle.remove()  # the model as it was
    standard = trainer.evaluate()
    print(f"held-out loss: {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after training")
    print(f"held-out loss: {standard['eval_loss']:.4f} in the standard form")
    print(f"accuracy: {before['eval_accuracy']:.3f} before, {after['eval_accuracy']:.3f} after training")
