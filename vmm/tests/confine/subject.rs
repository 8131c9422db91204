//! The process that confines itself, and then does as it was told.

#![allow(unsafe_code)] // forbidden system calls, made on purpose

use casemate_vmm::config::Confinement;
use casemate_vmm::confine::{self, Plan, seccomp, seccomp::ThreadKind};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;

/// Never returns: the test program's process ends here.
pub(crate) fn run(order: &str) -> ! {
    let words: Vec<_> = order.split(' ').collect();
    match words[..] {
        ["idle"] => idle(),
        ["do", what, kind] => violate(what, kind),
        ["keep", "directory"] => drop(enter(&[0, 1, File::open("/").unwrap().as_raw_fd()], 64)),
        ["keep", "closed"] => drop(enter(&[0, 1, 1000], 64)),
        ["keep", "negative"] => drop(enter(&[0, -1], 64)),
        ["open-files"] => drop(enter(&[0, 1], u32::MAX)),
        _ => panic!("unknown order {order}"),
    };
    std::process::exit(7)
}

fn enter(keep_fds: &[i32], max_open_files: u32) -> confine::Isolation {
    confine::enter(&Plan {
        level: Confinement::Full,
        keep_fds,
        max_open_files,
    })
    .unwrap_or_else(|e| {
        eprintln!("{e}");
        std::process::exit(1)
    })
}

/// Confined with a thread of each kind, until standard input ends.
fn idle() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler only ends the process.
        unsafe { libc::signal(signal, end_on_request as *const () as libc::sighandler_t) };
    }
    let kept = File::open("/proc/self/exe").unwrap();
    std::mem::forget(File::open("/proc/self/exe").unwrap());
    let isolation = enter(&[0, kept.as_raw_fd(), 1], 64);
    let open = errno(File::open("/etc/passwd").map(drop));
    let list = errno(std::fs::read_dir("/usr").map(drop));
    let write = errno(File::create("/tmp-of-a-guest").map(drop));
    start(ThreadKind::Vcpu);
    start(ThreadKind::BlockWorker);
    seccomp::install(ThreadKind::EventLoop).unwrap();
    println!(
        "ready isolation={isolation:?} kept={} open={open} list={list} write={write}",
        kept.as_raw_fd()
    );
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

extern "C" fn end_on_request(_: libc::c_int) {
    // SAFETY: no memory is involved.
    unsafe { libc::_exit(8) }
}

/// Starts a thread that has installed its filter once this returns, and then waits forever.
fn start(kind: ThreadKind) {
    let (ready, when_ready) = mpsc::channel();
    let thread = move || {
        seccomp::install(kind).unwrap();
        ready.send(()).unwrap();
        loop {
            thread::park();
        }
    };
    thread::Builder::new()
        .name(format!("{kind:?}"))
        .spawn(thread)
        .unwrap();
    when_ready.recv().unwrap();
}

/// Does what `kind` may not do; to be alive afterwards is the failure.
fn violate(what: &str, kind: &str) {
    let what = what.to_owned();
    enter(&[0, 1], 64);
    let kind = ThreadKind::ALL
        .into_iter()
        .find(|k| format!("{k:?}") == kind)
        .unwrap();
    if kind == ThreadKind::EventLoop {
        seccomp::install(kind).unwrap();
        commit(&what);
    } else {
        let thread = thread::spawn(move || {
            seccomp::install(kind).unwrap();
            commit(&what);
        });
        thread.join().unwrap();
    }
    std::io::stdout().write_all(b"alive\n").unwrap();
}

fn commit(crime: &str) {
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as libc::c_long;
    match crime {
        "socket" => call(libc::SYS_socket, [1, 1, 0]),
        "openat" => call(libc::SYS_openat, [-100, c"/".as_ptr() as libc::c_long, 0]),
        "kill" => call(libc::SYS_kill, [1, 0, 0]),
        // The process that started this one: out of reach in a PID namespace, in reach without.
        "signal-another" => {
            let parent = std::os::unix::process::parent_id() as libc::c_long;
            call(libc::SYS_tgkill, [parent, parent, libc::SIGABRT.into()]);
        }
        "ioctl" => call(
            libc::SYS_ioctl,
            [
                0,
                libc::TIOCSTI as libc::c_long,
                c"x".as_ptr() as libc::c_long,
            ],
        ),
        "map-executable" => call(libc::SYS_mmap, [0, 4096, executable]),
        "protect-executable" => call(libc::SYS_mprotect, [0, 4096, executable]),
        "thread" => drop(thread::spawn(|| ())),
        "abort" => std::process::abort(),
        _ => panic!("unknown crime {crime}"),
    }
}

fn call(number: libc::c_long, args: [libc::c_long; 3]) {
    // SAFETY: none of the calls above changes memory that the program uses, if it is made at all.
    unsafe { libc::syscall(number, args[0], args[1], args[2], 0, 0, 0) };
}

fn errno(result: std::io::Result<()>) -> String {
    match result.map_err(|e| e.raw_os_error()) {
        Ok(()) => "none".into(),
        Err(Some(libc::ENOENT)) => "ENOENT".into(),
        Err(Some(libc::EACCES)) => "EACCES".into(),
        Err(Some(libc::EROFS)) => "EROFS".into(),
        Err(other) => format!("{other:?}"),
    }
}
