"""What other copiers can be asked for, how they are called, and what their progress means."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from v2v_async import nbdcopy, qemu_img
from v2v_async.copy.endpoint import Endpoint, nbd
from v2v_async.copy.external import copy_disk_external, unsupported
from v2v_async.errors import DependencyError, UsageError
from v2v_async.events import Event, Reporter
from v2v_async.nbdcopy import NbdCopy
from v2v_async.options import Copier, CopyOptions

NEW = NbdCopy(
    Path("/usr/bin/nbdcopy"),
    "1.14.2",
    frozenset(
        f"--{name}"
        for name in (
            *("allocated", "connections", "destination-is-zero", "flush", "no-extents"),
            *("progress", "queue-size", "request-size", "requests", "sparse", "synchronous"),
            "threads",
        )
    ),
)
OLD = NbdCopy(Path("/usr/bin/nbdcopy"), "1.4.0", frozenset({"--progress", "--flush"}))


def program(folder: Path, name: str, script: str = "exit 0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


class TestFinding:
    def test_a_marked_folder_is_skipped(self, tmp_path: Path) -> None:
        program(tmp_path / "shim", "nbdcopy")
        (tmp_path / "shim" / nbdcopy.SHIM_MARKER).touch()
        real = program(tmp_path / "bin", "nbdcopy")
        path = f"{tmp_path / 'shim'}{os.pathsep}{tmp_path / 'bin'}"
        assert nbdcopy.find_nbdcopy(path) == real

    def test_a_link_to_our_script_or_into_a_marked_folder_is_skipped(self, tmp_path: Path) -> None:
        ours = program(tmp_path / "venv", "v2v-async")
        marked = program(tmp_path / "shim", "nbdcopy")
        (tmp_path / "shim" / nbdcopy.SHIM_MARKER).touch()
        for name, to in (("one", ours), ("two", marked)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "nbdcopy").symlink_to(to)
        real = program(tmp_path / "bin", "nbdcopy")
        folders = [tmp_path / "one", tmp_path / "two", tmp_path / "bin"]
        assert nbdcopy.find_nbdcopy(os.pathsep.join(map(str, folders))) == real

    def test_what_can_not_be_run_is_skipped(self, tmp_path: Path) -> None:
        (tmp_path / "a" / "nbdcopy").mkdir(parents=True)
        program(tmp_path / "b", "nbdcopy").chmod(0o644)
        real = program(tmp_path / "c", "nbdcopy")
        path = os.pathsep.join(str(tmp_path / name) for name in ("none", "a", "b", "c"))
        assert nbdcopy.find_nbdcopy(path) == real

    def test_only_ours_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program(tmp_path, "nbdcopy")
        (tmp_path / nbdcopy.SHIM_MARKER).touch()
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(DependencyError, match="v2v-async itself") as caught:
            nbdcopy.find_nbdcopy()
        assert "apt-get install libnbd-bin" in (caught.value.hint or "")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("copier", "package"), [("nbdcopy", "libnbd-bin"), ("qemu-img", "qemu-utils")]
)
async def test_a_missing_program_names_the_command_that_adds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copier: Copier, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "s").write_bytes(b"x")
    events: list[Event] = []
    with pytest.raises(DependencyError, match=copier) as caught:
        await copy(tmp_path / "s", tmp_path / "t", CopyOptions(copier=copier), events)
    assert f"apt-get install {package}" in (caught.value.hint or "")
    assert caught.value.disk == 3
    assert not events
    assert not (tmp_path / "t").exists()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo broken >&2; exit 1", "--version’ failed: broken"),
        ('test "$1" = --version || exit 3', "--long-options’ failed: exit status 3"),
    ],
)
async def test_an_nbdcopy_that_does_not_tell_what_it_is(
    tmp_path: Path, script: str, said: str
) -> None:
    with pytest.raises(DependencyError, match=said):
        await nbdcopy.probe(program(tmp_path, "nbdcopy", script))


async def copy(source: Path, target: Path, options: CopyOptions, events: list[Event]) -> None:
    await copy_disk_external(
        3,
        Endpoint("file", str(source)),
        Endpoint("file", str(target)),
        options,
        Reporter(events.append, "t").for_disk(3),
        is_known_zero=False,
    )


class TestUnsupported:
    def test_what_each_can_not_do(self) -> None:
        everything = CopyOptions(
            bandwidth=1,
            bandwidth_file=Path("b"),
            connections=2,
            requests=2,
            request_size=4096,
            queue_size=4096,
            sparse=4096,
            threads=2,
            allocated=True,
            target_is_zero=True,
            extents=False,
            synchronous=True,
            retries=7,
            checkpoint=Path("c"),
            verify=True,
            repair=True,
            digest="sha256",
        )
        alike = {"--checkpoint", "--verify", "--repair", "--digest", "--bandwidth-file"}
        alike |= {"--retries"}
        assert unsupported(everything) == []
        assert set(unsupported(replace(everything, copier="nbdcopy"))) == alike | {"--bandwidth"}
        assert set(unsupported(replace(everything, copier="qemu-img"))) == alike | {
            *("--request-size", "--queue-size", "--threads", "--connections", "--no-extents")
        }

    @pytest.mark.parametrize("copier", ["nbdcopy", "qemu-img"])
    def test_what_was_not_asked_for_is_no_hindrance(self, copier: Copier) -> None:
        assert unsupported(CopyOptions(copier=copier)) == []
        assert unsupported(CopyOptions(copier=copier, retries=0, connections=1)) == []

    @pytest.mark.anyio
    async def test_it_is_refused_before_anything_is_touched(self, tmp_path: Path) -> None:
        options = CopyOptions(copier="qemu-img", verify=True, threads=2)
        with pytest.raises(UsageError, match="qemu-img .*--verify and --threads") as caught:
            await copy(tmp_path / "s", tmp_path / "t", options, [])
        assert "native" in (caught.value.hint or "")
        assert not list(tmp_path.iterdir())

    @pytest.mark.anyio
    @pytest.mark.parametrize("copier", ["nbdcopy", "qemu-img"])
    async def test_a_file_is_not_copied_over_itself(self, tmp_path: Path, copier: Copier) -> None:
        (tmp_path / "s").write_bytes(b"content")
        (tmp_path / "t").symlink_to(tmp_path / "s")
        with pytest.raises(UsageError, match="same file"):
            await copy(tmp_path / "s", tmp_path / "t", CopyOptions(copier=copier), [])
        assert (tmp_path / "s").read_bytes() == b"content"

    @pytest.mark.anyio
    @pytest.mark.parametrize(
        "end",
        [Endpoint("stream"), Endpoint("command", argv=("nbdkit", "null")), Endpoint("null")],
        ids=str,
    )
    @pytest.mark.parametrize("is_source", [True, False])
    async def test_qemu_img_takes_no_streams_nor_commands(
        self, end: Endpoint, is_source: bool
    ) -> None:
        other = nbd("/nowhere")
        ends = (end, other) if is_source else (other, end)
        with pytest.raises(UsageError):
            await copy_disk_external(
                *(1, *ends, CopyOptions(copier="qemu-img"), Reporter(print, "t")),
                is_known_zero=False,
            )


class TestNbdcopy:
    def command(self, found: NbdCopy = NEW, *, zero: bool = False, **asked: object) -> list[str]:
        options = CopyOptions(**asked)  # type: ignore[arg-type]
        return nbdcopy.command(found, options, ["s"], ["t"], is_known_zero=zero, progress_fd=1)

    def test_all_that_it_has_words_for(self) -> None:
        words = self.command(
            connections=3,
            requests=5,
            request_size=65536,
            queue_size=1 << 20,
            sparse=0,
            threads=2,
            allocated=True,
            target_is_zero=True,
            extents=False,
            synchronous=True,
        )
        assert words[0] == "/usr/bin/nbdcopy"
        assert words[-3:] == ["--", "s", "t"]
        assert " ".join(sorted(words[1:-3])) == (
            "--allocated --connections=3 --destination-is-zero --flush --no-extents --progress=1 "
            "--queue-size=1048576 --request-size=65536 --requests=5 --sparse=0 --synchronous "
            "--threads=2"
        )

    def test_little_is_said_where_little_was_asked_for(self) -> None:
        assert self.command(flush=False)[1:-3] == ["--progress=1"]

    def test_what_we_know_is_zero(self) -> None:
        assert "--destination-is-zero" in self.command(zero=True)
        assert "--destination-is-zero" not in self.command(zero=True, allocated=True)
        assert "--destination-is-zero" not in self.command(OLD, zero=True)

    def test_an_older_one_is_named_with_its_version(self) -> None:
        with pytest.raises(UsageError, match="1.4.0 .*no --queue-size and no --destination-is-z"):
            self.command(OLD, queue_size=4096, target_is_zero=True)

    def test_uris(self) -> None:
        assert nbdcopy.uri("nbd://host/a b") == "nbd://host/a b"
        assert nbdcopy.uri("/a b/c%,?&#") == "nbd+unix:///?socket=/a%20b/c%25%2C%3F%26%23"

    @pytest.mark.parametrize(
        ("line", "hundredths"),
        [("0/100", 0), ("7/100", 700), ("100/100", 10_000), ("x 7/100", None), ("", None)],
    )
    def test_progress(self, line: str, hundredths: int | None) -> None:
        assert nbdcopy.progress(line) == hundredths


class TestQemuImg:
    def command(
        self, version: tuple[int, ...] = (7, 2, 22), *, zero: bool = False, **asked: object
    ) -> str:
        options = CopyOptions(**asked)  # type: ignore[arg-type]
        words = qemu_img.convert_command("q", version, options, "s", "t", is_known_zero=zero)
        return " ".join(words)

    def test_what_it_has_words_for(self) -> None:
        always = "q convert -n -p --image-opts --target-image-opts -t"
        assert self.command() == f"{always} writeback -W s t"
        assert self.command(flush=False, requests=4) == f"{always} unsafe -W -m 4 s t"
        assert self.command(synchronous=True) == f"{always} writeback -m 1 s t"
        assert self.command(allocated=True, zero=True) == f"{always} writeback -W -S 0 s t"
        assert self.command(sparse=65536, bandwidth=9, target_is_zero=True, zero=True) == (
            f"{always} writeback -W -S 65536 -r 9 --target-is-zero s t"
        )
        assert self.command(zero=True) == f"{always} writeback -W --target-is-zero s t"

    def test_an_older_one_is_named_with_its_version(self) -> None:
        with pytest.raises(UsageError, match=r"4\.2 .*no --target-is-zero"):
            self.command((4, 2), target_is_zero=True)
        with pytest.raises(UsageError, match="no -r"):
            self.command((4, 2), bandwidth=5)
        assert "--target-is-zero" not in self.command((4, 2), zero=True)

    @pytest.mark.parametrize(
        ("address", "behind"),
        [
            ("/a,b c", "server.type=unix,file.server.path=/a,,b c"),
            (
                "nbd+unix:///n%2C1?socket=/a%26b+c",
                "server.type=unix,file.server.path=/a&b+c,file.export=n,,1",
            ),
            (
                "nbd://[::1]:99/x/y",
                "server.type=inet,file.server.host=::1,file.server.port=99,file.export=x/y",
            ),
            (
                "nbd://localhost",
                "server.type=inet,file.server.host=localhost,file.server.port=10809,file.export=",
            ),
        ],
    )
    def test_exports(self, address: str, behind: str) -> None:
        assert qemu_img.nbd_image(address) == f"driver=raw,file.driver=nbd,file.{behind}"

    @pytest.mark.parametrize(
        "address",
        ["nbds://host/", "nbd+unix:///?socket=/a&tls-hostname=b", "nbd+unix:///", "nbd://h:x/"],
    )
    def test_exports_that_it_can_not_reach(self, address: str) -> None:
        with pytest.raises(UsageError, match="nbd"):
            qemu_img.nbd_image(address)

    def test_part_of_a_file(self) -> None:
        assert qemu_img.file_image(Path("/a,b"), size=512) == (
            "driver=raw,size=512,file.driver=file,file.filename=/a,,b"
        )

    @pytest.mark.parametrize(
        ("line", "hundredths"),
        [("    (0.00/100%)", 0), ("(12.34/100%)", 1234), ("(100.00/100%)", 10_000), ("x", None)],
    )
    def test_progress(self, line: str, hundredths: int | None) -> None:
        assert qemu_img.progress(line) == hundredths
