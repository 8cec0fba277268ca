"""What fleet and engine files may say, section by section. docs/fleet.md explains every key.

``config_files`` reads them. Bounds stand beside the types, so that the JSON Schema has them.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from concertmaster.core.fleet import Readiness
from concertmaster.engines.control import ControlKind
from concertmaster.engines.dialects import EngineKind
from concertmaster.engines.faults import Faults
from concertmaster.observe.logs import LogForm
from concertmaster.physics.hardware import GPUS
from concertmaster.physics.models import MODELS

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Above0 = Annotated[float, Meta(gt=0)]
AtLeast0 = Annotated[float, Meta(ge=0)]
Ratio = Annotated[float, Meta(gt=0, le=1)]
ModelId = Annotated[str, Meta(extra_json_schema={"enum": list(MODELS)})]
Gpu = Annotated[str, Meta(extra_json_schema={"enum": list(GPUS)})]


class ClusterSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[clusters]]``: a site and its distance from the caller."""

    name: str
    network_ms: AtLeast0 = 0.0


class NodeSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[nodes]]``: a machine with GPUs of one kind."""

    name: str
    gpu: Gpu
    gpus: Count
    cluster: str | None = None
    host_gb: AtLeast0 = 0.0
    memory_ratio: Ratio = 0.9


Serves = Literal["chat", "embeddings", "both"]
"""Calls that engines take: chats and completions, embeddings, or all of them."""


class PoolSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[pools]]``: interchangeable replicas of one model on one kind of GPU."""

    name: str
    model: ModelId
    gpu: Gpu
    served_name: str = ""
    replicas: Count | None = None
    engine: EngineKind | None = None
    control: ControlKind | None = None
    api_key_env: str = ""
    serves: Serves = "chat"
    command: list[str] = msgspec.field(default_factory=list)
    endpoints: list[str] = msgspec.field(default_factory=list)
    nodes: list[str] = msgspec.field(default_factory=list)
    tensor_parallel: Count = 1
    cluster: str | None = None
    state: Readiness = Readiness.RUNNING
    stopped: Readiness | None = None
    least_replicas: Natural | None = None
    memory_ratio: Ratio = 0.9
    kv_blocks: Count | None = None
    block_tokens: Count = 16
    max_batch_tokens: Count = 2048
    max_sequences: Count = 256
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True

    @property
    def count(self) -> int:
        """Replicas in the pool: as said, else one a node or an endpoint, else one."""
        if self.replicas is not None:
            return self.replicas
        return len(self.nodes) or max(1, len(self.endpoints))

    @property
    def runs(self) -> bool:
        """Whether its replicas run at the start."""
        return self.state is Readiness.RUNNING

    @property
    def least(self) -> int:
        """Replicas that scaling leaves it with: as said, else one if it runs at the start."""
        return self.least_replicas if self.least_replicas is not None else int(self.runs)

    @property
    def controlled_by(self) -> ControlKind:
        """How its engines load and unload: as said, else as processes if it has a command."""
        return self.control or ("process" if self.command else "vllm")

    @property
    def speaks(self) -> EngineKind:
        """What its engines are: as said, else what they are controlled as, else vLLM."""
        controlled: EngineKind = "vllm"
        match self.control:
            case "llama.cpp" | "ollama":
                controlled = self.control
            case _:
                pass
        return self.engine or controlled

    @property
    def stopped_state(self) -> Readiness:
        """Where weights lie once stopped: as said, else where they lie at the start.

        If they run at the start: in RAM with vLLM that is served, else on disk.
        """
        if self.stopped or not self.runs:
            return self.stopped or self.state
        sleeps = self.controlled_by == "vllm" and bool(self.endpoints)
        return Readiness.SLEEPING if sleeps else Readiness.DISK


class GatewaySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[gateway]``: where ``concertmaster serve`` listens and how it decides."""

    host: str = "127.0.0.1"
    port: Port = 8000
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    policy: str = "least-tokens+las"
    models: str = "default"
    forecast_budget_ms: Above0 = 20.0
    feedback: str = ""
    redact_labels: bool = True
    seed: int = 0
    window_s: AtLeast0 | None = None
    max_body_mb: Above0 = 20.0
    connect_timeout_s: Above0 = 5.0
    first_byte_timeout_s: Above0 = 600.0
    chunk_timeout_s: Above0 = 120.0
    total_timeout_s: Above0 = 3600.0
    retry_ratio: AtLeast0 = 0.2
    breaker_failures: Annotated[int, Meta(ge=0)] = 5
    breaker_error_ratio: Ratio = 0.5
    breaker_pause_s: Above0 = 1.0
    most_open: Annotated[int, Meta(ge=1)] = 10_000
    most_lag_ms: Above0 = 2000.0
    most_connections: Annotated[int, Meta(ge=1)] = 1024
    health_interval_s: Above0 = 2.0
    hold_s: Above0 = 600.0
    head_timeout_s: Above0 = 10.0
    body_timeout_s: Above0 = 60.0
    keys: str = ""
    admin: str = ""
    admin_key_env: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    receipts: str = ""
    receipts_kept: Annotated[int, Meta(ge=1)] = 100_000
    otel_url: str = ""
    log: LogForm = "text"
    log_calls: bool = False


class EmulatorSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[emulator]``: emulated engines started by ``concertmaster demo``."""

    speedup: Above0 = 1.0


class ScalingSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[scaling]``: what no scaling policy may exceed."""

    gpus: Count | None = None
    most_changes: Count = 8
    cooldown_s: AtLeast0 = 30.0


class FleetFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole fleet file."""

    pools: list[PoolSection]
    name: str | None = None
    clusters: list[ClusterSection] = msgspec.field(default_factory=list)
    nodes: list[NodeSection] = msgspec.field(default_factory=list)
    gateway: GatewaySection = GatewaySection()
    emulator: EmulatorSection = EmulatorSection()
    scaling: ScalingSection = ScalingSection()


class EngineFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One emulated engine, as ``concertmaster engine`` starts it."""

    model: ModelId
    gpu: Gpu
    host: str = "127.0.0.1"
    port: Port = 8100
    tensor_parallel: Count = 1
    speedup: Above0 = 1.0
    seed: int = 0
    memory_ratio: Ratio = 0.9
    kv_blocks: Count | None = None
    block_tokens: Count = 16
    max_batch_tokens: Count = 2048
    max_sequences: Count = 256
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True
    faults: Faults = Faults()
