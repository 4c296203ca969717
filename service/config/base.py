"""Types of setting values, with their bounds, and the base of all sections."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

OFF = "off"
KIB = 1024
MIB = 1024 * KIB


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` (``[::1]:80`` for IPv6). Raises :exc:`ValueError`."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("is not an address: write host:port, such as 127.0.0.1:4318")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(text: str) -> str:
    split_address(text)
    return text


def _address_or_off(text: str) -> str:
    return text if text == OFF else _address(text)


Address = Annotated[str, AfterValidator(_address)]
Listen = Annotated[str, AfterValidator(_address_or_off)]
Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Workers = Annotated[int, Field(ge=1, le=1000)]
Size = Annotated[int, Field(ge=KIB, le=1 << 40)]


class SettingsSection(BaseModel):
    """A table of ``config.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
