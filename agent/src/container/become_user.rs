//! The last steps of a child: identity, capabilities, seccomp, executable, execve.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, Mode, RawMode};
use rustix::process::{chdir, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::process::{LAST_CAPABILITY, Plan};
use super::user::{self, Identity};
use crate::error::{Attempt, Error, Kind, Result, plain};
use crate::seccomp::Filter;

/// A process ready to be executed.
pub(super) struct Ready {
    path: CString,
    env: Vec<CString>,
}

/// Makes the caller what `plan` says, but for the execve. It is in its container's root already.
pub(super) fn prepare(plan: &Plan, filter: Option<&Filter>, make_cwd: bool) -> Result<Ready> {
    let identity = identity(plan)?;
    for fd in 0..3 {
        give_stream(fd, identity.uid)?;
    }
    umask(Mode::from_raw_mode(0o022));
    if make_cwd {
        make_directories(&plan.cwd);
    }
    // Root can enter where the user can't, and the other way round: one of the two attempts must do.
    let entered = chdir(plan.cwd.as_c_str());
    schedule(plan)?;
    if plan.no_new_privileges {
        set_no_new_privs(true).attempt(|| "set no_new_privs".into())?;
    } else {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which is about to go.
        load(filter)?;
    }
    become_user(plan, &identity)?;
    if entered.is_err() {
        chdir(plan.cwd.as_c_str()).map_err(|e| {
            exec_error(&e.into(), |reason| {
                format!("chdir to cwd ({:?}): {reason}", plan.cwd)
            })
        })?;
    }
    umask(Mode::from_raw_mode(plan.umask as RawMode));
    let path = find_executable(plan)?;
    Ok(Ready {
        path,
        env: environment(plan, &identity),
    })
}

/// Executes; returns only if that fails.
pub(super) fn execute(plan: &Plan, ready: &Ready, filter: Option<&Filter>) -> Error {
    if plan.no_new_privileges
        && let Err(error) = load(filter)
    {
        return error;
    }
    let error = crate::sys::execve(&ready.path, &plan.args, &ready.env);
    exec_error(&error, |reason| format!("exec {:?}: {reason}", ready.path))
}

fn load(filter: Option<&Filter>) -> Result<()> {
    match filter {
        Some(filter) => filter.load().attempt(|| {
            format!(
                "load the seccomp filter of {} instructions",
                filter.program().len()
            )
        }),
        None => Ok(()),
    }
}

fn identity(plan: &Plan) -> Result<Identity> {
    let passwd = || user::database("/etc/passwd");
    if !plan.user.is_empty() {
        return user::resolve(&plan.user, &passwd(), &user::database("/etc/group"));
    }
    let home = if plan.env("HOME").is_none() {
        user::home(&passwd(), plan.uid)
    } else {
        None
    };
    Ok(Identity {
        uid: plan.uid,
        gid: plan.gid,
        groups: plan.groups.clone(),
        home,
    })
}

fn environment(plan: &Plan, identity: &Identity) -> Vec<CString> {
    let mut env = plan.env.clone();
    if plan.env("HOME").is_none_or(str::is_empty) {
        let home = identity.home.as_deref().unwrap_or("/");
        env.retain(|entry| !entry.as_bytes().starts_with(b"HOME="));
        env.extend(CString::new(format!("HOME={home}")));
    }
    env
}

/// The user may reopen its own streams through /dev/stdout; /dev/null and files keep their owner.
fn give_stream(fd: i32, uid: u32) -> Result<()> {
    use rustix::fs::{FileType, fchown, fstat};
    let fd = crate::sys::standard(fd);
    let Ok(stat) = fstat(fd) else { return Ok(()) };
    let pipe = FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
    if !pipe || stat.st_uid == uid {
        return Ok(());
    }
    match fchown(fd, Some(Uid::from_raw(uid)), None) {
        // An id that the user namespace doesn't map: the streams work all the same.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => Ok(()),
        result => result.attempt(|| format!("give the standard streams to uid {uid}")),
    }
}

fn make_directories(path: &CStr) {
    // What is missing in the end shows when entering it.
    let _ = std::fs::create_dir_all(std::ffi::OsStr::from_bytes(path.to_bytes()));
}

fn schedule(plan: &Plan) -> Result<()> {
    if let Some((class, level)) = plan.io_priority {
        crate::sys::set_io_priority(class, level).attempt(|| "apply process.ioPriority".into())?;
    }
    if let Some(attr) = plan.scheduler {
        crate::sys::set_scheduler(attr).attempt(|| "apply process.scheduler".into())?;
    }
    if let Some(cpus) = &plan.cpus {
        rustix::thread::sched_setaffinity(None, cpus)
            .attempt(|| "apply process.execCPUAffinity".into())?;
    }
    Ok(())
}

fn become_user(plan: &Plan, identity: &Identity) -> Result<()> {
    let set = |bits| CapabilitySet::from_bits_retain(bits);
    for cap in 0..=LAST_CAPABILITY {
        if plan.caps.bounding & 1 << cap == 0 {
            remove_capability_from_bounding_set(set(1 << cap))
                .attempt(|| format!("drop capability {cap} from the bounding set"))?;
        }
    }
    set_keep_capabilities(true).attempt(|| "keep capabilities".into())?;
    let groups: Vec<Gid> = identity
        .groups
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    set_thread_groups(&groups).attempt(|| format!("set groups {:?}", identity.groups))?;
    let gid = Gid::from_raw(identity.gid);
    set_thread_res_gid(gid, gid, gid).attempt(|| format!("set gid {}", identity.gid))?;
    let uid = Uid::from_raw(identity.uid);
    set_thread_res_uid(uid, uid, uid).attempt(|| format!("set uid {}", identity.uid))?;
    set_keep_capabilities(false).attempt(|| "keep capabilities no longer".into())?;
    let sets = CapabilitySets {
        effective: set(plan.caps.effective),
        permitted: set(plan.caps.permitted),
        inheritable: set(plan.caps.inheritable),
    };
    set_capabilities(None, sets).attempt(|| {
        format!(
            "set capabilities: effective {:#x}, permitted {:#x}, inheritable {:#x}",
            plan.caps.effective, plan.caps.permitted, plan.caps.inheritable
        )
    })?;
    clear_ambient_capability_set().attempt(|| "clear ambient capabilities".into())?;
    for cap in (0..=LAST_CAPABILITY).filter(|cap| plan.caps.ambient & 1 << cap != 0) {
        configure_capability_in_ambient_set(set(1 << cap), true).attempt(|| {
            format!("raise ambient capability {cap} (it must be permitted and inheritable)")
        })?;
    }
    Ok(())
}

/// Where `args[0]` is, found as a shell would, with errors that runc's users know.
fn find_executable(plan: &Plan) -> Result<CString> {
    let name = plan.args[0].to_string_lossy();
    if name.contains('/') {
        check_executable(Path::new(&*name)).map_err(|e| {
            exec_error(&e, |reason| match e.kind() {
                io::ErrorKind::NotFound => format!("exec: {name:?}: stat {name}: {reason}"),
                _ => format!("exec: {name:?}: {reason}"),
            })
        })?;
        return Ok(plan.args[0].clone());
    }
    let mut denied = false;
    for dir in plan.env("PATH").unwrap_or_default().split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let path = PathBuf::from(dir).join(&*name);
        match check_executable(&path) {
            Ok(()) => {
                return CString::new(path.as_os_str().as_bytes())
                    .map_err(|_| Error::invalid("PATH holds a NUL"));
            }
            Err(error) => denied |= error.kind() == io::ErrorKind::PermissionDenied,
        }
    }
    Err(if denied && !name.is_empty() {
        Error::new(Kind::Denied, format!("exec: {name:?}: permission denied"))
    } else {
        Error::new(
            Kind::NotFound,
            format!("exec: {name:?}: executable file not found in $PATH"),
        )
    })
}

fn check_executable(path: &Path) -> io::Result<()> {
    let stat = rustix::fs::stat(path)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if stat.st_mode & 0o111 == 0 {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    match rustix::fs::access(path, Access::EXEC_OK) {
        Err(rustix::io::Errno::ACCESS) => Err(io::Error::from_raw_os_error(libc::EACCES)),
        _ => Ok(()), // a filter may forbid the question: execve has the last word
    }
}

/// 127 for what isn't there, 126 for what can't be executed, as shells have it.
fn exec_error(error: &io::Error, text: impl FnOnce(String) -> String) -> Error {
    let kind = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ENAMETOOLONG) => Kind::NotFound,
        Some(libc::EACCES | libc::EPERM | libc::ENOEXEC | libc::EISDIR | libc::ETXTBSY) => {
            Kind::Denied
        }
        _ => Kind::Internal,
    };
    Error::new(kind, text(plain(error)))
}
