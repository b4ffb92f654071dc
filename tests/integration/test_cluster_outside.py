"""A scheduler and workers that others have started, as on several machines."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.cluster_batch import Batch, assert_in_order
from tests.cluster_work import broken_workshop
from tests.conftest import ROOT, assert_gone
from tests.dask_cluster import DASK, DaskCluster, dask_cluster
from tests.waiting import until
from v2v_async.batch.cluster import connecting
from v2v_async.batch.cluster.address import parse_cluster
from v2v_async.batch.cluster.connecting import open_cluster
from v2v_async.batch.guest_work import tombstone
from v2v_async.errors import DependencyError, UsageError, V2VError
from v2v_async.events import Reporter

pytestmark = pytest.mark.anyio
pytest.importorskip("distributed")

PASSWORD = "correct-horse-battery"


@pytest.fixture
def outside(short_tmp: Path) -> Iterator[DaskCluster]:
    with dask_cluster(short_tmp / "cluster") as made:
        yield made


@pytest.fixture
def home(short_tmp: Path) -> Path:
    made = short_tmp / "home"
    made.mkdir()
    return made


async def test_nothing_shared_and_no_password_seen(
    outside: DaskCluster, home: Path, short_tmp: Path
) -> None:
    batch = Batch(home, outside.uri)
    for name in ("one", "two"):
        (short_tmp / name).mkdir()
        hidden = (home / "work", home / "logs")
        outside.worker(name, tmpdir=short_tmp / name, hidden=hidden, wait=name == "two")
    batch.guest("a", wait="copy1", password=PASSWORD)
    batch.guest("b", fail="prepare", password=PASSWORD)
    async with batch.opened() as cluster, anyio.create_task_group() as group:
        group.start_soon(batch.run, cluster)
        pid = await batch.reached("a", "copy1")
        name = next(each for each, p in outside.processes.items() if p.pid == pid)
        other = {"one": "two", "two": "one"}[name]
        (own,) = (
            each.parent
            for each in (short_tmp / name).glob("v2v.*/state.json")
            if json.loads(each.read_text()) == {"made_by": "a"}
        )
        # What it has made on the target is known here, should it never come back.
        await until((home / "work" / "a" / "state.json").exists, "its state has come here")
        outside.kill(name)
        await batch.reached("a", "copy1", times=2)
        again = short_tmp / other / own.name
        assert (again / "metadata.out").exists()
        batch.let_go("a")
    assert batch.phases == {"a": "done", "b": "failed"}
    assert batch.steps("a").count("convert") == 2
    assert batch.steps("a").count("found state") == 1
    assert any("is converted again" in text for text in batch.texts("warning"))
    # Its logs have come here, and only they; what only the worker needed is its own again.
    assert (home / "logs" / "a" / "finalize.log").read_text() == "log of finalize\n"
    assert (home / "logs" / "b" / "prepare.log").read_text() == "log of prepare\n"
    assert not (home / "work" / "a").exists()
    assert not list((short_tmp / other).glob("v2v.*.log"))
    assert again.exists()  # real work removes it itself

    # Nowhere that anybody looks at.
    from distributed import Client

    async with Client(outside.uri, asynchronous=True, set_as_default=False) as client:
        events = await client.get_events()
        assert any(topic.startswith("v2v-async-") for topic in events)
        keys = {key for _, told in events["all"] for key in told.get("processing-tasks", ())}
        assert any(key.startswith("v2v-async-copies-a-") for key in keys)
        told = await client.story(*keys)
        assert told
        seen = [str(events), str(told), str(await client.scheduler.identity())]
    seen += [outside.log(each) for each in outside.processes]
    seen += [path.read_text() for path in (home / "dask").glob("*.log")]
    seen += [event.to_json() for event in batch.events]
    assert any("Run out-of-band function" in each for each in seen), "the logs were not looked at"
    assert not [each for each in seen if PASSWORD in each]


async def supervise(home: Path, uri: str, lease_s: float, log: Path) -> subprocess.Popen[bytes]:
    """Start a supervisor and return when its guests are in their copies."""
    with log.open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster_batch", str(home), uri, str(lease_s)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    batch = Batch(home)
    try:
        for name in ("a", "b"):
            await batch.reached(name, "copy1", of=supervisor)
    except BaseException:
        supervisor.kill()
        supervisor.wait()
        print(log.read_text())  # pytest shows it
        raise
    return supervisor


async def test_a_killed_supervisor_is_missed(outside: DaskCluster, home: Path) -> None:
    outside.worker("one", "conversions=2 copies=4")
    supervisor = await supervise(home, outside.uri, 5, home / "log")
    supervisor.kill()
    supervisor.wait()
    batch = Batch(home, outside.uri)
    for name in ("a", "b"):
        await batch.reached(name, "suspend")
        assert batch.steps(name)[-2:] == ["no servers", "suspend"]
    assert_gone(str(home))


async def test_the_next_supervisor_finds_nothing_running(outside: DaskCluster, home: Path) -> None:
    outside.worker("one", "conversions=2 copies=4")
    supervisor = await supervise(home, outside.uri, 600, home / "log")
    supervisor.kill()
    supervisor.wait()
    batch = Batch(home, outside.uri)
    for name in ("a", "b"):
        batch.guest(name)
    async with batch.opened(lease_s=600) as cluster:
        for name in ("a", "b"):
            assert batch.steps(name)[-2:] == ["no servers", "suspend"]
        assert_gone(str(home / "work"))
        await batch.run(cluster)
    assert batch.phases == {"a": "done", "b": "done"}
    for name in ("a", "b"):
        assert batch.steps(name).count("convert") == 1
        assert batch.steps(name).count("reopen") == 1


async def test_a_guest_that_only_its_worker_knows_to_be_done_stays(
    outside: DaskCluster, home: Path, short_tmp: Path
) -> None:
    batch = Batch(home, outside.uri)
    (short_tmp / "one").mkdir()
    outside.worker("one", tmpdir=short_tmp / "one", hidden=(home / "work", home / "logs"))
    batch.guest("a")
    order = batch.orders["a"]
    # As a supervisor leaves it that was killed when it was to hear of the end.
    order.path.mkdir()
    (order.path / "state.json").write_text('{"made_by": "a"}')
    async with batch.opened() as cluster:
        [worker] = cluster._cluster.workers
        tombstone(worker.own_path(order.path, "r")).touch()
        work = cluster.work(order, Reporter(batch.events.append, "r").for_guest("a"))
        assert await work.abandon() is True
    assert "abandon" not in batch.steps("a"), "by a state that knows nothing of its end"
    assert not order.path.exists()


async def test_the_scheduler_goes_away(outside: DaskCluster, home: Path) -> None:
    outside.worker("one", "conversions=2 copies=4")
    batch = Batch(home, outside.uri)
    for name in ("a", "b"):
        batch.guest(name, wait="copy1")
    with pytest.raises(V2VError) as caught:
        async with batch.opened() as cluster, anyio.create_task_group() as group:
            group.start_soon(batch.run, cluster)
            await batch.reached("a", "copy1")
            await batch.reached("b", "copy1")
            outside.kill("scheduler")
            with anyio.fail_after(10):
                await anyio.sleep_forever()
    assert "the scheduler" in caught.value.message
    assert "batch resume" in (caught.value.hint or "")
    # Its workers end with it, in order.
    for name in ("a", "b"):
        await batch.reached(name, "suspend")
    assert_gone(str(home))


async def test_workers_that_can_t_take_part(
    outside: DaskCluster, home: Path, short_tmp: Path
) -> None:
    async def run(**options: Any) -> Batch:
        batch = Batch(home, outside.uri)
        batch.guest("a")
        async with batch.opened(**options) as cluster:
            await batch.run(cluster)
        return batch

    # No worker at all, and one without the resources: the same words.
    messages = set()
    for name in (None, "plain"):
        if name is not None:
            outside.worker(name, None)
        with pytest.raises(V2VError) as caught:
            await run()
        messages.add((caught.value.message, caught.value.hint))
    ((message, hint),) = messages
    assert message == f"no worker of {outside.uri} has the resources ‘conversions’ and ‘copies’"

    # The command that it names is right.
    assert hint is not None
    words = shlex.split(hint.partition("have: ")[2])
    assert words[:3] == ["dask", "worker", outside.uri]
    with (outside.home / "named.log").open("wb") as log:
        outside.processes["named"] = subprocess.Popen(
            [DASK, *words[1:], "--no-dashboard", "--local-directory", str(outside.home)],
            stdout=log,
            stderr=log,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin:/usr/sbin"},
        )
    outside.wait_for_worker("named")
    batch = await run()
    assert batch.phases == {"a": "done"}
    assert_in_order(batch.events, "a")

    # What is missing on a worker is said before anything begins.
    with pytest.raises(V2VError) as caught:
        async with open_cluster(
            parse_cluster(outside.uri),
            Reporter(lambda event: None, "r"),
            broken_workshop,
            logs=home / "dask",
        ):
            raise AssertionError("not reached")
    assert "libnbd is not installed here" in caught.value.message
    assert caught.value.hint == "install it"

    # Another v2v-async.
    other = short_tmp / "other" / "v2v_async"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text('__version__ = "9.9.9"\n')
    outside.worker("newer", path=str(other.parent))
    with pytest.raises(DependencyError) as caught:
        await run()
    assert "has 9.9.9" in caught.value.message
    assert "‘dask worker’" in (caught.value.hint or "")


async def test_a_worker_that_comes_later_takes_guests(outside: DaskCluster, home: Path) -> None:
    outside.worker("one")
    batch = Batch(home, outside.uri)
    for name in ("a", "b"):
        batch.guest(name, wait="convert")
    async with batch.opened() as cluster, anyio.create_task_group() as group:
        group.start_soon(batch.run, cluster)
        begun = await until(
            lambda: [each for each in batch.calls() if each[1] == "convert"], "a conversion begins"
        )
        ((guest, _, first),) = begun  # the other one waits for a place
        second = outside.worker("two")
        other = {"a": "b", "b": "a"}[guest]
        assert await batch.reached(other, "convert") == second != first
        for name in ("a", "b"):
            batch.let_go(name)
    assert batch.phases == {"a": "done", "b": "done"}


async def test_a_worker_that_is_out_of_reach_for_a_while(outside: DaskCluster, home: Path) -> None:
    batch = Batch(home, outside.uri)
    outside.worker("one")
    batch.guest("a", wait="copy1")
    async with batch.opened(lease_s=4) as cluster, anyio.create_task_group() as group:
        group.start_soon(batch.run, cluster)
        await batch.reached("a", "copy1")
        outside.processes["one"].send_signal(signal.SIGSTOP)
        await until(
            lambda: any("does not answer" in text for text in batch.texts("warning")),
            lambda: f"it is missed: {batch.texts('warning')}",
        )
        outside.processes["one"].send_signal(signal.SIGCONT)
        await batch.reached("a", "copy1", times=2)
        # It had stopped before it began again: never two at once.
        steps = batch.steps("a")
        again = steps.index("copy1", steps.index("copy1") + 1)
        assert steps.index("suspend") < again
        assert steps[:again].count("servers") == steps[:again].count("no servers") + 1
        batch.let_go("a")
    assert batch.phases == {"a": "done"}
    assert batch.steps("a").count("convert") == 1, "what was converted is kept"
    assert_gone(str(home))


async def test_a_supervisor_that_slept(outside: DaskCluster, home: Path) -> None:
    outside.worker("one", "conversions=2 copies=4")
    supervisor = await supervise(home, outside.uri, 4, home / "log")
    try:
        batch = Batch(home, outside.uri)
        supervisor.send_signal(signal.SIGSTOP)
        for name in ("a", "b"):
            await batch.reached(name, "suspend")
        supervisor.send_signal(signal.SIGCONT)
        for name in ("a", "b"):
            await batch.reached(name, "copy1", times=2, of=supervisor)
            batch.let_go(name)
        await until(lambda: supervisor.poll() is not None, "it ends")
        assert supervisor.returncode == 0, (home / "log").read_text()
    finally:
        supervisor.kill()
        supervisor.wait()
    for name in ("a", "b"):
        assert batch.steps(name).count("convert") == 1
        assert batch.steps(name).count("finalize") == 1
    assert_gone(str(home))


async def test_tls(short_tmp: Path, home: Path) -> None:
    import dask
    from distributed.security import Security

    security = Security.temporary()
    files = {}
    for name in ("ca", "cert", "key"):
        files[name] = short_tmp / f"{name}.pem"
    files["ca"].write_text(security.tls_ca_file)
    files["cert"].write_text(security.tls_worker_cert)
    files["key"].write_text(security.tls_worker_key)
    words = [f"--tls-ca-file={files['ca']}", f"--tls-cert={files['cert']}"]
    words += [f"--tls-key={files['key']}", "--protocol=tls"]
    with dask_cluster(short_tmp / "cluster", *words) as outside:
        assert outside.uri.startswith("tls://")
        outside.worker("one")
        batch = Batch(home, outside.uri)
        batch.guest("a")
        with pytest.raises(UsageError) as caught:
            async with batch.opened():
                raise AssertionError("not reached")
        assert "distributed.comm.tls" in (caught.value.hint or "")
        settings = {
            "distributed.comm.tls.ca-file": str(files["ca"]),
            "distributed.comm.tls.client.cert": str(files["cert"]),
            "distributed.comm.tls.client.key": str(files["key"]),
        }
        with dask.config.set(settings):
            async with batch.opened() as cluster:
                await batch.run(cluster)
        assert batch.phases == {"a": "done"}


async def test_nobody_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "_CONNECT_TIMEOUT_S", 1.0)
    batch = Batch(home, "tcp://127.0.0.1:1")
    with pytest.raises(V2VError) as caught:
        async with batch.opened():
            raise AssertionError("not reached")
    assert "can't be reached" in caught.value.message
