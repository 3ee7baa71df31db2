"""Run CPython's tests of executors over one class of ours, and print what became of them as JSON.

`python tests/executors/cpython ThreadExecutor` runs all that are not left out, and with parts of tests'
names after it only those. Threads and child processes that a test leaves are only worth a warning to
CPython; here the test has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import sys
import time
import unittest
from typing import Any

from exclusions import exclusions
from suite import CASES
from test import support

LIMIT_S = 60.0  # for one test; the longest takes 6 s


class _Result(unittest.TestResult):
    """Collects what becomes of each test."""

    def __init__(self, show: bool) -> None:
        super().__init__()
        self.passed: list[str] = []
        self.skipped_tests: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._show = show
        self._began = 0.0
        self._texts: list[str] = []
        self._warnings = io.StringIO()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # where all threads are, if it hangs
        support.environment_altered = False
        support.print_warning.orig_stderr = self._warnings = io.StringIO()
        self._began, self._texts = time.monotonic(), []

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        name = _name_of(test)
        if support.environment_altered:
            self._texts.append(f"It left something behind:\n{self._warnings.getvalue()}")
        if self._texts:
            self.failed[name] = "\n".join(self._texts)
        elif name not in self.skipped_tests:
            self.passed.append(name)
        if self._show:
            word = "FAILED" if self._texts else "ok"
            print(f"{time.monotonic() - self._began:6.2f} s  {word:6}  {name}", file=sys.stderr, flush=True)

    def addError(self, test: Any, err: Any) -> None:
        self._texts.append(self._exc_info_to_string(err, test))

    def addFailure(self, test: Any, err: Any) -> None:
        self.addError(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._texts.append(f"{subtest}\n{self._exc_info_to_string(err, test)}")

    def addSkip(self, test: Any, reason: str) -> None:
        self.skipped_tests[_name_of(test)] = reason


def _name_of(test: unittest.TestCase) -> str:
    return f"{type(test).__name__.partition('_')[2]}.{test._testMethodName}"


def main() -> int:
    """Run them; 0 if none failed."""
    parser = argparse.ArgumentParser(prog="python tests/executors/cpython", description=__doc__)
    parser.add_argument("executor", choices=CASES, help="our class")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="of tests' names: only these, excluded or not"
    )
    parser.add_argument("--show", action="store_true", help="also show each test as it ends, on stderr")
    options = parser.parse_intermixed_args()
    support.verbose = 0  # else CPython's mixins print times of their own

    excluded = exclusions(options.executor)
    found = {
        f"{tests}.{method}": case(method)
        for tests, case in CASES[options.executor].items()
        for method in unittest.defaultTestLoader.getTestCaseNames(case)
    }
    if options.parts:
        chosen = {name for name in found if any(part in name for part in options.parts)}
    else:
        chosen = found.keys() - excluded.keys()
    result = _Result(options.show)
    suite = unittest.TestSuite(case for name, case in found.items() if name in chosen)
    with contextlib.redirect_stdout(sys.stderr):
        suite.run(result)
    report = {
        "passed": result.passed,
        "failed": result.failed,
        "skipped": result.skipped_tests,
        "left_out": {name: reason for name, reason in excluded.items() if name in found},
        # Of classes of tests that are run for this executor: others are for the other kind.
        "excluded_but_unknown": [
            name
            for name in excluded
            if name.partition(".")[0] in CASES[options.executor] and name not in found
        ],
    }
    print(json.dumps(report))
    return bool(result.failed)


if __name__ == "__main__":
    sys.exit(main())
