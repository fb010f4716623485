"""Prints one closing line for several runs of pytest: python closing_line.py XML ...

Each file is a run's --junitxml. The exit status is 1 where something failed or where a
run left no file, as one that was killed.
"""

import collections
import os
import sys
from xml.etree import ElementTree

COUNTS = ("tests", "failures", "errors", "skipped")


def main(paths: list[str]) -> int:
    total, seconds = collections.Counter(), 0.0
    missing = [path for path in paths if not os.path.exists(path)]
    for path in set(paths) - set(missing):
        for suite in ElementTree.parse(path).iter("testsuite"):
            total.update({name: int(suite.get(name)) for name in COUNTS})
            seconds += float(suite.get("time"))
    bad = total["failures"] + total["errors"]
    parts = [
        f"{total['failures']} failed" * bool(total["failures"]),
        f"{total['tests'] - bad - total['skipped']} passed",
        f"{total['skipped']} skipped" * bool(total["skipped"]),
        f"{total['errors']} errors" * bool(total["errors"]),
        f"{len(missing)} of {len(paths)} runs without an end" * bool(missing),
    ]
    minutes, rest = divmod(round(seconds), 60)
    line = f" {', '.join(filter(None, parts))} in {minutes}:{rest:02} min "
    print(line.center(88, "="))
    return int(bad > 0 or bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
