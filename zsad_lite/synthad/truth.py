"""What the drawings of synthad are known to show, in words, and whether a captioner said it."""

import pandas as pd

from zsad_lib.data.datasets import AnomalyDataset
from zsad_lib.errors import DataError
from zsad_lib.store import read_lines


def true_captions(dataset: AnomalyDataset) -> dict[str, str]:
    """{image id: the sentence its drawing was made from}, by attributes.jsonl in synthad's folder.

    That of a damaged drawing is the sentence of the drawing without the damage.
    """
    path = dataset.root / "attributes.jsonl"
    if not path.is_file():
        raise DataError(f"no true captions for {dataset.name}: {path} is not there, only synthad's folder has it")
    truth = {line["file"]: line["caption"] for line in read_lines(path)}
    files = {s.id: s.image_path.relative_to(dataset.root).as_posix() for s in dataset.samples}
    missing = [file for file in files.values() if file not in truth]
    if missing:
        raise DataError(f"{path} has no line for {missing[0]} and {len(missing) - 1} other images: draw synthad anew")
    return {name: truth[file] for name, file in files.items()}


def check_captions(said: list[str], truth: list[str]) -> pd.DataFrame:
    """Whether each statement of the true captions was made: columns image (index), attribute, truth, right (bool).

    A caption is statements joined by commas; the first names the category ("An image of a bottle"), the others an
    attribute and its value ("glass green").
    """
    rows = []
    for k, (sentence, true) in enumerate(zip(said, truth, strict=True)):
        statements = sentence.split(", ")
        for n, statement in enumerate(true.split(", ")):
            attribute = statement.split(" ")[0] if n else "category"
            rows.append((k, attribute, statement, statement in statements))
    return pd.DataFrame(rows, columns=["image", "attribute", "truth", "right"])
