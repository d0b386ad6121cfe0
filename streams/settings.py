"""Every setting of the service: one class, read once at the edge; all else receives plain values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from proto.errors import BadUsage

PREFIX = "CHURN_"
NESTING = "__"
CONFIG_VARIABLE = "CHURN_CONFIG"
DEFAULT_FILE = Path("churnstream.toml")

# Settings whose environment variable is the one every other tool uses, without our prefix.
COMMON_VARIABLES = {"kafka_bootstrap_servers": "KAFKA_BOOTSTRAP_SERVERS", "redis_url": "REDIS_URL", "log_level": "LOG_LEVEL"}

# Kafka client settings that are secrets: masked when shown, and readable from a file (CHURN_KAFKA__SASL_PASSWORD_FILE).
KAFKA_SECRETS = (
    "sasl.password",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.assertion.private.key.passphrase",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
)


def _kafka_spelling(values: Mapping[Any, Any]) -> dict[str, str]:
    return {str(k).lower().replace("_", "."): str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items()}


def _rates_spelling(values: Mapping[Any, Any]) -> dict[str, str]:
    # str() of the value: a TOML float would bring its binary neighbours along.
    return {str(k).upper(): str(v) for k, v in values.items()}


_SPELLING = {"kafka": _kafka_spelling, "rates": _rates_spelling}


def _common(name: str) -> AliasChoices:
    return AliasChoices(COMMON_VARIABLES[name], name)


class Settings(BaseSettings):
    """What an operator or the business may decide. Order: flag > environment > file > default.

    Environment names are the upper-case field names with the prefix CHURN_ (nesting by `__`), except KAFKA_BOOTSTRAP_SERVERS, REDIS_URL
    and LOG_LEVEL. The file is TOML: `--config FILE`, else CHURN_CONFIG, else ./churnstream.toml when it exists. Secrets can also be given
    as NAME_FILE, the path of a file that holds the value. An unknown CHURN_ name is an error.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTING, extra="forbid", frozen=True, populate_by_name=True, validate_default=True
    )

    # Where things are
    data_dir: Path = Field(
        Path(".churnstream"), description="Directory of everything kept on this machine: embedded servers, compiled kernels."
    )
    kafka_bootstrap_servers: str = Field(
        "",
        validation_alias=_common("kafka_bootstrap_servers"),
        description="host:port list of Kafka; empty = the embedded broker of `stack up`.",
    )
    redis_url: SecretStr = Field(
        SecretStr(""),
        validation_alias=_common("redis_url"),
        description="redis://, rediss:// or unix:// address, or redis+cluster://HOST:PORT,HOST:PORT of a Redis Cluster "
        "(rediss+cluster:// with TLS); empty = the embedded server of `stack up`.",
    )
    redis_oldest_version: str = Field(
        "",
        pattern=r"^(\d+(\.\d+)*)?$",
        description="Oldest redis-server accepted, e.g. 7.0.15 where the distribution has patched it; empty = the first of each series "
        "without the holes in its Lua engine (7.2.11, 7.4.6, 8.0.4, 8.2.2).",
    )
    kafka: dict[str, str] = Field(
        default_factory=dict,
        description="Further Kafka client settings (TLS, SASL, ...), passed through; `_` stands for `.`: CHURN_KAFKA__SECURITY_PROTOCOL.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias=_common("log_level"), description="Least severe log line that is written."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="TCP port of Prometheus metrics and health on each worker; 0 = off.")

    # Names
    namespace: str = Field("churn", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="First part of every Redis key of this deployment.")
    topic_prefix: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="Put before every topic name, e.g. `eu.`.")
    group_id: str = Field(
        "churnstream",
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="Consumer group of the scoring workers; the topic prefix goes before it.",
    )

    # Topics
    partitions: int = Field(4, ge=1, le=4096, description="Partitions of every input and output topic (count); never changed in place.")
    replication: int = Field(1, ge=1, le=9, description="Copies of each partition (count); 3 on a real cluster.")
    retention_days: int = Field(
        400, ge=1, description="How long inputs and outputs are kept (days); shorter than the longest window is said."
    )

    # Events
    currency: str = Field("EUR", pattern=r"^[A-Z]{3}$", description="ISO 4217 code of the account currency; amounts are its minor units.")
    rates: dict[str, Decimal] = Field(
        default_factory=dict,
        description="Units of the account currency per unit of another one, e.g. CHURN_RATES__USD=0.92; others are only counted.",
    )
    future_allowance_ms: int = Field(300_000, ge=0, description="How far an event time may lie beyond the broker's append time (ms).")
    max_event_bytes: int = Field(
        1_000_000, ge=1_000, le=16_000_000, description="Largest event value accepted (bytes); larger = dead letter."
    )
    digest_key: SecretStr = Field(
        SecretStr("churnstream/digest/v1"),
        min_length=1,
        description="Key of the 64-bit text digests; changing it needs a rebuild of all state.",
    )

    # Worker
    delivery: Literal["at_least_once", "exactly_once"] = Field(
        "at_least_once",
        description="After a crash scores may come again, equal to the byte; or never: in transactions, for readers with read_committed.",
    )
    batch_max_events: int = Field(4_000, ge=1, le=100_000, description="Most events of one partition handled at once (count).")
    batch_linger_ms: int = Field(5, ge=0, le=10_000, description="How long a batch waits to fill when the stream is slow (ms).")
    buffer_bytes: int = Field(
        32 << 20,
        ge=1 << 20,
        description="Bound of the read-ahead of one (topic, partition) in memory (bytes); at half of it reading resumes.",
    )
    max_facts_in_memory: int = Field(
        20_000_000, ge=100_000, description="Bound of facts one worker keeps in memory (count, 80 bytes each)."
    )
    memory_limit_mb: int = Field(
        0,
        ge=0,
        description="A worker whose resident memory is above this stops gracefully and exits with 1, to be started afresh (MB); 0 = never.",
    )
    progress_timeout_s: float = Field(60.0, gt=0, description="A worker with lag and no applied batch for this long exits (s).")

    # Snapshots and rebuilding
    snapshot_dir: Path | None = Field(
        None, description="Directory that all workers share, for snapshots of the state; none = no snapshots, rebuilding needs all records."
    )
    snapshot_interval_s: float = Field(3_600.0, gt=0, description="How often a worker takes a snapshot of each of its partitions (s).")
    snapshot_keep: int = Field(3, ge=1, le=1_000, description="Snapshots of a partition that are kept (count).")
    rebuild_incomplete: bool = Field(
        False, description="Rebuild lost state from the records that are left, though older ones are deleted and no snapshot holds them."
    )

    dead_letter_limit: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of dead letters in a minute (of 1,000 records or more) above which a worker pauses; 1 = it never does.",
    )

    # Scores
    fallback_probability: float = Field(0.5, ge=0, le=1, description="Probability of a score made while no model is loaded.")
    alert_hysteresis: float = Field(
        0.02,
        ge=0,
        le=0.5,
        description="How far below a threshold the probability must fall before the lower band is alerted (probability).",
    )
    feature_log: bool = Field(False, description="Log the vector of every score on churn-features (0.5 kB each).")
    reasons_top: int = Field(3, ge=0, le=20, description="Reasons given with a score (count).")

    # Drift
    drift_pages: float = Field(1.0, gt=0, description="False pages allowed in 30 days, all drift detectors together (count).")
    drift_segment: Literal["segment", "plan", "region", "age_band"] = Field(
        "segment", description="Profile field by whose values drift is watched apart."
    )
    drift_grace_ms: int = Field(600_000, ge=0, description="How long a block of the drift watch stays open for late scores (ms).")
    drift_webhook_url: str = Field("", description="http(s) address that gets every drift verdict as a signed POST; empty = none.")
    drift_webhook_secret: SecretStr = Field(SecretStr(""), description="Key of the HMAC-SHA256 signature of drift webhooks.")

    # Embedded servers
    stack_kafka_port: int = Field(0, ge=0, le=65535, description="TCP port of the embedded Kafka on 127.0.0.1; 0 = a free one.")
    stack_redis_port: int = Field(0, ge=0, le=65535, description="TCP port of the embedded Redis on 127.0.0.1; 0 = a free one.")
    stack_timeout_s: float = Field(60.0, gt=0, description="How long the embedded servers may take to answer (s).")
    dependency_timeout_s: float = Field(10.0, gt=0, description="How long Kafka or Redis may take to answer before a command gives up (s).")

    @field_validator("kafka", mode="before")
    @classmethod
    def _kafka_names(cls, value: object) -> object:
        """librdkafka writes its names with dots, the environment cannot; numbers and booleans of a TOML file become text."""
        return _kafka_spelling(value) if isinstance(value, Mapping) else value

    @field_validator("rates", mode="before")
    @classmethod
    def _currency_codes(cls, value: object) -> object:
        return _rates_spelling(value) if isinstance(value, Mapping) else value

    @field_validator("rates")
    @classmethod
    def _positive_rates(cls, value: dict[str, Decimal]) -> dict[str, Decimal]:
        for code, rate in value.items():
            if not (len(code) == 3 and code.isascii() and code.isalpha()) or not rate.is_finite() or rate <= 0:
                raise ValueError(f"rate {code} = {rate}: needs a three-letter currency code and a positive number")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` collected: a Settings made in a test must not depend on the machine's environment."""
        return (init_settings,)

    def prefixed(self, topic: str) -> str:
        """The name of `topic` in this deployment."""
        return self.topic_prefix + topic


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings with the origin of each value: "flag", "environment NAME", "file PATH" or "default"."""

    settings: Settings
    origins: dict[str, str]


@dataclass(slots=True)
class _CommandLine:
    """What the root command was given; set once before a command runs."""

    config: Path | None = None
    flags: dict[str, str] | None = None


_command_line = _CommandLine()


def use_command_line(config: Path | None, assignments: list[str]) -> None:
    """Remember `--config FILE` and `--set NAME=VALUE` for the `load` of the command that follows.

    Raises BadUsage when an assignment has no `=` or an unknown name.
    """
    flags: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise BadUsage(f"--set {assignment}: needs NAME=VALUE, e.g. --set partitions=8")
        _known(name.strip().lower().split(".")[0], f"--set {assignment}")
        flags[name.strip().lower()] = value
    _command_line.config, _command_line.flags = config, flags


def load(**flags: object) -> Settings:
    """The settings in force. `flags` are values a command got as its own options; None means not given.

    Raises BadUsage naming the setting, where it came from, and the nearest known name.
    """
    return load_with_origins(**flags).settings


def load_with_origins(**flags: object) -> Loaded:
    """As `load`, with where each value came from."""
    path = _file()
    layers: list[tuple[str, dict[str, Any]]] = [
        ("default", {}),
        (f"file {path}", _from_file(path) if path else {}),
        ("environment", _from_environment()),
        ("flag", _nest(_command_line.flags or {}) | {k: v for k, v in flags.items() if v is not None}),
    ]
    merged: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    for origin, values in layers:
        for name, value in values.items():
            before = merged.get(name)
            if name in ("kafka", "rates") and isinstance(value, dict):
                value = _SPELLING[name](value)  # noqa: PLW2901 - one spelling per key, else two layers would not meet
            merged[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
            origins[name] = f"environment {variable(name)}" if origin == "environment" else origin
    try:
        return Loaded(Settings(**merged), origins)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = _field_of(str(first["loc"][0])) if first["loc"] else "settings"
        where = ".".join(str(part) for part in (name, *first["loc"][1:]))
        message = f"setting {where} ({origins.get(name, 'unknown')}): {first['msg']}"
        raise BadUsage(f"{message}; `churnstream config show` lists all settings") from error


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return COMMON_VARIABLES.get(name, PREFIX + name.upper())


def is_secret(name: str) -> bool:
    """Whether the value of this field must not be shown."""
    return Settings.model_fields[name].annotation is SecretStr


def _known(name: str, where: str) -> None:
    if name not in Settings.model_fields:
        near = get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
        raise BadUsage(f"{where}: no such setting; " + (f"did you mean {near[0]}?" if near else "`churnstream config show` lists all"))


def _field_of(alias: str) -> str:
    return next((name for name, var in COMMON_VARIABLES.items() if alias == var), alias)


def _nest(flags: Mapping[str, str]) -> dict[str, Any]:
    """{"kafka.security.protocol": "SSL"} -> {"kafka": {"security.protocol": "SSL"}}."""
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        head, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
        else:
            nested[head] = value
    return nested


def _file() -> Path | None:
    if _command_line.config is not None:
        return _command_line.config
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadUsage(f"settings file {path}: not found; give --config FILE or unset {CONFIG_VARIABLE}")
    try:
        values: dict[str, Any] = TomlConfigSettingsSource(Settings, path).toml_data
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise BadUsage(f"settings file {path}: {error}") from error
    for name in values:
        _known(name, f"settings file {path}: {name}")
    return values


def _from_environment() -> dict[str, Any]:
    """Values of the environment, `*_FILE` secrets read. Raises BadUsage for a CHURN_ name that is no setting."""
    files: dict[str, Any] = {}
    for key, value in os.environ.items():
        upper = key.upper()
        if upper.endswith("_FILE") and (target := _secret_target(upper.removesuffix("_FILE"))):
            name, nested = target
            try:
                secret = Path(value).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise BadUsage(f"environment {key}: cannot read {value}: {error}") from error
            if nested:
                files.setdefault(name, {})[nested] = secret
            else:
                files[name] = secret
        elif upper.startswith(PREFIX) and upper != CONFIG_VARIABLE:
            name = upper.removeprefix(PREFIX).lower().split(NESTING)[0]
            if name in COMMON_VARIABLES:
                raise BadUsage(f"environment {key}: this setting is named {COMMON_VARIABLES[name]}")
            _known(name, f"environment {key}")
    try:
        plain = {_field_of(k): v for k, v in EnvSettingsSource(Settings)().items()}
    except ValueError as error:  # a dict setting that is not JSON
        raise BadUsage(f"environment: {error}") from error
    if isinstance(kafka := plain.get("kafka"), dict):
        plain["kafka"] = {
            k: v for k, v in kafka.items() if not (k.endswith("_file") and k.removesuffix("_file").replace("_", ".") in KAFKA_SECRETS)
        }
    for name, value in files.items():
        plain[name] = {**plain.get(name, {}), **value} if isinstance(value, dict) else value
    return plain


def _secret_target(upper: str) -> tuple[str, str] | None:
    """("redis_url", "") for REDIS_URL, ("kafka", "sasl_password") for CHURN_KAFKA__SASL_PASSWORD, None when not a secret."""
    for name in Settings.model_fields:
        if is_secret(name) and upper == variable(name):
            return name, ""
    head = f"{PREFIX}KAFKA{NESTING}"
    nested = upper.removeprefix(head).lower()
    return ("kafka", nested) if upper.startswith(head) and nested.replace("_", ".") in KAFKA_SECRETS else None
