"""Draw validation loss against minutes of training, from the log.csv of runs.

    pip install matplotlib
    python tools/plot.py out/nano out/ar --svg=assets/training.svg

A colour for each run, a kind of line for each level.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data import writing
from util.settings import UserError, guarded, optional, require, settings

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = {"val_gpt": ("-", "GPT level"), "val_draft": ("--", "draft"), "val_bound": (":", "bound")}


def read_log(run):
    """{column: ([minutes], [nats])} of a run's folder."""
    try:
        rows = [*csv.DictReader(Path(run, "log.csv").read_text().splitlines())]
        lines = {}
        for name in LINES:
            found = [(float(row["seconds"]) / 60, float(row[name])) for row in rows if row[name]]
            if found:
                lines[name] = tuple(zip(*found, strict=True))
    except (OSError, KeyError, ValueError) as e:
        raise UserError(f"{run} has no log.csv of a run ({e}): name the folders of runs") from None
    require(lines, f"{run}/log.csv has no validation yet: train on")
    return lines


@guarded
def main(argv):
    runs = [arg for arg in argv if not arg.startswith("--")]
    s, _ = settings({"svg": "assets/training.svg"}, [arg for arg in argv if arg.startswith("--")])
    require(runs, "name the folders of runs: python tools/plot.py out/nano out/ar")
    optional("matplotlib").use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "cascade", "font.size": 11, "legend.frameon": False,
                            "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(7.6, 4.4))
    for i, run in enumerate(runs):
        for name, (minutes, nats) in read_log(run).items():
            line, level = LINES[name]
            axes.plot(minutes, nats, color=COLORS[i % len(COLORS)], linestyle=line,
                      label=f"{Path(run).name}: {level}")
    axes.set(xlabel="minutes of training", ylabel="validation text, nats a token")
    axes.grid(color="#e5e5e5")
    axes.legend()
    with writing(s.svg):
        figure.savefig(s.svg, metadata={"Date": None}, bbox_inches="tight")
    print(s.svg)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
