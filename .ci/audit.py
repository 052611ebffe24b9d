"""What `make audit` asks: known vulnerabilities of each pinned package, and a list of what is
installed (an SBOM).

No answer is a failure. pip-audit itself ends well where its advisory service knows none of the
packages, as behind a mirror that has packages only; so a version with a published vulnerability is
asked about first, and has to be found.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
SBOM = Path(__file__).resolve().parent.parent / "build" / "sbom.json"
CANARY = "urllib3==1.26.4"  # CVE-2021-33503


class AuditError(Exception):
    """What was found, or why nothing could be asked, in one line."""


def main() -> int:
    SBOM.parent.mkdir(exist_ok=True)
    SBOM.write_text(sbom(list(distributions())), encoding="utf-8")
    sys.stdout.write(
        f"{SBOM}: {len(json.loads(SBOM.read_text())['components'])} packages (CycloneDX)\n"
    )
    try:
        check_service(asked([CANARY]))
        pins = [line for line in CONSTRAINTS.read_text(encoding="utf-8").split() if "==" in line]
        check_pins(pins, asked(pins))
    except AuditError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{len(pins)} pinned packages: no known vulnerability\n")
    return 0


def asked(pins: list[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each. Raises `AuditError` where it says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "pins.txt")
        requirements.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--requirement",
            str(requirements),
            "--no-deps",
            "--disable-pip",
        ]
        command += ["--format", "json", "--progress-spinner", "off", "--timeout", "15"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise AuditError(
            f"the advisory service cannot be asked, so nothing was audited: {lines[-1]}"
        )
    found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    return found


def check_service(found: list[dict[str, Any]]) -> None:
    """Raises `AuditError` unless the canary's vulnerability was found."""
    if not any(package.get("vulns") for package in found):
        reason = next(
            (package["skip_reason"] for package in found if "skip_reason" in package), "it has none"
        )
        raise AuditError(
            f"the advisory service does not know the vulnerability of {CANARY}, so its word on other packages is "
            f"worth nothing, and nothing was audited: {reason}"
        )


def check_pins(pins: list[str], answers: list[dict[str, Any]]) -> None:
    """Raises `AuditError` with what is vulnerable, or with what could not be asked about."""
    vulnerable = [
        f"{package['name']} {package['version']}: {', '.join(found['id'] for found in package['vulns'])}"
        for package in answers
        if package.get("vulns")
    ]
    if vulnerable:
        raise AuditError(f"known vulnerabilities: {'; '.join(vulnerable)}")
    known = {_normal(package["name"]) for package in answers if "skip_reason" not in package}
    if missing := sorted({_normal(pin.partition("==")[0]) for pin in pins} - known):
        raise AuditError(f"{len(missing)} packages were not audited: {', '.join(missing)}")


def sbom(installed: list[Distribution]) -> str:
    """A CycloneDX document with every installed package."""
    bom = Bom()
    for package in sorted(installed, key=lambda package: _normal(package.name)):
        url = PackageURL("pypi", name=_normal(package.name), version=package.version)
        bom.components.add(
            Component(
                name=package.name,
                version=package.version,
                type=ComponentType.LIBRARY,
                purl=url,
                bom_ref=str(url),
            )
        )
    return JsonV1Dot6(bom).output_as_string(indent=1)


def _normal(name: str) -> str:
    """As PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
