"""The service's engine alone: the same model in the same batches, and nothing else of psa-vlm.

    python benchmarks/plain_engine.py runs/demo/stage2

Answers OpenAI's chat completions, whole replies alone, to images as data URLs. There is no verdict,
no policy, no audit log and no limit: it is what `serving.py --plain` compares the service with.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from psa_vlm import Policy, PsaVlm, Turn
from psa_vlm.serving.engine import Ask
from psa_vlm.serving.in_process import InProcess


class Plain(PsaVlm):
    """The model without its bottleneck: images are encoded, and not assessed."""

    def _verdicts(self, requests: Sequence[Any], features: Any) -> list[Any]:
        return [None] * len(requests)


def picture(url: str) -> Image.Image:
    data = base64.b64decode(url.partition(",")[2])
    return Image.open(io.BytesIO(data)).convert("RGB")


def ask(body: dict[str, Any], policy: Policy) -> Ask:
    """A request as the engine takes it; the policy decides nothing."""
    turns, images = [], []
    for message in body["messages"]:
        parts = message["content"]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        turns.append(Turn(message["role"], text))
        images += map(picture, urls)
    return Ask(tuple(images), tuple(turns), policy, body["max_tokens"])


def create_app(run: Path) -> Starlette:
    engine = InProcess(Plain.from_pretrained(run))
    policy = Policy.default()

    async def chat(request: Request) -> JSONResponse:
        answer = await engine.answer(ask(await request.json(), policy))
        words = [part async for part in answer.parts if isinstance(part, str)]
        message = {"role": "assistant", "content": "".join(words)}
        return JSONResponse({"id": "plain", "choices": [{"index": 0, "message": message}]})

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        async with engine:
            yield

    routes = [Route("/v1/chat/completions", chat, methods=["POST"])]
    return Starlette(routes=routes, lifespan=running)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    options = parser.parse_args(argv)
    uvicorn.run(create_app(options.run), port=0, http="h11", ws="none")


if __name__ == "__main__":
    main()
