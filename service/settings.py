"""Every setting of the server, in one class. Each field is an environment variable `ROISERVE_<NAME>` and a flag of
`roiserve serve`; its description is the help of both. The entry point builds the settings once and passes them down; no
other module reads the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from service.cores import Binding, available_cores

ENV_PREFIX = "ROISERVE_"

Engine = Literal["auto", "eager", "compiled", "graphs", "openvino"]
BatchPolicy = Literal["exact", "bucketed", "padded"]
Precision = Literal["auto", "float32", "tf32", "float16", "bfloat16", "int8"]

OTHER_VARIABLES = frozenset(
    {"ROISERVE_PUBLISH", "ROISERVE_CPU_LIMIT", "ROISERVE_MEMORY_LIMIT", "ROISERVE_WEIGHTS_BASE_URL"}
)
"""Variables with our prefix that the server does not read: of the compose file, and of `roiserve models pull`."""

_ROUTE = r"^(/[A-Za-z0-9._~:@-]+)+$"
# What Vertex AI tells a container, by the variable of ours that it goes before: an image may have set ours already.
_VERTEX_VARIABLES = {
    "roiserve_port": "aip_http_port",
    "roiserve_health_route": "aip_health_route",
    "roiserve_predict_route": "aip_predict_route",
}

# Kubernetes gives every pod such variables for every Service: ROISERVE_PORT=tcp://10.0.0.7:8000 for one named roiserve.
_SERVICE_LINK_NAME = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


class Settings(BaseSettings):
    """What an operator may choose. Names include the units; values out of range are refused when it is built."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", protected_namespaces=())

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all interfaces, as in a container.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    admin_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="TCP port for /metrics, /healthz and /readyz, which are then not on the other one; unset keeps all "
        "on one.",
    )

    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="Path under which a proxy publishes the server, such as /detector, whether the proxy strips it or "
        "not.",
    )
    health_route: str | None = Field(
        None,
        pattern=_ROUTE,
        description="A further path that answers as /readyz does, for platforms that choose one; Vertex AI's "
        "AIP_HEALTH_ROUTE sets it, too.",
    )
    predict_route: str | None = Field(
        None,
        pattern=_ROUTE,
        description="A further path that answers as /invocations does; Vertex AI's AIP_PREDICT_ROUTE sets it, too.",
    )
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses or networks of proxies whose X-Forwarded-For and -Proto are believed, separated by "
        "commas; * believes everyone. Unset, those on this machine.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may call the server from a browser, such as https://app.example.com, "
        "separated by commas; * for all. Unset, none.",
    )

    model_store: Path = Field(Path("model_store"), description="Folder that holds <name>/<version>/model.toml.")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Models to load, as name or name@version, separated by commas; empty loads one version "
        "of each: the one that its file default says, else the highest.",
    )
    default_model: str | None = Field(
        None, description="Model for requests that name none; unset takes the first with masks, else the first."
    )
    device: str = Field(
        "auto", description="Where models run: auto, cpu, cuda or cuda:N; auto takes CUDA where there is one."
    )
    precision: Precision = Field(
        "auto",
        description="Number format of the network: auto, float32, tf32 (CUDA only), float16, bfloat16 or int8 (CPU "
        "only, quantised models only); auto is float16 on CUDA, except with the engine eager, and on the CPU int8 for "
        "a quantised model, else float32.",
    )
    engine: Engine = Field(
        "auto",
        description="What runs the network: auto, eager (PyTorch as it is), compiled (torch.compile), graphs (CUDA "
        "graphs, by name only) or openvino (for the CPU); auto takes the fastest of the others.",
    )
    jpeg_decoder: Literal["cpu", "cuda"] = Field(
        "cpu",
        description="What decodes baseline JPEGs: cpu, or cuda (nvJPEG, only where models run on CUDA). The CPU "
        "decodes all other images.",
    )
    engine_cache_dir: Path | None = Field(
        None,
        description="Folder where engines keep what they compiled, for the next start; unset takes .cache/roiserve in "
        "the user's home.",
    )

    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Number of processes that run models; unset takes one per GPU, or one per NUMA node on the CPU. 0 "
        "runs them in the process that serves HTTP, for debugging.",
    )
    bind_workers: Binding = Field(
        "node",
        description="What workers on the CPU are bound to if there are several: node, the cores of a NUMA node; cores, "
        "their own part of the cores, for machines that do nothing else; or off.",
    )
    probe_timeout_seconds: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="How long a worker may show no sign of progress before it is replaced, in seconds; must exceed "
        "the time of the slowest batch.",
    )

    max_batch_size: int = Field(8, ge=1, le=1024, description="Maximum number of images in a batch.")
    max_batch_pixels: int = Field(
        8 * 1344 * 1344,
        ge=1,
        description="Maximum number of pixels in a batch, after resizing and padding; a larger image runs alone. "
        "Lower it if the device runs out of memory.",
    )
    max_batch_wait_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="How long a free device waits for a batch to fill, in milliseconds; 0 never holds a request back.",
    )
    batch_policy: BatchPolicy = Field(
        "exact",
        description="Which images may share a batch. exact: those of the same size, padded to multiples of 32. "
        "bucketed: those that are padded to the same one of a few sizes. With both no answer depends on the others. "
        "padded: all, padded to the largest, as long as at least half of the batch is image and not padding.",
    )
    bucket_sizes: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="With the policy bucketed: the sizes to pad to, as WIDTHxHEIGHT in pixels of the resized picture, "
        "with commas between; they are rounded up to multiples of 32. Unset derives them from each model's min_size "
        "and max_size.",
    )
    max_queue_size: int = Field(
        64,
        ge=1,
        le=100_000,
        description="Maximum number of images waiting for the device; further requests are refused with 429.",
    )
    max_queue_pixels: int = Field(
        64 * 1344 * 1344,
        ge=1,
        description="Maximum number of pixels waiting for the device, after resizing and padding; further requests "
        "are refused with 429.",
    )

    allow_roi_op_override: bool = Field(
        False,
        description="Whether a request may choose another RoI operator than its model's, for comparison: true or "
        "false.",
    )

    request_timeout_ms: int = Field(
        30_000,
        ge=1,
        le=3_600_000,
        description="Time limit of a request, in milliseconds; a caller may ask for less.",
    )
    body_timeout_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Time limit for a request's body to arrive, in seconds; slower callers are cut off.",
    )
    max_body_bytes: int = Field(
        32 * 1024 * 1024,
        ge=1,
        description="Maximum size of a request body, in bytes; a larger one is refused with 413.",
    )
    max_held_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1,
        description="Maximum size of all request bodies held at one time, in bytes; further requests are refused with "
        "429.",
    )
    max_held_pixels: int = Field(
        200_000_000,
        ge=1,
        description="Maximum number of decoded pixels that a worker holds, at 3 bytes each; decoding takes several "
        "times that for a moment. Further images wait before they are decoded.",
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        description="Maximum size of an image, in pixels, as its header states it; a larger one is refused with 413.",
    )
    max_answer_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1,
        description="Largest JSON of what was found, in bytes, for all images of a request together; more is refused "
        "with 422 before it is encoded, or when that much has been.",
    )
    decode_threads: int = Field(
        default_factory=lambda: min(8, available_cores()),
        ge=1,
        le=256,
        description="Threads that decode images, and as many that encode masks, in each worker; unset takes one per "
        "core of the worker's share, at most 8.",
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Keys that may call /v1, separated by commas. With neither this nor api_keys_file, everyone may. "
        "Best set as a variable, since other users of the machine can see flags.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="File with further keys that may call /v1, one a line, such as a mounted secret; read again on "
        "SIGHUP.",
    )
    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Keys that may load and unload models and call the rest of /v1, separated by commas. With neither "
        "this nor admin_keys_file, nobody may load or unload. They do not close /v1 to others; api_keys does.",
    )
    admin_keys_file: Path | None = Field(
        None, description="File with further administrators' keys, one a line; read again on SIGHUP."
    )
    max_images_per_minute: float | None = Field(
        None, gt=0, description="Most images that each API key may send in a minute; more get a 429. Unset: no limit."
    )
    max_pixels_per_minute: float | None = Field(
        None,
        gt=0,
        description="Most pixels, as sent, that the images of each API key may have in a minute; more get a 429. "
        "Unset: no limit.",
    )

    label_studio_url: str | None = Field(
        None,
        description="The Label Studio whose tasks name images by address, such as http://label-studio:8080: only from "
        "there does the server fetch any. Unset, none.",
    )
    label_studio_api_key: SecretStr | None = Field(
        None,
        description="A user's access token for that Label Studio, from the page Account & Settings. Best set as a "
        "variable, since other users of the machine can see flags.",
    )

    drain_delay_seconds: float = Field(
        0.0,
        ge=0,
        le=600,
        description="How long to go on serving after SIGTERM while /readyz already says no, in seconds, so that load "
        "balancers notice.",
    )
    drain_timeout_seconds: float = Field(
        30.0, ge=0, le=3600, description="How long accepted requests may take to finish after that, in seconds."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Where spans of requests and batches go, by OTLP over HTTP, such as "
        "http://collector:4318/v1/traces; unset records none. Needs the extra otel.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of the log lines: text or json.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum severity to log: debug, info, warning or error."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments over the environment, in which Kubernetes' service links are not settings of ours."""
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {
            name: value for name, value in env_settings.env_vars.items() if not is_service_link(name, value or "")
        }
        from_vertex = {
            ours: env_settings.env_vars[theirs]
            for ours, theirs in _VERTEX_VARIABLES.items()
            if theirs in env_settings.env_vars
        }
        env_settings.env_vars = {**env_settings.env_vars, **from_vertex}
        return init_settings, env_settings

    @field_validator("models", "cors_origins", "forwarded_allow_ips", "bucket_sizes", mode="before")
    @classmethod
    def _split_at_commas(cls, value: str | Sequence[str]) -> Sequence[str]:
        return split_at_commas(value) if isinstance(value, str) else value

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: str | Sequence[str]) -> Sequence[str]:
        """A variable that is set but holds no key is a mistake, which must not open the service to everyone."""
        if not isinstance(value, str):
            return value
        keys = split_at_commas(value)
        if not keys:
            raise PydanticCustomError("keys", "expected at least one key, got none; unset it if no key is wanted")
        for key in keys:
            check_key(key)
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"\*|https?://[A-Za-z0-9.-]+(:[0-9]+)?|https?://\[[0-9a-f:]+\](:[0-9]+)?", origin):
                raise PydanticCustomError(
                    "origin", "expected origins such as https://app.example.com, without a path, or *"
                )
        return value

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            try:
                if address != "*":
                    ipaddress.ip_network(address)
            except ValueError:
                raise PydanticCustomError("address", "expected IP addresses or networks, or *") from None
        return value

    @field_validator("bucket_sizes")
    @classmethod
    def _check_bucket_sizes(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and info.data.get("batch_policy") != "bucketed":
            raise PydanticCustomError("size", "expected none unless batch_policy is bucketed")
        for size in value:
            if not re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", size):
                raise PydanticCustomError("size", "expected sizes such as 1344x800, width before height, in pixels")
        return value

    @field_validator("label_studio_url")
    @classmethod
    def _check_label_studio_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*/?", value
        ):
            raise PydanticCustomError(
                "address", "expected an address such as http://label-studio:8080, without a user, a password or a query"
            )
        return value

    @field_validator("admin_port")
    @classmethod
    def _check_admin_port(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value == info.data.get("port"):
            raise PydanticCustomError("admin_port", "expected another port than that of the API")
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
            raise PydanticCustomError("device", "expected auto, cpu, cuda or cuda:N")
        return value

    @property
    def buckets(self) -> tuple[tuple[int, int], ...] | None:
        """(height, width) of `bucket_sizes`; None unless the policy is `bucketed`."""
        if self.batch_policy != "bucketed":
            return None
        sizes = [size.split("x") for size in self.bucket_sizes]
        return tuple((int(height), int(width)) for width, height in sizes)

    def without_keys(self) -> Settings:
        """The same settings for a process that has no use for secrets."""
        secrets = {"api_keys": (), "api_keys_file": None, "admin_keys": (), "admin_keys_file": None}
        return self.model_copy(update=secrets | {"label_studio_api_key": None})


def split_at_commas(text: str) -> tuple[str, ...]:
    """The parts between commas, without the blanks around them; empty parts are left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_key(key: str) -> None:
    """Refuse an API key that no request could carry; the message does not repeat it.

    Raises:
        ValueError: the key is not UTF-8, or has control characters, which no HTTP header may hold.
    """
    if any("\ud800" <= character <= "\udfff" for character in key):
        raise PydanticCustomError("keys", "expected keys in UTF-8, got other bytes")
    if any(ord(character) < 32 or ord(character) == 127 for character in key):
        raise PydanticCustomError("keys", "expected keys without control characters, which no header may hold")


def environment_variable(name: str) -> str:
    """The variable that sets the field of this name."""
    return f"{ENV_PREFIX}{name.upper()}"


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set this variable to say where a Service is, rather than an operator to set something."""
    name = name.upper()
    return bool(_SERVICE_LINK_NAME.fullmatch(name)) or (
        name.endswith("_PORT") and bool(_SERVICE_LINK_VALUE.fullmatch(value))
    )


def service_links(environment: Mapping[str, str]) -> list[str]:
    """The variables with our prefix that Kubernetes set, by name."""
    return [name for name, value in sorted(environment.items()) if _is_ours(name) and is_service_link(name, value)]


def unknown_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """The variables with our prefix that set nothing, by name, each with the one that was probably meant."""
    known = {environment_variable(name) for name in Settings.model_fields}
    for name, value in sorted(environment.items()):
        if _is_ours(name) and name.upper() not in known | OTHER_VARIABLES and not is_service_link(name, value):
            yield name, next(iter(difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)), None)


def _is_ours(name: str) -> bool:
    return name.upper().startswith(ENV_PREFIX)
