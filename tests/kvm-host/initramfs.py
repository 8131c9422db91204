"""Writes an initramfs (cpio, newc) that holds copies of files of this machine.

Everything that could differ between two runs (inode numbers, times) is fixed,
so that the same files give the same bytes.
"""

import os
import stat
import subprocess
import sys


class Initramfs:
    """A cpio archive under construction; every path is added once."""

    def __init__(self, out):
        self._out = out
        self._inode = 0
        self._seen = set()

    def add_file(self, path, data, mode=0o644):
        """Adds a regular file of these bytes."""
        self.add_parents(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def add_directory(self, path, mode=0o755):
        """Adds a directory and the ones above it."""
        self.add_parents(path)
        self._entry(path, stat.S_IFDIR | mode)

    def add_symlink(self, path, target):
        """Adds a symbolic link."""
        self.add_parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, os.fsencode(target))

    def add_character_device(self, path, major, minor, mode=0o600):
        """Adds a character device node."""
        self.add_parents(path)
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def copy(self, source, path, under=""):
        """Copies a file of this machine, a directory with all below it, or a link with what it
        points to, to `path` below `under`; programs bring their interpreters and libraries."""
        status = os.lstat(source)
        if stat.S_ISLNK(status.st_mode):
            self.add_symlink(under + path, os.readlink(source))
            target = os.path.join(os.path.dirname(source), os.readlink(source))
            if os.path.exists(target):
                self.copy(os.path.normpath(target), os.path.normpath(target), under)
        elif stat.S_ISDIR(status.st_mode):
            self.add_directory(under + path, stat.S_IMODE(status.st_mode))
            for name in sorted(os.listdir(source)):
                self.copy(os.path.join(source, name), os.path.join(path, name), under)
        elif stat.S_ISREG(status.st_mode):
            if under + path in self._seen:
                return
            with open(source, "rb") as file:
                data = file.read()
            self.add_file(under + path, data, stat.S_IMODE(status.st_mode))
            if data.startswith(b"\x7fELF"):
                for library in _libraries(source):
                    self.copy_at_own_path(library, under)
            elif data.startswith(b"#!"):
                interpreter = data[2:].split(b"\n", 1)[0].split()
                if interpreter and os.path.exists(interpreter[0]):
                    self.copy_at_own_path(os.fsdecode(interpreter[0]), under)

    def copy_at_own_path(self, path, under=""):
        """Copies to the same path; /lib, /bin and their like are links on a merged-/usr machine, so to where
        they lead."""
        top = "/" + path.split("/")[1]
        if os.path.islink(top):
            self.add_symlink(under + top, os.readlink(top))
            path = os.path.join(os.path.realpath(top), path[len(top) + 1 :])
        self.copy(path, path, under)

    def finish(self):
        """Ends the archive."""
        self._header("TRAILER!!!", 0, 0, (0, 0))

    def add_parents(self, path):
        """Adds the directories above a path."""
        parent = os.path.dirname(path)
        if parent not in ("", "/") and parent not in self._seen:
            self.add_directory(parent)

    def _entry(self, path, mode, data=b"", device=(0, 0)):
        if path in self._seen:
            return
        self._seen.add(path)
        self._header(path, mode, len(data), device)
        self._out.write(data)
        self._out.write(b"\0" * (-len(data) % 4))

    def _header(self, path, mode, size, device):
        self._inode += 1
        name = os.fsencode(path.lstrip("/")) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, size, 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._out.write(header + b"\0" * (-len(header) % 4))


def _libraries(program):
    """The shared libraries and the loader of a program, as paths."""
    found = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return []  # static
    paths = []
    for line in found.stdout.splitlines():
        if "not found" in line:
            sys.exit(f"kvm-host: {program} needs a library that is missing:{line}")
        paths += [word for word in line.split() if word.startswith("/")]
    return paths
