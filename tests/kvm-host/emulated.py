"""The emulated KVM host: QEMU's TCG emulates AMD's SVM, a Linux with kvm_amd
in it offers a true /dev/kvm, and `init` beside this file runs one job there.

The job's streams travel over virtio-serial ports, which hold the writer back
instead of losing bytes. Each ends with a token, as a port itself has no end.
"""

import collections
import ctypes
import json
import mmap
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import initramfs

HOST_FAILED = 125
TIMED_OUT = 124
CONSOLE_LINES = 30
HERE = os.path.dirname(os.path.realpath(__file__))

# SVM's exit codes, by the names of AMD's manual.
EXIT_NAMES = {
    0x00: "cr0_read", 0x04: "cr4_read", 0x10: "cr0_write", 0x13: "cr3_write", 0x14: "cr4_write",
    0x60: "intr", 0x61: "nmi", 0x64: "vintr", 0x65: "cr0_sel_write", 0x72: "cpuid", 0x77: "pause", 0x78: "hlt",
    0x79: "invlpg", 0x7B: "ioio", 0x7C: "msr", 0x7F: "shutdown", 0x81: "vmmcall", 0x89: "wbinvd", 0x8A: "monitor",
    0x8B: "mwait", 0x8D: "xsetbv", 0x400: "npf",
}  # fmt: skip

# Variables that a command may count on; all others are the emulated host's own.
PASSED = ("LANG", "LC_ALL", "TERM", "USER", "LOGNAME", "SHELL", "PATH", "HOME")
PASSED_PREFIXES = ("CASEMATE_", "CARGO_", "RUST")

MACHINE = ["qemu-system-x86_64", "-M", "microvm,pcie=off,rtc=on,isa-serial=on,x-option-roms=off,acpi=off",
           "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]  # fmt: skip
CMDLINE = "console=ttyS0 panic=-1 reboot=t tsc=reliable no_timer_check"
# TCG lets guests execute XSETBV without telling KVM: every guest then finds XSAVE inconsistent, says so at
# length (half a virtual ms) and does without. It stays, as other VMMs refuse a host that lacks it.
PROCESSOR = "EPYC-Milan,+svm,+npt"
# Without ERMS and FSRM: a `rep movsb` would count as one instruction per byte.
CLOCK = ["-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=0,sleep=off", "-smp", "1", "-seed", "42",
         "-rtc", "base=2026-01-01T00:00:00,clock=vm", "-cpu", PROCESSOR + ",-erms,-fsrm"]  # fmt: skip
CLOCK_CMDLINE = "tsc_early_khz=1000000 nokaslr norandmaps mitigations=off job=/job"
NINE_P = "root=rootfs rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose rw"


class Stream(threading.Thread):
    """Copies what the host sends on a port to a descriptor of ours, up to the token."""

    def __init__(self, source, target, token, over):
        super().__init__(daemon=True)
        self._source, self._target, self._token, self._over = source, target, token, over
        self.complete = False

    def run(self):
        held = b""
        while data := self._source.recv(1 << 16):
            held += data
            if held.endswith(self._token):
                self._write(held[: -len(self._token)])
                self.complete = True
                return
            # The token may be arriving in pieces: keep as much back.
            keep = len(self._token) - 1
            self._write(held[:-keep])
            held = held[-keep:]

    def _write(self, data):
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._target, view) :]
        except BrokenPipeError:
            self._over(128 + signal.SIGPIPE)
            raise SystemExit from None


class Run:
    """One job in one emulated host."""

    def __init__(self, options, directory):
        self._options = options
        self._directory = directory
        # With a clock two runs must be the same to the byte.
        self._token = "end-of-stream-" * 3 if options.clock else secrets.token_hex(24)
        self._console = collections.deque(maxlen=CONSOLE_LINES)
        self._done = threading.Event()
        self._status = None
        self._exited = False
        self._exits = {}
        self._ports = {}
        self._inherited = []

    def run(self):
        """Runs the job; returns its exit status."""
        arguments = self._machine()
        parent = os.getpid()
        qemu = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, pass_fds=self._inherited,
                                preexec_fn=lambda: prepare(parent, self._options.core))  # fmt: skip
        for descriptor in self._inherited:
            os.close(descriptor)
        try:
            return self._attend(qemu)
        finally:
            self._done.set()
            # A profile is written at an orderly end.
            qemu.terminate() if self._options.profile else qemu.kill()
            qemu.wait()

    def _attend(self, qemu):
        options, token = self._options, self._token.encode()
        streams = [Stream(self._ports[2], 1, token, self._end), Stream(self._ports[3], 2, token, self._end)]
        for stream in streams:
            stream.start()
        for target, *arguments in ((self._read_control,), (self._read_console,), (self._await_qemu, qemu)):
            threading.Thread(target=target, args=arguments, daemon=True).start()
        if 4 in self._ports:
            threading.Thread(target=self._feed, daemon=True).start()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: self._end(128 + number))
        caller, deadline = os.getppid(), time.monotonic() + options.timeout
        while not self._done.wait(1):
            if time.monotonic() > deadline:
                self._complain(f"the time limit of {options.timeout:g} s is over")
                return TIMED_OUT
            if os.getppid() != caller:
                return HOST_FAILED
        for stream in streams if self._exited else []:
            stream.join(max(deadline - time.monotonic(), 1))
            if not stream.complete:
                self._complain("the command ended, but its output did not")
                return TIMED_OUT
        if options.exits and self._exited:
            with open(options.exits, "w", encoding="utf-8") as file:
                json.dump(self._exits, file, indent=1, sort_keys=True)
        return self._status

    def _end(self, status):
        if not self._done.is_set():
            self._status = status
            self._done.set()

    def _read_control(self):
        with self._ports[1].makefile("r", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                word, _, rest = line.strip().partition(" ")
                if word == "exit":
                    self._exited = True
                    self._end(int(rest))
                elif word == "exits":
                    count, _, reason = rest.partition(" ")
                    self._exits[EXIT_NAMES.get(int(reason), f"svm_{int(reason):#x}")] = int(count)

    def _read_console(self):
        with self._ports["console"].makefile("rb") as lines:
            for line in lines:
                self._console.append(line)
                if self._options.console:
                    sys.stderr.buffer.write(line)
                    sys.stderr.flush()

    def _await_qemu(self, qemu):
        _, complaint = qemu.communicate()
        # It says so of some twenty features of the processor model, for each processor.
        complaint = b"".join(line for line in complaint.splitlines(True) if b"TCG doesn't support" not in line)
        if not self._done.is_set():
            self._complain(f"the emulated host ended early (QEMU: {qemu.returncode})", complaint)
            self._end(HOST_FAILED)

    def _feed(self):
        port = self._ports[4]
        try:
            port.sendall(b"\n")
            while data := os.read(0, 1 << 16):
                port.sendall(data)
        except OSError:
            return
        port.shutdown(socket.SHUT_WR)

    def _complain(self, text, detail=b""):
        if not self._options.console:
            detail += b"".join(self._console)
        sys.stderr.buffer.write(f"kvm-host: {text}\n".encode() + detail)
        sys.stderr.flush()

    def _machine(self):
        """Prepares the job's files; returns QEMU's command line."""
        options = self._options
        cmdline = f"{CMDLINE} loglevel={7 if options.console else 4} "
        # The first device: its ports are /dev/vport0pN.
        arguments = [*MACHINE, "-m", str(options.memory), "-kernel", options.kernel, "-device", "virtio-serial-device"]
        self._write_job()
        if options.clock:
            arguments += [*self._plugin(), *CLOCK, "-initrd", self._write_initramfs()]
            cmdline += CLOCK_CMDLINE
        else:
            # The job leaves the first processor alone (README.md).
            arguments += ["-accel", "tcg,thread=multi,tb-size=512", "-smp", str(options.cpus + 1), "-cpu", PROCESSOR,
                          "-fsdev", "local,id=fs0,path=/,security_model=none,multidevs=remap",
                          "-device", "virtio-9p-device,fsdev=fs0,mount_tag=rootfs"]  # fmt: skip
            if options.disk:
                for descriptor in self._make_disk():
                    arguments += ["-add-fd", f"fd={descriptor},set=1"]
                arguments += ["-drive", "file=/dev/fdset/1,if=none,id=disk,format=raw,cache=unsafe,discard=unmap",
                              "-device", "virtio-blk-device,drive=disk"]  # fmt: skip
            cmdline += f"tsc_early_khz={tsc_khz()} {NINE_P} init={self._directory}/init job={self._directory}"
        arguments += ["-append", cmdline, *self._port("console"), "-serial", "chardev:console"]
        for number in range(1, 5 if options.stdin else 4):
            arguments += [*self._port(number), "-device", f"virtserialport,nr={number},chardev=port{number}"]
        return arguments

    def _plugin(self):
        """QEMU's option for a profile, if one is asked for."""
        if not self._options.profile:
            return []
        plugin = os.path.join(self._directory, "profile.so")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, os.path.join(HERE, "profile.c")], check=True)
        return ["-plugin", f"{plugin},out={os.path.abspath(self._options.profile)}"]

    def _port(self, name):
        ours, theirs = socket.socketpair()
        descriptor = os.dup(theirs.fileno())
        theirs.close()
        self._ports[name] = ours
        self._inherited.append(descriptor)
        return ["-chardev", f"socket,id={name if name == 'console' else f'port{name}'},fd={descriptor}"]

    def _write_job(self):
        options = self._options
        settings = {
            "TOKEN": self._token,
            "USER_ID": options.user or 0,
            "CLOCK": int(options.clock) or "",
            "CPUS": options.cpus,
            "EXITS": "1" if options.exits else "",
            "LAST_PORT": 4 if options.stdin else 3,
            "SCRATCH": " ".join(["/var/lib/casemate", *options.scratch]),
        }
        self._write("settings", "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items()))
        lines = ["#!/bin/busybox sh\n"]
        lines += [f"export {name}={shlex.quote(value)}\n" for name, value in self._environment().items()]
        directory = shlex.quote(os.getcwd())
        lines.append(f"cd {directory} {'2>/dev/null || cd /' if options.clock else '|| exit 125'}\n")
        lines.append(f"exec {shlex.join(options.command)}\n")
        self._write("command", "".join(lines))
        shutil.copy(os.path.join(HERE, "init"), self._directory)

    def _environment(self):
        given = os.environ
        names = [name for name in given if name in PASSED or name.startswith(PASSED_PREFIXES)]
        environment = {name: given[name] for name in sorted(names)}
        if self._options.clock:
            environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        environment |= {"TMPDIR": "/run/tmp", "CASEMATE_KVM_HOST": "here"}
        if self._options.user:
            user = self._options.user
            environment |= {"HOME": f"/run/home/{user}", "XDG_RUNTIME_DIR": f"/run/user/{user}"}
        for item in self._options.env:
            name, equals, value = item.partition("=")
            environment[name] = value if equals else given.get(name, "")
        return environment

    def _write(self, name, text):
        path = os.path.join(self._directory, name)
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.chmod(path, 0o755)

    def _make_disk(self):
        """A sparse ext4 disk that is already unlinked, so that nothing stays whatever happens."""
        path = os.path.join(self._directory, "disk")
        with open(path, "wb") as file:
            file.truncate(self._options.disk << 30)
        subprocess.run(["mkfs.ext4", "-q", "-m0", "-O^has_journal", "-Elazy_itable_init=1,nodiscard", path],
                       check=True, stdin=subprocess.DEVNULL, env={"PATH": "/usr/sbin:/sbin"})  # fmt: skip
        # QEMU takes the descriptor whose mode fits, and opens read-only first.
        descriptors = [os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)]
        os.unlink(path)
        self._inherited += descriptors
        return descriptors

    def _write_initramfs(self):
        path = os.path.join(self._directory, "initramfs")
        with open(path, "wb") as out:
            archive = initramfs.Initramfs(out)
            archive.add_character_device("/dev/console", 5, 1)
            archive.copy(os.path.join(self._directory, "init"), "/init")
            for name in ("init", "command", "settings"):
                archive.copy(os.path.join(self._directory, name), f"/job/{name}", "/copied")
            self._copy_machine(archive)
            archive.finish()
        return path

    def _copy_machine(self, archive):
        busybox = "/bin/busybox"
        archive.copy(os.path.realpath(busybox), busybox)
        for directory in ("proc", "sys", "dev", "run", "root", "tmp", "etc", "var/lib", "usr/bin", "usr/lib", "usr/sbin"):
            archive.add_directory(f"/copied/{directory}")
        for link in ("bin", "sbin", "lib", "lib64"):
            archive.add_directory(f"/copied/usr/{link}")
            archive.add_symlink(f"/copied/{link}", f"usr/{link}")
        archive.add_symlink("/copied/var/run", "/run")
        copies = [*self._options.copy]
        if self._options.user:
            copies.append("/usr/bin/setpriv")
        for item in copies:
            source, _, target = item.partition(":")
            source = os.path.abspath(source)
            if target:
                archive.copy(source, target, "/copied")
            else:
                archive.copy_at_own_path(source, "/copied")
        archive.copy(os.path.realpath(busybox), "/usr/bin/busybox", "/copied")
        applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        for applet in applets:
            archive.add_symlink(f"/copied/usr/bin/{applet}", "busybox")


def tsc_khz():
    """This machine's TSC frequency, which TCG hands on. A busy machine disturbs the kernel's own
    calibration so far that it gives the TSC up, and KVM can't run without one."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("0f31 48c1e220 4809d0 c3"))  # rdtsc; shl rdx, 32; or rax, rdx; ret
    rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def both_clocks():
        # The closest of several looks: no interruption between the two clocks.
        looks = []
        for _ in range(20):
            before, ticks, after = time.monotonic_ns(), rdtsc(), time.monotonic_ns()
            looks.append((after - before, (before + after) / 2, ticks))
        return min(looks)[1:]

    start, first = both_clocks()
    time.sleep(0.02)
    end, last = both_clocks()
    return round((last - first) * 1e6 / (end - start))


def prepare(parent, core):
    """In the child: keeps to one processor, if asked to, and is killed when the thread that started it ends."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def run(options):
    """Runs the job described by the options; returns its exit status, or HOST_FAILED."""
    for tool, package in (("qemu-system-x86_64", "qemu-system-x86"), ("busybox", "busybox-static")):
        if not shutil.which(tool):
            print(f"kvm-host: {tool} is missing: apt-get install {package}", file=sys.stderr)
            return HOST_FAILED
    with tempfile.TemporaryDirectory(prefix="casemate-kvm-host-") as directory:
        os.chmod(directory, 0o755)
        status = Run(options, directory).run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may still sit in a read that nothing ends.
    os._exit(status)
