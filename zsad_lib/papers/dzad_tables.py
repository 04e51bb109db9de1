"""DZAD's tables and figures in the paper's own rows and columns, what is measured beside what is printed.

Source: Zhang, Gao, Li and Gao, "Diffusion-based Zero-shot Anomaly Detection" (AAAI 2025): Tables 1 to 4, Figures 3, 4.
A row is (model, Reading): "SGSD" or "SD" of a `dzad_cross.Direction`, and how what it measured is read. The printed
figures lie in `published/` beside this file.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from zsad_lib.anomaly import weighting
from zsad_lib.errors import DataError, MethodError
from zsad_lib.evaluation.tables import COLUMNS, evaluate_run, format_cell
from zsad_lib.methods.dzad import DECISIONS, Reading
from zsad_lib.papers.dzad_cross import METRICS, Cross, Direction, aurocs, map_aurocs, measure_directions

PUBLISHED = Path(__file__).resolve().parent / "published"
COMPONENTS = ("SD", "SGSD", "M_t", "F_b", "w_t")
ABLATION = ((1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, 0, 0), (1, 1, 0, 1, 0), (1, 1, 1, 0, 1), (1, 1, 1, 1, 1))
FULL = ABLATION[-1]
UNGUIDED = (1, 0, 1, 1, 1)  # not in the paper: everything but the guide
TITLES = {"mvtec_ad": "MVTec AD", "visa": "VisA", "btad": "BTAD"}  # as the paper writes them
Row = tuple[str, Reading]
Directions = dict[str, Direction]


# --- rows; smoothing: sigma and pool of a Reading, in pixels of the maps


def component_label(row: Iterable[int]) -> str:
    """A row of Table 3 in words: "SGSD + M_t + w_t"; SD stands in every row and is named where it is alone."""
    names = [name for name, there in zip(COMPONENTS, row, strict=True) if there]
    return " + ".join(names[1:] if row[1] else names)


def component_reading(row: Iterable[int], decision: str = DECISIONS[0], **smoothing) -> Row:
    """(model, Reading) of a row of Table 3, five 0 or 1 in the order of COMPONENTS.

    Without M_t the one timestep in the middle decides; without F_b the map is that of the noise errors; without w_t
    all weights are 1.
    """
    _, guided, many, branches, weighted = row
    name = weighting.DEFAULT if weighted else "one"
    chosen = "two-branch" if branches else "noise errors"
    return "SGSD" if guided else "SD", Reading(name, bool(many), decision, chosen, **smoothing)


def ablation_rows(smoothing: dict, decision: str = DECISIONS[0], extra: bool = False) -> dict[str, Row]:
    """{label: (model, Reading)} of Table 3, in its order; extra: also UNGUIDED, which the paper does not have."""
    rows = [*ABLATION, *([UNGUIDED] if extra else [])]
    return {component_label(row): component_reading(row, decision, **smoothing) for row in rows}


def weighting_rows(smoothing: dict, decision: str = DECISIONS[0]) -> dict[str, Row]:
    """{weighting: (model, Reading)} of Table 4, in its order, then the learned one: M_t and w_t on noise errors."""
    return {
        name: ("SGSD", Reading(name, decision=decision, map="noise errors", **smoothing)) for name in weighting.FORMULAS
    }


def full_rows(smoothing: dict, decision: str = DECISIONS[0]) -> dict[str, Row]:
    """{"DZAD": (model, Reading)}: the complete method."""
    return {"DZAD": component_reading(FULL, decision, **smoothing)}


# --- the numbers


def evaluate_rows(directions: Directions, rows: dict[str, Row], n_bootstrap: int = 200, seed: int = 0) -> pd.DataFrame:
    """AUROCs of every row and direction, fractions with 95 % bootstrap intervals.

    A long frame with columns target, row and `tables.COLUMNS`; one line for each category, and "mean".
    """
    frames = []
    for target, direction in directions.items():
        for label, (model, reading) in rows.items():
            scores, maps = reading.read(direction.measured[model], direction.reference[model])
            frames.append(aurocs(direction, scores, maps, n_bootstrap, seed).assign(target=target, row=label))
    return _joined(frames)


def evaluate_baselines(directions: Directions, n_bootstrap: int = 200, seed: int = 0) -> pd.DataFrame:
    """The same frame, of the baselines; their names are the rows."""
    frames = []
    for target, direction in directions.items():
        for name, results in direction.baselines.items():
            frame = evaluate_run(results, n_bootstrap=n_bootstrap, seed=seed, metrics=list(METRICS))
            frames.append(frame.assign(target=target, row=name))
    return _joined(frames)


def judged_anomalous(directions: Directions, row: Row) -> pd.DataFrame:
    """Whom eq. 12 calls anomalous, by a row (model, Reading with class features): a frame with the rows of
    `directions` and the columns "normal images", "anomalous images", percent of these."""
    model, reading = row
    if reading.decision != "class features":
        raise MethodError(f"decision {reading.decision!r} orders images and judges none: use class features")
    shares = {}
    for target, direction in directions.items():
        judged = reading.read(direction.measured[model], direction.reference[model])[0] > 0
        labels = direction.measured[model].labels
        shares[target] = [100 * judged[labels == label].mean() for label in (0, 1)]
    return pd.DataFrame(shares, index=["normal images", "anomalous images"]).T.rename_axis("tested")


def error_levels(directions: Directions, model: str = "SGSD") -> pd.DataFrame:
    """Mean noise error of normal and anomalous images, auxiliary and tested: a frame with the rows of `directions`."""
    rows = {}
    for target, one in directions.items():
        sides = {"auxiliary": one.reference[model], "tested": one.measured[model]}
        rows[target] = {
            f"{side}, {name}": measured.errors.matrix[measured.labels == label].mean()
            for side, measured in sides.items()
            for label, name in enumerate(("normal", "anomalous"))
        }
    return pd.DataFrame(rows).T.rename_axis("tested")


def _joined(frames):
    return pd.concat(frames, ignore_index=True)[["target", "row", *COLUMNS]]


def stage_errors(direction: Direction, model: str = "SGSD") -> dict[str, dict[str, np.ndarray]]:
    """Mean noise error of each stage, by category and truth: {category: {"normal", "anomalous": float32 [n,N]}}."""
    stages = direction.measured[model].errors.matrix.mean(2)
    categories = np.array([sample.category for sample in direction.samples])
    labels = direction.measured[model].labels
    return {
        category: {
            name: stages[(categories == category) & (labels == label)]
            for label, name in enumerate(("normal", "anomalous"))
        }
        for category in dict.fromkeys(categories.tolist())
    }


def timestep_curves(frame: pd.DataFrame) -> dict[str, dict]:
    """A frame of `by_timesteps` for `plots.interval_curves`, percent: {metric: {schedule: (T, value, low, high)}}."""
    return {
        f"{title}, percent": {
            schedule: (part["T"].to_numpy(), *(100 * part[["value", "low", "high"]].to_numpy().T))
            for schedule, part in frame[frame.metric == metric].groupby("schedule", sort=False)
        }
        for metric, title in METRICS.items()
    }


# --- the tables; profile: what the measured columns are labelled with


def printed(table: int) -> pd.DataFrame:
    """The figures that the paper prints in its Table 1, 2, 3 or 4: fractions, as in `published/`."""
    return pd.read_csv(PUBLISHED / f"dzad_table{table}.csv")


def table1(frame: pd.DataFrame, profile: str) -> pd.DataFrame:
    """Image AUROC of each category, percent: rows "set: category", one column a measured row and a printed method."""
    rows = frame[frame.metric == "image_auroc"]
    keys = [f"{TITLES.get(t, t)}: {c}" for t, c in zip(rows.target, rows.category, strict=True)]
    known = printed(1)
    names = [f"MVTec AD: {category}" for category in known.category]
    return _beside(rows, keys, known.drop(columns="category").set_axis(names), profile).rename_axis("category")


def table2(frame: pd.DataFrame, profile: str) -> pd.DataFrame:
    """Image and pixel AUROC of each set, percent: rows "set: metric", columns as in `table1`."""
    rows = frame[frame.category == "mean"]
    keys = [f"{TITLES.get(t, t)}: {METRICS[m]}" for t, m in zip(rows.target, rows.metric, strict=True)]
    known = printed(2)
    names = [f"{dataset}: {METRICS[metric]}" for dataset, metric in zip(known.dataset, known.metric, strict=True)]
    return _beside(rows, keys, known.drop(columns=["dataset", "metric"]).set_axis(names), profile).rename_axis("set")


def table3(frame: pd.DataFrame, profile: str) -> pd.DataFrame:
    """The components: the paper's six rows, and further ones of the frame; a column for each component, then measured
    and printed AUROCs, percent."""
    table = _by_row(frame, profile)
    known = (100 * printed(3)[list(METRICS)]).set_axis([component_label(row) for row in ABLATION])
    ticks = {component_label(row): ["✓" if part else "" for part in row] for row in (*ABLATION, UNGUIDED)}
    for metric, title in METRICS.items():
        table[f"MVTec AD: {title} (printed)"] = _one_decimal(known[metric].reindex(table.index))
    marks = pd.DataFrame(ticks, index=list(COMPONENTS)).T.reindex(table.index)
    return pd.concat([marks, table], axis=1).rename_axis("components")


def table4(frame: pd.DataFrame, profile: str) -> pd.DataFrame:
    """The weighting functions: measured and printed AUROCs, percent, in the paper's order; the learned one is last."""
    table = _by_row(frame, profile)
    known = (100 * printed(4).drop(columns="weight_function")).set_axis(list(weighting.FORMULAS)[:-1])
    for column, title in (("mvtec", "MVTec AD"), ("visa", "VisA")):
        table[f"{title}: image AUROC (printed)"] = _one_decimal(known[f"{column}_image_auroc"].reindex(table.index))
    return table.set_axis([weighting.FORMULAS[name] for name in table.index]).rename_axis("w_t")


def decisions_table(frames: dict[str, pd.DataFrame], profile: str) -> pd.DataFrame:
    """Table 3's image AUROCs by decision: {decision: frame of `evaluate_rows`} -> rows the components, columns set and
    decision, percent."""
    parts = {}
    for decision, frame in frames.items():
        table = _by_row(frame[frame.metric == "image_auroc"], profile)
        names = [column.partition(": ")[0] for column in table]
        parts |= {f"{name}: {decision}": table[column] for name, column in zip(names, table, strict=True)}
    order = [f"{TITLES.get(t, t)}: {d}" for t in frame.target.unique() for d in frames]
    return pd.DataFrame(parts)[order].rename_axis("components")


def timesteps_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of `dzad_cross.by_timesteps` as a table: rows T, columns metric and schedule, percent [interval]."""
    cells = frame.assign(cell=_cells(frame), column=frame.metric.map(METRICS) + ", " + frame.schedule)
    return cells.pivot(index="T", columns="column", values="cell")[list(dict.fromkeys(cells.column))].rename_axis(
        None, axis=1
    )


def _beside(rows, keys, known, profile):
    """Measured rows and columns, then those printed; what the one does not have is said."""
    measured = rows.assign(key=keys, cell=_cells(rows)).pivot(index="key", columns="row", values="cell")
    measured = measured.loc[list(dict.fromkeys(keys)), list(dict.fromkeys(rows.row))]
    measured.columns = [f"{name} (measured, {profile})" for name in measured]
    known = (100 * known).map("{:.1f}".format).add_suffix(" (printed)")
    order = [*measured.index, *(name for name in known.index if name not in measured.index)]
    measured, known = measured.reindex(order).fillna("not run"), known.reindex(order).fillna("not printed")
    return pd.concat([measured, known], axis=1)


def _by_row(frame, profile):
    """Means over the categories: rows as in the frame, columns "set: metric (measured, profile)"."""
    means = frame[frame.category == "mean"]
    names = [f"{TITLES.get(t, t)}: {METRICS[m]}" for t, m in zip(means.target, means.metric, strict=True)]
    means = means.assign(column=[f"{name} (measured, {profile})" for name in names], cell=_cells(means))
    table = means.pivot(index="row", columns="column", values="cell")
    return table.loc[list(dict.fromkeys(means.row)), list(dict.fromkeys(means.column))].rename_axis(None, axis=1)


def _cells(frame):
    return [format_cell(*row) for row in zip(frame.value, frame.low, frame.high, strict=True)]


def _one_decimal(values):
    return values.map("{:.1f}".format).where(values.notna(), "not printed")


# --- pictures


def best_median_worst(values: np.ndarray) -> dict[str, int]:
    """{"best", "median", "worst": index} of values [I], NaN left out; of two medians the lower."""
    order = np.argsort(values, kind="stable")[: np.isfinite(values).sum()]
    if not len(order):
        raise ValueError("no value to rank: no image has an anomalous pixel")
    return {"best": int(order[-1]), "median": int(order[(len(order) - 1) // 2]), "worst": int(order[0])}


def examples(direction: Direction, row: Row) -> dict[str, tuple[int, float]]:
    """Fig. 3's images of a Direction, chosen by the pixel AUROC that `row` (model, Reading) has in each anomalous
    image: {"best", "median", "worst": (index, AUROC)}."""
    model, reading = row
    values = map_aurocs(reading.read(direction.measured[model], direction.reference[model])[1], direction.masks)
    return {word: (index, float(values[index])) for word, index in best_median_worst(values).items()}


def example_maps(direction: Direction, rows: dict[str, Row], indices: list[int]) -> dict[str, np.ndarray]:
    """{label: maps [n,H,W], each from 0 on} of rows {label: (model, Reading)} and of patch_knn, for the pictures."""
    maps = {
        label: reading.read(direction.measured[model].take(indices), direction.reference[model])[1]
        for label, (model, reading) in rows.items()
    }
    maps["patch_knn"] = direction.baselines["patch_knn"].maps[indices]
    return {label: m - m.min((1, 2), keepdims=True) for label, m in maps.items()}


# --- all of it


def study(
    crosses: Iterable[Cross],
    smoothing: dict,
    profile: str,
    n_bootstrap: int = 200,
    seed: int = 0,
    decision: str = DECISIONS[0],
    **options,
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, dict[str, str]]:
    """({name: table}, the frame of all numbers, {target: why it is left out}): Tables 1 to 4 and the decisions.

    options: of `dzad_cross.measure_direction`.
    """
    directions, left_out = measure_directions(crosses, **options)
    if not directions:
        raise DataError("no target at hand: " + "; ".join(left_out.values()))
    drawn = {"n_bootstrap": n_bootstrap, "seed": seed}
    full = evaluate_rows(directions, full_rows(smoothing, decision), **drawn)
    full = pd.concat([full, evaluate_baselines(directions, **drawn)], ignore_index=True)
    parts = {d: evaluate_rows(directions, ablation_rows(smoothing, d, extra=True), **drawn) for d in DECISIONS}
    weights = evaluate_rows(directions, weighting_rows(smoothing, decision), **drawn)
    tables = {
        "table1": table1(full, profile),
        "table2": table2(full, profile),
        "table3": table3(parts[decision], profile),
        "table4": table4(weights, profile),
        "decisions": decisions_table(parts, profile),
    }
    named = {"method": full, **{f"table 3, {d}": frame for d, frame in parts.items()}, "table 4": weights}
    frames = [frame.assign(table=name) for name, frame in named.items()]
    return tables, pd.concat(frames, ignore_index=True), left_out
