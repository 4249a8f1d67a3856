"""`rlm serve`: the endpoint, from the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

from rlm_runtime.cli import codes, models
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import LM


def run(args: argparse.Namespace) -> int:
    try:
        from rlm_runtime.serve.http.server import bind, log_to_stderr, serve, url_of
        from rlm_runtime.serve.http.settings import is_loopback
        from rlm_runtime.serve.rlm.app import create_app
        from rlm_runtime.serve.rlm.served import ServedModel
    except ModuleNotFoundError as error:
        raise UsageError(
            f'rlm serve needs the package {error.name}: in a checkout of this project, pip install ".[serve]".'
        ) from None

    keys = _keys(args)
    loopback = is_loopback(args.host)
    if not loopback and not keys and not args.allow_no_key:
        raise UsageError(
            f"--host {args.host} can be reached from other machines: give keys with --api-key-file, or say --allow-no-key."
        )
    settings = _settings(args, keys)
    options = models.run_options(args)
    budget, depth = options.pop("budget"), options.pop("max_depth")
    wanted = [_split(text) for text in args.model]
    if args.root or os.environ.get("RLM_ROOT") or not wanted:
        wanted.insert(0, (args.name, None, None))
    served: list[ServedModel] = []
    lms: list[LM] = []
    for name, root, sub in wanted:
        pair = models.pair(args) if root is None else models.named(args, root, sub)
        lms += pair
        served.append(ServedModel(name, *pair, max_depth=depth, budget=budget, options=options))
    if len({s.name for s in served}) < len(served):
        raise UsageError(
            "Two models have the same name; give another with --name or --model NAME=ROOT."
        )
    for model in served:
        model.check()  # what is wrong with the options shows now, not with the first request
    listener = bind(args.host, args.port)
    if settings.log_dir is not None:
        settings.log_dir.mkdir(parents=True, exist_ok=True)
    log_to_stderr()

    def on_ready() -> None:
        names = ", ".join(s.name for s in served)
        say(f"serving {names} at {url_of(listener)}" + ("" if keys else " (no key needed)"))
        if not keys and not loopback:
            say("warning: anyone who can reach this address can spend your tokens")

    async def main() -> None:
        try:
            await serve(create_app(served, settings), listener, on_ready=on_ready, say=say)
        finally:
            for lm in {id(m): m for m in lms}.values():
                await lm.aclose()

    asyncio.run(main())
    return codes.OK


def say(text: str) -> None:
    codes.complain(text)


def _settings(args: argparse.Namespace, keys: tuple[str, ...]) -> Any:
    from rlm_runtime.serve.http.settings import host_names
    from rlm_runtime.serve.rlm.settings import ServeSettings

    return ServeSettings(
        api_keys=keys,
        allowed_hosts=host_names(args.host, args.allowed_host, keys),
        cors_origins=tuple(args.cors_origin),
        max_runs=args.max_runs,
        max_queue=args.max_queue,
        drain_seconds=max(0.0, args.drain_seconds),
        body_bytes=max(1024, args.body_limit),
        file_bytes=args.file_limit,
        files_bytes=args.files_limit,
        file_seconds=args.file_days * 86_400,
        files_dir=Path(args.files_dir) if args.files_dir else None,
        progress=args.progress,
        log_dir=models.log_folder(args.log, default=False),
    )


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    from rlm_runtime.serve.http.settings import read_keys

    keys = [k.strip() for k in os.environ.get("RLM_API_KEYS", "").split(",")]
    if args.api_key_file:
        keys += read_keys(args.api_key_file, "--api-key-file")
    return tuple(dict.fromkeys(k for k in keys if k and not k.startswith("#")))


def _split(text: str) -> tuple[str, str | None, str | None]:
    name, equals, both = text.partition("=")
    root, _, sub = both.partition(",")
    if not (equals and name.strip() and root.strip()):
        raise UsageError(f"--model {text}: expected NAME=ROOT or NAME=ROOT,SUB.")
    return name.strip(), root.strip(), sub.strip() or None
