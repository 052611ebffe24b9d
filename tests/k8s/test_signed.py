"""The component `signed` puts the public key where weights are taken, and lets settings name it."""

from pathlib import Path

import pytest

from cluster.settings.serve import ServeConfig
from model.signing.signature import TrustedSigner, check
from raymill.errors import UserError
from tests.k8s import run_rules
from tests.k8s.manifests import K8S, find, pods, render
from tests.k8s.security_rules import RULES

KUSTOMIZATION = "overlays/gpu + components/signed"
KEY = "/signing/release.pub"


def test_each_pod_that_takes_weights_has_the_key() -> None:
    objects = render(KUSTOMIZATION)
    having: set[tuple[str, str]] = set()
    for pod in pods(objects):
        mounts = {mount["mountPath"] for mount in pod.container["volumeMounts"]}
        if str(Path(KEY).parent) in mounts:
            having.add((pod.component, pod.role))
    assert having == {
        ("completions", "head"),
        ("completions", "worker"),
        ("evaluate", "head"),
        ("evaluate", "worker"),
        ("pretrain", "head"),
    }
    assert [rule(objects) for rule in RULES] == [[]] * len(RULES)


def test_the_settings_that_its_comment_names_are_settings() -> None:
    assert KEY in (K8S / "components/signed/kustomization.yaml").read_text()
    config = run_rules.serve_config(find(render(KUSTOMIZATION), "RayService/completions"))
    told = config.model_dump() | {"storage": {"uri": "s3://raymill", "signed_by": KEY}}
    assert ServeConfig.model_validate(told).storage.signed_by == KEY


def test_a_key_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    placeholder = K8S / "components/signed/release.pub"
    (tmp_path / "model.sig").write_text("{}")
    with pytest.raises(UserError, match=r"release\.pub is no public key"):
        check(tmp_path, TrustedSigner(placeholder))
