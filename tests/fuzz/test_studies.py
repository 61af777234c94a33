"""What `entasis study plan` reads of damaged studies: all of it but the speed of the machine."""

import json

import yaml
from driver import changed, changes, damaged, damages
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.study import plan, study_files

STUDY = {
    "base": {"tokens": "2k", "data": {"train": "c/train", "validation": "c/validation", "sequence": 32},
        "batch": {"tokens": 64}, "optimizer": {"lr": 3e-3},
             "shape": {"profile": "crown", "layers": 2, "d_model": 32, "head_dim": 16, "context": 64, "vocabulary": 257, "budget": "60k"}},
    "arms": {"isotropic": {"shape.profile": "isotropic"}, "crown": {"shape.profile": "crown"}},
    "baseline": "isotropic", "protocols": ["params"], "seeds": 2, "threads": 1,
    "sweep": {"multipliers": [0.5, 1], "seeds": 1}, "margin": 0.01, "tolerance": "1%", "downstream": {"tasks": ["arc_easy"]},
    "corpora": {"c": {"sources": ["stdlib"], "train_tokenizer": 257}}, "sizes": {"small": {"base": {"tokens": "1k"}}},
    "size": "small",
}  # fmt: skip
WORDS = [
    "params", "flops", "time", ["params", "flops"], "isotropic", "crown", "shared", "mup", "nothing", [0.5, 1, 2], [1],
    [0, 1], 5, "50%", {"multipliers": [1, 2]}, {"shape.layers": 3}, {"base.tokens": "1k"}, {"optimizer": {"lr": 1}}, "large",
    "quickstart", {"tasks": []}, {"sources": ["stdlib"]}, {"copy_of": "c", "corruption": "shuffled"}, "extends", "corpora", "hours",
]  # fmt: skip


def test_studies(fuzz, memory):
    file = memory / "s.yaml"
    content = yaml.safe_dump(STUDY).encode()

    def check(edits):
        broken = isinstance(edits[0][0], str)
        file.write_bytes(damaged(content, edits) if broken else json.dumps(changed(STUDY, edits)).encode())
        try:
            plan.solve(study_files.read(file), 257)  # all of `study plan` but the machine's speed
        except UserError as error:
            assert "\n" not in str(error)
            return False
        return True

    fuzz(st.one_of(changes(WORDS, most=2), changes(WORDS, most=1), damages()), 5_000, check)
    fuzz.some_accepted()
