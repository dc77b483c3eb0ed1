"""Every setting of the server, in one class. Each field is an environment variable `ROISERVE_<NAME>` and a flag of
`roiserve serve`; its description is the help of both. Built once by the entry point and passed down; no other module
reads the environment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.cores import available_cores

ENV_PREFIX = "ROISERVE_"


class Settings(BaseSettings):
    """What an operator may choose. Units stand in the names; out of range is refused when the settings are built."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", protected_namespaces=())

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all interfaces, as in a container.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")

    model_store: Path = Field(Path("model_store"), description="Folder that holds <name>/<version>/model.toml.")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Models to load, as name or name@version, separated by commas; empty loads the newest of each."
    )
    default_model: str | None = Field(
        None, description="Model for requests that name none; unset takes the first with masks, else the first."
    )
    device: str = Field(
        "auto", description="Where models run: auto, cpu, cuda or cuda:N; auto takes CUDA where there is one."
    )
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Number format of the network: auto, float32, float16 or bfloat16; auto is float16 on CUDA, except "
        "with the engine eager, and float32 on the CPU.",
    )
    engine: Literal["auto", "eager", "compiled", "openvino"] = Field(
        "auto",
        description="What runs the network: auto, eager (PyTorch as it is), compiled (torch.compile) or openvino (for "
        "the CPU); auto takes the fastest there is.",
    )
    engine_cache_dir: Path | None = Field(
        None,
        description="Folder where an engine keeps what it compiled, for the next start; unset takes .cache/roiserve in "
        "the user's home.",
    )

    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Processes that run models; unset takes one a GPU, or one on the CPU. 0 runs them in the process "
        "that serves HTTP, for debugging.",
    )
    probe_timeout_seconds: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="How long a worker may give no sign of progress, in seconds, before it is replaced; above the time "
        "of the slowest batch.",
    )

    max_batch_size: int = Field(8, ge=1, le=1024, description="Most images that share a batch.")
    max_batch_pixels: int = Field(
        8 * 1344 * 1344,
        ge=1,
        description="Most pixels that share a batch, after resizing and padding; an image above it runs alone. "
        "Lower it when the device runs out of memory.",
    )
    max_batch_wait_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="How long a free device waits for a batch to fill, in milliseconds; 0 never holds a request back.",
    )
    batch_policy: Literal["exact", "padded"] = Field(
        "exact",
        description="Which images may share a batch: exact, those of one padded size, so that no answer depends on it; "
        "padded, all, padded to the largest as long as half of the batch is pixels of theirs.",
    )
    max_queue_size: int = Field(
        64, ge=1, le=100_000, description="Most images waiting for the device; one more is refused with 429."
    )
    max_queue_pixels: int = Field(
        64 * 1344 * 1344,
        ge=1,
        description="Most pixels waiting for the device, after resizing and padding; more are refused with 429.",
    )

    allow_roi_op_override: bool = Field(
        False,
        description="Whether a request may name another RoI operator than its model's (true or false), for comparison.",
    )

    request_timeout_ms: int = Field(
        30_000,
        ge=1,
        le=3_600_000,
        description="Longest time for one request, in milliseconds; callers may ask for less.",
    )
    body_timeout_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Longest time for a request's body to arrive, in seconds; slower callers are cut off.",
    )
    max_body_bytes: int = Field(
        32 * 1024 * 1024, ge=1, description="Largest request body, in bytes; more is refused with 413."
    )
    max_held_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1,
        description="Most bytes of request bodies held at a time, all requests together; more is refused with 429.",
    )
    max_held_pixels: int = Field(
        200_000_000,
        ge=1,
        description="Most pixels of decoded images that a worker holds at a time, 3 bytes each, and several times "
        "that while some are decoded; who comes then waits.",
    )
    max_image_pixels: int = Field(
        50_000_000, ge=1, description="Largest image, in pixels, known from its header; more is refused with 413."
    )
    decode_threads: int = Field(
        default_factory=lambda: min(8, available_cores()),
        ge=1,
        le=256,
        description="Threads that decode images, and as many that encode masks; unset takes one per core that the "
        "process may use, at most 8.",
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Keys that may call /v1, separated by commas; without any everyone may. Best set as a variable.",
    )
    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Further keys that may call /v1, separated by commas. Best set as a variable."
    )

    drain_delay_seconds: float = Field(
        0.0,
        ge=0,
        le=600,
        description="After SIGTERM, how long to serve on while /readyz says no, in seconds: load balancers notice.",
    )
    drain_timeout_seconds: float = Field(
        30.0, ge=0, le=3600, description="After that, how long accepted requests may take to finish, in seconds."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of the log lines: text or json.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged: debug, info, warning or error."
    )

    @field_validator("models", "api_keys", "admin_keys", mode="before")
    @classmethod
    def _split_at_commas(cls, value: str | Sequence[str]) -> Sequence[str]:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
            raise PydanticCustomError("device", "expected auto, cpu, cuda or cuda:N")
        return value


def environment_variable(name: str) -> str:
    """The variable that sets the field of this name."""
    return f"{ENV_PREFIX}{name.upper()}"
