"""The security checklist, as rules over rendered objects. `network_rules` has the connections,
`life_rules` who goes when."""

import re
from collections.abc import Iterator

import yaml

from tests.k8s.manifests import CLUSTER_KINDS, Manifest, cluster_spec, name_of, of_kind, pods

# See docs/explanation/threat-model.md
_EXTERNAL_SECRETS = {"api-keys", "huggingface", "redis", "redis-tls", "registry", "s3-credentials"}
_BOUNDED = {"cpu", "memory", "ephemeral-storage"}
_CLUSTER_SCOPED = {
    "Namespace",
    "PriorityClass",
    "ClusterQueue",
    "ResourceFlavor",
    "StorageClass",
    "IngressClass",
    "Topology",
    "ClusterRole",
    "ClusterRoleBinding",
}
_NODE_MARKS = ("ClusterRole/raymill-node-marker", "ClusterRoleBinding/raymill-node-markers")
_TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
_FABRICS = {"vpc.amazonaws.com/efa", "rdma/rdma_shared_device_a"}
_ENDPOINT = {"name": "completions-serve-svc", "port": 8000}
_SECRET_NAME = re.compile(
    r"(^|_)(token|secret|password|credentials?|access_key|api_?key)(_|$)", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|\bsk-[\w-]{20}")


def namespace_problems(objects: list[Manifest]) -> list[str]:
    (namespace,) = of_kind(objects, "Namespace")
    problems = []
    locks = any(
        "add" in c.get("securityContext", {}).get("capabilities", {})
        for _, c in _containers(objects)
    )
    for mode in ("enforce", "audit", "warn"):
        level = "privileged" if locks and mode == "enforce" else "restricted"
        if namespace["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") != level:
            problems.append(f"the namespace does not {mode} the pod security standard {level}")
    for manifest in objects:
        expected = None if manifest["kind"] in _CLUSTER_SCOPED else namespace["metadata"]["name"]
        if manifest["metadata"].get("namespace") != expected:
            problems.append(
                f"{name_of(manifest)} is not in the namespace"
                if expected
                else f"{name_of(manifest)} is in one"
            )
    return problems


def _containers(objects: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Returns each container, and the settings of the autoscaler's."""
    for pod in pods(objects):
        for container in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]:
            yield f"{pod.where} container {container['name']}", container
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        yield f"{name_of(manifest)} autoscaler", cluster_spec(manifest)["autoscalerOptions"]


def confinement_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") != 1000:
            problems.append(f"{pod.where}: must run as user 1000, not as root")
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            problems.append(f"{pod.where}: seccompProfile is not RuntimeDefault")
        if pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}:
            problems.append(f"{pod.where}: shares a namespace with its node")
        for volume in pod.spec.get("volumes", []):
            # Of which see identity_problems
            if not volume.keys() & {"emptyDir", "configMap", "secret", "projected"}:
                problems.append(
                    f"{pod.where}: volume {volume['name']} is none of emptyDir, configMap, secret"
                )
    for where, container in _containers(objects):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            problems.append(f"{where}: may gain privileges")
        capabilities = context.get("capabilities", {})
        may_lock = bool(_FABRICS & container.get("resources", {}).get("limits", {}).keys())
        added = set(capabilities.get("add", [])) - ({"IPC_LOCK"} if may_lock else set())
        if capabilities.get("drop") != ["ALL"] or added:
            problems.append(f"{where}: keeps capabilities")
        if context.get("readOnlyRootFilesystem") is not True:
            problems.append(f"{where}: its root file system is writable")
        if {"runAsUser", "runAsNonRoot", "seccompProfile"} & context.keys():
            problems.append(f"{where}: overrides its pod's security context")
        if any("hostPort" in port for port in container.get("ports", [])):
            problems.append(f"{where}: takes a port of its node")
    return problems


def scratch_problems(objects: list[Manifest]) -> list[str]:
    """A read-only root needs a writable /tmp (HOME, TMPDIR and Ray's session), and a Ray node a
    /dev/shm of memory."""
    problems = []
    for where, container in _containers(objects):
        mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        if "/tmp" not in mounts:
            problems.append(f"{where}: nothing writable at /tmp")
    for pod in [pod for pod in pods(objects) if pod.role != "redis"]:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for mount in pod.container["volumeMounts"]:
            volume = volumes.get(mount["name"], {})
            if mount["mountPath"] in ("/tmp", "/dev/shm") and "sizeLimit" not in volume.get(
                "emptyDir", {}
            ):
                problems.append(
                    f"{pod.where}: {mount['mountPath']} is no emptyDir with a sizeLimit"
                )
            if "emptyDir" not in volume and not mount.get("readOnly"):
                problems.append(f"{pod.where}: {mount['mountPath']} is not mounted read-only")
        media = {
            mount["mountPath"]: volumes[mount["name"]].get("emptyDir", {}).get("medium")
            for mount in pod.container["volumeMounts"]
            if mount["name"] in volumes
        }
        if pod.role != "submitter" and media.get("/dev/shm") != "Memory":
            problems.append(f"{pod.where}: /dev/shm is not of memory")
    return problems


def identity_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    accounts = {
        account["metadata"]["name"]: account for account in of_kind(objects, "ServiceAccount")
    }
    roles: dict[str, str] = {}
    for pod in pods(objects):
        account = pod.spec.get("serviceAccountName", "default")
        if account not in accounts:
            problems.append(f"{pod.where}: service account {account} is not among the manifests")
        if roles.setdefault(account, pod.role) != pod.role:
            problems.append(
                f"{pod.where}: shares service account {account} with a {roles[account]}"
            )
        if pod.spec.get("automountServiceAccountToken") is not False:
            problems.append(f"{pod.where}: a Kubernetes token is for the head's autoscaler only")
        tokens = {volume["name"] for volume in pod.spec.get("volumes", []) if "projected" in volume}
        mounted = {
            mount["name"]
            for container in pod.spec["containers"]
            for mount in container["volumeMounts"]
        }
        if tokens & mounted or (tokens and pod.role != "head"):
            problems.append(f"{pod.where}: users' code would have the autoscaler's token")
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        problems += _autoscaler_token_problems(manifest)
    serving = {
        pod.spec.get("serviceAccountName")
        for pod in pods(objects)
        if pod.component == "completions"
    }
    training = {
        pod.spec.get("serviceAccountName")
        for pod in pods(objects)
        if pod.component != "completions"
    }
    problems += [f"ServiceAccount/{name}: trains and serves" for name in sorted(serving & training)]
    problems += [
        f"ServiceAccount/{name}: mounts its token unasked"
        for name, account in accounts.items()
        if account.get("automountServiceAccountToken") is not False
    ]
    problems += [
        f"{name_of(o)}: needs no right"
        for o in of_kind(objects, "ClusterRole", "ClusterRoleBinding")
        if name_of(o) not in _NODE_MARKS
    ]
    for role in of_kind(objects, "Role", "ClusterRole"):
        for rule in role.get("rules", []):
            if "*" in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]:
                problems.append(f"{name_of(role)}: a right to everything")
            if "secrets" in rule["resources"]:
                problems.append(f"{name_of(role)}: nobody reads Secrets by it")
            stopping = {"delete"} if rule["resources"] == ["rayjobs"] else set()
            if {"pods/exec", "pods/attach"} & set(rule["resources"]):
                problems.append(f"{name_of(role)}: a way into pods")
            if set(rule["verbs"]) - {"get", "list", "create", "patch"} - stopping:
                problems.append(f"{name_of(role)}: {rule['verbs']} is more than raymill does")
    may_apply = {
        resource
        for role in of_kind(objects, "Role")
        for rule in role["rules"]
        if {"create", "patch"} <= set(rule["verbs"])
        for resource in rule["resources"]
    }
    problems += [
        f"{name_of(manifest)}: raymill's operators may not apply it, so it belongs to the platform"
        for manifest in objects
        if manifest["metadata"].get("labels", {}).get("app.kubernetes.io/component")
        not in ("platform", "monitoring")
        and f"{manifest['kind'].lower()}s" not in may_apply
    ]
    problems += [
        f"{name_of(binding)}: gives a pod's account rights"
        for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding")
        if any(subject["kind"] != "Group" for subject in binding["subjects"])
    ]
    return problems


def _autoscaler_token_problems(manifest: Manifest) -> list[str]:
    cluster = cluster_spec(manifest)
    volumes = {
        volume["name"]: volume for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]
    }
    mounts = [
        m
        for m in cluster["autoscalerOptions"].get("volumeMounts", [])
        if m["mountPath"] == _TOKEN_FOLDER
    ]
    sources = [
        s
        for mount in mounts
        for s in volumes.get(mount["name"], {}).get("projected", {}).get("sources", [])
    ]
    if {kind for source in sources for kind in source} != {"serviceAccountToken", "configMap"}:
        return [
            f"{name_of(manifest)}: the autoscaler has no token, with which it asks Kubernetes for pods"
        ]
    return []


def exposure_problems(objects: list[Manifest]) -> list[str]:
    """Only the endpoint can be reached from outside, by TLS."""
    problems = []
    for ingress in of_kind(objects, "Ingress"):
        paths = [
            path for rule in ingress["spec"].get("rules", []) for path in rule["http"]["paths"]
        ]
        services = [path["backend"]["service"] for path in paths]
        if not services or any(
            (s["name"], s["port"]["number"]) != tuple(_ENDPOINT.values()) for s in services
        ):
            problems.append(f"{name_of(ingress)} leads in from outside, and not to the endpoint")
        listening = (
            ingress["metadata"].get("annotations", {}).get("alb.ingress.kubernetes.io/listen-ports")
        )
        if listening != '[{"HTTPS": 443}]':
            problems.append(f"{name_of(ingress)}: keys would go in the clear")
    for route in of_kind(objects, "HTTPRoute"):
        if any(
            backend != _ENDPOINT
            for rule in route["spec"]["rules"]
            for backend in rule["backendRefs"]
        ):
            problems.append(f"{name_of(route)} leads in from outside, and not to the endpoint")
    for gateway in of_kind(objects, "Gateway"):
        if any(listener["protocol"] != "HTTPS" for listener in gateway["spec"]["listeners"]):
            problems.append(f"{name_of(gateway)}: keys would go in the clear")
    problems += [
        f"{name_of(service)} leads in from outside"
        for service in of_kind(objects, "Service")
        if service["spec"].get("type", "ClusterIP") != "ClusterIP"
    ]
    for manifest in of_kind(objects, *CLUSTER_KINDS):
        head = cluster_spec(manifest)["headGroupSpec"]
        if head.get("serviceType") != "ClusterIP" or head.get("enableIngress"):
            problems.append(
                f"{name_of(manifest)}: the head's service must be a ClusterIP without ingress"
            )
        if (
            manifest["spec"].get("serveService", {}).get("spec", {}).get("type", "ClusterIP")
            != "ClusterIP"
        ):
            problems.append(f"{name_of(manifest)}: the endpoint's service must be a ClusterIP")
    return problems


def resource_problems(objects: list[Manifest]) -> list[str]:
    problems = []
    for where, container in _containers(objects):
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        if _BOUNDED - limits.keys() or _BOUNDED - requests.keys():
            problems.append(f"{where}: lacks requests or limits of {', '.join(sorted(_BOUNDED))}")
        elif limits["memory"] != requests["memory"]:
            problems.append(
                f"{where}: Ray plans with the memory limit, so the request must equal it"
            )
    return problems


def image_problems(objects: list[Manifest]) -> list[str]:
    problems, images = [], set()
    for pod in pods(objects):
        if pod.spec.get("nodeSelector", {}).get("kubernetes.io/arch") != "amd64":
            problems.append(
                f"{pod.where}: may come onto a node of another architecture than the image's"
            )
        built_for_gpu = pod.container["image"].rpartition("/")[2].startswith("raymill-gpu")
        if built_for_gpu is not bool(pod.gpus):
            problems.append(f"{pod.where}: {pod.container['image']} is not the build for its node")
    for where, container in _containers(objects):
        if "image" not in container:  # the autoscaler's is the head's
            continue
        if container["name"] != "redis":
            # Two builds of one image
            images.add(container["image"].replace("raymill-gpu", "raymill"))
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in container["image"] and tag in ("", "latest"):
            problems.append(f"{where}: image {container['image']} is not pinned")
    if len(images) > 1:
        problems.append(f"more than one image: {', '.join(sorted(images))}")
    return problems


def secret_problems(objects: list[Manifest]) -> list[str]:
    """Secrets come from Secret references that exist elsewhere, never from these files."""
    problems = [f"{name_of(secret)} carries a secret" for secret in of_kind(objects, "Secret")]
    for config in of_kind(objects, "ConfigMap"):
        problems += [
            f"{name_of(config)}: {key} belongs in a Secret"
            for key, value in config["data"].items()
            if _SECRET_NAME.search(key) or _SECRET_VALUE.search(value)
        ]
    for where, container in _containers(objects):
        for variable in container.get("env", []):
            if _SECRET_NAME.search(variable["name"]) and "value" in variable:
                problems.append(f"{where}: {variable['name']} stands in the manifest")
    for manifest in of_kind(objects, "RayJob"):
        if "env_vars" in (yaml.safe_load(manifest["spec"].get("runtimeEnvYAML", "")) or {}):
            problems.append(f"{name_of(manifest)}: the dashboard shows a runtime_env's env_vars")
    return problems


def reference_problems(objects: list[Manifest]) -> list[str]:
    """Every ConfigMap that a pod names is among the objects, and every Secret is one that
    docs/how-to/kubernetes.md lists."""
    config_maps = {config["metadata"]["name"] for config in of_kind(objects, "ConfigMap")}
    pulling = [
        secret["name"]
        for o in of_kind(objects, "ServiceAccount")
        for secret in o.get("imagePullSecrets", [])
    ]
    problems = [f"nobody makes Secret {name}" for name in pulling if name not in _EXTERNAL_SECRETS]
    for pod in pods(objects):
        sources = pod.container.get("envFrom", [])
        volumes = pod.spec.get("volumes", [])
        named = [source["configMapRef"]["name"] for source in sources if "configMapRef" in source]
        named += [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
        # Kubernetes makes it in every namespace
        named = [name for name in named if name != "kube-root-ca.crt"]
        secrets = [source["secretRef"]["name"] for source in sources if "secretRef" in source]
        secrets += [volume["secret"]["secretName"] for volume in volumes if "secret" in volume]
        sources = [variable.get("valueFrom", {}) for variable in pod.container.get("env", [])]
        secrets += [
            source["secretKeyRef"]["name"] for source in sources if "secretKeyRef" in source
        ]
        problems += [
            f"{pod.where}: ConfigMap {name} does not exist"
            for name in named
            if name not in config_maps
        ]
        problems += [
            f"{pod.where}: nobody makes Secret {name}"
            for name in secrets
            if name not in _EXTERNAL_SECRETS
        ]
        mounted = {mount["name"] for mount in pod.container["volumeMounts"]}
        # Its claim
        there = {v["name"] for v in volumes} | ({"data"} if pod.role == "redis" else set())
        problems += [f"{pod.where}: volume {v} does not exist" for v in mounted - there]
    return problems


RULES = (
    namespace_problems,
    confinement_problems,
    scratch_problems,
    identity_problems,
    exposure_problems,
    resource_problems,
    image_problems,
    secret_problems,
    reference_problems,
)
