"""The regime map: rows are decays, columns are regimes, and the colour says what a decay gains over L2 decay.

    python -m train compare map [--tier cpu] [--folder FOLDER]

It trains nothing. It reads the folders of the comparisons of one tier, those that are there, and draws map.png with a
table beside it. A cell is filled where a verdict was reached on every text, else hollow. Gains are in nats per token;
of grokking, in factors of e fewer steps. A column whose controls fail is left out, and the command says so. Weights in
bfloat16 are no column: there forms of rounding are compared, not decays.
"""

import dataclasses
import importlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tyro

from train.config.fields import UserError
from train.display import say
from train.run.figures import RC_PARAMS, pyplot
from train.run.folder import write
from train.study.compare import verdicts
from train.study.regimes import compress_report, ending_report, grokking_report
from train.study.regimes import rows as repeated_rows
from train.study.regimes.arms import ARMS, DECAYS
from train.study.regimes.figures import save
from train.study.regimes.work import known
from train.study.results import RESULTS, read

ORDER = "repeated text"  # the column by whose gains rows are sorted
FULL = 0.1  # nats at which colours end
# Rows of the one pass by the name of the arm there.
ONE_PASS = {"adamw": "l2", "none": "none", "huber": "huber", "p_norm": "p_norm"} | {
    name: name
    for name in ("alphadecay_matched", "alphadecay", "awd", "adadecay", "cautious", "width_scaled")
}


class Cell(NamedTuple):
    """Gain over L2 decay, mean over texts; whether it is resolved on every text; nats or not."""

    gain: float
    resolved: bool


Column = Mapping[str, Cell]


@dataclasses.dataclass(frozen=True)
class Map:
    """Where the comparisons are, and where the map goes."""

    tier: str = "cpu"
    """Of the comparisons: their folders are runs/compare-REGIME-TIER."""
    runs: str = "runs"
    """Folder of these folders."""
    folder: str = "runs/compare-map"
    """Where map.png and map.md go."""


def main(arguments: list[str]) -> int:
    """`python -m train compare map`."""
    options = tyro.cli(
        Map,
        args=arguments,
        prog="python -m train compare map",
        description=__doc__,
        use_underscores=True,
    )
    columns, forgiving = collect(options)
    if not columns:
        raise UserError(
            f"There is no finished comparison of the tier {options.tier!r} in {options.runs}; run, for example,"
            f" python -m train compare repeated {options.tier}."
        )
    folder = pathlib.Path(options.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "map.md", table(columns, forgiving))
    draw(columns, forgiving, folder / "map.png")
    say(f"table     {folder / 'map.md'}\npicture   {folder / 'map.png'}")
    return 0


def collect(options: Map) -> tuple[dict[str, Column], dict[str, str]]:
    """All columns that hold, and the forgiveness of every arm on repeated text."""
    columns: dict[str, Column] = {}
    forgiving: dict[str, str] = {}
    for name, make in READERS.items():
        folder = pathlib.Path(options.runs).expanduser() / f"compare-{name}-{options.tier}"
        if not (folder / "comparison.json").exists():
            say(f"{name:10s} {folder} is not there.")
            continue
        found, failed = make(folder, options.tier)
        if failed:
            say(f"{name:10s} left out, a control failed: {failed[0]}")
            continue
        columns |= {title: column for title, column in found.items() if column}
        if name == "repeated":
            forgiving = _forgiveness(folder, options.tier)
    return columns, forgiving


def regime(name: str, folder: pathlib.Path, tier: str) -> tuple[Any, list[dict[str, Any]]]:
    """The fields of a folder and its records."""
    made = importlib.import_module(f"train.study.regimes.{name}_tiers").TIERS[tier]()
    fields = json.loads((folder / "comparison.json").read_text())
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if "task" in values:
        values["task"] = type(made.task)(**values["task"])
    made = dataclasses.replace(made, **values)
    return made, known(made, read(folder / RESULTS)).records


def _cell(differences: Sequence[tuple[Any, str]], better: str, worse: str) -> Cell | None:
    """From the differences of an arm from L2 decay on every text, and their verdicts."""
    values = [d.interval.value for d, _ in differences if d is not None]
    if len(values) < len(differences) or not values:
        return None
    said = {verdict for _, verdict in differences}
    return Cell(-float(np.mean(values)), said in ({better}, {worse}))


def _per_arm(found: Sequence[tuple[str, Any, str]], better: str, worse: str) -> dict[str, Cell]:
    cells = {}
    for arm in dict.fromkeys(arm for arm, _, _ in found):
        cell = _cell([(d, v) for name, d, v in found if name == arm], better, worse)
        if cell is not None:
            cells[arm] = cell
    return cells


def _one_pass(folder: pathlib.Path, tier: str) -> tuple[dict[str, Column], list[str]]:
    fields = json.loads((folder / "comparison.json").read_text())
    found = verdicts.rows(read(folder / RESULTS), fields["steps"])
    failed = verdicts.void(found, fields["texts"])
    cells = _per_arm(
        [
            (ONE_PASS[row.arm], row.difference, row.verdict)
            for row in found
            if row.arm in ONE_PASS and row.difference is not None
        ],
        "faster",
        "slower",
    )
    return {"one pass": cells}, failed


def _repeated(folder: pathlib.Path, tier: str) -> tuple[dict[str, Column], list[str]]:
    made, records = regime("repeated", folder, tier)
    found = repeated_rows.rows(made, records)
    failed = repeated_rows.failed(made, found, records)
    columns: dict[str, Column] = {}
    for title, prefix in ((ORDER, ""), ("repeated text,\nMuon", "muon_")):
        mine = [
            (row.arm.removeprefix(prefix), row.to_l2, row.verdict)
            for row in found
            if row.arm.startswith("muon_") == bool(prefix)
            and ARMS[row.arm].kind in ("decay", "muon")
            and (row.to_l2 is not None or row.arm == "none")
        ]
        columns[title] = _per_arm(mine, "better", "worse")
    none = [(row.arm, row.to_l2, row.verdict) for row in found if row.arm == "none"]
    columns[ORDER] = {**columns[ORDER], **_per_arm(none, "better", "worse")}
    return columns, failed


def _forgiveness(folder: pathlib.Path, tier: str) -> dict[str, str]:
    """Factors of two of λ within 0.02 nats on repeated text, the smallest over texts."""
    made, records = regime("repeated", folder, tier)
    smallest: dict[str, Any] = {}
    for row in repeated_rows.rows(made, records):
        close, before = row.forgiving, smallest.get(row.arm)
        if close is not None and (before is None or close.doublings < before.doublings):
            smallest[row.arm] = close
    return {arm: str(close) for arm, close in smallest.items()}


def _grokking(folder: pathlib.Path, tier: str) -> tuple[dict[str, Column], list[str]]:
    made, records = regime("grokking", folder, tier)
    cells = {}
    for row in grokking_report.rows(made, records):
        if row.ratio is not None:
            gain = -row.ratio.interval.value * math.log(2)
            cells[row.point.arm] = Cell(
                gain, row.verdict in ("faster", "slower") or math.isinf(gain)
            )
    return {"grokking\n(ln steps)": cells}, grokking_report.failed(made, records)


def _compress(folder: pathlib.Path, tier: str) -> tuple[dict[str, Column], list[str]]:
    made, records = regime("compress", folder, tier)
    mine = [
        (row.arm, row.pruned, row.verdict)
        for row in compress_report.rows(made, records)
        if row.pruned is not None and not row.arm.startswith("muon_")
    ]
    return {"half pruned": _per_arm(mine, "better", "worse")}, compress_report.failed(made, records)


def _ending(folder: pathlib.Path, tier: str) -> tuple[dict[str, Column], list[str]]:
    """How much less gradients over weights rise at the end than with L2 decay, as a natural logarithm."""
    made, records = regime("ending", folder, tier)
    found = []
    for row in ending_report.rows(made, records):
        if row.less is not None:
            found.append((row.point.arm, row.less, row.verdict))
    cells = {
        arm: Cell(cell.gain * math.log(2), cell.resolved)
        for arm, cell in _per_arm(found, "rises less", "rises more").items()
    }
    return {"rise at the end\n(ln ratio)": cells}, ending_report.failed(made, records)


READERS = {
    "one_pass": _one_pass,
    "repeated": _repeated,
    "grokking": _grokking,
    "compress": _compress,
    "ending": _ending,
}


def arms_of(columns: Mapping[str, Column]) -> list[str]:
    """Rows: no decay, L2, and the other decays, those that gain most on repeated text first."""
    order = columns.get(ORDER, {})
    there = [arm for arm in DECAYS if any(arm in column for column in columns.values())]
    others = sorted(
        (arm for arm in there if arm not in ("none", "l2")),
        key=lambda arm: -order[arm].gain if arm in order else math.inf,
    )
    return ["none", "l2", *others]


def table(columns: Mapping[str, Column], forgiving: Mapping[str, str]) -> str:
    """The map as a table."""
    heads = [title.replace("\n", " ") for title in columns]
    lines = [
        "# The regime map",
        "",
        f"| decay | {' | '.join(heads)} | forgiveness |",
        "| --- |" + " --- |" * (len(heads) + 1),
    ]
    for arm in arms_of(columns):
        cells = [_words(column.get(arm)) for column in columns.values()]
        lines.append(f"| {ARMS[arm].title} | {' | '.join(cells)} | {forgiving.get(arm, '')} |")
    return "\n".join([*lines, "", CAPTION, "", "![The table as a picture](map.png)", ""])


CAPTION = (
    "Gain over L2 decay, in nats per token unless the column says otherwise; positive is better. In brackets: not"
    " resolved on every text. Rarely: at most half of the runs get there. Forgiveness: factors of two of λ within 0.02"
    " nats of the best, on repeated text."
)


def _words(cell: Cell | None) -> str:
    if cell is None:
        return ""
    number = (
        f"{cell.gain:+.3f}" if math.isfinite(cell.gain) else "rarely" if cell.gain < 0 else "only"
    )
    return number if cell.resolved else f"({number})"


def draw(columns: Mapping[str, Column], forgiving: Mapping[str, str], path: pathlib.Path) -> bool:
    """A square per cell: its shade is the gain, dark blue for better and dark orange for worse, hollow if unresolved.

    Signs stand in the cells, so the picture can be read in grey.
    """
    plt: Any = pyplot()
    arms, titles = arms_of(columns), list(columns)
    with plt.rc_context(RC_PARAMS | {"axes.grid": False}):
        picture, panel = plt.subplots(
            figsize=(2.3 + 0.92 * (len(titles) + 1), 1.0 + 0.24 * len(arms)), layout="constrained"
        )
        better, worse = (np.array(plt.matplotlib.colors.to_rgb(c)) for c in ("#10305a", "#b4521e"))
        for i, arm in enumerate(arms):
            for j, title in enumerate(titles):
                cell = columns[title].get(arm)
                if cell is None:
                    if arm == "l2":
                        style = {"ha": "center", "va": "center", "fontsize": 7, "color": "#8a8a8a"}
                        panel.annotate("reference", (j, -i), **style)
                    continue
                share = min(1.0, abs(cell.gain) / FULL) if not math.isnan(cell.gain) else 0.0
                end = better if cell.gain > 0 else worse
                colour = 1 - (1 - end) * (0.12 + 0.88 * share)
                face = colour if cell.resolved else "white"
                box = {"facecolor": face, "edgecolor": colour if cell.resolved else "#b0b0b0"}
                panel.add_patch(plt.Rectangle((j - 0.47, -i - 0.42), 0.94, 0.84, **box))
                dark = cell.resolved and float(np.dot(colour, (0.3, 0.59, 0.11))) < 0.55
                text = _words(cell).strip("()")
                panel.annotate(
                    text,
                    (j, -i),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if dark else "black",
                )
            panel.annotate(
                forgiving.get(arm, ""), (len(titles), -i), ha="center", va="center", fontsize=7.5
            )
        panel.set_xlim(-0.6, len(titles) + 0.6)
        panel.set_ylim(-len(arms) + 0.4, 0.6)
        panel.set_xticks(
            range(len(titles) + 1), [*titles, "forgiveness\n(factors of 2)"], fontsize=7.5
        )
        panel.xaxis.tick_top()
        panel.set_yticks([-i for i in range(len(arms))], [ARMS[a].title for a in arms], fontsize=8)
        panel.tick_params(length=0)
        for side in panel.spines.values():
            side.set_visible(False)
        words = (
            "Gain over L2 decay, in nats per token unless the column says otherwise.\n"
            "Blue: better; orange: worse; hollow: not resolved on every text; rarely: at most half of the runs."
        )
        picture.suptitle(words, fontsize=8.5, x=0.01, ha="left")
        return save(picture, path)
