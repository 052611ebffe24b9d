"""The NetworkPolicies, evaluated as a network plugin does, allow exactly the connections of a table."""

import ipaddress
from dataclasses import dataclass, field

from tests.k8s.manifests import Manifest, name_of, of_kind, pods

_HOME = "raymill"


@dataclass(frozen=True)
class Peer:
    """A pod with its labels and its namespace's, or an address outside the cluster."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = _HOME
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str | None = None


def _node(component: str, node_type: str) -> Peer:
    labels = {"app.kubernetes.io/component": component, "ray.io/node-type": node_type, "raymill/role": "node"}
    return Peer(f"{component} {node_type}", labels)


def _elsewhere(name: str, *, pod_labels: dict[str, str] | None = None, labels: dict[str, str] | None = None) -> Peer:
    return Peer(name, pod_labels or {}, name, {"kubernetes.io/metadata.name": name} | (labels or {}))


_STRANGER = Peer("a stranger in the namespace", {"app": "stranger"})
_OUTSIDER = _elsewhere("another-namespace")
_GATEWAY = _elsewhere("gateway", labels={"raymill/gateway": "true"})
_MONITORING = _elsewhere("monitoring")
_OPERATOR = _elsewhere("kuberay-operator", pod_labels={"app.kubernetes.io/name": "kuberay-operator"})
_IMPOSTOR = _elsewhere("impostor", pod_labels={"app.kubernetes.io/name": "kuberay-operator"})
_DNS = _elsewhere("kube-system", pod_labels={"k8s-app": "kube-dns"})
_SUBMITTER = Peer("submitter", {"app.kubernetes.io/component": "pretrain", "raymill/role": "submitter"})
_METADATA = Peer("the cloud's metadata service", namespace="", address="169.254.169.254")
_INTERNET = Peer("object storage", namespace="", address="52.216.0.1")

_REDIS = Peer("redis", {"raymill/role": "redis", "app.kubernetes.io/component": "platform"})
_USER = Peer("a user of the shared cluster", {"raymill/role": "user"})

_COMPONENTS = ("tokenize", "pretrain", "evaluate", "completions", "shared")
_HEADS = [_node(component, "head") for component in _COMPONENTS]
_WORKERS = [_node(component, "worker") for component in _COMPONENTS]
_RAY_PORTS = (6379, 8265, 10001, 8000, 8080, 30000)


def _expectations() -> list[tuple[Peer, Peer, int, bool]]:
    """Each is (source, target, TCP port, whether they may talk)."""
    nodes = [*_HEADS, *_WORKERS]
    table = [(source, node, port, False) for source in (_STRANGER, _OUTSIDER) for node in nodes for port in _RAY_PORTS]
    for source in nodes:
        same = "app.kubernetes.io/component"
        table += [(source, t, port, source.labels[same] == t.labels[same]) for t in nodes for port in _RAY_PORTS]
    for node in nodes:
        is_endpoint = node.name == "completions worker"
        table += [(_GATEWAY, node, port, is_endpoint and port == 8000) for port in _RAY_PORTS]
        table += [(_MONITORING, node, port, port == 8080) for port in _RAY_PORTS]
        is_head = node in _HEADS
        table += [(_SUBMITTER, node, port, is_head and port == 8265) for port in _RAY_PORTS]
        table += [(_OPERATOR, node, port, is_head and port == 8265) for port in _RAY_PORTS]
        table += [(_IMPOSTOR, node, port, False) for port in _RAY_PORTS]
        table += [(node, _METADATA, port, False) for port in (80, 443, 6443)]
        table += [(node, _INTERNET, 443, True), (node, _INTERNET, 80, False), (node, _INTERNET, 6443, is_head)]
        table += [(node, _DNS, 53, True)]
        table += [(_USER, node, port, node.name == "shared head" and port == 8265) for port in _RAY_PORTS]
        keeps_state = is_head and node.name in ("completions head", "shared head")
        table += [(node, _REDIS, 6379, keeps_state), (node, _REDIS, 6380, False), (_REDIS, node, 8265, False)]
    table += [(_SUBMITTER, _METADATA, 80, False), (_SUBMITTER, _INTERNET, 443, False), (_SUBMITTER, _DNS, 53, True)]
    table += [(source, _REDIS, 6379, False) for source in (_STRANGER, _OUTSIDER, _SUBMITTER, _USER, _OPERATOR)]
    table += [(_REDIS, _INTERNET, 443, False), (_REDIS, _METADATA, 80, False)]
    table += [(_OUTSIDER, _SUBMITTER, 8000, False), (_OUTSIDER, _STRANGER, 8000, False)]
    return [*table, (_STRANGER, _INTERNET, 443, False), (_STRANGER, _METADATA, 80, False)]


def network_problems(objects: list[Manifest]) -> list[str]:
    policies = of_kind(objects, "NetworkPolicy")
    return [
        f"{source.name} {'cannot' if expected else 'can'} reach {target.name} on port {port}"
        for source, target, port, expected in _expectations()
        if _may_talk(policies, source, target, port, trust_source=not expected) is not expected
    ]


def label_problems(objects: list[Manifest]) -> list[str]:
    """The policies select by labels that each pod template must carry, for its own component."""
    problems = []
    components = {name_of(o): o["metadata"].get("labels", {}).get("app.kubernetes.io/component") for o in objects}
    for pod in [pod for pod in pods(objects) if pod.role != "redis"]:
        owner = components[pod.where.split()[0]]
        role = "submitter" if pod.role == "submitter" else "node"
        labels = pod.template["metadata"]["labels"]
        if (labels.get("app.kubernetes.io/component"), labels.get("raymill/role")) != (owner, role):
            problems.append(f"{pod.where}: no NetworkPolicy knows it by its labels")
    problems += [
        f"{name_of(manifest)}: not labelled as a part of raymill, or of which component"
        for manifest in objects
        if not {"app.kubernetes.io/part-of", "app.kubernetes.io/component"} <= manifest["metadata"]["labels"].keys()
    ]
    return problems


def _may_talk(policies: list[Manifest], source: Peer, target: Peer, port: int, *, trust_source: bool) -> bool:
    """Tells whether both sides allow it. A target of ours must refuse by itself, whatever its source's policies say:
    with `trust_source` only the target's count."""
    leaves = (trust_source and target.namespace == _HOME) or _side_allows(policies, "Egress", source, target, port)
    return leaves and _side_allows(policies, "Ingress", target, source, port)


def _side_allows(policies: list[Manifest], direction: str, owner: Peer, other: Peer, port: int) -> bool:
    """Tells whether the policies over `owner` let it talk with `other`; without any, it may."""
    if owner.namespace != _HOME:
        return True
    over = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], owner.labels)
    ]
    rules = [rule for spec in over for rule in spec.get(direction.lower(), [])]
    return not over or any(_rule_allows(rule, other, port) for rule in rules)


def _rule_allows(rule: Manifest, other: Peer, port: int) -> bool:
    peers = rule.get("to", rule.get("from", []))
    ports = rule.get("ports", [])
    return (not peers or any(_matches(peer, other) for peer in peers)) and (
        not ports or any("port" not in entry or entry["port"] == port for entry in ports)
    )


def _matches(peer: Manifest, other: Peer) -> bool:
    if "ipBlock" in peer:
        if other.address is None:
            return False
        address = ipaddress.ip_address(other.address)
        block = peer["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(excepted) for excepted in block.get("except", [])
        )
    if other.address is not None:
        return False
    if "namespaceSelector" in peer:
        return _selects(peer["namespaceSelector"], other.namespace_labels) and _selects(
            peer.get("podSelector", {}), other.labels
        )
    return other.namespace == _HOME and _selects(peer["podSelector"], other.labels)


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "matchExpressions are not evaluated here"
    return selector.get("matchLabels", {}).items() <= labels.items()


RULES = (network_problems, label_problems)
