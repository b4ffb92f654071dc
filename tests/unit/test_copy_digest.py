from __future__ import annotations

import hashlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.copy.digest import ALGORITHMS, DigestKind, DiskDigest, parse_kind
from v2v_async.errors import UsageError

# What nbdcopy 1.24.4 of Debian sid printed for ‘nbdcopy --blkhash[=KIND] FILE null:’, FILE made by
# `_disk`. It printed the same for a sparse file, without extents, --synchronous, with other request
# sizes, from a pipe, from nbdkit and to a file.
PRINTED = [
    ("", "", "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"),
    ("", "md5", "7dea362b3fac8e00956a4952a3d4f474"),
    ("", "sha1", "05fe405753166f125559e7c9ac558654f107c7e9"),
    (
        "",
        "sha512",
        "1b7409ccf0d5a34d3a77eaabfa9fe27427655be9297127ee9522aa1bf4046d4f"
        "945983678169cb1a7348edcac47ef0d9e2c924130e5bcc5f0d94937852c42f1b",
    ),
    ("z1", "", "3aa275143d0713bc404144a02208ea1ea840d565fa0c19af486cc65b0a10a267"),
    ("r1", "", "0d44b8bf0b8624e8688527eb5ee48f9f592191bb64c525a7e12d9717bb002e88"),
    ("r1", "md5", "ff9ad4ea46f2d81e8b5c0bc9f84555d8"),
    ("r511", "sha1/512", "a9e2567aabccb1941d2e9e8dda4ddbef7285fe1a"),
    ("r65535", "", "9079d4e23c59916d3c720897f9c662dd62d676ea480b27f3872fd41c0de6865a"),
    ("r65535", "sha256/4", "d669554f3500bef5df8443f91a9879c7bb31ba640191d471566904cb3490c2e1"),
    ("r65536", "", "bc96782c29ac56eb6e33e75fb6edfd852e01f20958efa2dc9834fabc69927aa9"),
    ("r65536", "sha256/4k", "25a48fc32cf28e2e5c2a066918443aa1933099543d4a1ef92fbb505f5d7b128a"),
    ("r65537", "", "53502d2080e09672552d206f43747759f418ccb3f7cb51b22d044652a790c645"),
    (
        "r65537",
        "sha512/512k",
        "143e58cc88d884a68d762ab5e8f1781d17b8d69b06e454b0fb7a9f06087e44d9"
        "f5b04527f1673db4f2e01efd348ddd7e3efd11d30eb119c53d23fe369991e83c",
    ),
    ("z65535", "", "8d353a9bd4f1656187818dba1da7272427de2c7d4866a2580be468a34c547d24"),
    ("z65536", "", "8ab067ab7939a3d4f40cbb118956c07c06aeae2d075d6e0a2ebbb94bd42832af"),
    ("z65536", "sha256/4k", "a8a2d97e2d589171b228e70e61a7081dbef89e2174ee1a74f1f591e002cf322e"),
    ("z65536", "sha256/4M", "8ab067ab7939a3d4f40cbb118956c07c06aeae2d075d6e0a2ebbb94bd42832af"),
    ("z65537", "", "43702a4ffbe4bdb5c0cf900dd2a899fdd2536b78559f8b55cf0ed7fe1e8195b5"),
    ("z65537", "sha256/4", "57b9a901f44f3af452f42db8b124ea6eb906ccfa6b7289f7b55059d53748961a"),
    ("z1000000", "sha1", "2e9b7c1007f8778d8abb260c0cdb7d89ab30d54f"),
    (
        "r65536 z65536 r65536",
        "",
        "f2cba76d6d4fa46caf83be83e092b783c7cb1e9139722a15b58c18a997dc796b",
    ),
    ("r65536 z65536 r65536", "md5", "e14d3d3601f65d274d7bf681c6eec40f"),
    (
        "r65536 z65536 r65536",
        "sha256/4k",
        "d5cecb08dceabce26ab17a35406817cc329ba14100a5c40e9199c2906c26d2d5",
    ),
    (
        "z65536 r65536 z65536",
        "",
        "202fe8af5882a398ab96749b5af2d591e9ab41affbdf338c4cb3415f95d6264b",
    ),
    ("z65536 r65536 z65536", "md5/128k", "eab022b70299348d1e516dc766218edc"),
    ("r300000", "md5", "f13190050eabad827355d3d2f539798d"),
    ("r300000", "sha1", "9777d826682599551cd2534dc80f1e339ab48d94"),
    ("r300000", "sha256", "2ccce2bfb47ec84ed0134ac3cca94a8de69ad70ecccc14eae14571de6ad47050"),
    (
        "r300000",
        "sha512",
        "6ab75a7c8e4fb11028316447abe76b8e17b9cb0c40071271760e2fde0c2d340a"
        "eba0b35d9cb5879986fe227247764149d9ed6cf65008067e9c9cf334e90b5f18",
    ),
    ("r300000", "md5/4096", "ca75af6e388af7b4558cd7af94d59906"),
    (
        "z40000 r20000 z140001",
        "",
        "8511dd66ea9976b865518dbb9fbca412f2f4f6c72972b9db0386ce437c1dba34",
    ),
    (
        "z40000 r20000 z140001",
        "sha256/4k",
        "c5f981b54ba0a6e73b16b63a9b4c77750731fe00aff372a86c7efffdfbf0a78c",
    ),
    ("z40000 r20000 z140001", "sha1/512", "25e02a5b6a66778f38e03cc9b24756d7cc0e8f1c"),
    (
        "r131072 z262144 r65536 z1000",
        "",
        "149da8c26f87e22569c07f2249ff990127e003d5ddbe5f543d85d0cb0be1bdfe",
    ),
    (
        "r131072 z262144 r65536 z1000",
        "sha512/512k",
        "9c37f11e9462cade7590295b445b922aa3f50015c16d7d0d97abc9e42c9a88b0"
        "43615ac967a5ff269a8adedde092c4eee1777bf2810fb8aa1050d956d9f0da5c",
    ),
    (
        "r131072 z262144 r65536 z1000",
        "sha256/1M",
        "7cef9b8e9cea3836df18ee7bd81b9b5d72eb8a0446108da348a2706fcfb95d94",
    ),
    (
        "z1048576 r4096 z3145728 r777",
        "",
        "acc4fdbea8279957150de383a7166b98facea503335f162f5f66608e069afb63",
    ),
    (
        "z1048576 r4096 z3145728 r777",
        "sha256/4k",
        "79d5a27b821e7c23538abf4b64e178ccf0736e32326e3245e3c90c92baba4e87",
    ),
    (
        "z1048576 r4096 z3145728 r777",
        "sha256/32M",
        "eb0f6e10781ebbdddf56cafbb02379cd2f16116851b833008038d04e3720a4f7",
    ),
    (
        "r1000000 z5000000 r12345",
        "",
        "8c90f89f833b89c6f3bebb4e35d33597b0c48b57110b6b0fea19b0fbb1b62ce4",
    ),
    (
        "r1000000 z5000000 r12345",
        "sha256/1M",
        "eddb04584ecd9bbd6843cecd5a5486e2b985feb71ae26e481ca0ea0f881d93be",
    ),
    (
        "z300000 f4096 z300000",
        "",
        "f4653cefd848c3e1c6d941f6851b21eeab09089786383817ab7167214b098988",
    ),
    (
        "z300000 f4096 z300000",
        "sha256/4",
        "146fae7d6334938871c2db3dcd865d6aba091d8d7de87191f27daf8d9ac181e1",
    ),
    (
        "r70000 z200 r70000 z1000000",
        "sha512",
        "2225bf2edebeaa1c774e3107d09af2cc62b8aa8894195d17370ecfbd0f79769f"
        "b6e86cc36aade6ffa80b99d1228b76d11e611e23ddf13d62f705b08435b9a936",
    ),
    ("r70000 z200 r70000 z1000000", "sha1/512", "aca77a7cebb16966f8e7e284fa0ffdb45ed1f16a"),
    (
        "r65536 z100000000 r3",
        "",
        "f66036ed37c17cfbf70d5d7351b96e11fe74ac9bd1b63377cc4a3ea58f627129",
    ),
    ("r65536 z100000000 r3", "md5/4096", "8bac93bf67eabdbd130d414a1d062bbe"),
    (
        "r65536 z100000000 r3",
        "sha256/32M",
        "a6076cf321d6216d6b80df3a07beb028924aa6c51ced32f6b6792ccffc862644",
    ),
]

# The same for ‘nbdcopy --blkhash=KIND [ nbdkit null size=SIZE ] null:’.
PRINTED_FOR_ZEROES = [
    (2**42, "sha256/1M", "d2c2f9da5d7b7fcff1cb6366fe16a072c1cd05dec4ad89a4d870b6affd824dcc"),
    (2**40, "md5/4M", "cc3db735160665fb6141575f9582407f"),
    (70_000_000_001, "sha1/64k", "63f6b432bef3e2d9e1ff4d714be1385bc3155fbd"),
]


def _disk(recipe: str) -> bytes:
    """Make ``r``andom bytes, ``z``eroes and bytes of 0xff, each with its length."""
    parts = []
    for seed, part in enumerate(recipe.split()):
        length = int(part[1:])
        if part[0] == "r":
            parts.append(random.Random(seed).randbytes(length))
        else:
            parts.append((b"\0" if part[0] == "z" else b"\xff") * length)
    return b"".join(parts)


def _reference(disk: bytes, kind: DigestKind) -> str:
    outer = hashlib.new(kind.algorithm)
    for start in range(0, len(disk), kind.block_size):
        block = disk[start : start + kind.block_size]
        outer.update(hashlib.new(kind.algorithm, block).digest())
    outer.update(len(disk).to_bytes(8, "little"))
    return outer.hexdigest()


def _add(digest: DiskDigest, disk: bytes, start: int, stop: int) -> None:
    content = disk[start:stop]
    if content.count(0) == len(content):
        digest.add_zeroes(start, stop - start)
    else:
        digest.add(start, memoryview(content))


@pytest.mark.parametrize(("recipe", "kind", "printed"), PRINTED)
def test_it_is_what_nbdcopy_prints(recipe: str, kind: str, printed: str) -> None:
    disk = _disk(recipe)
    request = 98_304  # a block and a half
    offsets = list(range(0, len(disk), request))
    random.Random(1).shuffle(offsets)
    digest = DiskDigest(parse_kind(kind), len(disk))
    for offset in offsets:
        _add(digest, disk, offset, min(offset + request, len(disk)))
    assert digest.hexdigest() == printed


@pytest.mark.parametrize(("size", "kind", "printed"), PRINTED_FOR_ZEROES)
def test_a_large_empty_disk_is_one_range(size: int, kind: str, printed: str) -> None:
    digest = DiskDigest(parse_kind(kind), size)
    digest.add_zeroes(0, size)
    assert digest.waiting <= 20  # counted, not held: only the digest of a short end
    assert digest.hexdigest() == printed


@st.composite
def _runs(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """Return a disk with zeroes in it, and where it is cut."""
    lengths = st.one_of(st.integers(1, 40), st.sampled_from([16, 64, 4096, 5000]))
    disk = b""
    for seed in range(draw(st.integers(0, 6))):
        length = draw(lengths)
        disk += random.Random(seed).randbytes(length) if draw(st.booleans()) else bytes(length)
    cuts = draw(st.sets(st.integers(0, len(disk)), max_size=20)) | {0, len(disk)}
    return disk, sorted(cuts)


@given(
    made=_runs(),
    block_size=st.sampled_from([1, 4, 16, 64, 1024, 65536]),
    algorithm=st.sampled_from(ALGORITHMS),
    threads=st.integers(1, 4),
    is_stream=st.booleans(),
    tells_zeroes=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_order_cuts_repeats_and_threads_do_not_matter(
    made: tuple[bytes, list[int]],
    block_size: int,
    algorithm: str,
    threads: int,
    is_stream: bool,
    tells_zeroes: bool,
    order: random.Random,
) -> None:
    disk, cuts = made
    kind = DigestKind(algorithm, block_size)
    digest = DiskDigest(kind, None if is_stream else len(disk))
    ranges = list(pairwise(cuts))
    order.shuffle(ranges)
    # Repeats are cut in other ways than the first time.
    ranges += [(order.choice(cuts), order.choice(cuts)) for _ in range(3)]

    def add(share: list[tuple[int, int]]) -> None:
        for start, stop in share:
            if start >= stop:
                continue
            if tells_zeroes:
                _add(digest, disk, start, stop)
            else:
                digest.add(start, memoryview(disk)[start:stop])

    if threads == 1:
        add(ranges)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(add, [ranges[start::threads] for start in range(threads)]))
    if is_stream:
        digest.end(len(disk))
    assert digest.hexdigest() == _reference(disk, kind)
    assert digest.hexdigest() == _reference(disk, kind)  # asking changes nothing


@given(
    st.integers(1, 2000), st.integers(0, 1999), st.integers(1, 2000), st.sampled_from([1, 16, 512])
)
def test_a_missing_range_is_an_error_until_it_comes(
    size: int, hole: int, hole_size: int, block_size: int
) -> None:
    hole %= size
    end = min(hole + hole_size, size)
    disk = random.Random(size).randbytes(size)
    kind = DigestKind("md5", block_size)
    digest = DiskDigest(kind, size)
    digest.add(0, memoryview(disk)[:hole])
    digest.add(end, memoryview(disk)[end:])
    with pytest.raises(ValueError, match=f"offset {hole // block_size * block_size}$"):
        digest.hexdigest()
    digest.add(hole, memoryview(disk)[hole:end])
    assert digest.hexdigest() == _reference(disk, kind)


def test_threads_that_take_turns_all_the_time() -> None:
    # hashlib lets others run while it hashes more than 2 KiB; this makes it so everywhere else.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        kind = DigestKind("sha1", 4096)
        disk = random.Random(0).randbytes(4_000_000) + bytes(1_000_000)
        digest = DiskDigest(kind, len(disk))
        request = 10_000  # begins and ends in the middle of blocks

        def lane(first: int) -> None:
            for start in range(first * request, len(disk), 4 * request):
                _add(digest, disk, start, min(start + request, len(disk)))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lane, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert digest.waiting == 0
    assert digest.hexdigest() == _reference(disk, kind)


def test_a_stream_without_an_end_has_no_digest() -> None:
    digest = DiskDigest(DigestKind(), None)
    digest.add(0, memoryview(b"abc"))
    with pytest.raises(ValueError, match="end of the stream"):
        digest.hexdigest()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 101), (100, 1), (5, -1)])
def test_what_is_not_on_the_disk_is_refused(offset: int, length: int) -> None:
    digest = DiskDigest(DigestKind(), 100)
    with pytest.raises(ValueError, match="are not on a disk of 100 bytes"):
        digest.add_zeroes(offset, length)


def test_only_what_is_ahead_waits() -> None:
    kind = DigestKind("sha256", 4096)
    disk = random.Random(0).randbytes(64 * 4096)
    digest = DiskDigest(kind, len(disk))
    for block in range(1, 63):  # all but the first
        digest.add(block * 4096, memoryview(disk)[block * 4096 : (block + 1) * 4096])
    assert digest.waiting == 62 * 32
    digest.add(0, memoryview(disk)[:100])
    assert digest.waiting == 62 * 32 + 4096  # a part is held with its content
    digest.add(100, memoryview(disk)[100:4096])
    assert digest.waiting == 0
    digest.add(0, memoryview(disk)[:100])  # once more, too late
    assert digest.waiting == 0
    digest.add(63 * 4096, memoryview(disk)[63 * 4096 :])
    assert digest.hexdigest() == _reference(disk, kind)


# What nbdcopy 1.24.4 does with --blkhash=TEXT.
@pytest.mark.parametrize(
    ("text", "algorithm", "block_size"),
    [
        (None, "sha256", 65536),
        ("", "sha256", 65536),
        ("md5", "md5", 65536),
        ("sHa512", "sha512", 65536),
        ("sha1/1m", "sha1", 2**20),
        ("sha256/4K", "sha256", 4096),
        ("sha256/4096", "sha256", 4096),
        ("sha256/8S", "sha256", 4096),
        ("sha256/4B", "sha256", 4),
        ("sha256/1", "sha256", 1),
        ("sha256/2G", "sha256", 2**31),
    ],
)
def test_kinds(text: str | None, algorithm: str, block_size: int) -> None:
    kind = parse_kind(text)
    assert (kind.algorithm, kind.block_size) == (algorithm, block_size)
    assert parse_kind(str(kind)) == kind


def test_a_kind_is_shown_as_it_is_written() -> None:
    shown = [str(parse_kind(text)) for text in (None, "MD5/512", "sha1/1024K", "sha256/2G")]
    assert shown == ["sha256/64k", "md5/512", "sha1/1M", "sha256/2048M"]


@pytest.mark.parametrize("text", ["sha384", "sha3-256", "crc32c", "sha", "64k", "/64k", " sha256"])
def test_other_algorithms_are_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(UsageError, match="is not a digest") as caught:
        parse_kind(text)
    assert caught.value.hint is not None
    assert "md5, sha1, sha256 or sha512" in caught.value.hint


@pytest.mark.parametrize(
    "size", ["", "0", "3", "12", "48k", "5000", "-4", "k", "s", "4k/", "/4k", "1.5k", "4G", "1e"]
)
def test_other_block_sizes_are_refused(size: str) -> None:
    with pytest.raises(UsageError, match="the block size of the digest"):
        parse_kind(f"sha256/{size}")
