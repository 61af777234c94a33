"""A Llama whose layers differ: transformers' own decoder layers, each built from a config of its own.

Written by Entasis. `config.per_layer_config` says of every layer its query heads, KV heads and FFN width; the numbers of
the whole config are the largest of them. Opens in transformers from 4.57 on, and in vLLM's Transformers backend.
"""

import copy

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class EntasisConfig(LlamaConfig):
    model_type = "entasis_llama"

    def validate(self):
        """Heads of width head_dim need not divide the hidden size; there is nothing else to check."""


def layer_config(config, index):
    """The config of one layer."""
    layers = config.per_layer_config
    if not isinstance(layers, dict):  # transformers from 5.14 on makes the configs itself
        return layers[index]
    single = copy.copy(config)
    for key, value in {int(i): numbers for i, numbers in layers.items()}.get(index, {}).items():
        setattr(single, key, value)
    return single


def rotary_config(config):
    """A config that says how positions turn in the words of any transformers: before 5 the scaling was rope_scaling."""
    single = layer_config(config, 0)
    if getattr(single, "rope_scaling", None) is None and single.rope_parameters["rope_type"] != "default":
        single.rope_scaling = single.rope_parameters
    return single


def decoder_layer(config, index):
    """One layer, which looks up how to compute attention in the whole model's config."""
    layer = LlamaDecoderLayer(layer_config(config, index), index)
    layer.self_attn.config = config
    return layer


class EntasisModel(LlamaModel):
    config_class = EntasisConfig

    def __init__(self, config):
        # LlamaModel's own initialiser would read the heads of the whole config, which no layer need have.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([decoder_layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=rotary_config(config))
        self.embedding_dropout = 0.0  # Starcoder2's
        self.gradient_checkpointing = False
        self.has_sliding_layers = False
        self.post_init()


class EntasisForCausalLM(LlamaForCausalLM):
    config_class = EntasisConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = EntasisModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=getattr(config, "head_bias", False)
        )
        self.post_init()
