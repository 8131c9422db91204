//! `casemate check`: can this host run microVMs, and if not, what is missing?

use super::args::CheckArgs;
use super::output;
use crate::scratch;
use crate::settings::Settings;
use casemate_vmm::probe::{self, HostFacts};
use rustix::fs::{Access, access};
use serde_json::{Value, json};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// One thing looked at.
#[derive(Debug)]
struct Finding {
    what: &'static str,
    problem: Option<String>,
    mend: String,
}

/// What helps where a file of the installation can't be used.
const REINSTALL: &str = "install casemate again, or correct the path in the configuration";

fn fine(what: &'static str) -> Finding {
    Finding {
        what,
        problem: None,
        mend: String::new(),
    }
}

fn bad(what: &'static str, problem: String, mend: impl Into<String>) -> Finding {
    Finding {
        what,
        problem: Some(problem),
        mend: mend.into(),
    }
}

fn file(what: &'static str, path: &Path) -> Finding {
    let path_text = path.display();
    match std::fs::File::open(path).and_then(|f| f.metadata()) {
        Ok(meta) if meta.is_file() && meta.len() > 0 => fine(what),
        Ok(_) => bad(
            what,
            format!("{path_text} is no file with content"),
            "install casemate again",
        ),
        Err(e) => bad(what, format!("can't read {path_text}: {e}"), REINSTALL),
    }
}

/// A file that can be run, too.
fn program(what: &'static str, path: &Path) -> Finding {
    let found = file(what, path);
    match access(path, Access::EXEC_OK) {
        Err(e) if found.problem.is_none() => bad(
            what,
            format!("can't run {}: {e}", path.display()),
            "install casemate again, on a file system without noexec",
        ),
        _ => found,
    }
}

fn directory(what: &'static str, path: &Path, variable: &str) -> Finding {
    let probe = path.join(format!(".check-{}", std::process::id()));
    let tried = std::fs::create_dir_all(path)
        .and_then(|()| std::fs::write(&probe, b"x"))
        .and_then(|()| std::fs::remove_file(&probe));
    match tried {
        Ok(()) => fine(what),
        Err(e) => bad(
            what,
            format!("can't write in {}: {e}", path.display()),
            format!("set {variable} to a directory of yours"),
        ),
    }
}

/// Does KVM's device run a guest as every kernel is? That it opens says little.
fn kvm(device: &Path) -> Finding {
    let Err(error) = probe::check(device) else {
        return fine("KVM");
    };
    let mut diagnosis = probe::diagnose(&error, &HostFacts::read());
    if device != Path::new(probe::DEVICE) {
        diagnosis.mend += &format!(
            " Or correct the configuration, where kvm is {}: usually it is {}.",
            device.display(),
            probe::DEVICE
        );
    }
    bad("KVM", diagnosis.problem, diagnosis.mend)
}

/// Can the VMM confine itself, by namespaces or by Landlock? It tries, in a process of its own.
fn confinement(vmm: &Path) -> Finding {
    let what = "confinement";
    let tried = Command::new(vmm)
        .arg("--probe-confinement")
        .stdin(Stdio::piped()) // no /dev/null, which a bare /dev lacks
        .output();
    let path = vmm.display();
    match tried {
        Ok(output) if output.status.success() => fine(what),
        Ok(output) => bad(
            what,
            match String::from_utf8_lossy(&output.stderr).trim() {
                "" => format!("{path} ended by {}", output.status),
                said => said.to_owned(),
            },
            "allow this user to make namespaces, or boot a kernel with Landlock (lsm=landlock,…)",
        ),
        Err(e) => bad(what, format!("can't run {path}: {e}"), REINSTALL),
    }
}

/// Does virtiofsd run? It is the one program that needs libraries of the host.
fn virtiofsd(path: &Path) -> Finding {
    let what = "virtiofsd";
    let tried = Command::new(path)
        .arg("--version")
        .stdin(Stdio::piped())
        .output();
    let problem = match tried {
        Ok(output) if output.status.success() => return fine(what),
        Ok(output) => match String::from_utf8_lossy(&output.stderr).trim() {
            "" => format!("{} ended by {}", path.display(), output.status),
            said => said.to_owned(),
        },
        Err(e) => format!("can't run {}: {e}", path.display()),
    };
    let mend = "install casemate again, and the libraries of libseccomp and libcap-ng";
    bad(what, problem, mend)
}

fn mke2fs(search_path: &str) -> Finding {
    let what = "mke2fs";
    let problem = match scratch::try_mke2fs(search_path) {
        Ok(()) => return fine(what),
        Err(e) if e.kind() == io::ErrorKind::NotFound => "mke2fs is not installed".to_owned(),
        Err(e) => format!("can't run mke2fs: {e}"),
    };
    bad(what, problem, "install the package e2fsprogs")
}

/// Everything that a run needs, in the order in which it needs it.
fn findings(settings: &Settings) -> Vec<Finding> {
    vec![
        kvm(&settings.kvm),
        program("VMM", &settings.vmm),
        confinement(&settings.vmm),
        program("shim", &settings.shim),
        file("guest kernel", &settings.kernel),
        file("guest agent", &settings.initrd),
        directory("state directory", &settings.state_dir, "CASEMATE_STATE"),
        directory("data directory", &settings.data_dir, "CASEMATE_DATA"),
        mke2fs(&scratch::search_path()),
        virtiofsd(&settings.virtiofsd),
    ]
}

/// `casemate check`; true: all is well.
pub(super) fn check(settings: &Settings, args: &CheckArgs) -> anyhow::Result<bool> {
    let findings = findings(settings);
    let well = findings.iter().all(|f| f.problem.is_none());
    if args.quiet {
        return Ok(well);
    }
    let rows: Vec<Value> = findings
        .iter()
        .map(|f| {
            json!({
                "Check": f.what,
                "Ok": f.problem.is_none(),
                "Result": f.problem.as_deref().unwrap_or("ok"),
                "Mend": f.mend,
            })
        })
        .collect();
    match args.format.format.as_deref() {
        None => {
            for finding in &findings {
                let result = finding.problem.as_deref().unwrap_or("ok");
                output::write(&format!("{:<17} {result}\n", finding.what))?;
                if !finding.mend.is_empty() {
                    output::write(&format!("{:<17} -> {}\n", "", finding.mend))?;
                }
            }
        }
        Some("json") => output::write(&format!("{}\n", json!({"Ok": well, "Checks": rows})))?,
        format => output::print(format, "", &["Check", "Result", "Mend"], &rows)?,
    }
    Ok(well)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn file_that_is_missing_or_empty_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        assert!(file("x", &empty).problem.is_some());
        assert!(file("x", &dir.path().join("missing")).problem.is_some());
        std::fs::write(&empty, "x").unwrap();
        assert!(file("x", &empty).problem.is_none());
    }

    #[test]
    fn program_that_may_not_be_run_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        std::fs::write(&path, "x").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        assert!(program("x", &path).problem.is_none());
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let problem = program("x", &path).problem.unwrap();
        assert!(problem.contains("can't run"), "{problem}");
        assert!(program("x", Path::new("/no/such")).problem.is_some());
    }

    #[test]
    fn confinement_that_the_host_forbids_gives_what_the_vmm_says() {
        // Programs that know no such option, one with a word about it.
        for (program, said) in [
            ("/bin/cat", "--probe-confinement"),
            ("/bin/false", "/bin/false ended by exit status: 1"),
        ] {
            let found = confinement(Path::new(program));
            assert!(found.problem.unwrap().contains(said), "{program}");
            assert!(found.mend.contains("Landlock"), "{program}");
        }
        let fine = confinement(Path::new("/bin/true"));
        assert!(fine.problem.is_none() && fine.mend.is_empty(), "{fine:?}");
    }

    #[test]
    fn confinement_with_a_vmm_that_cannot_run_names_it() {
        let problem = confinement(Path::new("/no/such/vmm")).problem.unwrap();
        assert!(problem.contains("can't run /no/such/vmm"), "{problem}");
    }

    #[test]
    fn mke2fs_that_is_not_installed_names_the_package() {
        let dir = tempfile::tempdir().unwrap();
        let found = mke2fs(dir.path().to_str().unwrap());
        assert_eq!(found.problem.as_deref(), Some("mke2fs is not installed"));
        assert!(found.mend.contains("e2fsprogs"), "{found:?}");
        assert!(mke2fs(&scratch::search_path()).problem.is_none());
    }

    #[test]
    fn kvm_of_the_configuration_is_probed_and_named() {
        let found = kvm(Path::new("/dev/no-kvm"));
        assert!(found.problem.unwrap().contains("/dev/no-kvm"));
        assert!(
            found.mend.contains("kvm is /dev/no-kvm") && found.mend.contains(probe::DEVICE),
            "{}",
            found.mend
        );
    }
}
