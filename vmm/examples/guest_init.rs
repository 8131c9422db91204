//! PID 1 of test guests: does what `test=` on the kernel's command line says and reports on the console.
//!
//! Built static and packed into an initrd by `tests/vm`.
#![allow(unsafe_code)] // reason: port I/O, mount(2) and vsock have no safe wrappers here

use std::arch::asm;
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;

const POWER_PORT: u16 = casemate_protocol::POWER_PORT;

fn main() {
    mount("proc", "/proc");
    mount("sysfs", "/sys");
    mount("devtmpfs", "/dev");
    // SAFETY: PID 1 of a guest of its own may use any port.
    unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) };
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let test = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("test="))
        .unwrap_or("off");
    for step in test.split(',') {
        run(step);
    }
    power(casemate_protocol::power::OFF);
}

fn run(step: &str) {
    match step {
        "off" => power(casemate_protocol::power::OFF),
        "reset" => power(casemate_protocol::power::RESET),
        // PID 1 that ends is a panic.
        "panic" => std::process::exit(1),
        "hang" => loop {
            std::thread::park();
        },
        "hello" => println!("hello from PID {}", std::process::id()),
        "cpus" => {
            for cpu in 1..32 {
                let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
                let _ = fs::write(path, "1");
            }
            let online = fs::read_to_string("/sys/devices/system/cpu/online");
            println!("cpus {}", online.unwrap_or_default().trim());
        }
        "memory" => {
            let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
            println!("memory {}", meminfo.lines().next().unwrap_or_default());
        }
        "clock" => {
            let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
            println!(
                "clock {}",
                fs::read_to_string(source).unwrap_or_default().trim()
            );
        }
        "count" => {
            for count in 0..1_000_000 {
                println!("count {count}");
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        "work" => {
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            for _ in 0..cpus {
                std::thread::spawn(|| {
                    for turn in 0u64.. {
                        std::hint::black_box(turn);
                    }
                });
            }
        }
        "interrupts" => println!(
            "{}",
            fs::read_to_string("/proc/interrupts").unwrap_or_default()
        ),
        "disks" => {
            for disk in ["vda", "vdb", "vdc"] {
                if let Ok(size) = fs::read_to_string(format!("/sys/block/{disk}/size")) {
                    let mut first = [0; 16];
                    let read = fs::File::open(format!("/dev/{disk}"))
                        .and_then(|mut file| file.read(&mut first));
                    println!("disk {disk} {} {read:?} {first:?}", size.trim());
                }
            }
        }
        // Long enough for a test to do something in between.
        "wait" => std::thread::sleep(std::time::Duration::from_secs(2)),
        "vsock" => match vsock(casemate_protocol::HOST_CID, casemate_protocol::CONTROL_PORT) {
            Ok(mut stream) => {
                let mut word = [0; 4];
                let read = stream.read_exact(&mut word);
                println!("vsock {} {read:?}", String::from_utf8_lossy(&word));
                let _ = stream.write_all(b"pong");
            }
            Err(error) => println!("vsock {error}"),
        },
        other => println!("unknown step {other}"),
    }
}

/// A connection to a port of the host.
fn vsock(cid: u32, port: u32) -> io::Result<fs::File> {
    // SAFETY: socket(2) touches no memory.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was opened just now.
    let stream = unsafe { fs::File::from_raw_fd(fd) };
    // SAFETY: plain numbers, for which zero is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = cid;
    address.svm_port = port;
    let size = size_of_val(&address) as u32;
    // SAFETY: the address is valid and of that size.
    match unsafe { libc::connect(fd, (&raw const address).cast(), size) } {
        0 => Ok(stream),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mount(kind: &str, at: &str) {
    let _ = fs::create_dir(at);
    let (kind, at) = (CString::new(kind), CString::new(at));
    if let (Ok(kind), Ok(at)) = (kind, at) {
        // SAFETY: all strings are terminated and outlive the call.
        unsafe {
            libc::mount(
                kind.as_ptr(),
                at.as_ptr(),
                kind.as_ptr(),
                0,
                std::ptr::null(),
            )
        };
    }
}

fn power(byte: u8) -> ! {
    // SAFETY: waits until the console has sent everything; without a console it fails at once.
    unsafe { libc::tcdrain(1) };
    // SAFETY: a port write touches no memory; `ioperm` has allowed it.
    unsafe { asm!("out dx, al", in("dx") POWER_PORT, in("al") byte, options(nomem, nostack)) };
    loop {
        std::thread::park();
    }
}
