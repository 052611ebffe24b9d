"""The private names of other packages that the code relies on: each exists, takes these parameters,
and is used by its own package as it was when this was written. A release that changes one fails
here, in one place.
"""

import ast
import inspect
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
import torch
from torch.optim.adamw import adamw

from cluster.settings.code_folders import CODE_FOLDERS
from tests.repository import BANNED_MODULES, REPOSITORY


class Canary(NamedTuple):
    name: str
    parameters: str | None  # None: not a function
    user: str  # a module or an object of the package
    use: str  # a part of the user's source that names it


TRAIN = "ray.train.v2._internal"
CALLBACK = f"{TRAIN}.execution.callback"
GROUP = f"{TRAIN}.execution.worker_group"
TRAINER = "ray.train.v2.api.data_parallel_trainer"
POLICY = f"{TRAIN}.execution.scaling_policy.ElasticScalingPolicy"
FAILURES = f"{TRAIN}.execution.failure_handling.DefaultFailurePolicy"
COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
HTTP = "uvicorn.protocols.http.httptools_impl"
PROTOCOL = f"{HTTP}.HttpToolsProtocol"
FLOW = "uvicorn.protocols.http.flow_control.FlowControl"

CANARIES = [
    # model/decoders/foreign.py: the rule by which a model's modules get their first values, and the
    # constants that layers share.
    Canary(
        "transformers.modeling_utils.PreTrainedModel._init_weights",
        "self module",
        "transformers.modeling_utils",
        "self._init_weights(module)",
    ),
    # model/signing/signature.py: signs a statement of its own, and reads what was signed.
    Canary(
        "model_signing._signing.sign_ec_key.Signer.sign",
        "self payload",
        "model_signing._signing.sign_ec_key",
        "MessageToJson(payload.statement.pb)",
    ),
    Canary(
        "model_signing._signing.sign_sigstore.Verifier._verify_signed_content",
        "self signature",
        "model_signing._signing.sign_sigstore",
        "return self._verifier.verify_dsse(bundle=bundle, policy=self._policy)",
    ),
    # model/signing/identity.py: what Sigstore's parts raise where they refuse.
    Canary(
        "sigstore._internal.fulcio.client.FulcioClientError",
        None,
        "sigstore._internal.fulcio.client",
        "raise FulcioClientError from http_error",
    ),
    Canary(
        "sigstore._internal.rekor.RekorClientError",
        None,
        "sigstore._internal.rekor.client_v2",
        "raise RekorClientError(http_error)",
    ),
    Canary(
        "model_signing.signing.Config.sign",
        "self model_path signature_path",
        "model_signing.signing",
        "signature = self._signer.sign(payload)",
    ),
    Canary(
        "model_signing._signing.signing.Verifier._verify_signed_content",
        "self signature",
        "model_signing._signing.signing",
        "payload_type, payload = self._verify_signed_content(signature)",
    ),
    Canary(
        "model_signing.verifying.Config.verify",
        "self model_path signature_path",
        "model_signing.verifying",
        "expected_manifest = self._verifier.verify(signature)",
    ),
    Canary(
        "model_signing._signing.signing.dsse_payload_to_manifest",
        "dsse_payload",
        "model_signing._signing.signing",
        "return dsse_payload_to_manifest(payload)",
    ),
    Canary(
        "model_signing._signing.sign_sigstore_pb.Signature.read",
        "path",
        "model_signing.verifying",
        "sigstore_pb.Signature.read(pathlib.Path(signature_path))",
    ),
    # tests/moto_server.py: what a listing of a bucket iterates over.
    Canary(
        "moto.s3.utils._VersionedKeyStore.items",
        "self",
        "moto.s3.models",
        "for key_name, key in bucket.keys.items()",
    ),
    # cluster/local/start_node.py: one machine may have several nodes, their ports are on loopback,
    # and none is Ray Client's; a raylet on busy cores has longer than 30 s.
    Canary(
        "ray._private.services.resolve_ip_for_localhost",
        "host",
        "ray.scripts.scripts",
        "= services.resolve_ip_for_l",
    ),
    Canary(
        "ray._private.ray_constants.ENABLE_RAY_CLUSTER",
        None,
        "ray.scripts.scripts",
        "not ray_constants.ENABLE_RAY_CL",
    ),
    Canary(
        "ray._private.ray_constants.ENABLE_RAY_CLUSTER",
        None,
        "ray._private.services",
        "not ray_constants.ENABLE_RAY_CL",
    ),
    Canary(
        "ray.scripts.scripts.get_ray_client_dependency_error",
        "",
        "ray.scripts.scripts",
        "has_ray_client = get_ray_client_dependency_error() is None",
    ),
    Canary(
        "ray._private.services.get_node",
        "gcs_address node_id",
        "ray._private.node",
        "raylet_start_wait_time_s = 30",
    ),
    Canary(
        "ray.scripts.scripts.main",
        None,
        "ray.scripts.scripts",
        'if __name__ == "__main__":\n    main()',
    ),
    # jobs/ray_train/callbacks.py
    Canary(
        f"{CALLBACK}.WorkerCallback.after_init_train_context",
        "self",
        f"{GROUP}.worker",
        "callback.after_init_train_context()",
    ),
    Canary(
        f"{TRAIN}.execution.context.get_train_context", "", f"{GROUP}.worker", "get_train_context"
    ),
    Canary(
        f"{TRAIN}.execution.context.TrainContext",
        None,
        f"{TRAIN}.execution.context",
        "preemption_context: Preem",
    ),
    Canary(
        f"{TRAIN}.execution.preemption.PreemptionContext",
        None,
        f"{TRAIN}.execution.preemption",
        "preemption_info: Opt",
    ),
    Canary(
        "ray.train.UserCallback.after_exception",
        "self run_context worker_exceptions",
        f"{TRAIN}.callbacks.user_callback",
        "user_callback.after_exception(",
    ),
    # jobs/ray_train/worker_backend.py: workers are replaced alone.
    Canary(
        "ray.train.torch.config.TorchConfig.backend_cls",
        None,
        GROUP + ".worker_group",
        "backend_cls.has_replica_groups",
    ),
    Canary(
        "ray.train.torch.config._TorchBackend.on_start",
        "self worker_group backend_config",
        f"{TRAIN}.callbacks.backend_setup",
        "self._backend.on_start(execution_group, self._backend_config)",
    ),
    Canary(
        "ray.train.torch.config._TorchBackend.on_shutdown",
        "self worker_group backend_config",
        f"{TRAIN}.callbacks.backend_setup",
        "self._backend.on_shutdown(execution_group, self._backend_config)",
    ),
    Canary(
        "ray.train.torch.config._TorchBackend.share_cuda_visible_devices",
        None,
        f"{TRAIN}.callbacks.accelerators",
        "self._backend.share_cuda_visible_devices",
    ),
    Canary(
        f"{CALLBACK}.WorkerGroupCallback.after_worker_group_poll_status",
        "self worker_group_status",
        f"{GROUP}.worker_group",
        "callback.after_worker_group_poll_status(",
    ),
    Canary(
        f"{CALLBACK}.WorkerGroupCallback.after_worker_group_start",
        "self worker_group",
        f"{GROUP}.worker_group",
        "callback.after_worker_group_start(self)",
    ),
    Canary(
        f"{CALLBACK}.WorkerGroupCallback.before_worker_group_shutdown",
        "self worker_group",
        f"{GROUP}.worker_group",
        "callback.before_worker_group_shutdown(self)",
    ),
    Canary(
        f"{CALLBACK}.WorkerGroupCallback.before_worker_group_abort",
        "self worker_group_context",
        f"{GROUP}.worker_group",
        "callback.before_worker_group_abort(",
    ),
    Canary(
        f"{CALLBACK}.ControllerCallback.on_controller_start_worker_group",
        "self scaling_config num_workers",
        f"{TRAIN}.execution.controller.controller",
        "selector = callback.on_controller_start_worker_group(",
    ),
    Canary(f"{TRAIN}.callbacks.datasets.DatasetsCallback", None, TRAINER, "= DatasetsCallback("),
    Canary(
        "ray.train.v2.torch.torch_trainer.TorchTrainer._create_default_callbacks",
        "self",
        TRAINER,
        "callbacks=self._create_default_callbacks()",
    ),
    Canary(
        "ray.train.v2.torch.torch_trainer.TorchTrainer._initialize_and_run_controller",
        "self controller_init_kwargs",
        TRAINER,
        "scaling_policy=",
    ),
    # jobs/ray_train/worker_backend.py: which errors of the controller begin a group again
    Canary(
        FAILURES,
        None,
        f"{TRAIN}.execution.failure_handling.factory",
        "DefaultFailurePolicy(failure_config",
    ),
    Canary(
        f"{FAILURES}._is_retryable_error",
        "self training_failed_error",
        FAILURES,
        "self._is_retryable_error(training_failed_error)",
    ),
    Canary(
        f"{CALLBACK}.ControllerCallback.before_controller_execute_failure_decision",
        "self failure_decision",
        f"{TRAIN}.execution.controller.controller",
        '"before_controller_execute_failure_decision"',
    ),
    Canary(
        f"{CALLBACK}.WorkerGroupCallback.after_worker_group_training_start",
        "self worker_group",
        f"{GROUP}.worker_group",
        "callback.after_worker_group_training_start(self)",
    ),
    # jobs/ray_train/seated_group.py: seats have places of their own, and others come.
    Canary(
        f"{TRAIN}.execution.controller.controller.TrainController.worker_group_cls",
        None,
        f"{TRAIN}.execution.controller.controller",
        "self._worker_group = self.worker_group_cls.create(",
    ),
    Canary(
        f"{GROUP}.worker_group.WorkerGroup._create_placement_group",
        "self scaling_config worker_group_context",
        f"{GROUP}.worker_group",
        "pg_handle = self._create_placement_group(",
    ),
    Canary(
        f"{GROUP}.placement_group_handle.PlacementGroupHandle",
        None,
        f"{GROUP}.worker_group",
        "if not pg_handle.wait(self._worker_group_start_timeout_s):",
    ),
    Canary(
        f"{GROUP}.worker_group.WorkerGroup._create_workers",
        "self num_workers placement_group resources_per_worker placement_group_bundle_indices "
        "starting_world_rank world_size replica_group_size",
        f"{GROUP}.worker_group",
        "starting_world_rank=replica_group_index",
    ),
    Canary(
        f"{GROUP}.worker_group.WorkerGroup._init_train_context",
        "self workers sync_actor",
        f"{GROUP}.worker_group",
        "self._init_train_context(new_workers, sync_actor)",
    ),
    Canary(
        f"{GROUP}.worker_group.WorkerGroup",
        None,
        f"{GROUP}.worker_group",
        "self._replica_groups[replica_group_index] = new_replica_group",
    ),
    Canary(
        f"{GROUP}.worker_group.WorkerGroup",
        None,
        f"{GROUP}.worker_group",
        "worker_rank_to_replica_group_rank=self._worker_rank_to_replica_group_rank",
    ),
    Canary(
        f"{GROUP}.worker_group.WorkerGroup.get_replica_groups",
        "self",
        f"{GROUP}.worker_group",
        "return self._replica_groups",
    ),
    Canary(
        f"{GROUP}.execution_group.ReplicaGroup.__init__",
        "self workers resources_per_worker callbacks",
        f"{GROUP}.worker_group",
        "new_replica_group = ReplicaGroup(",
    ),
    Canary(
        f"{GROUP}.execution_group.ReplicaGroup.start_training",
        "self worker_group_context",
        f"{GROUP}.worker_group",
        "new_replica_group.start_training(self._worker_group_context)",
    ),
    Canary(
        f"{GROUP}.execution_group.ReplicaGroup.shutdown",
        "self",
        f"{GROUP}.worker_group",
        "old_replica_group.shutdown()",
    ),
    # jobs/ray_train/joiners.py
    Canary(
        f"{TRAIN}.exceptions.WorkerGroupStartupFailedError",
        None,
        f"{GROUP}.worker_group",
        "raise WorkerGroupStartupFailedError(error_msg) from actor_error",
    ),
    # jobs/ray_train/callbacks.py: a group's name.
    Canary(
        f"{TRAIN}.execution.context.TrainContext.get_synchronization_actor",
        "self",
        f"{TRAIN}.execution.context",
        "sync_actor = self.get_synchronization_actor()",
    ),
    Canary("ray.actor.ActorHandle._actor_id", None, "ray.actor", "return self._ray_actor_id"),
    # jobs/ray_train/drains.py
    Canary(
        "ray._private.state.state",
        None,
        f"{TRAIN}.execution.preemption",
        "return ray._private.state.state.get_draining_nodes()",
    ),
    Canary(
        f"{GROUP}.worker.RayTrainWorker.mark_preempt",
        "self info",
        f"{TRAIN}.execution.preemption",
        "actor.mark_preempt.remote(info)",
    ),
    # jobs/ray_train/node_losses.py: what a worker tells.
    Canary(
        f"{GROUP}.worker.WorkerStatus",
        None,
        f"{GROUP}.poll",
        "status.preemption_info is not None",
    ),
    Canary(f"{GROUP}.worker.WorkerStatus", None, f"{GROUP}.poll", "not status.running for status"),
    # While some workers are replaced, a decision for as many leaves the others alone.
    Canary(
        f"{GROUP}.poll.WorkerGroupPollStatus.failing_replica_group_indices",
        None,
        f"{TRAIN}.execution.controller.controller",
        "and decision.num_workers == current_num_workers",
    ),
    # jobs/ray_train/lending_policy.py
    Canary(
        f"{POLICY}._get_resize_decision",
        "self num_workers",
        POLICY,
        "return self._get_resize_decision(num_workers)",
    ),
    Canary(
        f"{TRAIN}.execution.scaling_policy.NoopDecision",
        None,
        f"{TRAIN}.execution.controller.controller",
        "isinstance(scaling_decision, NoopDecision)",
    ),
    Canary(
        f"{TRAIN}.execution.scaling_policy.ResizeDecision",
        None,
        f"{TRAIN}.execution.controller.controller",
        "isinstance(scaling_decision, ResizeDecision)",
    ),
    Canary(
        f"{POLICY}.__init__",
        "self scaling_config",
        f"{TRAIN}.execution.scaling_policy.factory",
        "ElasticScalingPolicy(",
    ),
    Canary(
        f"{POLICY}._count_possible_workers",
        "self reserved_resources",
        POLICY,
        "self._count_possible_workers(",
    ),
    Canary(
        f"{POLICY}.make_decision_for_running_worker_group",
        "self worker_group_state worker_group_status",
        f"{TRAIN}.execution.controller.controller",
        ".make_decision_for_running_worker_group(",
    ),
    Canary(
        f"{POLICY}.make_decision_for_non_running_worker_group",
        "self",
        f"{TRAIN}.execution.controller.controller",
        ".make_decision_for_non_running_worker_group()",
    ),
    Canary(
        f"{POLICY}.after_controller_start",
        "self train_run_context",
        f"{TRAIN}.execution.controller.controller",
        '"after_controller_start"',
    ),
    Canary(
        f"{POLICY}.before_controller_abort",
        "self",
        f"{TRAIN}.execution.scaling_policy.ScalingPolicy",
        'def before_controller_abort(self):\n        """Cancel the resource request',
    ),
    Canary(
        "ray.train.v2.api.config.ScalingConfig._resources_per_worker_not_none",
        None,
        POLICY,
        "self.scaling_config._resources_per_worker_not_none",
    ),
    # jobs/ray_train/cluster_view.py: an actor and its method, by name.
    Canary(
        f"{COORDINATOR}._AutoscalingCoordinatorActor._tick",
        "self",
        COORDINATOR,
        'namespace="AutoscalingCoordinator"',
    ),
    # jobs/pretrain.py sets these variables.
    Canary(
        f"{TRAIN}.constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR",
        None,
        f"{TRAIN}.constants",
        '"RAY_TRAIN_HEALTH_CHECK_INTE',
    ),
    Canary(
        f"{TRAIN}.constants.PREEMPTION_POLL_INTERVAL_S_ENV_VAR",
        None,
        f"{TRAIN}.constants",
        '"RAY_TRAIN_PREEMPTION_POLL_IN',
    ),
    Canary(
        f"{TRAIN}.constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR",
        None,
        f"{TRAIN}.constants",
        '"RAY_TRAIN_WORKER_GROUP_STAR',
    ),
    # serving/proxy: bounds on connections.
    Canary(f"{FLOW}.__init__", "self transport", PROTOCOL, "self.flow = FlowControl(transport)"),
    Canary(f"{FLOW}.resume_reading", "self", HTTP, "self.flow.resume_reading()"),
    Canary(f"{HTTP}.STATUS_LINE", None, PROTOCOL, "STATUS_LINE[400]"),
    Canary(f"{PROTOCOL}.connection_made", "self transport", PROTOCOL, "self.connections.add(self)"),
    Canary(f"{PROTOCOL}.connection_lost", "self exc", PROTOCOL, "self.connections.discard(self)"),
    Canary(f"{PROTOCOL}.data_received", "self data", PROTOCOL, "self.parser.feed_data(data)"),
    Canary(
        f"{PROTOCOL}._unset_keepalive_if_required",
        "self",
        PROTOCOL,
        "self._unset_keepalive_if_required()",
    ),
    Canary(f"{PROTOCOL}.on_message_begin", "self", PROTOCOL, "httptools.HttpRequestParser(self)"),
    Canary(
        f"{PROTOCOL}.on_header", "self name value", PROTOCOL, "self.headers.append((name, value))"
    ),
    Canary(f"{PROTOCOL}.on_headers_complete", "self", PROTOCOL, "parse_url(self.url)"),
    Canary(f"{PROTOCOL}.on_body", "self body", PROTOCOL, "self.cycle.body += body"),
    Canary(f"{PROTOCOL}.on_message_complete", "self", PROTOCOL, "self.cycle.more_body = False"),
    Canary(
        f"{PROTOCOL}.on_response_complete",
        "self",
        PROTOCOL,
        "on_response=self.on_response_complete",
    ),
    Canary(f"{PROTOCOL}.send_400_response", "self msg", PROTOCOL, "self.send_400_response(msg)"),
    Canary(
        f"{PROTOCOL}.timeout_keep_alive_handler",
        "self",
        PROTOCOL,
        "self.timeout_keep_alive_handler",
    ),
    Canary(f"{PROTOCOL}.pause_writing", "self", PROTOCOL, "self.flow.pause_writing()"),
    Canary(f"{PROTOCOL}.resume_writing", "self", PROTOCOL, "self.flow.resume_writing()"),
    Canary(
        f"{PROTOCOL}.__init__",
        None,
        PROTOCOL,
        "set_dangerous_leniencies(lenient_data_after_close=True)",
    ),
    Canary(
        f"{HTTP}.RequestResponseCycle",
        None,
        f"{HTTP}.RequestResponseCycle",
        "self.response_complete = ",
    ),
    Canary(
        f"{HTTP}.RequestResponseCycle",
        None,
        f"{HTTP}.RequestResponseCycle",
        "self.response_started = ",
    ),
    Canary(
        f"{HTTP}.RequestResponseCycle",
        None,
        f"{HTTP}.RequestResponseCycle",
        "self.message_event = ",
    ),
    Canary(
        "uvicorn.config.HTTP_PROTOCOLS",
        None,
        "uvicorn.config.Config",
        "HTTP_PROTOCOLS.get(self.http, self.http)",
    ),
    Canary(
        "ray.serve._private.constants.RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
        None,
        "ray.serve._private.http_util",
        "if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH:",
    ),
    # cluster/endpoint/endpoint.py refuses this variable.
    Canary(
        "ray.serve._private.constants.RAY_SERVE_ENABLE_HA_PROXY",
        None,
        "ray.serve._private.constants",
        'os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1"',
    ),
    # cluster/stages/stage.py makes this logger quiet.
    Canary(
        "ray._private.runtime_env.packaging.default_logger",
        None,
        "ray._private.runtime_env.packaging",
        "default_logger = logging.getLogger(__name__)",
    ),
    # tests/lanes.py
    Canary(
        "xdist.scheduler.LoadFileScheduling._split_scope",
        "self nodeid",
        "xdist.scheduler.LoadScopeScheduling",
        "scope = self._split_scope(nodeid)",
    ),
]


@pytest.mark.parametrize(
    "canary", CANARIES, ids=[f"{canary.name} in {canary.user}" for canary in CANARIES]
)
def test_a_private_name_is_what_the_code_relies_on(canary: Canary) -> None:
    found = pkgutil.resolve_name(canary.name)
    if canary.parameters is not None:
        names = list(inspect.signature(found).parameters)
        if "_ray_trace_ctx" in names:  # an actor's, added later
            names.remove("_ray_trace_ctx")
        assert names == canary.parameters.split()
    assert canary.use in inspect.getsource(pkgutil.resolve_name(canary.user))


def imported_names(path: Path) -> set[str]:
    """Returns the full names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_private_name_that_is_imported_has_a_canary() -> None:
    used = {
        name
        for folder in CODE_FOLDERS
        for path in (REPOSITORY / folder).rglob("*.py")
        for name in imported_names(path)
    }
    private = {
        name
        for name in used
        if any(f"{name}.".startswith(f"{module}.") for module in BANNED_MODULES)
    }
    assert len(private) >= 12
    known = [canary.name for canary in CANARIES]
    assert {
        name for name in private if not any(f"{k}.".startswith(f"{name}.") for k in known)
    } == set()


def test_ray_reads_every_variable_that_is_set_for_it() -> None:
    """Ray ignores a variable that it does not know: one that it renames would change nothing, and
    nobody would notice."""
    folders = [REPOSITORY / folder for folder in ("cluster", "jobs", "serving")]
    files = [
        path for folder in folders for kind in ("py", "toml") for path in folder.rglob(f"*.{kind}")
    ]
    text = "".join(
        path.read_text(encoding="utf-8") for path in [*files, REPOSITORY / "k8s/base/ray.env"]
    )
    names = set(re.findall(r'(?:"|^)(RAY_\w+)(?="| ?=)', text, re.MULTILINE))
    assert {
        "RAY_worker_niceness",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
        "RAY_health_check_period_ms",
    } <= names
    root = Path(ray.__file__).parent
    modules = (
        "_private",
        "_common",
        "train/v2/_internal",
        "serve/_private",
        "dashboard/modules/job",
    )
    python = "".join(
        path.read_text(encoding="utf-8")
        for module in modules
        for path in (root / module).rglob("*.py")
    )
    native = (root / "_raylet.so").read_bytes()  # its names lack the prefix
    assert {
        name
        for name in names
        if name not in python and name.removeprefix("RAY_").encode() not in native
    } == set()


def test_adamw_as_a_function_takes_what_the_exact_state_gives_it() -> None:
    """PyTorch documents the optimizer's class only, which imports torch._dynamo."""
    values, gradient = torch.ones(2), torch.full((2,), 0.5)
    moments, squares, count = torch.zeros(2), torch.zeros(2), torch.zeros(())
    settings = {"lr": 0.1, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.99, "eps": 0.0}
    adamw(
        [values],
        [gradient],
        [moments],
        [squares],
        [],
        [count],
        fused=True,
        amsgrad=False,
        maximize=False,
        **settings,
    )
    assert count == 1
    assert torch.allclose(values, torch.full((2,), 0.9))
    assert torch.allclose(moments, gradient * 0.1) and torch.allclose(squares, gradient**2 * 0.01)
