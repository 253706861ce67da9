"""Draw validation loss against minutes of training, from the log.csv of runs.

    pip install matplotlib
    python tools/plot.py out/nano out/ar --svg=training.svg

A colour for each run, a kind of line for each level.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data import read_text, writing
from util.settings import guarded, optional, require, settings

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = {"val_gpt": ("-", "GPT level"), "val_draft": ("--", "draft"), "val_bound": (":", "bound")}


@guarded
def main(argv):
    runs = [arg for arg in argv if not arg.startswith("--")]
    s, _ = settings({"svg": "training.svg"}, [arg for arg in argv if arg.startswith("--")])
    require(runs, "name the folders of runs: python tools/plot.py out/nano out/ar")
    require(s.svg.endswith(".svg"), f"--svg={s.svg} must end in .svg")
    optional("matplotlib").use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "cascade", "legend.frameon": False,
                            "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(7.6, 4.4))
    for i, run in enumerate(runs):
        rows = [*csv.DictReader(read_text(Path(run, "log.csv")).splitlines())]
        known = any(row.get(name) for row in rows for name in LINES)
        require(known, f"{run}/log.csv has no validation yet: train on")
        for name, (line, level) in LINES.items():
            seen = [row for row in rows if row.get(name)]
            axes.plot([float(row["seconds"]) / 60 for row in seen],
                      [float(row[name]) for row in seen], color=COLORS[i % len(COLORS)],
                      linestyle=line, label=f"{run}: {level}" if seen else None)
    axes.set(xlabel="minutes of training", ylabel="validation text, nats a token")
    axes.grid(color="#e5e5e5")
    axes.legend()
    with writing(s.svg):
        figure.savefig(s.svg, metadata={"Date": None}, bbox_inches="tight")
    print(s.svg)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
