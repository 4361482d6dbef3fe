"""Encoders, encoder-decoders, vision, classifiers, PyTorch's own layers, and decoders of other libraries' shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from rewrite_models import VOCAB, MatmulCounter, furthest, gradients
from torch import Tensor, nn

from lightning_mst import apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogits

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip


def blocks(model: nn.Module, **options: object) -> dict[str, dict[str, str]]:
    handle = apply_mst(model, **{**OPTIONS, **options})
    rows: dict[str, dict[str, str]] = {}
    for row in handle.rows:
        rows.setdefault(row.block, {})[row.name] = row.reason if row.form == "as it was" else row.form
    return rows


def bert_mlm() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def modernbert_mlm() -> nn.Module:
    config = transformers.ModernBertConfig(**SIZES, attention_dropout=0.0, mlp_dropout=0.0, embedding_dropout=0.0)
    return transformers.ModernBertForMaskedLM(config)


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=48, d_kv=12, d_ff=112, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCAB, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=112, decoder_ffn_dim=112, num_mel_bins=8, dropout=0.0,
            max_source_positions=33, max_target_positions=40, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [bert_mlm, modernbert_mlm, t5, whisper])
@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_encoders_and_encoder_decoders_keep_loss_and_gradients(build, checkpoint_layers, batch):
    torch.manual_seed(0)
    model = build().double().train()
    ids, labels = batch
    inputs = {"input_ids": ids, "labels": labels}
    if build is whisper:
        inputs = {"input_features": torch.randn(2, 8, 66, dtype=torch.float64), "labels": labels}
    expected = gradients(model, model(**inputs).loss)
    rows = blocks(model, checkpoint_layers=checkpoint_layers)
    assert set(rows["MLP"].values()) == {"M = 4"}
    assert set(rows["LM head"].values()) == {"M = 4"}
    output = model(**inputs)
    assert isinstance(output.logits, DeferredLogits)
    assert furthest(gradients(model, output.loss), expected) < 1e-6


def test_the_feed_forward_method_of_a_bert_layer_runs_once_less_than_its_parts_would(batch):
    """Its norm comes after the residual: only the whole method lets checkpointing stop before it."""
    model = bert_mlm().train()
    ids, labels = batch

    def passes() -> float:
        with MatmulCounter(112) as counter:
            model(input_ids=ids, labels=labels).loss.backward()
        return counter.total / (ids.numel() * 2 * 2 * 48 * 112)

    apply_mst(model, **OPTIONS)
    assert passes() <= 4.0 + 1e-9


def test_vision_transformers_and_classifiers_keep_their_heads_and_the_table_says_so(batch):
    torch.manual_seed(0)
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **{k: v for k, v in SIZES.items() if k not in ("vocab_size", "pad_token_id")},
            image_size=32, patch_size=8, num_labels=5,
        )
    ).double().train()  # fmt: skip
    pictures, kinds = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 4])
    expected = gradients(vit, vit(pixel_values=pictures, labels=kinds).loss)
    rows = blocks(vit)
    assert set(rows["MLP"].values()) == {"M = 4"}
    assert rows["LM head"] == {"classifier": "a head of 5 outputs is no LM head"}
    assert furthest(gradients(vit, vit(pixel_values=pictures, labels=kinds).loss), expected) < 1e-6


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (transformers.LlamaForSequenceClassification, torch.tensor([0, 2])),
        (transformers.LlamaForTokenClassification, None),
        (transformers.BertForSequenceClassification, torch.tensor([0, 2])),
        (transformers.BertForTokenClassification, None),
    ],
)
def test_classifiers_get_their_mlps_rewritten_and_keep_their_heads(model_class, labels, batch):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2} if "Llama" in model_class.__name__ else SIZES
    model = model_class(model_class.config_class(**sizes, num_labels=3, classifier_dropout=0.0)).double().train()
    inputs = {"input_ids": batch[0], "labels": batch[0] % 3 if labels is None else labels}
    expected = gradients(model, model(**inputs).loss)
    rows = blocks(model)
    assert set(rows["MLP"].values()) == {"M = 4"}
    (reason,) = rows["LM head"].values()
    assert reason == "a head of 3 outputs is no LM head"
    assert furthest(gradients(model, model(**inputs).loss), expected) < 1e-6


class TorchLM(nn.Module):
    """PyTorch's own encoder or decoder layers with a head."""

    def __init__(self, stack: nn.Module, width: int = 48) -> None:
        super().__init__()
        self.embed, self.stack, self.head = nn.Embedding(VOCAB, width), stack, nn.Linear(width, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
        if isinstance(self.stack, nn.TransformerDecoder):
            return self.head(self.stack(x, x.detach(), tgt_mask=mask))
        return self.head(self.stack(x, mask=mask))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_pytorchs_own_layers_run_their_feed_forward_method_in_mini_sequences(kind, norm_first, batch):
    torch.manual_seed(0)
    layer = getattr(nn, f"Transformer{kind}Layer")(48, 4, 112, dropout=0.0, batch_first=True, norm_first=norm_first)
    options = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    model = TorchLM(getattr(nn, f"Transformer{kind}")(layer, 2, **options)).double()
    ids, labels = batch

    def loss() -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    expected = gradients(model, loss())
    rows = blocks(model)
    assert rows["MLP"] == {f"stack.layers.{i}._ff_block": "M = 4" for i in range(2)}
    assert furthest(gradients(model, loss()), expected) < 1e-10
    model.eval()
    with torch.no_grad():  # PyTorch's fused kernel for inference takes no notice of the rewrite
        assert torch.isfinite(model(ids)[..., :1]).all()


# --- decoders as other libraries write them --------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale


class SelfAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.output_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if lengths is None:
            return self.output_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        attended = [F.scaled_dot_product_attention(*(t[None] for t in part), is_causal=True)[0] for part in parts]
        return self.output_proj(torch.cat(attended))


class GatedFeedForward(nn.Module):
    """torchtune's names: w1 gates, w3 goes up, w2 goes down."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SelfAttentionLayer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sa_norm, self.attn, self.mlp_norm = RMSNorm(dim), SelfAttention(dim), RMSNorm(dim)
        self.mlp = GatedFeedForward(dim, 112)

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        h = x + self.attn(self.sa_norm(x), lengths)
        return h + self.mlp(self.mlp_norm(h))


class TuneDecoder(nn.Module):
    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList(SelfAttentionLayer(dim) for _ in range(2))
        self.norm, self.output = RMSNorm(dim), nn.Linear(dim, VOCAB, bias=False)

    def forward(self, tokens: Tensor, lengths: list[int] | None = None) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, lengths)
        return self.output(self.norm(h)).float()


class ParallelBlock(nn.Module):
    """litgpt's names: attention and MLP side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_1, self.attn, self.mlp = nn.LayerNorm(dim), SelfAttention(dim), GatedFeedForward(dim, 112)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)
        return self.attn(normed) + self.mlp(normed) + x


class LitGPT(nn.Module):
    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB + 5, dim),
                "h": nn.ModuleList(ParallelBlock(dim) for _ in range(3)),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        # The vocabulary is padded.
        self.lm_head = nn.Linear(dim, VOCAB + 5, bias=True)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


@pytest.mark.parametrize("model_class", [TuneDecoder, LitGPT])
def test_decoders_of_other_libraries_are_found_by_structure(model_class, batch):
    torch.manual_seed(0)
    model = model_class().double()
    ids, labels = batch

    def loss() -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())

    expected = gradients(model, loss())
    rows = blocks(model)
    assert set(rows["MLP"].values()) == set(rows["LM head"].values()) == {"M = 4"}
    assert set(rows["layer"].values()) == {"checkpointed"}
    assert furthest(gradients(model, loss()), expected) < (1e-6 if model_class is TuneDecoder else 1e-10)


def test_packed_sequences_without_a_batch_dimension_are_exact(batch):
    torch.manual_seed(0)
    model = TuneDecoder().double()
    ids, labels, lengths = batch[0].flatten(), batch[1].flatten(), [20, 7, 39]

    def loss() -> Tensor:
        return F.cross_entropy(model(ids, lengths)[:-1], labels[1:])

    expected = gradients(model, loss())
    assert set(blocks(model)["MLP"].values()) == {"M = 4"}
    assert furthest(gradients(model, loss()), expected) < 1e-6


def test_a_model_of_new_class_and_attribute_names_is_found_by_structure(batch):
    class Zorp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blip, self.blop, self.blup = nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 96)

        def forward(self, quux: Tensor) -> Tensor:
            return self.blop(self.blip(quux).sigmoid() * self.blup(quux))

    class Frob(nn.Module):
        """Shaped like Zorp, but every token sees the one before it."""

        def __init__(self) -> None:
            super().__init__()
            self.blip, self.blop, self.blup = nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 96)

        def forward(self, quux: Tensor) -> Tensor:
            return self.blop(self.blip(quux).sigmoid() * self.blup(quux).roll(1, dims=-2))

    class Wibble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.splat, self.frob, self.zorp = nn.LayerNorm(48), Frob(), Zorp()

        def forward(self, quux: Tensor) -> Tensor:
            quux = quux + self.frob(self.splat(quux))
            return quux + self.zorp(quux)

    class Thing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Embedding(VOCAB, 48), nn.Linear(48, VOCAB)
            self.middle = nn.ModuleList(Wibble() for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.front(ids)
            for part in self.middle:
                x = part(x)
            return self.back(x)

    torch.manual_seed(0)
    model = Thing().double()

    def loss() -> Tensor:
        return F.cross_entropy(model(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())

    expected = gradients(model, loss())
    rows = blocks(model)
    assert rows["MLP"]["middle.0.zorp"] == "M = 4"
    assert rows["LM head"] == {"back": "M = 4"}
    assert furthest(gradients(model, loss()), expected) < 1e-10
    handle = apply_mst(model, **OPTIONS)
    reasons = {row.name: row.reason for row in handle.rows}
    assert "middle.0.frob" not in reasons or "mixes tokens" in reasons["middle.0.frob"]
