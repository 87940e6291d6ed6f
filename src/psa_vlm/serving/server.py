"""From settings to a running server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from psa_vlm.errors import AuditError, ConfigError, MissingExtra
from psa_vlm.serving.keys import Keys, is_loopback
from psa_vlm.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from psa_vlm.evaluation.drift import DriftMonitor
    from psa_vlm.inference import PsaVlm
    from psa_vlm.policy.policy import Policy
    from psa_vlm.serving.audit import Audit
    from psa_vlm.serving.engine import Engine
    from psa_vlm.serving.remote import Remote
    from psa_vlm.serving.service import Service

UPSTREAM_KEY = "PSA_VLM_UPSTREAM_KEY"
"""Environment variable with the key that an upstream engine asks for."""


@dataclass(frozen=True)
class Settings:
    """What a server is started with.

    Attributes:
        model: the run folder.
        policy: a file or a shipped name; None means the run's own.
        host, port: where to listen.
        name: what clients call the model; None means the name of the run folder.
        keys: file of the tenants' keys; None asks for none.
        audit: file or database URL of the audit log.
        limits: changes, as in `("images=4",)`.
        base: where the base model is now, if it moved.
        upstream: URL of an engine that answers in place of this process; its key, if it asks for
            one, is in the environment, as `UPSTREAM_KEY` names it.
        upstream_model: what that engine calls the model; None means as clients do.
        remote: hosts that images may be fetched from, as in `("example.org",)`.
        risky_share: of the requests that come, for the drift monitor; None means as many as among
            the calibration samples.

    Raises:
        ConfigError: others than this machine could ask without a key, or the upstream is no URL.
    """

    model: Path
    policy: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    keys: Path | None = None
    audit: str = "audit.db"
    limits: tuple[str, ...] = ()
    base: Path | None = None
    upstream: str | None = None
    upstream_model: str | None = None
    remote: tuple[str, ...] = ()
    risky_share: float | None = None

    def __post_init__(self) -> None:
        if self.keys is None and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host}: others could ask without a key; make one with"
                " 'psa-vlm keys add keys.yaml TENANT' and give --keys keys.yaml"
            )
        if self.upstream is not None and not self.upstream.startswith(("http://", "https://")):
            raise ConfigError(
                f"upstream {self.upstream}: write the URL of its API, as in http://127.0.0.1:9000/v1"
            )


def build(settings: Settings) -> FastAPI:
    """Load everything and put it together; nothing listens yet.

    Raises:
        PsaVlmError: the run, the policy, a limit, the keys or the audit log can't be used.
        MissingExtra: an optional package is not installed.
    """
    try:
        from psa_vlm.serving.app import create_app
        from psa_vlm.serving.service import Model, Service
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "serve") from error
    from psa_vlm.inference import PsaVlm
    from psa_vlm.model.checkpoint import fingerprint
    from psa_vlm.policy.policy import Policy

    def policy() -> Policy:
        if settings.policy is None:
            return Policy.from_yaml(settings.model / "policy.yaml")
        return Policy.load(settings.policy)

    limits = Limits().changed(settings.limits)  # what is quick to check comes first
    keys = None if settings.keys is None else Keys.load(settings.keys)
    policy()
    vlm = PsaVlm.from_pretrained(settings.model, base=settings.base)
    model = Model(settings.name or settings.model.resolve().name, fingerprint(settings.model))
    engine = _engine(settings, vlm, model.name, limits)
    audit = _audit(settings.audit)
    remote, drift = _remote(settings, limits), _drift(settings, vlm)
    service = Service(engine, model, policy(), audit, keys, limits, policy, remote, drift)
    return create_app(service)


def _engine(settings: Settings, vlm: PsaVlm, name: str, limits: Limits) -> Engine:
    from psa_vlm.serving.in_process import InProcess

    local = InProcess(vlm, limits.batch, limits.wait_ms / 1000, limits.waiting)
    if settings.upstream is None:
        return local
    try:
        from psa_vlm.serving.upstream import Upstream
    except ImportError as error:
        raise MissingExtra(error.name or "openai", "serve") from error
    return Upstream(
        local,
        settings.upstream,
        settings.upstream_model or name,
        os.environ.get(UPSTREAM_KEY),
        limits.seconds,
        limits.waiting,
    )


def _remote(settings: Settings, limits: Limits) -> Remote | None:
    if not settings.remote:
        return None
    try:
        from psa_vlm.serving.remote import Remote
    except ImportError as error:
        raise MissingExtra(error.name or "httpx2", "serve") from error
    return Remote(settings.remote, limits)


def _drift(settings: Settings, vlm: PsaVlm) -> DriftMonitor | None:
    if vlm.calibration is None:
        return None
    from psa_vlm.evaluation.drift import DriftMonitor

    return DriftMonitor(vlm.calibration, settings.risky_share)


def serve(settings: Settings) -> None:
    """Serve until stopped; what was taken is finished first, within the limit on seconds.

    SIGHUP reads the policy anew. Errors are `build`'s.
    """
    app = build(settings)
    import uvicorn

    service: Service = app.state.service
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: service.policies.reload())
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        http="h11",  # it limits headers
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=service.limits.seconds,
    )


@contextmanager
def open_audit(log: str, existing: bool = False) -> Iterator[Audit]:
    """The audit log at a file or a database URL.

    Args:
        log: file or URL.
        existing: a file that is not there is an error, not a new log.

    Raises:
        AuditError: it can't be opened.
        MissingExtra: SQLAlchemy is not installed.
    """
    if existing and "://" not in log and not Path(log).is_file():
        raise AuditError(f"{log}: no such audit log")
    with closing(_audit(log)) as audit:
        yield audit


def _audit(log: str) -> Audit:
    try:
        from psa_vlm.serving.audit import Audit
    except ImportError as error:
        raise MissingExtra(error.name or "sqlalchemy", "serve") from error
    return Audit(log if "://" in log else f"sqlite:///{log}")
