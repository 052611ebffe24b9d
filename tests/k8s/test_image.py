"""Reads the Dockerfile and its packages' hashes, and runs the image's code and kernels as a pod
runs them.

`image_root.py` says what it runs in: a built image where there is one, else the Dockerfile's steps
followed here.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from cluster.local.local_cluster import free_port
from cluster.settings.code_folders import CODE_FOLDERS
from model.kernels.native_library import FOLDER_VARIABLE
from serving.engine_process.client import VLLM_PYTHON_VARIABLE
from tests.k8s.image_root import image_root
from tests.k8s.manifests import CLUSTER_KINDS, K8S, cluster_spec, of_kind, render
from tests.k8s.pod_process import needs_pods
from tests.repository import REPOSITORY

RUN = """
data: {source: [/mnt/files/texts], vocab_size: 400, val_fraction: 0.2}
model: {preset: tiny, n_positions: 128}
train: {max_tokens: 16384, global_batch_size: 4, micro_batch_size: 2, eval_max_tokens: 4096}
scaling: {max_workers: 1}
cluster: {num_nodes: 1}
"""


def _instructions() -> list[tuple[str, str]]:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines)
    ]


def _stage(name: str) -> list[tuple[str, str]]:
    """Returns the instructions of a stage; the last one has no name."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in _instructions():
        if instruction == "FROM":
            stages[rest.partition(" AS ")[2]] = current = []
            current.append((instruction, rest))
        elif stages:
            current.append((instruction, rest))
    return stages[name]


def test_base_is_pinned_and_can_be_replaced() -> None:
    arguments = dict(
        rest.partition("=")[::2] for name, rest in _instructions() if name == "ARG" and "=" in rest
    )
    assert arguments.keys() == {"BASE_IMAGE", "BUILD", "PIP_OPTIONS"}
    assert re.fullmatch(r"docker\.io/library/python:3\.11\.\d+-slim-\w+", arguments["BASE_IMAGE"])
    assert arguments["BUILD"] == "cpu"
    assert [_stage(name)[0][1] for name in ("kernels", "runtime")] == [
        "${BASE_IMAGE} AS kernels",
        "${BASE_IMAGE} AS runtime",
    ]
    assert _stage("")[0] == ("FROM", "packages-${BUILD}")


def test_ends_as_the_user_that_pods_run_as() -> None:
    users = [rest for name, rest in _instructions() if name == "USER"]
    (user,) = {
        cluster_spec(job)["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"]
        for job in of_kind(render("base"), "RayJob")
    }
    assert users == [f"{user}:{user}"]


def test_copies_what_is_there_and_all_the_code() -> None:
    copied = [
        rest.split()[:-1]
        for name, rest in _instructions()
        if name == "COPY" and "--from=" not in rest
    ]
    sources = {source for sources in copied for source in sources}
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert set(CODE_FOLDERS) <= sources
    allowed = {
        line[1:]
        for line in Path(K8S / "Dockerfile.dockerignore").read_text().splitlines()
        if line[0] == "!"
    }
    assert allowed == sources


def test_the_kernels_are_compiled_in_a_stage_and_found_at_run_time() -> None:
    assert ("RUN", "python -m model.kernels.native_library --bake /kernels") in _stage("kernels")
    assert ("COPY", "--from=kernels /kernels /opt/kernels") in _stage("")
    [environment] = [rest for name, rest in _stage("runtime") if name == "ENV"]
    assert f"{FOLDER_VARIABLE}=/opt/kernels" in environment.split()


def test_no_compiler_is_left_but_the_one_that_vllm_needs() -> None:
    compilers = {
        name: [
            word
            for _, rest in _stage(name)
            for word in rest.split()
            if word in ("g++", "gcc", "clang")
        ]
        for name in ("kernels", "runtime", "packages-cpu", "packages-gpu", "")
    }
    assert compilers == {
        "kernels": ["g++"],
        "runtime": [],
        "packages-cpu": [],
        "packages-gpu": ["gcc"],
        "": [],
    }


def test_vllm_is_where_the_endpoint_looks_for_it() -> None:
    [made] = [rest for name, rest in _stage("packages-gpu") if name == "RUN" and "venv" in rest]
    [(variable, python)] = [
        rest.split("=") for name, rest in _stage("packages-gpu") if name == "ENV"
    ]
    assert variable == VLLM_PYTHON_VARIABLE
    assert f"python -m venv {Path(python).parent.parent} &&" in made


def test_every_package_comes_by_its_hash() -> None:
    installs = [rest for name, rest in _instructions() if name == "RUN" and "pip install" in rest]
    files = [
        re.findall(r"--requirement (\S+)", rest) for rest in installs if "--require-hashes" in rest
    ]
    assert sorted(file for found in files for file in found) == [
        ".ci/image-cpu.txt",
        ".ci/image-gpu.txt",
        ".ci/image-vllm.txt",
    ]
    assert [rest for rest in installs if "--require-hashes" not in rest] == [
        "pip install --no-deps --no-build-isolation --editable ."  # the code itself
    ]


@pytest.mark.parametrize("build", ["cpu", "gpu", "vllm"])
def test_the_list_of_packages_has_a_hash_each_and_is_of_the_tested_versions(build: str) -> None:
    text = (REPOSITORY / f".ci/image-{build}.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    assert len(entries) == text.count("==") == len({name for name, _, _ in entries})
    versions = {name: version for name, version, _ in entries}
    assert any(name.startswith("nvidia-") for name in versions) is (build != "cpu")
    # Which an index by another name lacks
    assert not [version for version in versions.values() if "+" in version]
    if build != "vllm":  # whose environment is its own
        pinned = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)$", _constraints(), re.MULTILINE))
        named = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
        assert {
            name: (v, named[name])
            for name, v in versions.items()
            if name in named and v != named[name]
        } == {}
        assert {"ray", "torch", "setuptools", "numpy", "safetensors"} <= versions.keys()


def test_ray_is_the_version_that_the_manifests_name() -> None:
    (pinned,) = re.findall(r"^ray(?:\[.*\])?==(\S+)$", _constraints(), re.MULTILINE)
    named = {
        cluster_spec(manifest)["rayVersion"] for manifest in of_kind(render("base"), *CLUSTER_KINDS)
    }
    assert named == {pinned}


def _constraints() -> str:
    return (REPOSITORY / ".ci/constraints.txt").read_text(encoding="utf-8")


@needs_pods
@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv here")
def test_trains_and_serves_as_user_1000_on_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    root = image_root(tmp_path / "made", sources=[REPOSITORY / folder for folder in CODE_FOLDERS])
    files = tmp_path / "files"
    (files / "texts").mkdir(parents=True)
    for number in range(40):
        words = " ".join(f"w{number * k % 97}" for k in range(120))
        (files / "texts" / f"{number}.txt").write_text(f"Document {number}. {words}\n")
    (files / "run.yaml").write_text(RUN)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))

    [check] = [rest for name, rest in _stage("") if name == "RUN" and "getuid" in rest]
    check = check.replace("python ", f"{root.python} ", 1).replace("'/app'", f"'{root.app}'")
    raymill = f"{root.python} -m cluster.cli"
    serve = f"{raymill} serve latest --engine.kernels native --port {free_port()}"
    script = f"""set -e
{check}
if touch {root.app}/probe 2> /dev/null; then echo the root can be written; exit 1; fi
{raymill} pretrain /mnt/files/run.yaml --json
{serve} --api-key-file key --json > served 2> serve.log & server=$!
until [ -s served ]; do kill -0 $server || {{ cat serve.log; exit 1; }}; sleep 0.5; done
{raymill} complete 'Document 3.' --max-tokens 8 --json
kill $server
wait $server || true
"""
    done = root.run(script, files, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["usage"]["completion_tokens"] == 8
