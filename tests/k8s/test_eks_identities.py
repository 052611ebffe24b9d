"""The roles of `k8s/nodes/eks/identities.sh` let each account write its own part of the bucket, by
IAM's rules."""

import os
import subprocess
from collections import defaultdict
from pathlib import Path

from moto.iam.access_control import IAMPolicy, PermissionResult

from tests.k8s.manifests import K8S

_AWS = """#!/bin/sh
# Keeps what it was told; the account's number is all that it knows
[ "$1 $2" = "sts get-caller-identity" ] && echo 111122223333
{ printf '%s\\0' "$@"; printf '\\1'; } >> "$TOLD"
"""


def told(folder: Path) -> list[list[str]]:
    """Returns the calls of `aws` that the script makes."""
    program = folder / "aws"
    program.write_text(_AWS)
    program.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "TOLD": str(folder / "told")}
    script = [str(K8S / "nodes/eks/identities.sh"), "raymill", "models"]
    subprocess.run(script, check=True, env=environment)
    calls = (folder / "told").read_text().split("\1")[:-1]
    return [call.split("\0")[:-1] for call in calls]


def test_what_trains_writes_checkpoints_and_what_serves_writes_endpoints(tmp_path: Path) -> None:
    policies: dict[str, list[IAMPolicy]] = defaultdict(list)
    accounts: dict[str, str] = {}
    for _, verb, *rest in told(tmp_path):
        words = dict(zip(rest[::2], rest[1::2], strict=False))
        if verb == "put-role-policy":
            policies[words["--role-name"]].append(IAMPolicy(words["--policy-document"]))
        if verb == "create-pod-identity-association":
            accounts[words["--service-account"]] = words["--role-arn"].rpartition("/")[2]
    assert {len(made) for made in policies.values()} == {1, 2}

    def may(account: str, action: str, key: str) -> bool:
        results = [
            policy.is_action_permitted(f"s3:{action}", f"arn:aws:s3:::models/{key}")
            for policy in policies[accounts[account]]
        ]
        assert results
        return PermissionResult.DENIED not in results and PermissionResult.PERMITTED in results

    checkpoint, live = "runs/a/checkpoints/step-1/manifest.json", "endpoints/completions.json"
    keys = (checkpoint, "left-out/trainer-a.json", live, "endpoints/audit/completions.jsonl")
    writes = {
        account: [may(account, "PutObject", key) for key in keys] for account in sorted(accounts)
    }
    training, serving, none = [True, True, False, False], [False, False, True, True], [False] * 4
    assert writes == {
        "evaluator": none,
        "ray-head": training,
        "server": serving,
        "serving-head": serving,
        "tokenizer": training,
        "trainer": training,
    }
    for account in accounts:
        assert may(account, "GetObject", live) and may(account, "GetObject", checkpoint)
        assert may(account, "DeleteObject", live) == (writes[account] == serving)
