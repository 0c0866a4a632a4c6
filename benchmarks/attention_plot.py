"""Draws time and memory against length from the CSV files of `attention.py`.

python benchmarks/attention_plot.py results.csv picture.svg
"""

import argparse
import csv

from matplotlib import rcParams
from matplotlib.figure import Figure

OURS = ("chunked", "sparse")
PASSES = ("forward", "forward+backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv")
    parser.add_argument("picture")
    args = parser.parse_args()
    with open(args.csv, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["pass"] in PASSES]
    rcParams["svg.hashsalt"] = "lolcats"  # the same picture from the same figures
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for line, passed in zip(panels, PASSES, strict=True):
        for panel, column in zip(line, ("median_ms", "peak_mib"), strict=True):
            for kind, path in dict.fromkeys((row["kind"], row["path"]) for row in rows if row["pass"] == passed):
                if path not in OURS and kind != "sliding":
                    continue  # the peers do the same work in all kinds
                points = [
                    (int(row["length"]), float(row[column]))
                    for row in rows
                    if (row["pass"], row["kind"], row["path"]) == (passed, kind, path)
                ]
                name = f"{kind}, {path}" if path in OURS else {"sdpa": "causal softmax"}.get(path, path)
                panel.plot(*zip(*points, strict=True), marker="o", linestyle="-" if path in OURS else "--", label=name)
            panel.set(xscale="log", yscale="log", title=f"{passed}, {column.replace('_', ', ')}")
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
    for panel in panels[1]:
        panel.set_xlabel("tokens")
        panel.set_xticks(
            sorted({int(row["length"]) for row in rows}), labels=sorted({row["length"] for row in rows}, key=int)
        )
        panel.minorticks_off()
    figure.savefig(args.picture, metadata={"Date": None} if args.picture.endswith(".svg") else None)


if __name__ == "__main__":
    main()
