"""Ask for known vulnerabilities of pinned packages: `python audit.py REQUIREMENTS`, with pip-audit.

Ends with 1 where there are any, with 2 where pip-audit fails. Where nobody can be asked it says why,
and ends well: a machine without that network can still be worked on.
"""

import json
import re
import subprocess
import sys

WAIT_S = 90
ASK = [
    *(sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip"),
    *("--timeout", "5", "--progress-spinner", "off", "--format", "json", "-r"),
]
# What pip-audit says of a service that cannot be reached, sends elsewhere, or answers with an error.
NOBODY = re.compile(
    r"requests\.exceptions\.|pip_audit\._service\.interface\.(ConnectionError|ServiceError)\b"
    r"|ERROR:pip_audit\._cli:(Tip: your network|Could not connect to |.* is not redirecting properly)"
)


def main(requirements: str) -> int:
    """The exit code."""
    try:
        done = subprocess.run(
            [*ASK, requirements], capture_output=True, text=True, timeout=WAIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"audit: skipped, no answer within {WAIT_S} s")
        return 0
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        lines = ["no word", *filter(None, done.stderr.splitlines())]
        if NOBODY.match(lines[-1]):
            reason = next(filter(NOBODY.match, lines))  # the last may be no more than advice
            print(f"audit: skipped, nobody can be asked: {reason[:200]}")
            return 0
        print(f"audit: pip-audit failed: {done.stderr}", file=sys.stderr)
        return 2
    hit = [(one, vuln) for one in found for vuln in one.get("vulns", ())]
    for one, vuln in hit:
        fixed = ", ".join(vuln["fix_versions"]) or "none"
        print(f"audit: {one['name']} {one['version']} has {vuln['id']}; fixed in: {fixed}")
    unknown = [one for one in found if "skip_reason" in one]
    if unknown:
        said = f"nothing is said of {len(unknown)} of {len(found)} packages"
        print(f"audit: skipped, {said}: {unknown[0]['skip_reason']}")
    elif not hit:
        print(f"audit: nothing known against {len(found)} packages")
    return 1 if hit else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
