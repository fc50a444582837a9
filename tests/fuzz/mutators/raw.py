"""What can happen to the bytes of any file."""

from __future__ import annotations

import os
from pathlib import Path

from tests.fuzz.sample import Mutator, Rng, Sample, remove

# Numbers at which parsers break, in eight bytes.
NUMBERS = [
    0,
    1,
    2**7,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
HOLE = 3 << 30
"""Bytes of a file that takes no room on the disk, and too much in memory."""


def truncate(sample: Sample, rng: Rng) -> None:
    path = sample.file(rng)
    os.truncate(path, rng.randrange(max(path.stat().st_size, 1)))


def truncate_the_end(sample: Sample, rng: Rng) -> None:
    path = sample.file(rng)
    os.truncate(path, max(path.stat().st_size - rng.randint(1, 64), 0))


def empty(sample: Sample, rng: Rng) -> None:
    os.truncate(sample.file(rng), 0)


def extend(sample: Sample, rng: Rng) -> None:
    with sample.file(rng).open("ab") as file:
        file.write(rng.choice([rng.randbytes(rng.randint(1, 5000)), b"\0" * rng.randint(1, 5000)]))


def extend_by_a_hole(sample: Sample, rng: Rng) -> None:
    os.truncate(sample.file(rng), HOLE)


def only_a_hole(sample: Sample, rng: Rng) -> None:
    path = sample.file(rng)
    os.truncate(path, 0)
    os.truncate(path, HOLE)


def flip_a_bit(sample: Sample, rng: Rng) -> None:
    change(sample.file(rng), lambda data: flip(data, rng, 1))


def flip_bits(sample: Sample, rng: Rng) -> None:
    change(sample.file(rng), lambda data: flip(data, rng, rng.randint(2, 200)))


def flip_bits_at_the_start(sample: Sample, rng: Rng) -> None:
    change(sample.file(rng), lambda data: flip(data, rng, rng.randint(1, 8), 0, 512))


def flip_bits_at_the_end(sample: Sample, rng: Rng) -> None:
    change(
        sample.file(rng), lambda data: flip(data, rng, rng.randint(1, 8), max(len(data) - 512, 0))
    )


def write_bytes(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.choice([0, 0xFF, 0x7F, 0x80, rng.randrange(256)])

    change(sample.file(rng), edit)


def write_a_number(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        size = rng.choice([2, 4, 8])
        number = rng.choice(NUMBERS) % 2 ** (8 * size)
        start = rng.randrange(len(data))
        data[start : start + size] = number.to_bytes(size, rng.choice(["little", "big"]))

    change(sample.file(rng), edit)


def zero_a_range(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        start, end = part(data, rng)
        data[start:end] = bytes(end - start)

    change(sample.file(rng), edit)


def fill_a_range_with_noise(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        start, end = part(data, rng)
        data[start:end] = rng.randbytes(end - start)

    change(sample.file(rng), edit)


def duplicate_a_range(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        start, end = part(data, rng)
        data[end:end] = data[start:end] * rng.choice([1, 1, 2, 50])

    change(sample.file(rng), edit)


def remove_a_range(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        start, end = part(data, rng)
        del data[start:end]

    change(sample.file(rng), edit)


def swap_two_ranges(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        size = rng.randint(1, max(len(data) // 4, 1))
        a, b = (rng.randrange(max(len(data) - size, 1)) for _ in range(2))
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]

    change(sample.file(rng), edit)


def swap_the_header_with_another_file(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        size = rng.choice([4, 8, 64, 512, 4096])
        data[:size] = sample.other(rng)[:size]

    change(sample.file(rng), edit)


def splice_with_another_file(sample: Sample, rng: Rng) -> None:
    def edit(data: bytearray) -> None:
        other = sample.other(rng)
        data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]

    change(sample.file(rng), edit)


def replace_by_another_file(sample: Sample, rng: Rng) -> None:
    sample.file(rng).write_bytes(sample.other(rng))


def replace_by_noise(sample: Sample, rng: Rng) -> None:
    sample.file(rng).write_bytes(rng.randbytes(rng.randint(1, 20000)))


def replace_by_text(sample: Sample, rng: Rng) -> None:
    text = rng.choice(["{}", "[]", "null", "\n", "<html></html>", "{" * 10**5, "[" * 10**6, '"a'])
    sample.file(rng).write_text(text, encoding="utf-8")


def replace_by_a_folder(sample: Sample, rng: Rng) -> None:
    path = sample.file(rng)
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "file").write_text("", encoding="utf-8")


def replace_by_a_loop_of_links(sample: Sample, rng: Rng) -> None:
    path = sample.file(rng)
    path.unlink()
    path.symlink_to(path.name)


def replace_by_a_dangling_link(sample: Sample, rng: Rng) -> None:
    path = sample.file(rng)
    path.unlink()
    path.symlink_to(sample.work / "outside" / "nothing")


def replace_by_a_link_to_itself(sample: Sample, rng: Rng) -> None:
    """A link to the same file elsewhere, as Hugging Face's cache has them: no fault."""
    path = sample.file(rng)
    path.rename(sample.work / "outside" / "blob")
    path.symlink_to(sample.work / "outside" / "blob")
    sample.must = "succeed"


def replace_by_a_pipe(sample: Sample, rng: Rng) -> None:
    """Nobody ever writes to it: who opens it waits for ever."""
    path = sample.file(rng)
    path.unlink()
    os.mkfifo(path)


def replace_by_an_endless_device(sample: Sample, rng: Rng) -> None:
    path = sample.file(rng)
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/urandom", "/dev/null", "/dev/full"]))


def another_suffix(sample: Sample, rng: Rng) -> None:
    suffixes = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".pth.tar", ".weights.h5", ".keras")
    path = sample.path.with_name(f"renamed{rng.choice((*suffixes, '', '.zip', '.orbax'))}")
    sample.path.rename(path)
    sample.path = path


def a_difficult_name(sample: Sample, rng: Rng) -> None:
    names = [
        "a b",
        "ä",
        "模型",
        "-x",
        "%s%n",
        "a'b\"c",
        "..a",
        "$(touch x)",
        "a" * 180,
        "a;b",
        "{}",
    ]
    _, dot, rest = sample.path.name.partition(".")
    sample.path = sample.path.rename(sample.path.with_name(rng.choice(names) + dot + rest))
    sample.must = "succeed"


def remove_it(sample: Sample, rng: Rng) -> None:
    remove(sample.file(rng))


def nothing(sample: Sample, rng: Rng) -> None:
    """The file as it is."""
    sample.must = "succeed"


# Numbers are how often each is drawn.
MUTATORS: dict[Mutator, int] = {
    truncate: 2,
    truncate_the_end: 1,
    empty: 1,
    extend: 1,
    extend_by_a_hole: 1,
    only_a_hole: 1,
    flip_a_bit: 4,
    flip_bits: 4,
    flip_bits_at_the_start: 4,
    flip_bits_at_the_end: 4,
    write_bytes: 4,
    write_a_number: 4,
    zero_a_range: 2,
    fill_a_range_with_noise: 2,
    duplicate_a_range: 2,
    remove_a_range: 2,
    swap_two_ranges: 1,
    swap_the_header_with_another_file: 2,
    splice_with_another_file: 1,
    replace_by_another_file: 1,
    replace_by_noise: 1,
    replace_by_text: 1,
    replace_by_a_folder: 1,
    replace_by_a_loop_of_links: 1,
    replace_by_a_dangling_link: 1,
    replace_by_a_link_to_itself: 1,
    replace_by_a_pipe: 1,
    replace_by_an_endless_device: 1,
    another_suffix: 1,
    a_difficult_name: 1,
    remove_it: 1,
    nothing: 1,
}


def change(path: Path, edit) -> None:
    """Edit the bytes of a file; an empty one gets some first."""
    data = bytearray(path.read_bytes() or b"\0")
    edit(data)
    path.write_bytes(data)


def flip(data: bytearray, rng: Rng, count: int, start: int = 0, end: int | None = None) -> None:
    """Flip bits in a range."""
    for _ in range(count):
        at = rng.randrange(start, min(end or len(data), len(data)))
        data[at] ^= 1 << rng.randrange(8)


def part(data: bytearray, rng: Rng) -> tuple[int, int]:
    """A range, short ones more often."""
    start = rng.randrange(len(data))
    longest = rng.choice([8, 64, 512, len(data)])
    return start, min(start + rng.randint(1, longest), len(data))
