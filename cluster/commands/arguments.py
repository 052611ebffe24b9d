"""The arguments that commands take, each declared once; the settings of the trees are flags
besides."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.commands.command import Argument, Arguments, SettingAs, SettingsOf, Switch
from cluster.commands.completion import checkpoints, overlays, run_ids
from cluster.settings.parser import ConfigError
from cluster.storage.uris import absolute_uri
from raymill.errors import UserError

if TYPE_CHECKING:
    from cluster.settings.plan import PlanConfig, TraceConfig
    from cluster.settings.run import RunConfig
    from cluster.settings.stages import EvaluateConfig
    from model.signing.signature import Signer, SigningKey, Trusted


def _run_config() -> "type[RunConfig]":
    from cluster.settings.run import RunConfig

    return RunConfig


def _plan_config() -> "type[PlanConfig]":
    from cluster.settings.plan import PlanConfig

    return PlanConfig


def _trace_config() -> "type[TraceConfig]":
    from cluster.settings.plan import TraceConfig

    return TraceConfig


def _evaluate_config() -> "type[EvaluateConfig]":
    from cluster.settings.stages import EvaluateConfig

    return EvaluateConfig


def amount(text: str) -> float:
    """Returns a number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text!r}")
    return value


def count(text: str) -> int:
    """Returns a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


_REFERENCE = "run id, run@step, path or URI of a checkpoint's or run's folder"
_FOLDER_OF_RUN = "run id, path or URI of a run's folder, or latest: the run that was published last"
_OVERRIDDEN = "YAML file; flags override its settings"

# Of several commands.
RUN_SETTINGS = SettingsOf(_run_config)
PLAN_SETTINGS = SettingsOf(_plan_config)
TRACE_SETTINGS = SettingsOf(_trace_config)
EVALUATE_SETTINGS = SettingsOf(_evaluate_config, positional="checkpoint")
NO_PUBLISH = SettingAs(
    "--no-publish", "leave `latest` as it is", setting="checkpoint.publish", value="false"
)
MAP_DOCUMENTS = SettingAs(
    "--documents",
    "give a finished token store the document map that it lacks, for `raymill where`",
    setting="data.map_documents",
    value="true",
)
CONFIG = Argument[Path | None]("config", _OVERRIDDEN, nargs="?", parse=Path)
CONFIG_FLAG = Argument[Path | None]("--config", _OVERRIDDEN, parse=Path)
KEY = Argument[str | None](
    "--key",
    "the private key, a PEM file whose passphrase is taken from RAYMILL_KEY_PASSPHRASE, or a pkcs11: URI",
    metavar="KEY",
)
KEYLESS = Switch("--keyless", "sign as an identity at an identity provider, by Sigstore")
IDENTITY_TOKEN = Argument[Path | None](
    "--identity-token",
    "file with the token of --keyless; what the CI lends its job when unset",
    parse=Path,
    metavar="FILE",
)
TRUST_CONFIG = Argument[Path | None](
    "--trust-config",
    "trust configuration of a private Sigstore instance, a JSON file; the public one when unset",
    parse=Path,
    metavar="FILE",
)
IDENTITY = Argument[str | None](
    "--identity", "also check that this identity has signed the checkpoints", metavar="NAME"
)
IDENTITY_PROVIDER = Argument[str | None](
    "--identity-provider", "the identity provider that vouches for --identity", metavar="URL"
)
CERTIFICATES = Argument[Path | None](
    "--certificates",
    "PEM file with the key's certificate and those that lead to a trusted one",
    parse=Path,
    metavar="FILE",
)
SIGN = Argument[str | None](
    "--sign",
    "sign what is written with this private key, as `raymill sign` does",
    metavar="KEY",
)
TIMESTAMP = Argument[str | None](
    "--timestamp",
    "time stamp authority (RFC 3161) that stamps the signatures",
    metavar="URL",
)
SIGNED_BY = Argument[Path | None](
    "--signed-by",
    "also check that the holder of this public key, a PEM file, or of a certificate below those in it, or the identity "
    "in this JSON file, has signed the checkpoints",
    parse=Path,
    metavar="FILE",
)
TIMESTAMPED_BY = Argument[Path | None](
    "--timestamped-by",
    "root certificate of a time stamp authority, a PEM file: signatures must have its stamp, and their certificates "
    "count as of then",
    parse=Path,
    metavar="FILE",
)
STORAGE = Argument[str](
    "--storage.uri",
    "root of runs and registry",
    parse=absolute_uri,
    default=".raymill",
    metavar="URI",
)
CHECKPOINT = Argument[str]("checkpoint", f"{_REFERENCE}, or `latest`", completer=checkpoints)
NAMED = Argument[str | None](
    "named",
    f"{_REFERENCE}; `latest` when unset",
    nargs="?",
    metavar="checkpoint",
    completer=checkpoints,
)
RUN_ID = Argument[str]("run_id", "run id", metavar="RUN", completer=run_ids)
RUN = Argument[str]("run", _FOLDER_OF_RUN, metavar="RUN", completer=run_ids)
YES = Switch("--yes", "delete, and do not only say what")

# Of looking at runs and token stores.
RUNS = Argument[list[str]]("runs", _FOLDER_OF_RUN, nargs="+", metavar="RUN", completer=run_ids)
TWO_RUNS = Argument[list[str]]("runs", _FOLDER_OF_RUN, nargs=2, metavar="RUN", completer=run_ids)
PRICE = Argument[float | None](
    "--price", "dollars for an hour of a GPU, or of a CPU where there is none", parse=amount
)
STEPS = Argument[str](
    "--steps", "first and last step; all when unset", default="..", metavar="A..B"
)
NUM_PROCESSES = Argument[int](
    "--workers", "processes that train; 1 when unset", parse=int, default=1
)
NUM_SAMPLES = Argument[int](
    "--samples", "intervals between checkpoints that are computed again", parse=int, default=10
)
NUM_SHARDS = Argument[int](
    "--tokenize",
    "shards of the token store, drawn like the intervals, that are made again from the corpus that the settings name",
    parse=int,
    default=0,
    metavar="SHARDS",
)
NONCE = Argument[str | None](
    "--nonce", "what decides the lots, with the ledger's last line; drawn when unset"
)
AUDITS_FOLDER = Argument[Path](
    "--to",
    "folder for the report, where an interrupted audit goes on",
    parse=Path,
    default=Path("audit"),
)
DOCUMENT = Argument[str | None](
    "--document",
    "a file of the corpus, or the end of its path; with the first byte (of the uncompressed text) or the row of one "
    "of its documents",
    metavar="FILE[:PLACE]",
)
TEXT = Argument[str | None]("--text", "the whole text of a document, exactly")
STEP = Argument[int | None]("--step", "which documents it took", parse=int, metavar="N")
EXPLAINED_STEP = Argument[int](
    "--step", "the step to take apart", parse=int, metavar="N", required=True
)
TRACED_TEXT = Argument[str | None]("text", "the text; - reads standard input", nargs="?")
TRACED_FILE = Argument[Path | None](
    "--file", "a file that holds the text, in UTF-8", parse=Path, metavar="FILE"
)
MIN_TOKENS = Argument[int](
    "--min-tokens",
    "tokens of the shortest span; at least 12, and 12 when unset",
    parse=int,
    default=12,
)
LAST_STEP = Argument[int | None](
    "--step",
    "what the checkpoint of this step had learned; what the run has learned when unset",
    parse=int,
    metavar="N",
)
EXPERIMENT = Argument[str](
    "--mlflow", "an experiment of MLflow", metavar="EXPERIMENT", required=True
)
FOLLOW_RUN = Switch("--follow", "continue until the run has ended")
STORE = Argument[str | None](
    "store", "folder, manifest or key of a token store; the only one when unset", nargs="?"
)
INDEXED_STORE = Argument[str | None](
    "named",
    "folder, manifest or key of a token store; the only one when unset",
    nargs="?",
    metavar="store",
)
SOURCE = Argument[str]("source", "folder, pattern or file; a path or URI", metavar="SOURCE")
NEW_FOLDER = Argument[str]("destination", "new folder, a path or URI", metavar="DEST")

# Of stages and jobs.
FAULTS = Argument[list[str]](
    "--chaos",
    "inject faults on the local cluster: kill-worker@20 kill-node@40 add-node@60 kill-head@80",
    nargs="+",
    default=[],
    metavar="FAULT@STEP",
)
STAGE = Argument[str](
    "stage",
    "tokenize: turn a corpus into token shards; pretrain: train on token shards, made first where missing, and publish "
    "the checkpoint; pipeline: tokenize, train, evaluate and report, all stages in one job",
    choices=("tokenize", "pretrain", "pipeline"),
)
ADDRESS = Argument[str | None](
    "--address", "Jobs API of a Ray cluster, such as http://head:8265", metavar="URL"
)
KUBERAY = Argument[str | None](
    "--kuberay",
    "as a RayJob: one of k8s/overlays, or your kustomization",
    metavar="OVERLAY",
    completer=overlays,
)
ONLY_CHECK = Switch("--dry-run", "check all, start nothing; with --kuberay print the objects")
TOKEN_FILE = Argument[Path | None](
    "--token-file",
    "file with the Ray cluster's token; RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN when unset",
    parse=Path,
    metavar="FILE",
)
KEEPS_ON = Switch("--watch", "do so again every 30 s, until it is interrupted")
FOLLOW_LOG = Switch("-f --follow", "until the job ends; exit code 1 unless it succeeded")
ALL_LAUNCHES = Switch("--all", "print all launches that are kept, not only the last one")
SHOWS_RAY = Switch("--ray", "include the lines of Ray and of its workers' processes")
NUM_LENT = Argument[int]("--workers", "number of workers to give up", parse=int, metavar="N")
END_LOAN = Switch("--return", "end the loan")
LOAN_S = Argument[float]("--for", "300 when unset", parse=float, default=300.0, metavar="SECONDS")

# Of the endpoint.
URL = Argument[str | None]("--url", "endpoint, such as http://127.0.0.1:8000")
ADMIN_KEY = Argument[Path | None]("--admin-key-file", "file with the admin key", parse=Path)
PROMPT = Argument[str]("prompt")
API_KEY = Argument[Path | None]("--api-key-file", "file with the API key", parse=Path)
MAX_TOKENS = Argument[int | None](
    "--max-tokens", "64 when unset, or as many as fit after the prompt", parse=int
)
TEMPERATURE = Argument[float]("--temperature", parse=float, default=0.8)
SEED = Argument[int | None]("--seed", parse=int)
PROMOTED = Argument[str | None](
    "checkpoint", f"{_REFERENCE}, or `latest`", nargs="?", completer=checkpoints
)
ADAPTER = Argument[str | None](
    "--adapter",
    "an adapter by its name, beside the model; the model itself when unset",
    metavar="NAME",
)
FINISH = Switch("--finish", "give all requests to the current canary")
FOLLOWED = Argument[str | None](
    "--follow",
    "promote each newer checkpoint of a run as it appears",
    metavar="RUN",
    completer=run_ids,
)
CANARY_PERCENT = Argument[float | None](
    "--canary",
    "of the clients, at first: an API key keeps its version, and only requests without a key, user or session are "
    "drawn one by one",
    parse=float,
    metavar="PERCENT",
)
WATCH_S = Argument[float | None](
    "--watch-s", "seconds in which it may be rolled back; the endpoint's when unset", parse=float
)
GATE_SOURCE = Argument[str | None](
    "--gate-source",
    "held-out text, or token rows as .json, on which its loss is compared with the live version's; the run's "
    "validation rows when unset, `none` for no comparison",
    metavar="FILE",
)
MAX_LOSS_INCREASE = Argument[float | None](
    "--max-loss-increase",
    "allowed increase in nats per token; the endpoint's if unset",
    parse=float,
)

# Of Kubernetes and Grafana.
NAMESPACE = Argument[str | None]("--namespace -n", "Kubernetes namespace; raymill when unset")
OVERLAYS_NAMESPACE = Argument[str | None](
    "--namespace -n", "Kubernetes namespace, instead of the overlay's own"
)
OVERLAY = Argument[str](
    "overlay",
    "one of k8s/overlays, such as dev or gpu, or the folder of your own kustomization",
    metavar="OVERLAY",
    completer=overlays,
)
COMPONENT = Argument[str | None](
    "--component",
    "only this component: platform, tokenize, pretrain, evaluate, completions or shared",
)
LET_CHECK = Switch("--dry-run", "let Kubernetes check it, and change nothing")
KUBE_OBJECT = Argument[str]("name", "such as shared or rayjob/pretrain", metavar="NAME")
KUBE_OBJECTS = Argument[str | None](
    "name", "such as shared or rayjob/pretrain; all when unset", nargs="?", metavar="NAME"
)
GROUP = Argument[str | None]("--group", "worker group; the only one when unset")
LEAST_PODS = Argument[int | None]("--min", "pods that are always there", parse=int)
MOST_PODS = Argument[int | None]("--max", "pods under load", parse=int)
SUSPEND = Switch("--suspend", "remove all pods, the head's too")
RESUME = Switch("--resume", "restore what was suspended")
PROMETHEUS = Argument[str | None](
    "--prometheus-url", "the data source's address, as Grafana reaches it", metavar="URL"
)


def signing_key(arguments: Arguments) -> "SigningKey | None":
    """Returns the key of `--sign`; None where nothing is to be signed. Raises `UserError` for what
    belongs to a signature where there is none."""
    from model.signing.signature import SigningKey

    key, url = arguments[SIGN], arguments[TIMESTAMP]
    certificates = arguments[CERTIFICATES]
    if key is None and (url or certificates):
        raise UserError("--certificates and --timestamp are for signatures: name a key with --sign")
    return SigningKey.at(key, certificates, timestamp_url=url) if key else None


def signer_of(arguments: Arguments) -> "Signer":
    """Returns who signs by `--key` or `--keyless`. Raises `UserError` for what belongs to the
    other."""
    from model.signing.signature import SigningIdentity, SigningKey

    certificates, url = arguments[CERTIFICATES], arguments[TIMESTAMP]
    token, trust_config = arguments[IDENTITY_TOKEN], arguments[TRUST_CONFIG]
    if arguments[KEYLESS]:
        if certificates or url:
            raise UserError("--certificates and --timestamp are for --key: Sigstore has its own")
        return SigningIdentity(token, trust_config)
    if token or trust_config:
        raise UserError("--identity-token and --trust-config are for --keyless")
    key = arguments[KEY]
    assert key is not None, "one of the two is required"
    return SigningKey.at(key, certificates, timestamp_url=url)


def trusted_signer(arguments: Arguments) -> "Trusted | None":
    """Returns whom `--signed-by` or `--identity` trusts; None where nobody must have signed. Raises
    `UserError` for what belongs to a signer where none is named."""
    from model.signing.signature import TrustedIdentity, trusted_by_file

    file, authority = arguments[SIGNED_BY], arguments[TIMESTAMPED_BY]
    identity, provider = arguments[IDENTITY], arguments[IDENTITY_PROVIDER]
    if file is None and authority is not None:
        raise UserError("--timestamped-by is for signatures: name whose they are with --signed-by")
    if (identity is None) != (provider is None):
        raise UserError("--identity and --identity-provider belong together: name both")
    if identity is None and arguments[TRUST_CONFIG]:
        raise UserError("--trust-config is for identities: name one with --identity")
    if identity is not None and provider is not None:
        return TrustedIdentity(identity, provider, arguments[TRUST_CONFIG])
    return trusted_by_file(file, authority)


def named_once(arguments: Arguments, argument: Argument[str | None], *, flag: str) -> str | None:
    """Returns what stands by itself, or what the flag gives that says the same. Raises `ConfigError`
    for two."""
    named, given = arguments[argument], arguments.values[flag]
    if named is not None and given not in (None, named):
        raise ConfigError(f"two {flag}s, {named} and --{flag} {given}; name one")
    return named or given
