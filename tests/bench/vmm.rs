//! Starts VMMs, ours and others', and waits for a sign of life of their guests.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use casemate_protocol::{CONTROL_PORT, GUEST_CID};
use casemate_vmm::config::{Confinement, VmConfig, VsockConfig, VsockPort};
use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;

/// Guest memory of every boot that is measured, MiB.
pub(crate) const MEMORY_MIB: u32 = 128;
const SIGN: &[u8] = b"casemate-bench: up";
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for every VMM: what it needs beyond that is its own business.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// A VMM under way; killed when dropped.
pub(crate) struct Vmm(Child);

impl Vmm {
    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The files that all boots use.
pub(crate) struct Files {
    /// `casemate-vmm`.
    pub vmm: PathBuf,
    /// Uncompressed vmlinux.
    pub kernel: PathBuf,
    /// Our own initrd, with the agent.
    pub agent_initrd: PathBuf,
    /// The initrd of [`SIGN`].
    pub sign_initrd: PathBuf,
}

/// Milliseconds from the exec of our VMM until the guest's init reports on the console.
pub(crate) fn boot_ours(files: &Files) -> Result<f64> {
    let (reader, writer) = std::io::pipe()?;
    let mut handed = Handed::default();
    let mut config = config(files, &files.sign_initrd, &mut handed)?;
    config.console = Some(handed.add(&writer)?);
    // The VMM asks for a talkative console by itself; the last word on the log's level counts.
    config.cmdline = "quiet".into();
    drop(writer);
    let (_vmm, begun) = start(files, &config, handed)?;
    await_sign(reader, begun)
}

/// The same with Firecracker.
pub(crate) fn boot_firecracker(files: &Files, firecracker: &Path) -> Result<f64> {
    let mut document = tempfile::NamedTempFile::new()?;
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": files.kernel,
            "initrd_path": files.sign_initrd,
            "boot_args": format!("{CMDLINE} reboot=k pci=off nomodule i8042.noaux i8042.nomux i8042.dumbkbd"),
        },
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
    });
    document.write_all(config.to_string().as_bytes())?;
    let mut command = Command::new(firecracker);
    command
        .args(["--no-api", "--level", "Error", "--config-file"])
        .arg(document.path());
    boot_on_stdout(command)
}

/// The same with QEMU's microvm machine.
pub(crate) fn boot_qemu(files: &Files) -> Result<f64> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,acpi=off",
    ]);
    command.args([
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-smp",
        "1",
        "-m",
        &MEMORY_MIB.to_string(),
    ]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command
        .arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.sign_initrd);
    command.args(["-append", CMDLINE]);
    boot_on_stdout(command)
}

/// Starts our VMM as the shim does for an empty sandbox; milliseconds until the agent answered a call.
pub(crate) fn boot_agent(files: &Files) -> Result<(Vmm, UnixStream, f64)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut handed = Handed::default();
    let mut config = config(files, &files.agent_initrd, &mut handed)?;
    let port = VsockPort {
        port: CONTROL_PORT,
        fd: handed.add(&theirs)?,
    };
    config.vsock = Some(VsockConfig {
        cid: GUEST_CID,
        ports: vec![port],
    });
    config.balloon = true;
    drop(theirs);
    let (vmm, begun) = start(files, &config, handed)?;
    ours.set_read_timeout(Some(PATIENCE))?;
    hello(&ours).context("the agent did not answer")?;
    let took = milliseconds(begun);
    Ok((vmm, ours, took))
}

fn config(files: &Files, initrd: &Path, handed: &mut Handed) -> Result<VmConfig> {
    let mut open = |path: &Path| -> Result<i32> {
        handed.add(&File::open(path).with_context(|| format!("open {}", path.display()))?)
    };
    let (kernel, initrd) = (open(&files.kernel)?, Some(open(initrd)?));
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm")?;
    Ok(VmConfig {
        kvm: handed.add(&kvm)?,
        memory_mib: MEMORY_MIB,
        vcpus: 1,
        kernel,
        initrd,
        cmdline: String::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        shares: Vec::new(),
        vsock: None,
        balloon: false,
        console: None,
        control: None,
        confinement: Confinement::Full,
    })
}

/// Descriptors that the next child inherits.
#[derive(Default)]
struct Handed(Vec<OwnedFd>);

impl Handed {
    /// Adds a copy of the descriptor and gives its number.
    fn add(&mut self, fd: &impl AsFd) -> Result<i32> {
        let copy = fd.as_fd().try_clone_to_owned()?;
        rustix::io::fcntl_setfd(&copy, FdFlags::empty())?;
        let number = copy.as_raw_fd();
        self.0.push(copy);
        Ok(number)
    }
}

/// Starts the VMM; our copies of what it was handed are closed then.
fn start(files: &Files, config: &VmConfig, mut handed: Handed) -> Result<(Vmm, Instant)> {
    let mut document = File::from(rustix::fs::memfd_create("config", MemfdFlags::CLOEXEC)?);
    document.write_all(&serde_json::to_vec(config)?)?;
    document.rewind()?;
    let mut command = Command::new(&files.vmm);
    command.args(["--config-fd", &handed.add(&document)?.to_string()]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit());
    let begun = Instant::now();
    let child = command
        .spawn()
        .with_context(|| format!("start {}", files.vmm.display()))?;
    Ok((Vmm(child), begun))
}

fn boot_on_stdout(mut command: Command) -> Result<f64> {
    let (reader, writer) = std::io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::inherit());
    let begun = Instant::now();
    let child = command
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let _vmm = Vmm(child);
    drop(command);
    await_sign(reader, begun)
}

fn await_sign(mut console: impl Read, begun: Instant) -> Result<f64> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !seen.windows(SIGN.len()).any(|window| window == SIGN) {
        let read = console.read(&mut buffer)?;
        ensure!(
            read > 0,
            "the console closed after: {}",
            String::from_utf8_lossy(&seen)
        );
        seen.extend_from_slice(&buffer[..read]);
        ensure!(
            begun.elapsed() < PATIENCE,
            "no sign of life; the console: {}",
            String::from_utf8_lossy(&seen)
        );
    }
    Ok(milliseconds(begun))
}

fn milliseconds(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
}

/// Bytes of the guest's memory that nothing uses, some time after the first answer.
pub(crate) fn free_memory(agent: &UnixStream) -> Result<u64> {
    // HelloResponse.free_bytes.
    number(&hello(agent)?, 5)?.context("the agent did not tell its free memory")
}

/// One ttrpc call, written out, as a client library would be measured as well; the response's payload.
fn hello(mut stream: &UnixStream) -> Result<Vec<u8>> {
    let field = |number: u8, value: &str| {
        let mut bytes = vec![number << 3 | 2, value.len() as u8];
        bytes.extend_from_slice(value.as_bytes());
        bytes
    };
    let request = [field(1, "casemate.agent.v1.Agent"), field(2, "Hello")].concat();
    let mut frame = Vec::new();
    frame.extend_from_slice(&(request.len() as u32).to_be_bytes());
    frame.extend_from_slice(&1_u32.to_be_bytes());
    frame.extend_from_slice(&[1, 0]); // a request, no flags
    frame.extend_from_slice(&request);
    stream.write_all(&frame)?;
    let mut header = [0; 10];
    stream.read_exact(&mut header)?;
    if header[8] != 2 {
        bail!("the agent sent {header:?} instead of a response");
    }
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    ensure!(length < 4096, "the agent's answer has {length} bytes");
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let mut payload = Vec::new();
    for field in fields(&body)? {
        match field {
            // The status, empty where all is well.
            (1, Value::Bytes(status)) => ensure!(
                status.is_empty(),
                "the agent answered with an error: {}",
                String::from_utf8_lossy(status)
            ),
            (2, Value::Bytes(bytes)) => payload = bytes.to_vec(),
            _ => {}
        }
    }
    Ok(payload)
}

/// A field's value, as far as these messages have such.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The last value of a number field.
fn number(message: &[u8], wanted: u64) -> Result<Option<u64>> {
    Ok(fields(message)?
        .into_iter()
        .rev()
        .find_map(|field| match field {
            (number, Value::Number(value)) if number == wanted => Some(value),
            _ => None,
        }))
}

/// The fields of a protobuf message with their numbers.
fn fields(mut message: &[u8]) -> Result<Vec<(u64, Value<'_>)>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let value = varint(&mut message)?;
        let value = match tag & 7 {
            0 => Value::Number(value),
            2 => {
                let length = usize::try_from(value)?;
                let (bytes, rest) = message
                    .split_at_checked(length)
                    .with_context(|| format!("a field of {length} bytes is cut off"))?;
                message = rest;
                Value::Bytes(bytes)
            }
            other => bail!("a field of wire type {other}"),
        };
        fields.push((tag >> 3, value));
    }
    Ok(fields)
}

fn varint(message: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first().context("a number is cut off")?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    bail!("a number of more than 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_among_other_fields_is_found() {
        let message = [0x0a, 2, b'h', b'i', 0x18, 5, 0x28, 0x80, 0x01];

        assert_eq!(number(&message, 5).unwrap(), Some(128));
        assert_eq!(number(&message, 4).unwrap(), None);
    }

    #[test]
    fn fields_of_a_message_cut_off_are_an_error() {
        for message in [&[0x0a][..], &[0x0a, 5, 1], &[0x28, 0x80], &[0x0d, 0]] {
            assert!(fields(message).is_err(), "{message:?}");
        }
    }
}
