//! What busybox lacks, for use in the guest: a static program that every fixture image carries.

mod packets;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((verb, rest)) if verb == "tree" && !rest.is_empty() => {
            let skip: Vec<PathBuf> = rest[1..].iter().map(PathBuf::from).collect();
            match casemate_tests::list_tree(Path::new(&rest[0]), &skip) {
                Ok(text) => {
                    print!("{text}");
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    eprintln!("{}: {error}", rest[0]);
                    ExitCode::FAILURE
                }
            }
        }
        Some((verb, [])) if verb == "hog" => hog(),
        Some((verb, [])) if verb == "power-off" => power_off(),
        Some((verb, [when])) if verb == "end-agent" => end_agent(when),
        Some((verb, [when])) if verb == "end-kernel" => end_kernel(when),
        Some((verb, [port])) if verb == "udp-echo" => packets::echo(port),
        Some((verb, [address, port])) if verb == "udp-flood" => packets::flood(address, port),
        Some((verb, [address, port, count])) if verb == "udp-ping" => {
            packets::ping(address, port, count)
        }
        Some((verb, [length])) if verb == "stream" && length.parse::<u64>().is_ok() => {
            let length = length.parse().unwrap_or(0);
            match casemate_tests::stream::write(length, &mut std::io::stdout().lock()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Some((verb, [file, text])) if verb == "map" => {
            match map(Path::new(file), text.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("{file}: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Some((verb, [file])) if verb == "data" => match data(Path::new(file)) {
            Ok(ranges) => {
                ranges.iter().for_each(|(from, to)| println!("{from} {to}"));
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{file}: {error}");
                ExitCode::FAILURE
            }
        },
        Some((verb, [file, seconds])) if verb == "lock" => {
            match lock(Path::new(file), seconds.parse().unwrap_or(0)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("{file}: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        _ => {
            eprintln!(
                "usage: guest-tool udp-echo PORT | udp-flood ADDRESS PORT | udp-ping ADDRESS PORT COUNT | map FILE TEXT | lock FILE SECONDS | data FILE | tree ROOT [SKIP…] | stream BYTES | hog | power-off | end-agent MILLISECONDS | end-kernel MILLISECONDS"
            );
            ExitCode::from(2)
        }
    }
}

/// Where a file has data, and not holes: from, to.
fn data(file: &Path) -> std::io::Result<Vec<(u64, u64)>> {
    use rustix::fs::SeekFrom;
    let file = std::fs::File::open(file)?;
    let (mut ranges, mut to) = (Vec::new(), 0);
    loop {
        let from = match rustix::fs::seek(&file, SeekFrom::Data(to)) {
            Ok(from) => from,
            Err(rustix::io::Errno::NXIO) => return Ok(ranges), // a hole to the end
            Err(error) => return Err(error.into()),
        };
        to = rustix::fs::seek(&file, SeekFrom::Hole(from))?;
        ranges.push((from, to));
    }
}

/// Waits until so many milliseconds after the epoch.
fn wait_until(when: &str) {
    let when = std::time::Duration::from_millis(when.parse().unwrap_or(0));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    std::thread::sleep(when.saturating_sub(now.unwrap_or_default()));
}

/// Writes over the code of PID 1, whose /proc is mounted on /watched: its next instruction is its last.
fn end_agent(when: &str) -> ExitCode {
    use std::os::unix::fs::FileExt;
    wait_until(when);
    let maps = std::fs::read_to_string("/watched/1/maps").unwrap_or_default();
    let memory = std::fs::File::options().write(true).open("/watched/1/mem");
    let Ok(memory) = memory else {
        return ExitCode::FAILURE;
    };
    for line in maps
        .lines()
        .filter(|line| line.contains(" r-xp ") && line.contains('/'))
    {
        let bounds = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
        let (start, end) = bounds.map_or((0, 0), |(start, end)| (number(start), number(end)));
        // A breakpoint instruction.
        let code = vec![0xcc; end.saturating_sub(start) as usize];
        let _ = memory.write_all_at(&code, start);
    }
    ExitCode::SUCCESS
}

/// Has the kernel panic: it is told to do so when memory runs out, and it does.
fn end_kernel(when: &str) -> ExitCode {
    wait_until(when);
    match std::fs::write("/watched/sys/vm/panic_on_oom", "2") {
        Ok(()) => hog(),
        Err(_) => ExitCode::FAILURE,
    }
}

/// Takes a file's lock for a while, or says that somebody has it.
fn lock(path: &Path, seconds: u64) -> std::io::Result<()> {
    use rustix::fs::{FlockOperation, flock};
    let file = std::fs::File::create(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => println!("locked"),
        Err(rustix::io::Errno::WOULDBLOCK) => println!("busy"),
        Err(error) => return Err(error.into()),
    }
    std::thread::sleep(std::time::Duration::from_secs(seconds));
    Ok(())
}

/// Writes to the beginning of a file by way of a shared mapping.
#[allow(unsafe_code)] // reason: a mapping is memory without an owner
fn map(path: &Path, text: &[u8]) -> std::io::Result<()> {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync};
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len() as usize;
    if length < text.len() {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the place; the file is long enough for the text, and nobody cuts it off.
    unsafe {
        let place = mmap(
            std::ptr::null_mut(),
            length,
            access,
            MapFlags::SHARED,
            &file,
            0,
        )?;
        std::ptr::copy_nonoverlapping(text.as_ptr(), place.cast(), text.len());
        msync(place, length, MsyncFlags::SYNC)?;
    }
    Ok(())
}

/// Takes memory, every page of it touched, until the kernel has had enough.
fn hog() -> ! {
    let mut hoard = Vec::new();
    loop {
        hoard.push(vec![1_u8; 1 << 20]);
        std::hint::black_box(&hoard);
    }
}

/// Turns the machine off by casemate's power port, as the agent does: an initrd may use it.
#[allow(unsafe_code)] // reason: a port is written by an instruction of its own
fn power_off() -> ExitCode {
    const IOPERM: u64 = 173;
    /// `casemate_protocol::POWER_PORT` and `power::OFF`.
    const PORT: u16 = 0x600;
    const OFF: u8 = 1;
    let result: i64;
    // SAFETY: ioperm(PORT, 1, 1) touches no memory; the kernel changes rcx and r11 besides the result.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") IOPERM => result, in("rdi") u64::from(PORT), in("rsi") 1_u64,
            in("rdx") 1_u64, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    if result < 0 {
        return ExitCode::FAILURE;
    }
    // SAFETY: the port is the power device's, or nobody's.
    unsafe { std::arch::asm!("out dx, al", in("dx") PORT, in("al") OFF, options(nomem, nostack)) };
    ExitCode::FAILURE
}
