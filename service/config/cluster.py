"""Settings of the cluster: NATS JetStream, partitions and leases."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from betrace.service.config.base import MIB, Seconds, SettingsSection, split_address


class ClusterSettings(SettingsSection):
    """Several machines that share the work through NATS JetStream. Without this section, BeTrace
    runs as one process with a local log. Needs the extra `cluster`."""

    servers: str = "nats://127.0.0.1:4222"
    """The NATS servers' addresses as nats://host:port, separated by commas."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*$", max_length=64)] = (
        "betrace"
    )
    """Prefix of the names of streams, buckets and subjects. Clusters that share NATS servers need
    different prefixes."""
    node: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$", max_length=64)] = ""
    """This process's name, unique in the cluster; if empty, host name and process id."""
    partitions: Annotated[int, Field(ge=1, le=1024)] = 16
    """Number of partitions that spans are divided into. Used when the cluster is created; after
    that, this setting is ignored, and `betrace cluster resize` changes the number."""
    replicas: Annotated[int, Field(ge=1, le=5)] = 3
    """Servers that keep each message. A message is acknowledged once most of them have it."""
    partition_bytes: Annotated[int, Field(ge=0, le=1 << 50)] = 0
    """Size at which a partition's stream is full and refuses spans; 0 means the servers' limit."""
    lease_seconds: Seconds = 2
    """An evaluator that has not renewed its leases for this long loses its partitions."""
    heartbeat_seconds: Seconds = 0.5
    """How often a node shows that it is alive and renews its leases."""
    tick_seconds: Seconds = 0.5
    """A partition that has been quiet for this long gets a tick, so that its log time advances."""
    read_bytes: Annotated[int, Field(ge=MIB, le=1 << 30)] = 8 * MIB
    """Bytes that are read from a partition at once."""
    connect_seconds: Seconds = 30
    """How long the start waits for a NATS server."""
    monitoring_port: Annotated[int, Field(ge=0, le=65535)] = 8222
    """HTTP monitoring port of the NATS servers, which `betrace doctor` asks whether they sync every
    write; 0 if they have none."""
    user: str = ""
    """User name at the NATS servers, if they require one."""
    password: SecretStr = SecretStr("")
    """The user's password."""
    token: SecretStr = SecretStr("")
    """Token for the NATS servers, if they require one instead of a user."""
    tls_ca: str = ""
    """PEM file of the authority that signed the servers' certificates. Turns TLS on."""
    tls_certificate: str = ""
    """PEM file of the certificate that this process presents to the servers."""
    tls_key: str = ""
    """PEM file of the certificate's key."""

    @field_validator("servers")
    @classmethod
    def _servers(cls, text: str) -> str:
        urls = [each.strip() for each in text.split(",") if each.strip()]
        if not urls:
            raise ValueError("is empty: name at least one server, such as nats://127.0.0.1:4222")
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("nats", "tls") or parts.path or parts.username:
                raise ValueError(
                    f"has {url}: write nats://host:port; user and password are settings of their "
                    "own"
                )
            split_address(parts.netloc)
        return ",".join(urls)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heartbeat_seconds > self.lease_seconds / 2:
            raise ValueError(
                f"cluster.heartbeat_seconds ({self.heartbeat_seconds:g}) is more than half of "
                f"cluster.lease_seconds ({self.lease_seconds:g}); leases would expire between "
                "heartbeats: lower the first or raise the second"
            )
        if bool(self.tls_certificate) != bool(self.tls_key):
            given, missing = (
                ("certificate", "key") if self.tls_certificate else ("key", "certificate")
            )
            raise ValueError(
                f"cluster.tls_{given} is set but cluster.tls_{missing} is not; set both or neither"
            )
        if self.user and self.token.get_secret_value():
            raise ValueError("cluster.user and cluster.token exclude each other; set one of them")
        return self
