"""The models that the swarm serves: `GET /v1/models`, `GET /v1/models/{id}`, and finding one by its name."""

from __future__ import annotations

import time
from typing import Any

import orjson
from aiohttp import web

from shared.client.directory import ServedModel
from shared.errors import NoRoute
from web.openai.errors import model_not_found
from web.swarm import Swarm
from web.swarm_view import SwarmFeed

Json = dict[str, Any]


class Models:
    """The models of a swarm, by the names that clients use."""

    def __init__(self, swarm: Swarm, feed: SwarmFeed) -> None:
        self._directory = swarm.directory
        self._feed = feed
        self._started = int(time.time())

    def find(self, name: str) -> ServedModel:
        """By name or artefact. Raises ApiError for a model never heard of, NoRoute for one that went away."""
        try:
            return self._directory.find(name)
        except NoRoute:
            if self._feed.has_shown(name):
                raise
            raise model_not_found(name) from None

    def names(self) -> list[str]:
        return list(self._by_name())

    def _by_name(self) -> dict[str, ServedModel]:
        by_name: dict[str, ServedModel] = {}
        for model in [*self._directory.models(), *self._directory.adapted()]:
            by_name.setdefault(model.name, model)  # of several artefacts, the one that `find` gives
        return by_name

    async def get_list(self, request: web.Request) -> web.Response:
        models = [self._view(model) for model in self._by_name().values()]
        return web.json_response(body=orjson.dumps({"object": "list", "data": models}))

    async def get_one(self, request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(self._view(self.find(request.match_info["id"]))))

    def _view(self, model: ServedModel) -> Json:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "swarm",
            "swarm": {
                "artefact": model.artefact,
                "layers": model.layer_count,
                "covered": model.covered,
                "gaps": [[gap.start, gap.end] for gap in model.gaps],
                "peers": len(model.peers),
                "context_length": model.context_length,
            },
        }
