"""The Dockerfile is checked as far as possible without a container runtime: it is read, not built."""

import re
from pathlib import Path

from cluster.settings.code_folders import CODE_FOLDERS
from serving.engine.native_library import FOLDER_VARIABLE
from tests.k8s.manifests import CLUSTER_KINDS, K8S, cluster_spec, of_kind, render
from tests.repository import REPOSITORY


def _instructions() -> list[tuple[str, str]]:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines)]


def test_base_is_pinned_and_can_be_replaced() -> None:
    argument, options = (rest for name, rest in _instructions() if name == "ARG")
    assert options == "PIP_OPTIONS="
    assert any("pip install" in rest and "${PIP_OPTIONS}" in rest for name, rest in _instructions() if name == "RUN")
    name, _, image = argument.partition("=")
    assert re.fullmatch(r"docker\.io/library/python:3\.11\.\d+-slim-\w+", image)
    assert ("FROM", f"${{{name}}}") in _instructions()


def test_ends_as_the_user_that_pods_run_as() -> None:
    users = [rest for name, rest in _instructions() if name == "USER"]
    (user,) = {
        cluster_spec(job)["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"]
        for job in of_kind(render("base"), "RayJob")
    }
    assert users == [f"{user}:{user}"]


def test_copies_what_is_there_and_all_the_code() -> None:
    copied = [rest.split()[:-1] for name, rest in _instructions() if name == "COPY" and "--from=" not in rest]
    sources = {source for sources in copied for source in sources}
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert set(CODE_FOLDERS) <= sources
    allowed = {line[1:] for line in Path(K8S / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert allowed == sources


def test_the_kernels_are_compiled_in_a_stage_and_found_at_run_time() -> None:
    instructions = _instructions()
    [start] = [i for i, (name, rest) in enumerate(instructions) if name == "FROM" and rest.endswith(" AS kernels")]
    [end] = [i for i, (name, _) in enumerate(instructions) if name == "FROM" and i > start]
    assert ("RUN", "python -m serving.engine.native_library --bake /kernels") in instructions[start:end]
    assert ("COPY", "--from=kernels /kernels /opt/kernels") in instructions[end:]
    [environment] = [rest for name, rest in instructions[end:] if name == "ENV"]
    assert f"{FOLDER_VARIABLE}=/opt/kernels" in environment.split()
    assert not [rest for _, rest in instructions[end:] if "g++" in rest]


def test_ray_is_the_version_that_the_manifests_name() -> None:
    (pinned,) = re.findall(r"^ray(?:\[.*\])?==(\S+)$", (REPOSITORY / ".ci/constraints.txt").read_text(), re.MULTILINE)
    named = {cluster_spec(manifest)["rayVersion"] for manifest in of_kind(render("base"), *CLUSTER_KINDS)}
    assert named == {pinned}
