"""Model cards: what a trained checkpoint is, what it was trained on and how."""

import json
import os
import platform
import re
from pathlib import Path

import numpy as np
import torch

from zsad_lib import store

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
    """The model card out/README.md from what a work folder holds, and out/training_log.json (`read_log`)."""
    rows, logs = dict(facts), {}
    for path in sorted(work.glob("*.json"), key=os.path.getmtime):
        stage = store.read_json(path)
        if "plan" not in stage:
            continue
        steps, seed = stage["plan"]
        losses = [round(float(part.mean()), 5) for part in np.array_split(stage["losses"], min(100, steps))]
        logs[path.stem] = {"steps": steps, "seed": seed, "seconds": stage["seconds"], "losses": losses}
        minutes = f"{stage['seconds'] / 60:.0f} min"
        rows[f"stage {path.stem}"] = f"{steps} steps, seed {seed}, {minutes}, last loss {losses[-1]:.3f}"
    machine = f"{platform.machine()} {'GPU' if torch.cuda.is_available() else 'CPU'}"
    rows["hardware"] = f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows["licence"] = "Apache-2.0"
    command = re.sub("--(steps=|seed=)?", lambda option: f" --{option[1] or 'set '}", work.name)
    card = CARD.format(
        name=work.name, command=command, library=library, what=what, limits=limits,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "training_log.json").write_text(json.dumps(logs) + "\n")


def read_name(checkpoint: Path) -> str | None:
    """The name that its card gives to a checkpoint of `zsad train`; of any other folder None."""
    card = checkpoint / "README.md"
    if not (card.is_file() and (checkpoint / "training_log.json").is_file()):
        return None
    heading = re.search(r"(?m)^# (.+)$", card.read_text(encoding="utf-8", errors="replace"))
    return heading and heading[1]


def read_log(checkpoint: str | Path) -> dict[str, dict]:
    """Of each stage of a checkpoint's training: steps, seed, seconds, losses (means over a hundredth each)."""
    return store.read_json(Path(checkpoint) / "training_log.json")
