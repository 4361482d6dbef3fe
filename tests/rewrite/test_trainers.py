"""Trainers of transformers and TRL: a rewritten model trains in them as the unmodified one does.

Some of them take their loss from the model's logits, which are deferred then. TRL's SFT, DPO and KTO multiply the last
hidden states by the head's weight themselves, in chunks, and never call the head; there the MLPs are what is rewritten.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from rewrite_models import VOCAB, build, furthest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

from lightning_mst import apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogitsWarning

pytest.importorskip("accelerate")  # without it transformers' Trainer can't be made
OPTIONS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "optim": "sgd",
    "learning_rate": 0.5, "bf16": False, "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    model.pre_tokenizer = WhitespaceSplit()
    result = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    result.chat_template = "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> ' }}{% endfor %}"
    return result


class World:
    """Models, data and the ways to make a trainer of them; two worlds differ in nothing but the rewrite."""

    def __init__(self, folder: Path, *, rewritten: bool) -> None:
        self.folder = folder
        self.model, self.reference = build("Llama 3", torch.float32), build("Llama 3", torch.float32)
        with torch.no_grad():
            self.reference.lm_head.weight.mul_(2)
        if rewritten:
            for model in (self.model, self.reference):
                apply_mst(model, mlp_chunks=4, lm_head_chunks=4)
        generator = torch.Generator().manual_seed(0)

        def text() -> str:
            length = int(torch.randint(9, 33, (), generator=generator))
            return " ".join(f"w{i}" for i in torch.randint(8, (length,), generator=generator).tolist())

        self.texts = [text() for _ in range(8)]
        self.replies = [(f" {text()}", f" {text()}") for _ in range(8)]

    def transformers(self, options: dict[str, Any], **more: Any) -> Any:
        words = tokenizer()
        rows = [{"input_ids": words(text).input_ids} for text in self.texts]
        return transformers.Trainer(
            self.model,
            args=transformers.TrainingArguments(str(self.folder), **{**OPTIONS, **options}),
            train_dataset=rows,
            eval_dataset=rows[:3],
            data_collator=transformers.DataCollatorForLanguageModeling(words, mlm=False),
            **more,
        )

    def sft(self, options: dict[str, Any], **more: Any) -> Any:
        return self._trl("trl", "SFT", [{"text": text} for text in self.texts], options, **more)

    def preferences(self, module: str, name: str, options: dict[str, Any], **more: Any) -> Any:
        rows = [
            {"prompt": text, "chosen": chosen, "rejected": rejected}
            for text, (chosen, rejected) in zip(self.texts, self.replies, strict=True)
        ]
        return self._trl(module, name, rows, options, **more)

    def dpo(self, options: dict[str, Any], **more: Any) -> Any:
        return self.preferences("trl", "DPO", options, ref_model=self.reference, **more)

    def kto(self, options: dict[str, Any]) -> Any:
        rows = [
            {"prompt": text, "completion": reply, "label": bool(i % 2)}
            for i, (text, (reply, _)) in enumerate(zip(self.texts, self.replies, strict=True))
        ]
        return self._trl("trl.experimental.kto", "KTO", rows, options, ref_model=self.reference)

    def gkd(self, options: dict[str, Any]) -> Any:
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]}
            for text, (reply, _) in zip(self.texts, self.replies, strict=True)
        ]
        return self._trl("trl.experimental.gkd", "GKD", rows, options, teacher_model=self.reference)

    def _trl(self, module: str, name: str, rows: list[dict], options: dict[str, Any], **more: Any) -> Any:
        pytest.importorskip("trl")
        trl = pytest.importorskip(module)
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
        return getattr(trl, f"{name}Trainer")(
            self.model,
            args=getattr(trl, f"{name}Config")(output_dir=str(self.folder), **{**OPTIONS, **options}),
            train_dataset=data,
            eval_dataset=data.select(range(3)),
            processing_class=tokenizer(),
            **more,
        )


def loss_outside(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    logits = outputs["logits"][:, :-1].reshape(-1, VOCAB)
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


def best_entries(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}


def accuracy_of_all(prediction: transformers.EvalPrediction) -> dict[str, float]:
    best = prediction.predictions.argmax(-1)
    return accuracy(transformers.EvalPrediction(best, prediction.label_ids))


def size_of_all(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"size": float(abs(prediction.predictions).mean())}


def lora() -> Any:
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


TRAINERS: dict[str, Callable[[World], Any]] = {
    "Trainer": lambda w: w.transformers({}),
    "Trainer, accumulation": lambda w: w.transformers({"gradient_accumulation_steps": 2}),
    "Trainer, checkpointing": lambda w: w.transformers({"gradient_checkpointing": True}),
    "Trainer, label smoothing": lambda w: w.transformers({"label_smoothing_factor": 0.1}),
    "Trainer, loss outside": lambda w: w.transformers({}, compute_loss_func=loss_outside),
    "Trainer, accuracy": lambda w: w.transformers(
        EVALUATED, compute_metrics=accuracy, preprocess_logits_for_metrics=best_entries
    ),
    "Trainer, metrics of all logits": lambda w: w.transformers(EVALUATED, compute_metrics=accuracy_of_all),
    "SFT": lambda w: w.sft(EVALUATED),
    "SFT, dft": lambda w: w.sft({"loss_type": "dft"}),
    "SFT, packing": lambda w: w.sft({"packing": True, "max_length": 32, "packing_strategy": "wrapped"}),
    "SFT, label smoothing": lambda w: w.sft({"label_smoothing_factor": 0.1}),
    "SFT, loss outside": lambda w: w.sft({}, compute_loss_func=loss_outside),
    "SFT, LoRA": lambda w: w.sft({}, peft_config=lora()),
    "DPO": lambda w: w.dpo(EVALUATED),
    "DPO, several losses": lambda w: w.dpo({"loss_type": ["sigmoid", "ipo", "sft"]}),
    "DPO, weighted": lambda w: w.dpo({"use_weighting": True}),
    "DPO, precomputed": lambda w: w.dpo({"precompute_ref_log_probs": True}),
    "DPO, LoRA": lambda w: w.preferences("trl", "DPO", {}, peft_config=lora()),
    "DPO, metrics of all logits": lambda w: w.dpo(EVALUATED, compute_metrics=size_of_all),
    "KTO": lambda w: w.kto({}),
    "ORPO": lambda w: w.preferences("trl.experimental.orpo", "ORPO", EVALUATED),
    "CPO": lambda w: w.preferences("trl.experimental.cpo", "CPO", EVALUATED),
    "GKD": lambda w: w.gkd({"lmbda": 0.0}),
}


class Record(transformers.TrainerCallback):
    """What a training run did: its logs, the gradients of each step, and who asked for the real logits."""

    def __init__(self, world: World, make: Callable[[World], Any]) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.tokens_at_once = 0
        self.answers: set[type] = set()
        world.model.model.layers[0].mlp.act_fn.register_forward_pre_hook(self._see_tokens)
        world.model.lm_head.register_forward_hook(self._see_answer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(0)  # adapters are drawn when the trainer is made
            trainer = make(world)
            trainer.add_callback(self)
            trainer.train()
        told = [str(w.message) for w in caught if issubclass(w.category, DeferredLogitsWarning)]
        self.asked_by = {message.split(" needs the real logits")[0] for message in told}
        self.logs = [
            {key: value for key, value in log.items() if not key.endswith(("_runtime", "_per_second"))}
            for log in trainer.state.log_history
        ]

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def _see_tokens(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.tokens_at_once = max(self.tokens_at_once, args[0].shape[:-1].numel())

    def _see_answer(self, module: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        self.answers.add(type(answer))


@pytest.mark.parametrize("name", TRAINERS)
def test_logs_and_gradients_are_those_of_the_unmodified_model(name: str, tmp_path: Path) -> None:
    plain = Record(World(tmp_path / "plain", rewritten=False), TRAINERS[name])
    mini = Record(World(tmp_path / "mini", rewritten=True), TRAINERS[name])

    assert len(mini.logs) == len(plain.logs)
    for got, expected in zip(mini.logs, plain.logs, strict=True):
        # Rewards are small differences of log-probabilities around -100.
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(mini.gradients) == len(plain.gradients) == 2
    for got, expected in zip(mini.gradients, plain.gradients, strict=True):
        assert furthest(got, expected) <= 1e-5

    assert Tensor not in mini.answers
    assert mini.tokens_at_once <= -(-plain.tokens_at_once // 4)
    # The trainer pads all logits of an evaluation, to give them to a function of the user's as an array.
    assert mini.asked_by == ({"atleast_1d"} if name.endswith("metrics of all logits") else set())


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_the_metrics_of_a_run_are_not_trivial(name: str, tmp_path: Path) -> None:
    logs = Record(World(tmp_path, rewritten=True), TRAINERS[name]).logs
    assert 0 < max(log.get("mean_token_accuracy", 0) for log in logs) < 1
    assert all(log["entropy"] > 0 for log in logs if "loss" in log)
