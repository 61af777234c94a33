"""A model opened in Python: its hidden states, several prompts at once, and a folder of its own."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import entasis
from entasis.data import tokenizer
from entasis.errors import UserError
from entasis.evaluate.chat import Chat
from entasis.evaluate.loading import Loaded
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape


@pytest.fixture(scope="module")
def model():
    layers = (LayerShape(2, 1, 32), LayerShape(1, 1, 48), LayerShape(2, 2, 16))
    made = Transformer(ModelShape(d_model=32, head_dim=16, vocabulary=300, layers=layers, context=128))
    init_weights(made, 0)
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    return Loaded(
        made.eval(), tokenizer.train([text], 300), Chat("{{ messages[0].content }}", {"eos_token": "</s>"})
    )


def test_hidden_states_are_what_each_layer_reads_and_the_head_makes_logits_of_the_last(model):
    states_LTD = model.hidden_states("import json")
    assert states_LTD.shape == (4, len(model.encode("import json")), 32)
    read = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, i=i: read.__setitem__(i, args[0][0]))
        for i, block in enumerate(model.model.blocks)
    ]
    logits = model.logits("import json")
    for hook in hooks:
        hook.remove()
    for i, x_TD in read.items():
        torch.testing.assert_close(states_LTD[i], x_TD)
    with torch.no_grad():
        torch.testing.assert_close(model.model.head_logits(model.model.norm(states_LTD[-1])), logits)


def test_prompts_together_are_continued_as_if_alone(model):
    prompts = ["def main(", "import ", "x"]
    together = model.generate(prompts, tokens=12, temperature=0)
    assert together == [model.generate(p, tokens=12, temperature=0) for p in prompts]
    ids = [model.encode(p) for p in prompts]
    assert [
        model.tokenizer.decode(answer) for answer in model.generate(ids, tokens=12, temperature=0)
    ] == together
    assert model.generate(ids[0], tokens=3, temperature=0) == model.generate(ids, tokens=3, temperature=0)[0]


def test_ids_may_be_any_sequence_of_whole_numbers(model):
    ids = model.encode("import json")
    expected = model.generate(ids, tokens=4, temperature=0)
    array, tensor = np.array(ids, np.uint16), torch.tensor(ids)
    for prompt in (tuple(ids), array, tensor, list(array), list(tensor)):
        assert model.generate(prompt, tokens=4, temperature=0) == expected
    for prompts in ([ids, ids], np.stack([array] * 2), torch.stack([tensor] * 2), [array, tensor]):
        assert model.generate(prompts, tokens=4, temperature=0) == [expected] * 2


def test_a_saved_model_is_opened_as_it_was_and_nothing_is_overwritten(model, tmp_path):
    model.save(tmp_path / "saved")
    again = entasis.load(tmp_path / "saved")
    assert torch.equal(again.logits("import json"), model.logits("import json"))
    assert again.chat == model.chat and again.tokenizer.hash == model.tokenizer.hash
    assert json.loads((tmp_path / "saved/shape.json").read_text()) == model.shape.to_dict()
    with pytest.raises(UserError, match="not empty"):
        model.save(tmp_path / "saved")
