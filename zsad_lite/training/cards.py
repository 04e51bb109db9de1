"""zsad_lite.training.cards"""

import json
import os
import platform
from pathlib import Path

import numpy as np
import torch

CARD = """---
license: apache-2.0
library_name: {library}
---
# {name}

{what}

| | |
|---|---|
{rows}

**Limits.** {limits}

Written by `zsad train {command}`; the same command and seed on the same device give the same weights.
"""


def write_card(out: Path, work: Path, library: str, what: str, limits: str, facts: dict[str, str]) -> None:
    """The model card ``out/README.md``: what it is and how each stage was trained; ``out/training_log.json``: each
    stage's steps, seed, seconds and losses (a hundred means)."""
    rows, logs = dict(facts), {}
    for path in sorted(work.glob("*.json"), key=os.path.getmtime):
        stage = json.loads(path.read_text())
        if "plan" in stage:
            steps, seed = stage["plan"]
            losses = [round(float(part.mean()), 5) for part in np.array_split(stage["losses"], min(100, steps))]
            logs[path.stem] = {"steps": steps, "seed": seed, "seconds": stage["seconds"], "losses": losses}
            rows[f"stage {path.stem}"] = (
                f"{steps} steps, seed {seed}, {stage['seconds'] / 60:.0f} min, last loss {losses[-1]:.3f}"
            )
    (out / "training_log.json").write_text(json.dumps(logs) + "\n")
    rows["hardware"] = (
        f"{platform.machine()} {'GPU' if torch.cuda.is_available() else 'CPU'}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    rows["licence"] = "Apache-2.0"
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    name = work.name.rpartition("-seed")[0]
    command = name.replace("--", " --set ")
    (out / "README.md").write_text(
        CARD.format(name=name, command=command, library=library, what=what, rows=lines, limits=limits), encoding="utf-8"
    )


def read_log(checkpoint: str | Path) -> dict[str, dict]:
    """What ``write_card`` kept of each stage of a checkpoint's training: steps, seed, seconds, losses."""
    return json.loads((Path(checkpoint) / "training_log.json").read_text())
