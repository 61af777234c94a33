"""All eight seeds of `constructive` at nano: the five of results/constructive-nano and the three of this folder.

    python results/constructive-nano-seeds-5-7/join.py

Within a seed all runs are of one machine, so differences are paired by seed as ever. Printed are the 95 % interval of the
t, and the anytime-valid p with Holm over all comparisons that the study planned, since the last three seeds were added by
one who had seen the first five.
"""

import json
from pathlib import Path

from entasis.study import sequential, statistics

HERE = Path(__file__).parent
BLOCKS = [
    json.loads((folder / "verdict.json").read_text()) for folder in (HERE.parent / "constructive-nano", HERE)
]

found = {}
for protocol, part in BLOCKS[0]["protocols"].items():
    base = BLOCKS[0]["baseline"]
    pairs = [(arm, base) for arm in part["arms"] if arm != base]
    pairs += [(c["arm"], c["against"]) for c in part["contrasts"]]
    scores = {
        arm: {s: x for b in BLOCKS for s, x in b["protocols"][protocol]["arms"][arm]["scores"].items()}
        for arm in part["arms"]
    }
    for arm, against in pairs:
        seeds = sorted(scores[arm].keys() & scores[against].keys())
        differences = [scores[arm][s] - scores[against][s] for s in seeds]
        if any(differences):
            found.setdefault((arm, against, tuple(differences)), (protocol, differences))

# The control is judged apart.
family = {key: row for key, row in found.items() if key[0] != "half"}
p = [sequential.follow(d, alpha=0.05)[-1].p for _, d in family.values()]
holm = dict(zip(family, statistics.holm(p, BLOCKS[0]["comparisons"]), strict=True))
for key, (protocol, d) in found.items():
    mean, low, high, _ = statistics.paired_interval(d)
    valid = f"p {holm[key]:.4f}" if key in holm else "control"
    print(f"{protocol:7}{key[0]:19}{key[1]:19}{len(d)} {mean:+.4f} ({low:+.4f}, {high:+.4f})  {valid}")
