"""Images as a client sends them, and services that are asked over real HTTP."""

from __future__ import annotations

import base64
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import create_engine

from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.app import create_app
from psa_vlm.serving.audit import Audit
from psa_vlm.serving.in_process import InProcess
from psa_vlm.serving.service import Model, Service

from ..files import encode


def encoded(colour: str = "red", size: tuple[int, int] = (32, 32), frames: int = 1) -> bytes:
    """A PNG of one colour, or a GIF of several frames."""
    first = Image.new("RGB", size, colour)
    if frames == 1:
        return encode(first)
    rest = [Image.new("RGB", size, (0, 0, 9 * i)) for i in range(1, frames)]
    return encode(first, "GIF", save_all=True, append_images=rest)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image(url: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


CHAT = "/v1/chat/completions"


def chat(*urls: str, text: str = "What is this?", **changes: Any) -> dict[str, Any]:
    """The body of a request to `CHAT` about images."""
    content = [*map(image, urls), {"type": "text", "text": text}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return body | changes


@pytest.fixture(scope="session")
def make_url() -> Any:
    """Makes the data URL of an image: colour, size, frames."""
    return lambda *args, **named: data_url(encoded(*args, **named))


@pytest.fixture()
def audit(tmp_path: Path) -> Iterator[Audit]:
    log = Audit(f"sqlite:///{tmp_path / 'audit.db'}")
    yield log
    log.close()


MakeService = Callable[..., Service]


@pytest.fixture()
def make_service(model: PsaVlm, audit: Audit) -> MakeService:
    """Makes a service of a policy, and of what else it takes; the tiny model is its engine."""

    def make(policy: Policy, engine: Any = None, **parts: Any) -> Service:
        engine = engine or InProcess(model, wait=0)
        return Service(engine, Model("tiny", "f" * 16), policy, audit, **parts)

    return make


def client_of(service: Service, **options: Any) -> TestClient:
    return TestClient(create_app(service), "http://localhost", **options)


@pytest.fixture()
def live() -> Iterator[Callable[[Any], str]]:
    """Serves an ASGI app at a port of its own, and gives its address."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(_served(app))


@contextmanager
def _served(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield "http://127.0.0.1:{1}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served_by_command(*told: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`psa-vlm serve` in a process of its own, and its address."""
    program = "from psa_vlm.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", *map(str, told), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        lines = (re.search(r"http://[\d.:]+", line) for line in server.stderr)
        yield server, next(found[0] for found in lines if found)
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.fixture()
def breaks_after(model: PsaVlm) -> Iterator[Callable[[int, str], None]]:
    """Lets the language model fail, with a reason, at its first step after so many."""
    hooks = []

    def set_to(steps: int, reason: str) -> None:
        left = iter(range(steps + 1))

        def fail(*_: Any) -> None:
            if next(left, None) is None:
                raise RuntimeError(reason)

        hooks.append(model.backbone.model.get_decoder().register_forward_pre_hook(fail))

    yield set_to
    for hook in hooks:
        hook.remove()


def _postgres_programs() -> Path | None:
    """Where the programs of a PostgreSQL server are, if anywhere."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((one for one in folders if (one / "initdb").is_file()), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, which listens at a socket alone."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (looked for pg_ctl and initdb)")
    folder = Path(tempfile.mkdtemp(prefix="psa-"))  # short: a socket's path is limited
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # which the server refuses to run as
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def run(program: str, *told: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *told]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)

    run("initdb", "-U", "psa", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-locale")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-l", str(folder / "log"), "-w", "-o", options, "start")
    yield f"postgresql://psa@/postgres?host={folder}"
    run("pg_ctl", "-m", "immediate", "-w", "stop")
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, of one kind and of the other."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'audit.db'}"
        return
    url = request.getfixturevalue("postgres")
    yield url
    execute(url, "DROP TABLE IF EXISTS records")


def execute(url: str, statement: str) -> None:
    """Change a database behind an audit log's back."""
    if url.startswith("postgresql:"):
        url = url.replace("postgresql:", "postgresql+psycopg:", 1)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()
