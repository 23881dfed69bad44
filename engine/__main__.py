"""Where the real parts are wired together: `python -m engine child …` for the supervisor, `slotkeeper …` for people."""

import sys
from collections.abc import Awaitable, Callable

import structlog
import trio

from engine import config as configuration
from engine import datadir, logs, service
from engine import planner as planning
from engine import worker as working
from engine.child import ChildArguments, ChildContext, Role, run_child, wait_for_lock
from engine.clock import SystemClock
from engine.config import Config
from engine.core import ledger
from engine.datadir import Metadata, planning_directory, shard_directory
from engine.journal.sqlite import SqliteJournal, open_journal
from engine.planner import Planner
from engine.worker import Bounds, Worker
from readmodel.publisher import Publisher

log: structlog.stdlib.BoundLogger = structlog.get_logger("engine")

_MEBIBYTE = 1024 * 1024


async def _open(context: ChildContext, config: Config, *, planner: bool) -> SqliteJournal:
    arguments = context.arguments
    directory = planning_directory(arguments.data) if planner else shard_directory(arguments.data, arguments.index)
    return await wait_for_lock(
        lambda: open_journal(
            directory,
            epoch=arguments.epoch,
            segment_bytes_max=config.journal.segment_mb * _MEBIBYTE,
            checkpoint_bytes=config.journal.checkpoint_mb * _MEBIBYTE,
        )
    )


async def run_worker(context: ChildContext, metadata: Metadata, config: Config) -> None:
    """Be the worker of shard `context.arguments.index`."""
    arguments = context.arguments
    directory = shard_directory(arguments.data, arguments.index)
    clock = SystemClock()
    journal = await _open(context, config, planner=False)
    recovered = working.recover(journal, directory)
    for warning in recovered.warnings:
        log.warning("a snapshot was passed over", reason=warning)
    publisher = Publisher(
        arguments.runtime,
        f"shard-{arguments.index:02d}",
        epoch=arguments.epoch,
        restart_count=journal.restart,
        row_capacity=max(1024, len(recovered.state.counters) * 2),
    )
    worker = Worker(
        state=recovered.state,
        journal=journal,
        publisher=publisher,
        clock=clock,
        rules=ledger.Rules(
            hold_ms_max=config.reservations.hold_seconds_max * 1000,
            finished_keep_ms=config.reservations.finished_keep_seconds * 1000,
        ),
        bounds=Bounds(
            config.overload.batch_commands_max, config.overload.queue_ms_max, config.journal.snapshot_every_events
        ),
        directory=directory,
        snapshot_seq=recovered.from_seq,
        shard=arguments.index,
        peers={
            shard: arguments.runtime / f"worker-{shard:02d}.sock"
            for shard in range(metadata.shards)
            if shard != arguments.index
        },
    )
    worker.start_term(journal.epoch, journal.restart)
    worker.publish_all()
    await worker.commit_first()
    listener = service.bind(arguments.runtime / f"worker-{arguments.index:02d}.sock")
    log.info(
        "serving",
        position=journal.head.seq,
        snapshot=recovered.from_seq,
        replayed=recovered.events_replayed,
        reservations=recovered.state.reservations.count,
        counters=len(recovered.state.counters),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.serve, listener, worker.take)
        nursery.start_soon(_stop, context, worker.stop)
        context.ready()
        await worker.run()
        nursery.cancel_scope.cancel()
    publisher.close()
    await journal.close()
    log.info("stopped", **worker.statistics()._asdict())


async def run_planner(context: ChildContext, metadata: Metadata, config: Config) -> None:
    """Be the planner."""
    arguments = context.arguments
    journal = await _open(context, config, planner=True)
    planner = Planner(
        state=planning.recover(journal),
        journal=journal,
        directory=planning_directory(arguments.data),
        runtime=arguments.runtime,
        shards=metadata.shards,
        clock=SystemClock(),
    )
    planner.start_term(journal.epoch, journal.restart)
    await planner.commit()
    listener = service.bind(arguments.runtime / "planner.sock")
    log.info("serving", position=journal.head.seq)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.serve, listener, planner.take)
        nursery.start_soon(_stop, context, planner.stop)
        context.ready()
        await planner.run()
        nursery.cancel_scope.cancel()
    await journal.close()
    log.info("stopped", position=journal.head.seq)


async def _stop(context: ChildContext, stop: Callable[[], None]) -> None:
    await context.stop.wait()
    stop()


async def run_api(context: ChildContext, metadata: Metadata, config: Config) -> None:
    """Be one of the api processes."""
    from api import process  # noqa: PLC0415 - workers need not load it

    await process.run(context, metadata, config)


MAINS: dict[Role, Callable[[ChildContext, Metadata, Config], Awaitable[None]]] = {
    "worker": run_worker,
    "planner": run_planner,
    "api": run_api,
}


def child(words: list[str]) -> None:
    """Be a child of the supervisor. Does not return."""
    arguments = ChildArguments.from_argv(words)
    config = configuration.decode((arguments.runtime / datadir.CONFIG_NAME).read_bytes())
    logs.configure(level=config.log.level, log_format=config.log.format, role=arguments.role, index=arguments.index)
    metadata = datadir.load(arguments.data)

    async def run(context: ChildContext) -> None:
        await MAINS[arguments.role](context, metadata, config)

    run_child(run, arguments)


def main() -> None:
    """The command `slotkeeper`."""
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2:])
    else:
        from api.cli import cli  # noqa: PLC0415 - children need not load it

        cli(prog_name="slotkeeper")


if __name__ == "__main__":
    main()
