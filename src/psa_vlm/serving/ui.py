"""The page at /ui: a workbench for whoever runs the service.

The page is a client like any other: its requests go the way of all, under the same limits, and are
on record before they are answered. But it may override what was seen and pick another policy, which
is for the operator alone. So it is there only where no keys are needed, on a loopback.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from psa_vlm.errors import PolicyError, RequestError
from psa_vlm.policy.files import shipped_names
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.protocol import ChatRequest, Text
from psa_vlm.serving.service import Caller, Service

FILES = {"/ui": "page.html", "/ui/page.css": "page.css", "/ui/page.js": "page.js"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing is loaded from elsewhere, no text becomes code, and no other page may frame this one."""
WITH_KEYS = (
    "This service asks for keys, so it has no page: the page may override verdicts and pick another"
    " policy, which no tenant may.\nOn the machine itself, serve the run without --keys on another"
    " port, and open /ui there.\n"
)


class PageRequest(ChatRequest):
    """Body of `POST /ui/chat`: a chat, and what only the operator may change."""

    policy: Text | None = None
    concepts: dict[Text, Text] | None = None


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page's routes, or with keys in force one that says why it is not there."""
    if service.keys is not None:

        @app.get("/ui", include_in_schema=False)
        async def refused() -> Response:
            return PlainTextResponse(WITH_KEYS, 403)

        return

    shipped = _shipped(service)

    for path, name in FILES.items():
        app.add_api_route(path, _file(name), include_in_schema=False)

    @app.get("/ui/facts", include_in_schema=False)
    async def facts() -> dict[str, Any]:
        """The words of the verdicts, the policies that may be picked, and what was calibrated."""
        taxonomy, calibration = service.engine.taxonomy, service.engine.calibration
        promised = {"miss_rate", "false_refusal", "confidence", "valid_until"}
        return {
            "model": service.model.name,
            "types": {name: taxonomy.label(name) for name in taxonomy.types},
            "levels": taxonomy.levels,
            "policies": list(_policies(service, shipped)),
            "calibration": calibration and calibration.model_dump(mode="json", include=promised),
        }

    @app.post("/ui/chat", include_in_schema=False)
    async def chat(body: PageRequest) -> Response:
        """A chat under any of the policies, with any concepts overridden."""
        policies = _policies(service, shipped)
        policy = service.policies.of(None) if body.policy is None else policies.get(body.policy)
        if policy is None:
            told = f"there is no policy '{body.policy}' here any more; load the page again"
            raise RequestError(told, "policy", "policy_not_found", 404)
        return await service.chat(body, Caller(None, policy), body.concepts, explains=True)


def _file(name: str) -> Callable[[], Response]:
    text = (resources.files("psa_vlm.serving") / "page" / name).read_text("utf-8")
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript"}[name.split(".")[1]]
    return lambda: Response(text, headers=HEADERS, media_type=kind)


def _shipped(service: Service) -> list[Policy]:
    """The shipped policies that fit the engine's taxonomy."""
    found = []
    for name in shipped_names():
        policy = Policy.shipped(name)
        try:
            policy.check(service.engine.taxonomy)
        except PolicyError:
            continue
        found.append(policy)
    return found


def _policies(service: Service, shipped: list[Policy]) -> dict[str, Policy]:
    """What may be picked, by name: the served policy first, its tenants', and the shipped ones."""
    served = service.policies.of(None)
    tenants = (served.for_tenant(name) for name in served.tenants)
    found = {one.name: one for one in (served, *tenants)}
    for one in shipped:
        if one.name not in found:
            found[one.name] = one
        elif one != found[one.name]:
            found[f"{one.name} (shipped)"] = one
    return found
