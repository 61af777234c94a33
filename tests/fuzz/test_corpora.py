"""`entasis data inspect` and `doctor` on a damaged corpus: the headers of its shards, and its index."""

import json
import shutil

import numpy as np
import pytest
from driver import changed, changes, damaged, damages
from hypothesis import strategies as st


@pytest.fixture
def corpus(fuzz, memory):
    texts = [f"Document {i} says {'this and that ' * (i % 7)}" for i in range(40)]
    (memory / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert fuzz.command(
        "data", "prepare", "a.jsonl", "--tokenizer", "bytes", "--output", "c", "--validation", "0"
    )
    return memory / "c" / "train"


def test_shards(fuzz, corpus):
    file = corpus / "shard-00000.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    def check(edits):
        file.write_bytes(damaged(content[:end], edits) + content[end:])
        fuzz.command("data", "doctor", corpus, codes=(0, 1, 2))
        return fuzz.command("data", "inspect", corpus)

    fuzz(damages(within=end), 4_000, check)
    fuzz.some_accepted()


def test_index(fuzz, corpus):
    file = corpus / "corpus.json"
    index = json.loads(file.read_text())
    index.pop("seal", None)
    content = json.dumps(index).encode()

    def check(edits):
        broken = isinstance(edits[0][0], str)
        file.write_bytes(damaged(content, edits) if broken else json.dumps(changed(index, edits)).encode())
        fuzz.command("data", "doctor", corpus, codes=(0, 1, 2))
        return fuzz.command("data", "inspect", corpus)

    fuzz(st.one_of(changes(), damages()), 2_500, check)


def test_ids(fuzz, corpus):
    """Files of ids of other projects, with what their headers promise."""
    ids = np.arange(600, dtype=np.uint16) % 256
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    np.save("x.npy", ids)
    megatron = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + (1).to_bytes(8, "little") * 2
    sound = {
        "llm.c": header.tobytes() + ids.tobytes(),
        "npy": (corpus.parents[1] / "x.npy").read_bytes(),
        "megatron": megatron
        + np.array([600], np.int32).tobytes()
        + np.zeros(1, np.int64).tobytes()
        + bytes(16),
    }
    file = corpus.parents[1] / "ids.bin"

    output = corpus.parents[1] / "imported"

    def bring(given):
        kind, edits = given
        file.write_bytes(ids.tobytes())
        (file.with_suffix(".idx") if kind == "megatron" else file).write_bytes(damaged(sound[kind], edits))
        shutil.rmtree(output, ignore_errors=True)
        return fuzz.command(
            "data", "import", file, "--format", kind, "--tokenizer", "bytes", "--output", output
        )

    fuzz(st.tuples(st.sampled_from(list(sound)), damages(within=1100)), 2_500, bring)
