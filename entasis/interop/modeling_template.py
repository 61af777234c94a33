"""A Llama whose layers differ: transformers' own decoder layers, each built from a config of its own.

Written by Entasis. `config.layer_shapes` lists [query heads, KV heads, FFN width] of every layer.
"""

import copy

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


class EntasisConfig(LlamaConfig):
    model_type = "entasis_llama"

    def validate_architecture(self):
        """Heads of width head_dim need not divide the hidden size; there is nothing else to check."""


def layer_config(config, index):
    """The config of one layer."""
    single = copy.deepcopy(config)
    heads, kv_heads, width = config.layer_shapes[index]
    single.num_attention_heads, single.num_key_value_heads, single.intermediate_size = heads, kv_heads, width
    return single


class EntasisModel(LlamaModel):
    config_class = EntasisConfig

    def __init__(self, config):
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([LlamaDecoderLayer(layer_config(config, i), i) for i in layers])
        self.post_init()


class EntasisForCausalLM(LlamaForCausalLM):
    config_class = EntasisConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = EntasisModel(config)
        self.post_init()
