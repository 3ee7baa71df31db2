"""`python -m benchmarks [NAME…]`: run benchmarks by name, print their tables, write their figures."""

from __future__ import annotations

import argparse
import compileall
import importlib
import sys
from pathlib import Path

import fractal_runner
from benchmarks._report import Report, say
from benchmarks._scratch import Scratch
from fractal_runner.errors import did_you_mean

RESULTS = Path(__file__).resolve().parent / "results"

# One line per benchmark: the module benchmarks.<name> has `run(report, scratch)`.
BENCHMARKS = {
    "overhead": "what a unit costs beside the same call in a bare pool of threads",
    "history": "how large the record of 100,000 units is, and how soon it answers",
    "images": "from tasks' raw outputs to the new dataset, and filtering it, up to 1,000,000 images",
    "loop": "how late the caller's event loop is with 10,000 units in flight",
    "executors": "what a call costs on our executors and on others, and how well slots are kept busy",
    "batch": "what a call costs on a batch executor whose jobs cost nothing, 100,000 of them",
    "lsf": "calls on an emulated LSF, beside a bsub for each",
    "slurm": "calls on a real Slurm cluster, beside submitit and executorlib",
    "engines": "calls over Dask and Ray, beside the engines' own interfaces; pools that are kept",
    "warm": "the demo's tasks and small scripts started warm, beside cold",
    "repeat": "the tests of executors, again and again: what fails now and then, and what is left behind",
}

# Run where they are named: one takes most of an hour, and measures nothing; one needs Slurm; one needs the
# demo's tasks, and half an hour; one needs Dask and Ray, and a quarter of an hour.
ONLY_BY_NAME = {"engines", "repeat", "slurm", "warm"}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; 0, or 1 if a benchmark could not be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"benchmarks to run (default: all but {' and '.join(sorted(ONLY_BY_NAME))})",
    )
    parser.add_argument("--json-dir", type=Path, default=RESULTS, help="where <name>.json goes (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and end")
    options = parser.parse_args(arguments)
    if options.list:
        width = max(map(len, BENCHMARKS))
        for name, what in BENCHMARKS.items():
            print(f"{name:{width}}  {what}")
        return 0
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}: {did_you_mean(name, BENCHMARKS)}")
    # As an installed package is; where it is edited, each process would do it.
    compileall.compile_dir(Path(fractal_runner.__file__).parent, quiet=1)
    options.json_dir.mkdir(parents=True, exist_ok=True)
    failed = False
    # One scratch for all of them, emptied at the very end: see its module.
    with Scratch(below=RESULTS) as scratch:
        for name in dict.fromkeys(options.names or [name for name in BENCHMARKS if name not in ONLY_BY_NAME]):
            report = Report(name, BENCHMARKS[name])
            say(f"{name}: {BENCHMARKS[name]}")
            try:
                importlib.import_module(f"benchmarks.{name}").run(report, scratch)
            except Exception as error:  # one that cannot run here does not keep the others from running
                say(f"{name}: could not be run: {type(error).__name__}: {error}")
                failed = True
                continue
            report.print()
            say(f"{name}: figures in {report.write(options.json_dir)}")
        say("removing the run directories")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
