"""Quantization sites of transformers' BERT and RoBERTa with a classification head; MiniLM's encoders are BERTs.

Signed: the inputs of query, key and value (a scale each, as BiT has), q, k, v, attention output, input of the feed-forward
network, pooler, head. Unsigned: probabilities and ReLU's output; GELU's with a learned offset. The word embeddings' weight is
a site, row-wise by a rule (`per_channel`), as in BiT; position and type embeddings stay float. Attention comes in through
the library's own registry: `set_attn_implementation`, no module of the model is replaced.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsquant.errors import ConfigError
from dsquant.models.sites import Sites
from dsquant.ops.quant_attention import quant_attention
from dsquant.quant.modules import ActivationQuantizer, Mode

ATTENTION = "dsquant"
GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
ACTIVATIONS = (*GELUS, "relu")
PARTS = ("q", "k", "probs", "v")  # in the order of quant_attention's arguments


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with the quantizers of `module`, as transformers' AttentionInterface asks: (B, N, H, D) and no probabilities.

    query, key, value are (B, H, N, D); attention_mask is bool (B, 1, 1, N), true at real tokens. Where no site quantizes or
    observes, the result is exactly that of the library's own `sdpa`.
    """
    sites = [getattr(module, f"{part}_quantizer") for part in PARTS]
    observed = any(site is not None and site.observer is not None for site in sites)
    if not observed and all(site is None or site.mode is Mode.FLOAT for site in sites):
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False)
    mask = None if attention_mask is None else _additive(attention_mask)
    if observed:
        out = _observed(sites, query, key, value, scaling, mask)
    else:
        args = (None if site is None else site.args(query) for site in sites)
        out = quant_attention(query, key, value, scaling, *args, mask=mask)
    return out.transpose(1, 2).contiguous(), None


def _additive(real: Tensor) -> Tensor:
    """Return float32 0 at real keys and the lowest number at others: finite, so that a row of padding alone gives no NaN."""
    return torch.zeros(real.shape, device=real.device).masked_fill_(~real, torch.finfo(torch.float32).min)


def _observed(
    sites: list[ActivationQuantizer | None], q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Form the probabilities for calibration to see; the fused op never holds them whole."""
    on_q, on_k, on_probs, on_v = sites
    q, k, v = _through(on_q, q), _through(on_k, k), _through(on_v, v)
    scores = (q * scaling) @ k.transpose(-2, -1)
    probabilities = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(dim=-1)
    return _through(on_probs, probabilities) @ v


def _through(site: ActivationQuantizer | None, x: Tensor) -> Tensor:
    return x if site is None else site(x)


def padding_mask(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Return the bool mask (B, 1, 1, N) of real keys, as transformers' AttentionMaskInterface asks; no value is read back."""
    return None if attention_mask is None else attention_mask[:, None, None, :]


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, padding_mask)


def insert_sites(model: PreTrainedModel, sites: Sites) -> None:
    """Quantize every site of a BERT or RoBERTa classifier in place. Raises ConfigError for a variant without known sites.

    `model.input_tokens`, the length that its inputs are padded to, sets the elements of a sample (LSQ's gradient factor) and
    the groups of per_token; without it that is the model's greatest length.
    """
    _check_variant(model)
    if sites.policy.qk_reparam:
        raise ConfigError(
            f"quant.qk_reparam needs q, k and v fused in one layer; those of {type(model).__name__} are three, set it to false"
        )
    name = model.base_model_prefix
    encoder, config = getattr(model, name), model.config
    tokens = getattr(model, "input_tokens", None) or config.max_position_embeddings
    sites.embedding(f"{name}.embeddings.word_embeddings", encoder.embeddings.word_embeddings)
    for index, layer in enumerate(encoder.encoder.layer):
        _insert_layer(f"{name}.encoder.layer.{index}", layer, config, tokens, sites)
    heads = [(f"{name}.pooler.dense", encoder.pooler.dense)] if encoder.pooler is not None else []
    classifier = model.classifier
    if isinstance(classifier, nn.Linear):
        heads.append(("classifier", classifier))
    else:
        heads += [("classifier.dense", classifier.dense), ("classifier.out_proj", classifier.out_proj)]
    for head_name, head in heads:
        sites.linear(head_name, head, features=head.in_features)
    model.set_attn_implementation(ATTENTION)


def _insert_layer(name: str, layer: nn.Module, config: Any, tokens: int, sites: Sites) -> None:
    attention, hidden = layer.attention.self, tokens * config.hidden_size
    heads = attention.num_attention_heads
    for part in ("query", "key", "value"):
        sites.linear(f"{name}.attention.self.{part}", getattr(attention, part), features=hidden, out_heads=heads)
    per_head = {"heads": heads, "heads_first": True, "tokens": tokens}
    for part in ("q", "k", "v"):
        quantizer = sites.activation(f"{name}.attention.self.{part}", hidden, **per_head)
        setattr(attention, f"{part}_quantizer", quantizer)
    probs = f"{name}.attention.self.probs"
    attention.probs_quantizer = sites.activation(
        probs, heads * tokens * tokens, signed=False, keys_last=True, **per_head
    )
    if attention.probs_quantizer is not None and attention.probs_quantizer.site.spec.offset:
        raise ConfigError(f"{probs} has an offset, which would give padding a share; set offset: false by a quant rule")
    sites.linear(f"{name}.attention.output.dense", layer.attention.output.dense, features=hidden, heads=heads)
    sites.linear(f"{name}.intermediate.dense", layer.intermediate.dense, features=hidden)
    sites.linear(
        f"{name}.output.dense", layer.output.dense, features=tokens * config.intermediate_size, signed=False,
        offset=config.hidden_act in GELUS,
    )  # fmt: skip


def _check_variant(model: PreTrainedModel) -> None:
    config = model.config
    if config.is_decoder or config.add_cross_attention:
        raise ConfigError(f"{type(model).__name__} is set up as a decoder; only encoders have sites in dsquant")
    if config.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act is {config.hidden_act!r}; its sites are not known, take one of {ACTIVATIONS}")
    if config.attention_probs_dropout_prob > 0:
        raise ConfigError(
            "set model.kwargs.attention_probs_dropout_prob to 0: quantized attention never holds the probabilities to drop"
        )
