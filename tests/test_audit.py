"""`make audit` fails where a package is vulnerable, and where no service could tell."""

import importlib.util
import json
from importlib.metadata import distributions
from types import ModuleType
from typing import Any

import pytest

from tests.repository import REPOSITORY

pytest.importorskip("pip_audit", reason="pip install '.[audit]'")

# pip-audit 2.10 says this about a package behind a mirror that has no advisories, and then exits
# with 0.
UNKNOWN = "Dependency not found on PyPI and could not be audited: %s (1.0)"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, *vulnerabilities: str) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": [{"id": found} for found in vulnerabilities]}


def test_a_service_that_is_not_there_fails_the_audit(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the real pip-audit with every address replaced by a port where nobody listens."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    assert audit.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the advisory service ") and "nothing was audited" in said
    assert said.count("\n") == 1


def test_a_service_without_advisories_fails_the_audit(audit: ModuleType) -> None:
    skipped = {"name": "urllib3", "skip_reason": UNKNOWN % "urllib3"}
    for answer in ([skipped], [package("urllib3")], []):
        with pytest.raises(audit.AuditError, match="does not know the vulnerability of urllib3"):
            audit.check_service(answer)
    audit.check_service([package("urllib3", "CVE-2021-33503")])


def test_vulnerable_and_unasked_packages_are_named(audit: ModuleType) -> None:
    pins = ["left_pad==1.0", "Right.Pad==1.0"]
    audit.check_pins(pins, [package("left-pad"), package("right-pad")])
    with pytest.raises(
        audit.AuditError, match=r"known vulnerabilities: right-pad 1\.0: CVE-1, CVE-2"
    ):
        audit.check_pins(pins, [package("left-pad"), package("right-pad", "CVE-1", "CVE-2")])
    skipped = {"name": "right-pad", "skip_reason": UNKNOWN % "right-pad"}
    with pytest.raises(audit.AuditError, match="1 packages were not audited: right-pad"):
        audit.check_pins(pins, [package("left-pad"), skipped])
    with pytest.raises(audit.AuditError, match="1 packages were not audited: right-pad"):
        audit.check_pins(pins, [package("left-pad")])


def test_the_sbom_names_what_is_installed(audit: ModuleType) -> None:
    document = json.loads(audit.sbom(list(distributions())))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    urls = {component["purl"] for component in document["components"]}
    assert any(url.startswith("pkg:pypi/ray@2.60") for url in urls)
    assert {component["name"] for component in document["components"]} >= {
        "torch",
        "safetensors",
        "boto3",
    }
