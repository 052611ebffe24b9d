"""The NetworkPolicies, evaluated as a network plugin does, allow exactly the connections of a
table."""

import ipaddress
from dataclasses import dataclass, field

from tests.k8s.manifests import Manifest, find, name_of, of_kind, pods

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
    labels = {
        "app.kubernetes.io/component": component,
        "ray.io/node-type": node_type,
        "raymill/role": "node",
    }
    return Peer(f"{component} {node_type}", labels)


def _elsewhere(
    name: str, *, pod_labels: dict[str, str] | None = None, labels: dict[str, str] | None = None
) -> Peer:
    return Peer(
        name, pod_labels or {}, name, {"kubernetes.io/metadata.name": name} | (labels or {})
    )


_STRANGER = Peer("a stranger in the namespace", {"app": "stranger"})
_OUTSIDER = _elsewhere("another-namespace")
_GATEWAY = _elsewhere("gateway", labels={"raymill/gateway": "true"})
_MONITORING = _elsewhere("monitoring")
_HELM_LABELS = {"app.kubernetes.io/name": "kuberay-operator"}
_KUSTOMIZE_LABELS = {
    "app.kubernetes.io/name": "kuberay",
    "app.kubernetes.io/component": "kuberay-operator",
}
_OPERATORS = [
    _elsewhere(namespace, pod_labels=labels)
    for namespace in ("kuberay-operator", "ray-system", "default")
    for labels in (_HELM_LABELS, _KUSTOMIZE_LABELS)
]
_IMPOSTOR = _elsewhere("impostor", pod_labels={"app.kubernetes.io/name": "kuberay-operator"})
_DNS = _elsewhere("kube-system", pod_labels={"k8s-app": "kube-dns"})
_POD_DNS = Peer(
    "a DNS cache in a pod", {"k8s-app": "node-local-dns"}, "kube-system", _DNS.namespace_labels
)
_SUBMITTER = Peer(
    "submitter", {"app.kubernetes.io/component": "pretrain", "raymill/role": "submitter"}
)
_METADATA = Peer("the cloud's metadata service", namespace="", address="169.254.169.254")
_NODE_DNS = Peer("the node's DNS cache", namespace="", address="169.254.20.10")
_EKS_DNS = Peer("EKS' DNS on the node", namespace="", address="172.20.0.10")
_POD_IDENTITY = Peer("EKS Pod Identity's agent", namespace="", address="169.254.170.23")
_EKS_BALANCER = Peer("EKS' load balancer", namespace="", address="192.168.3.4")
_GKE_BALANCER = Peer("GKE's load balancer", namespace="", address="35.191.0.7")
_PROXY = Peer("the proxy", namespace="", address="10.0.0.10")
_METADATA_6 = Peer("AWS' metadata service by IPv6", namespace="", address="fd00:ec2::254")
_INTERNET_6 = Peer("object storage by IPv6", namespace="", address="2600:1f18::1")
_INTERNET = Peer("object storage", namespace="", address="52.216.0.1")

_REDIS = Peer("redis", {"raymill/role": "redis", "app.kubernetes.io/component": "platform"})
_USER = Peer("a user of the shared cluster", {"raymill/role": "user"})

_COMPONENTS = ("tokenize", "pretrain", "evaluate", "completions", "shared")
_HEADS = [_node(component, "head") for component in _COMPONENTS]
_WORKERS = [_node(component, "worker") for component in _COMPONENTS]
_RAY_PORTS = (6379, 8265, 10001, 8000, 8080, 30000)


def _expectations(
    policies: list[Manifest], *, has_proxy: bool
) -> list[tuple[Peer, Peer, int, bool]]:
    """Returns (source, target, TCP port, whether they may talk) of each; a cloud's policies are
    named after what they open."""
    nodes = [*_HEADS, *_WORKERS]
    names = {policy["metadata"]["name"] for policy in policies}
    on_eks, on_gke = "pod-identity" in names, "cloud-dns" in names
    table = [
        (source, node, port, False)
        for source in (_STRANGER, _OUTSIDER)
        for node in nodes
        for port in _RAY_PORTS
    ]
    for source in nodes:
        same = "app.kubernetes.io/component"
        table += [
            (source, t, port, source.labels[same] == t.labels[same])
            for t in nodes
            for port in _RAY_PORTS
        ]
    for node in nodes:
        is_endpoint = node.name == "completions worker"
        table += [(_GATEWAY, node, port, is_endpoint and port == 8000) for port in _RAY_PORTS]
        table += [(_MONITORING, node, port, port == 8080) for port in _RAY_PORTS]
        is_head = node in _HEADS
        table += [(_SUBMITTER, node, port, is_head and port == 8265) for port in _RAY_PORTS]
        table += [
            (operator, node, port, is_head and port == 8265)
            for operator in _OPERATORS
            for port in _RAY_PORTS
        ]
        for balancer, is_there in ((_EKS_BALANCER, on_eks), (_GKE_BALANCER, on_gke)):
            table += [
                (balancer, node, port, is_there and is_endpoint and port == 8000)
                for port in _RAY_PORTS
            ]
        table += [(_IMPOSTOR, node, port, False) for port in _RAY_PORTS]
        table += [
            (node, metadata, port, False)
            for metadata in (_METADATA, _METADATA_6)
            for port in (80, 443, 988, 6443)
        ]
        table += [(node, _POD_IDENTITY, 80, on_eks), (node, _POD_IDENTITY, 443, False)]
        table += [(node, _INTERNET, 80, False), (node, _INTERNET, 6443, is_head)]
        # A head asks the Kubernetes API, whose address nobody knows
        goes_out = is_head or not has_proxy
        table += [(node, internet, 443, goes_out) for internet in (_INTERNET, _INTERNET_6)]
        table += [(node, _PROXY, 3128, has_proxy)]
        table += [
            (node, dns, port, port == 53)
            for dns in (_DNS, _POD_DNS, _NODE_DNS)
            for port in (53, 80)
        ]
        table += [(node, _METADATA, 53, on_gke), (node, _EKS_DNS, 53, on_eks)]
        table += [
            (_USER, node, port, node.name == "shared head" and port == 8265) for port in _RAY_PORTS
        ]
        keeps_state = is_head and node.name in ("completions head", "shared head")
        table += [
            (node, _REDIS, 6379, keeps_state),
            (node, _REDIS, 6380, False),
            (_REDIS, node, 8265, False),
        ]
    table += [
        (_SUBMITTER, _METADATA, 80, False),
        (_SUBMITTER, _INTERNET, 443, False),
        (_SUBMITTER, _DNS, 53, True),
    ]
    table += [
        (source, _REDIS, 6379, False)
        for source in (_STRANGER, _OUTSIDER, _SUBMITTER, _USER, *_OPERATORS)
    ]
    table += [(_REDIS, _INTERNET, 443, False), (_REDIS, _METADATA, 80, False)]
    table += [(_OUTSIDER, _SUBMITTER, 8000, False), (_OUTSIDER, _STRANGER, 8000, False)]
    return [*table, (_STRANGER, _INTERNET, 443, False), (_STRANGER, _METADATA, 80, False)]


def network_problems(objects: list[Manifest]) -> list[str]:
    policies = of_kind(objects, "NetworkPolicy")
    has_proxy = "HTTPS_PROXY" in find(objects, "ConfigMap/ray-environment")["data"]
    return [
        f"{source.name} {'cannot' if expected else 'can'} reach {target.name} on port {port}"
        for source, target, port, expected in _expectations(policies, has_proxy=has_proxy)
        if _may_talk(policies, source, target, port, trust_source=not expected) is not expected
    ]


def label_problems(objects: list[Manifest]) -> list[str]:
    """The policies select by labels that each pod template must carry, for its own component."""
    problems = []
    components = {
        name_of(o): o["metadata"].get("labels", {}).get("app.kubernetes.io/component")
        for o in objects
    }
    for pod in [pod for pod in pods(objects) if pod.role != "redis"]:
        owner = components[pod.where.split()[0]]
        role = "submitter" if pod.role == "submitter" else "node"
        labels = pod.template["metadata"]["labels"]
        if (labels.get("app.kubernetes.io/component"), labels.get("raymill/role")) != (owner, role):
            problems.append(f"{pod.where}: no NetworkPolicy knows it by its labels")
    problems += [
        f"{name_of(manifest)}: not labelled as a part of raymill, or of which component"
        for manifest in objects
        if not {"app.kubernetes.io/part-of", "app.kubernetes.io/component"}
        <= manifest["metadata"]["labels"].keys()
    ]
    return problems


def _may_talk(
    policies: list[Manifest], source: Peer, target: Peer, port: int, *, trust_source: bool
) -> bool:
    """Tells whether both sides allow it. A target of ours must refuse by itself, whatever its
    source's policies say: with `trust_source` only the target's count."""
    leaves = (trust_source and target.namespace == _HOME) or _side_allows(
        policies, "Egress", source, target, port
    )
    return leaves and _side_allows(policies, "Ingress", target, source, port)


def _side_allows(
    policies: list[Manifest], direction: str, owner: Peer, other: Peer, port: int
) -> bool:
    """Tells whether the policies over `owner` let it talk with `other`; without any, it may."""
    if owner.namespace != _HOME:
        return True
    over = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], owner.labels)
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
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions), (
        "others are not evaluated here"
    )
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


RULES = (network_problems, label_problems)
