#!/usr/bin/python3
"""Writes a vmlinux with only what a VMM has to load.

The linker aligns segments and the entry code to 2 MiB and fills the gaps, in
the file and within segments: a third of it. Here each run of pages with
content becomes a PT_LOAD segment of its own, page-aligned in the file too, so
that a VMM can map it; sections and symbols are gone. Addresses stay.
"""

import struct
import sys

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
PT_LOAD, PT_NOTE = 1, 4
PAGE = 4096
# A gap shorter than this isn't worth a segment.
GAP_PAGES = 8
# What the linker fills gaps with: nothing, or int3 within code.
FILLERS = (b"\0" * PAGE, b"\xcc" * PAGE)


def runs(data):
    """The (start, end) page numbers of runs with content; short gaps don't end a run."""
    found = []
    for page in range((len(data) + PAGE - 1) // PAGE):
        content = data[page * PAGE : (page + 1) * PAGE]
        if any(content == filler[: len(content)] for filler in FILLERS):
            continue
        if found and page - found[-1][1] < GAP_PAGES:
            found[-1][1] = page + 1
        else:
            found.append([page, page + 1])
    return found


def pack(image):
    """The packed image of an ELF image."""
    header = list(EHDR.unpack_from(image))
    program_offset, size, count = header[5], header[9], header[10]
    segments, notes = [], []
    for number in range(count):
        kind, flags, offset, virtual, physical, in_file, in_memory, align = PHDR.unpack_from(image, program_offset + number * size)
        data = image[offset : offset + in_file]
        if kind == PT_NOTE:
            notes.append((flags, data, virtual, physical, align))
        elif kind == PT_LOAD:
            if virtual % PAGE or physical % PAGE:
                sys.exit(f"pack: segment at {physical:#x} is not page-aligned")
            found = runs(data) or [[0, 0]]
            ends = [start * PAGE for start, _ in found[1:]] + [in_memory]
            for (start, stop), end in zip(found, ends):
                content = data[start * PAGE : stop * PAGE]
                segments.append((flags, content, virtual + start * PAGE, physical + start * PAGE, end - start * PAGE))

    out = bytearray(-(-(EHDR.size + PHDR.size * (len(segments) + len(notes))) // PAGE) * PAGE)
    program = []
    for flags, content, virtual, physical, in_memory in segments:
        program.append((PT_LOAD, flags, len(out), virtual, physical, len(content), in_memory, PAGE))
        out += content + b"\0" * (-len(content) % PAGE)
    for flags, data, virtual, physical, align in notes:
        program.append((PT_NOTE, flags, len(out), virtual, physical, len(data), len(data), align))
        out += data

    header[5], header[6], header[10], header[11:] = EHDR.size, 0, len(program), [0, 0, 0]
    EHDR.pack_into(out, 0, *header)
    for number, entry in enumerate(program):
        PHDR.pack_into(out, EHDR.size + number * PHDR.size, *entry)
    return out


with open(sys.argv[1], "rb") as source:
    packed = pack(source.read())
with open(sys.argv[2], "wb") as target:
    target.write(packed)
