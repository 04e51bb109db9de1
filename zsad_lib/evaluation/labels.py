"""Which finished runs stand together in a table, and how each is named there."""

from pathlib import Path
from typing import Any

from zsad_lib.errors import RunError
from zsad_lib.evaluation.runs import Results, load_results, read_run

DERIVED = ("t_latent", "t_denoise")  # follow from other settings, unless they alone differ
MOST = 4  # differing settings in a label


def find_runs(
    out: Path | str, dataset: str | None = None, folders: list[Path] | None = None
) -> tuple[list[Results], list[str]]:
    """The finished, labelled runs in `out` (or the named folders, whatever they are), and why others are left out."""
    found, loaded, left_out = folders or sorted(path.parent for path in Path(out).glob("*/run.json")), [], []
    for folder in found:
        try:
            run = read_run(folder)
            if run and dataset and run["dataset"] != dataset:
                continue
            if not folders and run["state"] != "finished":
                left_out.append(f"{run['state']}: {folder}")
            elif not folders and all(label < 0 for _, _, label, _ in run["samples"]):
                left_out.append(f"no labels: {folder}")
            else:
                loaded.append(load_results(folder))
        except RunError as error:
            if folders:
                raise
            left_out.append(str(error))
    if not loaded:
        where = f"among {len(found)} run folders" if folders else f"in {out}"
        reasons = "".join(f"; left out, {reason}" for reason in left_out)
        raise RunError(f"no finished run {f'on {dataset} ' if dataset else ''}{where}: `zsad score` first{reasons}")
    return loaded, left_out


def grouped(runs: list[Results]) -> dict[str, dict[str, Results]]:
    """{title of a set of images: {label: Results}}: only runs over the same images share a table."""
    sets, groups = {}, {}
    for results in runs:
        key = results.run["dataset"], frozenset(results.frame["id"])
        sets.setdefault(key, []).append(results)
    for (dataset, ids), members in sets.items():
        title = f"{dataset}, {len(ids)} images"
        while title in groups:
            title += "*"
        members.sort(key=lambda results: (results.run["config"].get("backbone") is None, run_label(results.run)))
        groups[title] = dict(zip(run_labels([results.run for results in members]), members, strict=True))
    return groups


def run_label(run: dict) -> str:
    """The method, the backbone it stands on, and what a control has re-initialised there."""
    backbone = run["config"].get("backbone")
    named = f"{run['method']}, {backbone['name']}" if backbone else run["method"]
    return named + (" (untrained features)" if run.get("control") == "features" else "")


def run_labels(runs: list[dict]) -> list[str]:
    """A different label for every run: `run_label`, and in a few words where runs of one label differ."""
    labels = []
    for run in runs:
        same = [other["config"] for other in runs if run_label(other) == run_label(run)]
        own = run["config"]
        differing = [key for key in own if any(other.get(key) != own[key] for other in same)]
        chosen = [key for key in differing if key not in DERIVED] or differing
        words = list(dict.fromkeys(_word(key, own[key], same) for key in chosen))
        more = ["…"] if len(words) > MOST else []
        labels.append(", ".join([run_label(run), *filter(None, words[:MOST]), *more]))
    pairs = zip(labels, runs, strict=True)
    return [f"{one} #{run['fingerprint'][:6]}" if labels.count(one) > 1 else one for one, run in pairs]


def _word(key: str, value: Any, same: list[dict]) -> str:
    """A setting as it stands in a label: a network by its name where that tells it from the others."""
    if not isinstance(value, dict):
        return f"{key}={value}"
    inner = {
        name: part for name, part in value.items() if any((other.get(key) or {}).get(name) != part for other in same)
    }
    if "name" in inner or key == "features":
        return f"{key}={value['name']}" if "name" in inner else ""
    if key == "captions":
        return f"captions of {value['images']} images" if "images" in value else f"captions by {_name(value)}"
    plain = [f"{key}.{name}={part}" for name, part in inner.items() if name not in ("weights", "guide", "schedule")]
    return ", ".join(plain)


def _name(captions: dict) -> str:
    speaker = captions["captioner"]
    return speaker["name"] if isinstance(speaker, dict) else speaker
