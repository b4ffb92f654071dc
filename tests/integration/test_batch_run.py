"""``v2v-async batch``, the command itself: real servers and copies, replayed conversions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.batches import Batch
from tests.conftest import assert_gone
from tests.integration.servers import MIB
from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import open_journal
from v2v_async.cli.batch.plans import read

SLOW = '[limits]\nconversions = 2\nbandwidth = "3MB/s"\n'
# Of which some 1.6 MB are data: enough for a run at such a rate to be in its middle when it is met.
SMALL = 2 * MIB


def test_a_batch_from_its_plan_to_its_report(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 5)
    batch.write_plan("[limits]\nconversions = 2\ndisks = 3\n")
    done = batch.batch("run", str(batch.plan), "--name", "r")
    batch.assert_converted(*batch.disks)
    batch.assert_nothing_left(*batch.disks)
    assert "g5" in done.stdout
    assert set(batch.phases().values()) == {"done"}
    report = json.loads(batch.batch("report", "r", "--format", "json").stdout)
    assert len(report["guests"]) == 5
    events = batch.events()
    assert (events[0].type, events[-1].type) == ("started", "finished")
    assert events[-1].details == {"done": 5, "failed": 0, "cancelled": 0}
    # Never more than the plan allows, and both at work at the same time.
    taken = [event.details["taken"] for event in events if event.type == "limits" and event.details]
    assert max(each["conversions"] for each in taken) <= 2
    assert max(each["disks"] for each in taken) <= 3
    assert "r: 5 done: ended" in batch.batch("status").stdout


def test_guests_with_outputs_of_their_own(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 4, size=MIB * 3 + 512)
    batch.write_plan()
    outputs = {
        "g1": 'type = "null", storage = ""',
        "g2": 'type = "qemu", format = "qcow2"',
        "g3": 'type = "json", format = "qcow2", options = { compressed = true }',
    }
    text = batch.plan.read_text()
    for name, output in outputs.items():
        text = text.replace(f'{{ name = "{name}" }}', f'{{ name = "{name}", {output} }}')
    batch.plan.write_text(text)
    batch.batch("run", str(batch.plan), "--name", "r")
    batch.assert_converted("g4")
    made = {path.name for path in batch.out.iterdir()}
    assert made == {
        *("g2.sh", "g2-sda", "g2-sdb", "g3.json", "g3-sda", "g3-sdb"),
        *("g4.xml", "g4-sda", "g4-sdb"),
    }
    report = json.loads(batch.batch("report", "r", "--format", "json").stdout)
    assert {Path(name).name for name in report["guests"][1]["outputs"]} >= {"g2-sda", "g2-sdb"}


def test_what_is_wrong_is_told_before_anything_begins(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 3)
    batch.disks["g2"][0].unlink()
    batch.write_plan("", {"g3": 'convert = { root = "nowhere at all" }'})
    refused = batch.batch("run", str(batch.plan), "--name", "r", status=2)
    assert "plan.toml:" in refused.stderr
    assert "g3" in refused.stderr
    batch.write_plan()
    refused = batch.batch("run", str(batch.plan), "--name", "r", status=2)
    assert "g2" in refused.stderr
    assert "g2-1.img" in refused.stderr
    assert list(batch.out.iterdir()) == []
    assert list(batch.tmp.iterdir()) == []
    assert not batch.run().exists(), "its name is free"
    dry = batch.batch("run", str(batch.plan), "--dry-run", status=2)
    assert "g2-1.img" in dry.stdout


def test_the_others_are_converted_where_that_is_wanted(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 3)
    for disk in batch.disks["g2"]:
        disk.unlink()
    done = batch.batch("run", str(batch.plan), "--name", "r", "--skip-wrong", status=11)
    assert "1 of 3 guests failed" in done.stderr
    batch.assert_converted("g1", "g3")
    assert batch.phases() == {"g1": "done", "g2": "failed", "g3": "done"}
    [failed] = [each for each in batch.events() if each.type == "failed"]
    assert failed.details is not None
    bundle = failed.details["bundle"]
    with tarfile.open(bundle) as archive:
        told = archive.extractfile("g2-failure/summary.txt")
        assert told is not None
        text = told.read().decode()
    assert "g2-1.img" in text
    assert "g2-2.img" in text, "all that is wrong with it is told"
    assert bundle in batch.batch("report", "r", "--format", "json", status=0).stdout


def test_a_guest_that_can_not_be_converted_touches_no_other(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 3)
    program = short_tmp / "bin" / "virt-v2v-in-place"
    program.parent.mkdir()
    real = batch.environment["PATH"].partition(":")[0] + "/virt-v2v-in-place"
    # It is given the source's name, which is that of the first disk.
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *source.xml) grep -q "<name>g2-1<" "$(eval echo \\${{$#}})" &&'
        f' export V2V_REPLAY_FAILS=1;; esac\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    batch.environment["PATH"] = f"{program.parent}:{batch.environment['PATH']}"
    batch.batch("run", str(batch.plan), "--name", "r", status=11)
    batch.assert_converted("g1", "g3")
    batch.assert_nothing_left("g1", "g3")
    assert batch.phases() == {"g1": "done", "g2": "failed", "g3": "done"}
    [failed] = [event for event in batch.events() if event.type == "failed" and not event.step]
    assert failed.details is not None
    assert failed.details["permanent"] is True
    assert Path(failed.details["bundle"]).stat().st_size < 256 << 10
    attempts = [event.guest for event in batch.events() if event.type == "retrying"]
    assert attempts == []
    # Mended, it is tried again, and only it.
    batch.environment["PATH"] = batch.environment["PATH"].partition(":")[2]
    batch.batch("resume", "r", "--failed")
    batch.assert_converted("g2")
    assert set(batch.phases().values()) == {"done"}


def test_a_server_that_dies_costs_another_attempt_and_not_what_has_landed(
    short_tmp: Path,
) -> None:
    batch = Batch(short_tmp, 1)
    batch.write_plan('[retries]\ndelay = "0.1s"\n[limits]\nbandwidth = "2MB/s"\n')
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.type == "progress" and _copied(event) > 1 << 20)
    [state] = batch.tmp.glob("v2vb.*/*/state.json")
    [pid] = [
        each["pid"]
        for each in json.loads(state.read_text())["processes"]
        if each["socket"].endswith("/out1")
    ]
    os.kill(pid, signal.SIGKILL)
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    batch.assert_converted("g1")
    batch.assert_nothing_left("g1")
    events = batch.events()
    assert sum(event.type == "retrying" and event.disk is None for event in events) == 1
    assert [event.type for event in events].count("converted") == 1
    assert sum(event.step == "convert" and event.type == "started" for event in events) == 1


def _copied(event: object) -> int:
    amounts = getattr(event, "bytes", None)
    return amounts.copied if amounts is not None else 0


def test_stopped_by_a_signal_and_taken_up_again(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 3, size=SMALL)
    batch.write_plan(SLOW)
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.type == "progress")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert "v2v-async batch resume r" in output
    assert_gone(str(batch.tmp))
    assert "stopped; to go on: v2v-async batch resume r" in batch.batch("status").stdout
    follow = batch.batch("status", "r", "--follow")
    assert "resume r" in follow.stdout
    batch.batch("resume", "r")
    batch.assert_converted(*batch.disks)
    batch.assert_nothing_left(*batch.disks)


def test_paused_resumed_and_cancelled_from_another_terminal(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 3, size=4 * MIB)
    # g2 would take minutes, and g3 has no turn before it is gone.
    batch.write_plan(
        "[limits]\nconversions = 1\ndisks = 2\n[limits.groups.slow]\nbandwidth = 20000\n",
        {"g1": "priority = 9", "g2": 'priority = 5\ngroup = "slow"'},
    )
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.guest == "g2" and event.type == "progress")
    batch.batch("pause", "r", "g3")
    follower = batch.begin("status", "r", "--follow")
    assert "cancelled: 1 guest" in batch.batch("cancel", "r", "g2").stdout
    batch.await_event(run, lambda event: event.guest == "g2" and event.type == "cancelled")
    batch.await_event(run, lambda event: event.guest == "g1" and event.type == "finished")
    phases = batch.phases()
    assert phases["g1"] == "done"
    assert phases["g2"] == "cancelled"
    assert phases["g3"] not in ("done", "failed")
    refused = batch.batch("pause", "r", "g9", status=2)
    assert "no guest ‘g9’" in refused.stderr
    batch.batch("resume", "r", "g3")
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    followed, _ = follower.communicate(timeout=20)
    assert follower.returncode == 0, followed
    assert "g3" in followed
    batch.assert_nothing_left("g1", "g3")


def test_cancelled_when_nobody_runs_it(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, size=SMALL)
    batch.write_plan(SLOW)
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.type == "progress")
    batch.kill(run)
    assert_gone(str(batch.tmp))
    assert list(batch.out.iterdir()) != []
    batch.batch("cancel", "r")
    batch.assert_nothing_left()
    assert set(batch.phases().values()) == {"cancelled"}
    batch.write_plan()
    batch.batch("run", str(batch.plan), "--name", "another")  # what it had is free


def test_two_runs_can_not_take_the_same(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, size=4 * MIB)
    batch.write_plan("[limits]\nbandwidth = 20000\n")
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.type == "progress")
    again = batch.batch("run", str(batch.plan), "--name", "r", status=2)
    assert "there is a run ‘r’ already" in again.stderr
    other = batch.batch("run", str(batch.plan), "--name", "other", status=2)
    assert "another run has what this one needs" in other.stderr
    assert "run ‘r’" in other.stderr
    both = batch.batch("resume", "r")  # it goes on already: nothing to resume
    assert "2 guests" in both.stdout
    batch.batch("cancel", "r")
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    batch.assert_nothing_left()


def test_seen_on_a_web_page_while_it_runs(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, size=SMALL)
    batch.write_plan(SLOW)
    run = batch.begin("run", str(batch.plan), "--name", "r", "--serve", "127.0.0.1:0")
    batch.await_event(run, lambda event: event.type == "progress")
    assert run.stdout is not None
    address = re.search(r"http://\S+", run.stdout.readline())
    assert address is not None, "the first line that it prints"
    page, _, token = address[0].partition("?token=")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{page}api/state", timeout=20)

    def get(path: str) -> str:
        request = urllib.request.Request(
            f"{page}{path}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return str(answer.read().decode())

    state = json.loads(get("api/state"))
    assert [guest["name"] for guest in state["guests"]] == ["g1", "g2"]
    assert state["bytes"]["to_move"] > 0
    assert 'v2v_limit_capacity{resource="conversions"} 2.0' in get("metrics")
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    kept = "".join(path.read_text() for path in batch.run().rglob("*.jsonl"))
    assert token not in kept
    busy = batch.batch("resume", "r", "--serve", "127.0.0.1:x", status=2)
    assert "127.0.0.1:x" in busy.stderr


@pytest.mark.parametrize("words", [[], ["status", "nowhere"], ["run", "nowhere.toml"], ["pause"]])
def test_mistakes_on_the_command_line(short_tmp: Path, words: list[str]) -> None:
    batch = Batch(short_tmp, 1)
    done = batch.batch(*words, status=2)
    assert "Traceback" not in done.stderr
    assert done.stderr


def test_a_plan_to_fill_in(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 1)
    done = batch.batch("init", "new.toml")
    assert "batch run new.toml --dry-run" in done.stdout
    refused = batch.batch("init", "new.toml", status=2)
    assert "is there already" in refused.stderr
    subprocess.run(["grep", "-q", r"^\[\[guests\]\]", batch.folder / "new.toml"], check=True)
    assert batch.batch("init", "--yaml").stdout.count("guests:") >= 1


def test_a_guest_that_has_gained_a_disk_is_not_called_done(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2)
    xml = short_tmp / "g2.xml"

    def write_domain(disks: list[Path]) -> None:
        told = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
            f"<source file='{disk}'/><target dev='sd{letter}' bus='scsi'/></disk>"
            for letter, disk in zip("ab", disks, strict=False)
        )
        xml.write_text(
            "<domain type='kvm'><name>g2</name><memory unit='MiB'>512</memory><os><type>hvm</type>"
            f"</os><devices>{told}</devices></domain>"
        )

    write_domain(batch.disks["g2"][:1])
    batch.sources_by_guest["g2"] = f'input = {{ type = "libvirtxml", source = "{xml}" }}'
    batch.write_plan("[limits]\nconversions = 1\n", {"g1": "priority = 1"})
    batch.environment["V2V_REPLAY_HANGS_S"] = "1"  # g2's disks are looked at after g1's conversion
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.guest == "g1" and event.step == "convert")
    write_domain(batch.disks["g2"])
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 11, output
    assert "the guest has 2 disks now, and had 1 when the batch looked at it" in output
    batch.assert_converted("g1")
    assert not (batch.out / "g2.xml").exists()
    assert not [event for event in batch.events() if event.type == "retrying"]


def test_a_conversion_that_is_gone_is_made_again(short_tmp: Path) -> None:
    """As when its folder was being removed, or tidied up, while nobody ran it."""
    batch = Batch(short_tmp, 1, size=SMALL)
    batch.write_plan('[retries]\ndelay = "0.1s"\n[limits]\nbandwidth = "1MB/s"\n')
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.type == "progress")
    batch.kill(run)
    [record] = batch.tmp.glob("v2vb.*/1/overlay-1.json")
    record.unlink()
    done = batch.batch("resume", "r")
    assert "what was converted of disk 1 is not in" in done.stdout + done.stderr
    batch.assert_converted("g1")
    batch.assert_nothing_left("g1")


def test_a_run_that_was_killed_before_it_began_touches_nothing_when_cancelled(
    short_tmp: Path,
) -> None:
    batch = Batch(short_tmp, 1)
    plan, _ = read(batch.plan)
    folder.create(batch.run().parent, "r", plan)
    precious = batch.tmp / "1" / "precious"
    precious.parent.mkdir()
    precious.touch()
    assert "cancelled: 1 guest" in batch.batch("cancel", "r").stdout
    assert precious.exists()
    assert batch.phases() == {"g1": "cancelled"}


def test_a_cancel_that_its_supervisor_did_not_live_to_do(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, size=SMALL)
    batch.write_plan(SLOW)
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.type == "progress")
    batch.kill(run)
    with open_journal(batch.run() / folder.JOURNAL) as journal:
        journal.cancel(["g2"])
    batch.batch("resume", "r")
    assert batch.phases() == {"g1": "done", "g2": "cancelled"}
    batch.assert_nothing_left("g1")
    # What it had is free for others.
    batch.write_plan()
    batch.batch("run", str(batch.plan), "--name", "again")
    batch.assert_converted("g1", "g2")


def test_no_temporary_directory(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 1)
    batch.environment["TMPDIR"] = str(short_tmp / "absent")
    for more in (["--dry-run"], []):
        refused = batch.batch("run", str(batch.plan), *more, status=2)
        assert "can't be used: No such file" in refused.stderr
        assert "bug" not in refused.stderr
