"""Audits installed packages for known vulnerabilities: `python audit.py PROJECT`.

Needs pip-audit. The status is 1 only where a landing could do something about it: a
package that PROJECT needs at run time has a vulnerability, and a release that mends it
exists. All else is printed: vulnerabilities without such a release (an advisory of
today must not stop a change that has nothing to do with it), those of packages for
tests, and, in capitals, what could not be audited, for want of a connection or because
the index did not know the package.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from typing import Any


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(project: str) -> set[str]:
    """Names of the packages that a project needs, directly or not, without extras."""
    found, waiting = set(), [project]
    while waiting:
        name = normal(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in lines:
            wanted, _, condition = line.partition(";")
            if "extra" not in condition:
                waiting.append(re.match(r"[\w.-]+", wanted.strip())[0])
    return found - {normal(project)}


def report(answer: dict[str, Any], names: set[str]) -> tuple[list[str], int]:
    """Lines about what pip-audit found, and the exit status.

    Args:
      answer: its JSON.
      names: of the packages that count.
    """
    lines, status, skipped = [], 0, []
    for package in answer["dependencies"]:
        name = package["name"]
        if "skip_reason" in package:
            skipped.append(name)
        for fault in package.get("vulns", []):
            mended = ", ".join(fault["fix_versions"])
            counts = normal(name) in names
            end = f"mended in {mended}" if mended else "not mended in any release yet"
            what = "needed here" if counts else "not needed at run time"
            lines.append(
                f"{name} {package['version']} has {fault['id']}; {end}; {what}"
            )
            if counts and mended:
                status = 1
    done = len(answer["dependencies"]) - len(skipped)
    if skipped:
        lines.append(
            f"NOT AUDITED: {len(skipped)} of {len(skipped) + done} packages, which the "
            f"index of vulnerabilities does not know: {', '.join(skipped)}"
        )
    lines.append(f"audited: {done} packages")
    return lines, status


def main(project: str) -> int:
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--skip-editable"]
    command += ["--progress-spinner=off", "--timeout=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        answer = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        said = str(error)
        if not isinstance(error, OSError | subprocess.TimeoutExpired):
            said = (done.stderr.strip().splitlines() or [said])[-1]
        print(f"NOT AUDITED: no connection? {said[:300]}")
        return 0
    lines, status = report(answer, needed(project))
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
