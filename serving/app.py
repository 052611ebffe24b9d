"""Deploys the endpoint, from manifests (`serving.app:build_app`) and as the job of `raymill serve`.

Never write `from __future__ import annotations` here: Ray Serve would pass `build_app` a plain
dict.
"""

import contextlib
import sys
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from cluster.endpoint.endpoint import require_key, require_ray_proxies, url_of
from cluster.endpoint.local_end import LONGEST_STREAM_S, entrance_of
from cluster.local.local_cluster import require_free_port
from cluster.output.progress import say
from cluster.settings.flags import with_absolute_paths
from cluster.settings.serve import ServeConfig
from cluster.stages.stage import stage_main
from cluster.storage.registry import find_checkpoint, named_checkpoint
from cluster.storage.uris import open_storage
from cluster.wings import added
from model.files.bounded_text import require_bounded_text
from serving.api.access import read_rules
from serving.delivery.autoscaling import ScalingPolicy
from serving.delivery.coordinator import Coordinator
from serving.delivery.delivery_file import DeliveryFile, endpoint_name
from serving.delivery.promotion import version_of
from serving.protocol.json_log import FORMAT_VARIABLE
from serving.protocol.served_model import read_served_model
from serving.proxy.front_door import ENTRANCE_VARIABLE, KEYLESS_VARIABLE, proxy_environment
from serving.replica import Replica
from serving.start_watch import follow_start

APP_NAME = "raymill"
CONTROLLER_VARIABLES = {
    # Ray's 0.1 would take 3% of a core from the engine, all day
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # A proxy that fails three checks is replaced. Ray's 10 s between them leave the place of one
    # that has ended empty for 20 to 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}


def build_app(config: ServeConfig) -> serve.Application:
    """Builds the application for a Ray Serve config file. As long as the settings name the same
    checkpoint, it continues with what was promoted meanwhile, also on a new cluster; so does each
    adapter."""
    return _app(config, deployment=f"config file: {config.checkpoint}")


def _app(config: ServeConfig, *, deployment: str) -> serve.Application:
    require_ray_proxies()
    require_key(config)
    for check in added(lambda wing: wing.endpoint_check):
        check(config)
    replicas = config.replicas
    fixed = replicas.min_replicas == replicas.max_replicas
    # A full replica answers 429 itself. Ray Serve's own limit is higher, so that only a flood gets
    # the proxy's refusal, to which front_door.py gives OpenAI's shape.
    flood_limit = 2 * config.max_ongoing_requests
    health: dict[str, Any] = {
        "health_check_period_s": 1,  # a dead engine is replaced within seconds; the default is 10 s
        "health_check_timeout_s": 5,
        # A checkpoint that does not load will not load the twentieth time either
        "max_constructor_retry_count": 3,
    }
    replica = serve.deployment(
        name="Replica",
        num_replicas=replicas.min_replicas if fixed else None,
        autoscaling_config=None if fixed else autoscaling(config),
        ray_actor_options={
            "num_cpus": replicas.threads_per_replica,
            "num_gpus": config.engine.tensor_parallel_size if config.engine.device == "cuda" else 0,
        },
        max_ongoing_requests=flood_limit,
        max_queued_requests=flood_limit,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=LONGEST_STREAM_S,
        **health,
    )(Replica)
    coordinator = serve.deployment(
        name="Coordinator",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,  # each replica's report, and what operators ask
        graceful_shutdown_timeout_s=1,
        **health,
    )(Coordinator)
    files = {
        "api_key_file": config.api_key_file,
        "admin_key_file": config.admin_key_file,
        "receipt_key_file": config.receipt_key_file,
    }
    # Replicas run elsewhere
    absolute: dict[str, Any] = {
        name: file and str(Path(file).absolute()) for name, file in files.items()
    }
    absolute["storage"] = with_absolute_paths(config.storage)
    return replica.bind(
        config.model_copy(update=absolute),
        access=read_rules(config),
        coordinator=coordinator.bind(config, deployment=deployment),
        deployment=deployment,
    )


def autoscaling(config: ServeConfig) -> AutoscalingConfig:
    """Scales by `ScalingPolicy`, with figures of the last seconds and its own delays instead of Ray
    Serve's."""
    replicas = config.replicas
    delays = replicas.model_dump(
        include={"scale_up_after_s", "scale_down_after_s", "scale_to_zero_after_s"}
    )
    rules = delays | {"target_ongoing_requests": config.target_ongoing_requests}
    return AutoscalingConfig(
        min_replicas=replicas.min_replicas,
        max_replicas=replicas.max_replicas,
        policy=AutoscalingPolicy(policy_function=ScalingPolicy, policy_kwargs=rules),
        metrics_interval_s=1,
        look_back_period_s=5,
        upscale_delay_s=0,
        downscale_delay_s=0,
    )


def run(config: ServeConfig) -> dict[str, Any]:
    """Deploys on the cluster that the caller has joined, and returns once the endpoint answers. It
    stays up until the caller ends Ray Serve or the cluster. The paths in the settings are absolute,
    as replicas have another working directory. Raises `UserError` for a port in use, an unusable
    checkpoint, or a damaged state of this endpoint, with which its coordinator would wait for a
    repair."""
    storage = config.storage
    checkpoint, folder = find_checkpoint(config.checkpoint, storage.uri, signed_by=storage.signer)
    require_bounded_text(folder)
    for reference in config.adapters.values():
        named_checkpoint(reference, config.storage.uri)
    model = read_served_model(folder, name=config.model_name)
    name = config.model_name or version_of(model, checkpoint=checkpoint).name
    deployment = f"started {uuid.uuid4().hex}"  # a new one, which begins with this checkpoint
    DeliveryFile(
        open_storage(config.storage.uri), endpoint_name(config), deployment=deployment
    ).restore()
    app = _app(config, deployment=deployment)
    if not serve.status().proxies:
        require_free_port(config.host, config.port)
        say("starting the endpoint's proxies")
        # Started from a task whose environment the proxies inherit; there is no other way to give
        # them settings.
        variables = proxy_environment(config.http) | CONTROLLER_VARIABLES
        variables[ENTRANCE_VARIABLE] = entrance_of(config.host, config.port)
        if config.api_key_file is None:
            variables[KEYLESS_VARIABLE] = "1"
        if config.log_format is not None:
            variables[FORMAT_VARIABLE] = config.log_format
        start = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(serve.start)
        # On the head and on each node with a replica. Nodes of one machine share the port
        # (SO_REUSEPORT), so the end of one proxy ends its connections and no others.
        ray.get(
            start.remote(
                proxy_location="EveryNode", http_options={"host": config.host, "port": config.port}
            )
        )
    say(f"starting replicas of {name}, which load {checkpoint}")
    with contextlib.suppress(TimeoutError):  # of a proxy that is replaced just now
        serve.run_many(
            [serve.RunTarget(app, name=APP_NAME, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    url = url_of(config.host, config.port)
    follow_start(APP_NAME, url=url, num_wanted=config.replicas.min_replicas)
    return {"url": url, "model": name}


if __name__ == "__main__":
    sys.exit(stage_main(run, ServeConfig))
