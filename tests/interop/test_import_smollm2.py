"""SmolLM2-135M-Instruct, a real model in a 4-bit GGUF: imported, it is the model that transformers and
llama.cpp run.

The file comes with `make smollm2`; without it these tests are skipped and say so.
"""

import argparse
import inspect
import re
import statistics
import typing
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from entasis.cli import main
from entasis.evaluate.chat import load as load_chat
from entasis.interop.exporting import export
from entasis.interop.importing import import_model
from entasis.model import weights
from entasis.train.metrics import records

SOURCE = Path(__file__).parents[2] / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.skipif(
        not SOURCE.exists(), reason=f"{SOURCE.name} is not in .cache/smollm2; run `make smollm2`"
    ),
    pytest.mark.xdist_group("smollm2"),
]

PROSE = """The old lighthouse keeper climbed the stairs slowly, one hand on the rail, listening to the wind that
came in from the sea. He had done this every evening for forty years, and he knew each step by its sound. At the
top he wiped the salt from the glass, trimmed the wick, and sat down to wait for the boats. In a few hours the
fishermen would pass the point, and the youngest of them, who was his grandson, would raise a lantern twice so
that the old man could go to bed."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    return folder, import_model(SOURCE, folder)


@pytest.fixture(scope="module")
def ours(imported):
    return weights.load(imported[0]).eval()


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        SOURCE.parent, gguf_file=SOURCE.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(SOURCE.parent, gguf_file=SOURCE.name)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def tokenizer(imported):
    return Tokenizer.from_file(str(imported[0] / "tokenizer.json"))


def test_it_is_the_model_of_its_model_card(imported):
    _, result = imported
    shape = result.shape
    assert result.parameters == 134_515_008
    assert (shape.n_layers, shape.d_model, shape.head_dim, shape.vocabulary) == (30, 576, 64, 49_152)
    assert {(x.n_heads, x.n_kv_heads, x.d_ff) for x in shape.layers} == {(9, 3, 1536)}
    assert shape.tied_embeddings and shape.rope_theta == 1e5 and shape.context == 8192
    assert result.tokenizer and result.chat_template and result.dtype == "float32"


@torch.no_grad()
def test_the_capital_of_france(ours, tokenizer):
    ids = tokenizer.encode("The capital of France is", add_special_tokens=False).ids
    assert tokenizer.decode([int(ours(torch.tensor([ids]))[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
@torch.no_grad()
def test_loss_on_prose_and_logits_equal_transformers(ours, theirs, tokenizer):
    ids = torch.tensor([tokenizer.encode(PROSE, add_special_tokens=False).ids])
    reference = theirs[0](ids).logits
    mine = ours(ids)
    assert ids.shape[1] > 100
    losses = [
        torch.nn.functional.cross_entropy(x[0, :-1].float(), ids[0, 1:]).item() for x in (mine, reference)
    ]
    assert abs(losses[0] - losses[1]) < 1e-3, losses
    assert losses[0] < 3.5
    torch.testing.assert_close(mine, reference, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_tokenizer_equals_transformers(theirs, tokenizer):
    """On real text without blanks before digits: transformers' GGUF conversion forgets that SmolLM splits
    digits off first, which changes how the blanks before one are taken; llama.cpp, below, agrees with
    ours there."""
    text = "\n".join(inspect.getsource(module) for module in (argparse, typing, statistics))
    text = re.sub(r"\s+(?=\d)", "", text)
    chatted = "<|im_start|>user\nWho's there?  naïve café 日本語 😀\r\n\tend   <|im_end|>\n"
    for sample in (text, PROSE, chatted):
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert ids == theirs[1].encode(sample, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == sample


def test_the_chat_template_is_that_of_the_file(imported):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(imported[0])
    user = {"role": "user", "content": "Hello"}
    for messages in ([user], [{"role": "system", "content": "Be brief."}, user]):
        chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
        assert load_chat(imported[0]).render(messages) == chat


def test_it_answers_a_question_in_a_chat(imported, capsys):
    asked = ["--chat", "--prompt", "What is the capital of France?", "--temperature", "0", "--tokens", "24"]
    assert main(["generate", str(imported[0]), *asked]) == 0
    answer = capsys.readouterr().out
    assert "Paris" in answer and "France?" not in answer and "<|im" not in answer


@pytest.mark.slow
@torch.no_grad()
def test_exported_it_opens_in_transformers_and_llama_cpp(imported, ours, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    llama_cpp = pytest.importorskip("judge_llama_cpp", reason="llama.cpp's wheel xllamacpp is not installed")
    ids = tokenizer.encode("The capital of France is", add_special_tokens=False).ids
    expected = ours(torch.tensor([ids]))[0]
    for to in ("hf", "padded"):
        export(imported[0], tmp_path / to, to=to)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / to, dtype=torch.float32)
        logits = theirs.eval()(torch.tensor([ids])).logits[0]
        # Logits reach 30 here; the sums over 576 and 1536 products are taken in another order.
        torch.testing.assert_close(logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        text = transformers.AutoTokenizer.from_pretrained(tmp_path / to).decode(int(logits[-1].argmax()))
        assert text == " Paris"
    export(imported[0], tmp_path / "gguf", to="gguf")  # f32: f16 would be another model by 8e-3
    server = llama_cpp.open_server(next((tmp_path / "gguf").glob("*.gguf")), threads=2)
    judged = llama_cpp.log_probabilities(server, "The capital of France is", 5)
    mine = expected[-1].log_softmax(-1)
    assert max(abs(mine[i].item() - value) for i, value in judged.items()) < 5e-3
    assert tokenizer.decode([max(judged, key=judged.get)]) == " Paris"


@torch.no_grad()
def test_llama_cpp_splits_and_continues_alike(ours, tokenizer):
    llama_cpp = pytest.importorskip("judge_llama_cpp", reason="llama.cpp's wheel xllamacpp is not installed")
    server = llama_cpp.open_server(SOURCE, threads=2)
    text = "In 1889,  12345 people paid 2.50 francs to climb it.\n\n   7 of them were from"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert llama_cpp.n_tokens(server, text) == len(ids)
    theirs = llama_cpp.log_probabilities(server, ids, 20)
    mine = ours(torch.tensor([ids]))[0, -1].log_softmax(-1)
    # llama.cpp also rounds the activations to 8 bits, so the two agree in rank and roughly in value.
    assert int(mine.argmax()) == max(theirs, key=theirs.get)
    assert max(abs(mine[i].item() - value) for i, value in list(theirs.items())[:5]) < 0.5


@pytest.mark.slow
def test_its_last_two_layers_are_fine_tuned_from_the_command_line(imported, tmp_path, capsys):
    """The loss falls, and everything else stays as it was to the bit."""
    folder, _ = imported
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Evening {i}.\n{PROSE}\n" * 2)
    corpus = tmp_path / "corpus"
    command = ["data", "prepare", str(tmp_path / "text"), "--tokenizer", str(folder / "tokenizer.json")]
    assert main([*command, "--validation", "0", "--output", str(corpus)]) == 0
    (tmp_path / "recipe.yaml").write_text(
        f"start: {{from: {folder}}}\n"
        f"data: {{train: {corpus / 'train'}, sequence: 64}}\n"
        "batch: {tokens: 128}\n"
        "optimizer: {lr: 1e-3, weight_decay: 0}\n"
        "schedule: {name: constant, warmup: 0}\n"
        "stages: [{tokens: 512, trainable: 'blocks[-2:]'}]\n"
        "precision: fp32\ncompile: false\nattention: sdpa\nlogging: {tensorboard: false}\n"
    )
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(run)]) == 0, capsys.readouterr().err
    losses = [record["loss"] for record in records(run)]
    assert losses[-1] < losses[0] - 0.1
    before, after = (dict(weights.load(f).named_parameters()) for f in (folder, run))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed} == {"28", "29"}
    assert len(changed) == sum(name.startswith(("blocks.28.", "blocks.29.")) for name in before)
