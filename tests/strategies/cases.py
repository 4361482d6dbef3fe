"""Training runs that every strategy has to get right: what is built, on what data, in which setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mst import MSTConfig
from lightning_mst.causal_lm import CausalLM

RANKS, STEPS, LENGTH, VOCAB = 2, 2, 21, 61
CHUNKS = {"mlp_chunks": 3, "lm_head_chunks": 3}


def build(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).train()


def rows(count: int, *, ragged: bool) -> list[dict[str, Tensor]]:
    """Sequences; ragged ones have very different numbers of labels that count."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for index in range(count):
        ids = torch.randint(VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        if ragged:
            labels[: (0, 15, 4, 19)[index % 4]] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


@dataclass(frozen=True)
class Case:
    """One run on two ranks.

    Attributes:
        strategy: a name, or a function that makes the strategy on each rank.
        tied: whether the LM head is tied to the embedding.
        checkpoint: ``checkpoint_layers``.
        batches: micro-batches to a step.
        ragged: whether ranks and micro-batches have different numbers of labels.
        token_weighted: on the ``"module"``, the ``"callback"``, or neither.
        shard: ``configure_model`` of the user: (LightningModule, mesh) -> nothing.
        mst: off, for the unmodified model under the same strategy.
        trainer: further arguments of the Trainer.
        unused: whether the module has a weight that no loss depends on.
        replicas: how many ranks see different batches.
        whole_layer: norms and projections in mini-sequences as well, and the layers' inputs on the host.
    """

    strategy: str | Callable[[], Any]
    tied: bool = False
    checkpoint: Any = "all"
    batches: int = 1
    ragged: bool = False
    token_weighted: str = ""
    shard: Callable[[Any, Any], None] | None = None
    mst: bool = True
    trainer: dict[str, Any] = field(default_factory=dict)
    unused: bool = False
    replicas: int = RANKS
    whole_layer: bool = False

    @property
    def config(self) -> MSTConfig:
        if not self.mst:
            return MSTConfig(None, None, self.checkpoint)
        options: dict[str, Any] = {"checkpoint_layers": self.checkpoint}
        if self.whole_layer:
            options |= {"layer_chunks": 3, "checkpoint_offload": "inputs"}
        return MSTConfig(**CHUNKS, **options)

    def data(self) -> list[dict[str, Tensor]]:
        return rows(RANKS * STEPS * self.batches * 2, ragged=self.ragged)


class Module(CausalLM):
    """Trains by SGD and writes down each step's gradients, as whole tensors."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5), **options)
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.rows: list[dict[str, Tensor]] = []

    def train_dataloader(self) -> DataLoader:
        # Lightning's own sampler would shuffle.
        sampler = DistributedSampler(self.rows, shuffle=False, **self.trainer.strategy.distributed_sampler_kwargs)
        return DataLoader(self.rows, batch_size=2, sampler=sampler)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        names = {id(p): n for n, p in self.named_parameters()}
        grads = {}
        for parameter in self.parameters():
            grad = parameter.grad
            if grad is not None:
                whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                grads[names[id(parameter)]] = whole.detach().clone()
        self.gradients.append(grads)


class ShardedByUser(Module):
    shard: Callable[[Any, Any], None]

    def configure_model(self) -> None:
        type(self).shard(self, self.device_mesh)


def per_layer(module: Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(module.model, mesh=mesh["data_parallel"])


def per_mlp(module: Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in module.model.model.layers:
        fully_shard(layer.mlp, mesh=mesh["data_parallel"])
    per_layer(module, mesh)


def head_alone(module: Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.model.lm_head, mesh=mesh["data_parallel"])
    per_layer(module, mesh)


def tensor_parallel(module: Module, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    parallelize_module(module.model, mesh["tensor_parallel"], plan)


def model_parallel(**sizes: int) -> Callable[[], Any]:
    def make() -> Any:
        from lightning_mst.strategies import MSTModelParallelStrategy

        return MSTModelParallelStrategy(**sizes)

    return make


CASES: dict[str, Case] = {
    "DDP": Case("mst_ddp"),
    "DDP without checkpointing": Case("mst_ddp", checkpoint="none"),
    "DDP, tied, accumulating": Case("mst_ddp", tied=True, batches=2),
    "DDP with unused parameters": Case("mst_ddp_find_unused_parameters_true", unused=True),
    "plain DDP and the callback": Case("ddp"),
    "DDP in double precision": Case("mst_ddp", trainer={"precision": "64-true"}),
    "DDP in bf16-mixed": Case("mst_ddp", trainer={"precision": "bf16-mixed"}),
    "DDP in bf16-mixed, unmodified": Case("mst_ddp", mst=False, trainer={"precision": "bf16-mixed"}),
    "token-weighted DDP": Case("mst_ddp", ragged=True, token_weighted="module"),
    "token-weighted DDP, accumulating": Case("mst_ddp", batches=2, ragged=True, token_weighted="callback"),
    "FSDP2": Case("mst_model_parallel"),
    "FSDP2 without checkpointing": Case("mst_model_parallel", checkpoint="none"),
    "FSDP2, tied, accumulating": Case("mst_model_parallel", tied=True, batches=2),
    "FSDP2 in bf16-mixed": Case("mst_model_parallel", trainer={"precision": "bf16-mixed"}),
    "FSDP2 in bf16-mixed, unmodified": Case("mst_model_parallel", mst=False, trainer={"precision": "bf16-mixed"}),
    "FSDP2 in bf16-true": Case("mst_model_parallel", trainer={"precision": "bf16-true"}),
    "FSDP2 in bf16-true, unmodified": Case("mst_model_parallel", mst=False, trainer={"precision": "bf16-true"}),
    "FSDP2 by layer": Case("mst_model_parallel", shard=per_layer),
    "FSDP2 by layer, whole layers": Case("mst_model_parallel", shard=per_layer, whole_layer=True),
    "FSDP2, whole layers": Case("mst_model_parallel", whole_layer=True),
    "DDP, whole layers": Case("mst_ddp", whole_layer=True),
    "FSDP2 by MLP": Case("mst_model_parallel", shard=per_mlp),
    "FSDP2 by MLP, without checkpointing": Case("mst_model_parallel", shard=per_mlp, checkpoint="none"),
    "FSDP2, head alone": Case("mst_model_parallel", shard=head_alone),
    "token-weighted FSDP2, accumulating": Case(
        "mst_model_parallel", batches=2, ragged=True, token_weighted="callback", tied=True
    ),
    "tensor parallel": Case(
        model_parallel(data_parallel_size=1, tensor_parallel_size=2), shard=tensor_parallel, replicas=1
    ),
    "tensor parallel without checkpointing": Case(
        model_parallel(data_parallel_size=1, tensor_parallel_size=2),
        shard=tensor_parallel,
        replicas=1,
        checkpoint="none",
    ),
}
