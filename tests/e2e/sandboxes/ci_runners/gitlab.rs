//! The custom executor of GitLab's runner.

use super::*;
use rustix::process::kill_process;
use serde_json::{Value, json};
use std::fs;

/// Other numbers than the runner's own, which are 1 and 2: the variables must be looked at.
const BUILD_FAILED: i32 = 41;
const SYSTEM_FAILED: i32 = 42;

/// A job as the runner has it: its directory, what GitLab said of it, and what `config` made of that.
struct Job<'a> {
    host: &'a Host,
    dir: PathBuf,
    response: Value,
    variables: Vec<(String, String)>,
    job_env: Vec<(String, String)>,
    grace: u32,
    helpers: &'static str,
}

/// What GitLab sends for a job of project 5, as far as it matters.
fn response(id: u32) -> Value {
    json!({
        "id": id,
        "token": "jobT0ken",
        "job_info": {"id": id, "name": "te\"st: $(reboot) '\n -x", "stage": "test", "project_id": 5, "project_name": "p"},
        "git_info": {"repo_url": "https://gitlab.example.com/g/p.git", "ref": "main", "ref_type": "branch", "protected": false},
        "runner_info": {"uuid": "", "timeout": 3600},
        "variables": [{"key": "CI_JOB_ID", "value": id.to_string(), "public": true}],
        "image": {"name": "busybox"},
        "services": null,
    })
}

impl<'a> Job<'a> {
    fn new(host: &'a Host, id: u32) -> Self {
        Self::of(host, id, response(id))
    }

    fn protected(host: &'a Host, id: u32) -> Self {
        let mut response = response(id);
        response["git_info"]["protected"] = json!(true);
        Self::of(host, id, response)
    }

    fn of(host: &'a Host, id: u32, response: Value) -> Self {
        let dir = host.dir().join(format!("custom executor {id}"));
        fs::create_dir_all(&dir).unwrap();
        Self {
            host,
            dir,
            response,
            variables: vec![("CI_JOB_IMAGE".into(), "busybox".into())],
            job_env: Vec::new(),
            grace: 600,
            helpers: "",
        }
    }

    /// Sets a variable in .gitlab-ci.yml.
    fn sets(&mut self, name: &str, value: &str) {
        self.variables.retain(|(old, _)| old != name);
        self.variables.push((name.into(), value.into()));
    }

    fn stage(&self, name: &str) -> Command {
        let mut command = program(self.host, &format!("gitlab/{name}"));
        let variables = self.variables.iter();
        command
            .current_dir(&self.dir)
            .env("CASEMATE_CI_GRACE", self.grace.to_string())
            .env("CASEMATE_CI_HELPERS", self.helpers)
            .env("TMPDIR", &self.dir)
            .env("BUILD_FAILURE_EXIT_CODE", BUILD_FAILED.to_string())
            .env("SYSTEM_FAILURE_EXIT_CODE", SYSTEM_FAILED.to_string())
            .env("BUILD_EXIT_CODE_FILE", self.dir.join("build_exit_code"))
            .env("JOB_RESPONSE_FILE", self.dir.join("response.json"))
            .envs(self.job_env.iter().cloned())
            .envs(variables.map(|(name, value)| (format!("CUSTOM_ENV_{name}"), value)));
        command
    }

    fn config(&self) -> Finished {
        let response = self.response.to_string();
        fs::write(self.dir.join("response.json"), response).unwrap();
        let mut command = self.stage("config");
        command.arg("gl");
        ends(command)
    }

    fn configured(&mut self) -> &mut Self {
        let config: Value = serde_json::from_str(&self.config().succeeds().text()).unwrap();
        let job_env = config["job_env"].as_object().unwrap();
        let text = |value: &Value| value.as_str().expect("all are strings").to_owned();
        self.job_env = job_env
            .iter()
            .map(|(name, value)| (name.clone(), text(value)))
            .collect();
        self
    }

    fn prepared(&mut self) -> &mut Self {
        self.configured();
        ends(self.stage("prepare")).succeeds();
        self
    }

    fn script(&self, stage: &str, script: &str) -> Command {
        let dir = self.dir.join(format!("script {stage}"));
        fs::create_dir_all(&dir).unwrap();
        // As the runner writes one for `shell = "sh"`.
        let quoted = script.replace('\'', r"'\''");
        let script = format!(
            "#!/usr/bin/env sh\n\ntrap 'exit 1' TERM\n\n\
             case \"$(set -o)\" in *\"pipefail\"*) set -o pipefail;; esac; set -o errexit\nset +o noclobber\n\
             (trap 'exit 1' TERM; eval '{quoted}\n') < /dev/null\nexit 0\n"
        );
        let path = dir.join("script.");
        fs::write(&path, script).unwrap();
        let mut command = self.stage("run");
        command.arg(path).arg(stage);
        command
    }

    fn runs(&self, stage: &str, script: &str) -> Finished {
        ends(self.script(stage, script))
    }

    fn cleaned_up(&self) {
        ends(self.stage("cleanup")).succeeds();
    }

    /// All stages of a job that passes.
    fn passes(&mut self, script: &str) {
        self.prepared();
        self.runs("build_script", script).succeeds();
        self.cleaned_up();
    }

    fn artifacts(&self) -> PathBuf {
        artifacts(self.host).join(format!("gl-{}", self.response["id"]))
    }
}

#[test]
fn gitlab_job_goes_through_all_stages_and_its_cache_is_kept() {
    let host = Host::with_images();
    let helper = "cd /to; printf '#!/bin/sh\necho helped' > gitlab-runner; chmod 755 gitlab-runner";
    host.run(["-v", "ci-helpers:/to", "busybox", "sh", "-c", helper])
        .succeeds();
    let mut job = Job::protected(&host, 1);
    job.helpers = "ci-helpers";
    let config: Value = serde_json::from_str(&job.config().succeeds().text()).unwrap();
    assert_eq!(config["builds_dir"], "/builds");
    assert_eq!(config["builds_dir_is_shared"], false);
    job.prepared();
    job.runs("prepare_script", "echo \"Running on $(hostname)...\"")
        .succeeds()
        .mentions("Running on ");
    job.runs(
        "get_sources",
        "mkdir -p /builds/g/p; echo it > /builds/g/p/it",
    )
    .succeeds();
    job.runs(
        "restore_cache",
        "gitlab-runner cache-extractor; ! touch /opt/ci-helpers/x",
    )
    .succeeds()
    .prints("helped\n");
    // Standard input is not the rest of the script.
    let script = "cd /builds/g/p; cat; cat it; echo first > /cache/who; printf '%s' \"it's\" >&2
        mkdir /artifacts/dir; echo built > \"/artifacts/dir/-a 'name\"; ln -s /etc/passwd /artifacts/link";
    job.runs("build_script", script)
        .succeeds()
        .prints("it\n")
        .complains_of("it's");
    job.runs("after_script", "true").succeeds();
    job.runs("archive_cache", "true").succeeds();
    job.runs("upload_artifacts_on_success", "true").succeeds();
    job.runs("cleanup_file_variables", "true").succeeds();
    job.cleaned_up();
    let out = job.artifacts();
    assert_eq!(names_in(&out), ["dir", "link"]);
    let built = fs::read_to_string(out.join("dir/-a 'name")).unwrap();
    assert_eq!(built, "built\n");
    assert_eq!(
        fs::read_link(out.join("link")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert!(!job.dir.join("build_exit_code").exists());
    assert_eq!(cached(&host, "gl-5"), "first");

    // Another branch's job gets it, and changes nothing for others.
    Job::new(&host, 2).passes("grep first /cache/who; echo second > /cache/who");
    assert_eq!(cached(&host, "gl-5"), "first");
    // An image with an entrypoint, a stop signal and a user of its own.
    let mut job = Job::protected(&host, 3);
    job.sets("CI_JOB_IMAGE", "configured");
    job.passes("id -un; grep first /cache/who; rm /cache/who; echo third > /cache/who; touch /builds/x /artifacts/x");
    assert_eq!(cached(&host, "gl-5"), "third");
    assert_eq!(names_in(&job.artifacts()), ["x"]);
    host.casemate(["volume", "rm", "ci-helpers"]).succeeds();
    only_caches_are_left(&host);
}

#[test]
fn gitlab_job_that_fails_says_how_and_keeps_no_cache() {
    let host = Host::with_images();
    let mut job = Job::protected(&host, 1);
    job.prepared();
    for code in [7, 125, 137] {
        let script = format!("echo log > /artifacts/log; echo bad > /cache/who; exit {code}");
        job.runs("build_script", &script).ends_with(BUILD_FAILED);
        // 125 is what casemate's own failures are told by.
        let told = fs::read_to_string(job.dir.join("build_exit_code")).unwrap();
        assert_eq!(told, format!("{}\n", if code == 125 { 1 } else { code }));
    }
    job.runs("after_script", "true").succeeds();
    job.cleaned_up();
    assert_eq!(
        fs::read_to_string(job.artifacts().join("log")).unwrap(),
        "log\n"
    );
    assert!(volumes(&host).is_empty());

    // Passed, but for what came later.
    let mut job = Job::protected(&host, 2);
    job.prepared();
    job.runs("build_script", "true").succeeds();
    job.runs("upload_artifacts_on_success", "false")
        .ends_with(BUILD_FAILED);
    job.runs("cleanup_file_variables", "true").succeeds();
    job.cleaned_up();
    assert!(volumes(&host).is_empty());
    only_caches_are_left(&host);
}

#[test]
fn gitlab_job_out_of_time_ends_with_all_it_started() {
    let host = Host::with_images();
    let mut job = Job::new(&host, 1);
    job.prepared();
    let script = "sleep 54321 & echo begun; sleep 54321";
    let mut running = Running::start(job.script("build_script", script));
    running.prints("begun");
    signal_group(&running, Signal::TERM);
    running.ends().ends_with(BUILD_FAILED);
    // `after_script` has its own time, and the VM to itself.
    job.runs("after_script", "! pgrep -f 54321").succeeds();
    job.cleaned_up();
    only_caches_are_left(&host);
}

#[test]
fn gitlab_job_whose_runner_is_gone_ends_by_itself_and_the_next_one_sweeps_it() {
    let host = Host::with_images();
    let mut lost = Job::new(&host, 1);
    lost.response["runner_info"]["timeout"] = json!(1);
    lost.grace = 1;
    lost.prepared();
    host.casemate(["wait", "gl-1"]).ends_with(0);
    lost.runs("build_script", "echo never")
        .ends_with(SYSTEM_FAILED)
        .prints("")
        .complains_of("the VM of the job gl-1 is gone");
    assert!(volumes(&host).contains(&"gl-1".to_owned()));
    a_moment();
    let mut next = Job::new(&host, 2);
    next.prepared();
    assert_eq!(volumes(&host), ["gl-2"]);
    next.cleaned_up();
    only_caches_are_left(&host);
}

#[test]
fn gitlab_cleanup_removes_what_any_kill_left_and_may_come_twice() {
    let host = Host::with_images();
    let mut job = Job::protected(&host, 1);
    // Nothing was configured, nothing prepared.
    job.cleaned_up();
    job.configured();
    job.cleaned_up();
    // The runner dies in the middle of preparing, at several moments.
    for tenths in [0, 2, 5, 10, 20] {
        let preparing = Running::start(job.stage("prepare"));
        std::thread::sleep(Duration::from_millis(100 * tenths + 20));
        signal_group(&preparing, Signal::KILL);
        drop(preparing);
        if tenths % 2 == 0 {
            job.cleaned_up();
            only_caches_are_left(&host);
        }
    }
    // Preparing is tried again, whatever is there.
    ends(job.stage("prepare")).succeeds();
    ends(job.stage("prepare")).succeeds();
    job.runs("build_script", "echo x > /cache/who").succeeds();
    let mut running = Running::start(job.script("step_release", "echo begun; sleep 1000"));
    running.prints("begun");
    signal_group(&running, Signal::KILL);
    drop(running);
    job.cleaned_up();
    job.cleaned_up();
    // The last stage was killed: the job didn't pass.
    assert!(volumes(&host).is_empty());

    // A VM that dies is no fault of the job's.
    job.prepared();
    let mut running = Running::start(job.script("build_script", "echo begun; sleep 1000"));
    running.prints("begun");
    for pid in host.processes("casemate-vmm") {
        let _ = kill_process(pid, Signal::KILL);
    }
    running.ends().ends_with(SYSTEM_FAILED);
    job.cleaned_up();
    assert!(volumes(&host).is_empty());
    only_caches_are_left(&host);
}

#[test]
fn gitlab_jobs_of_a_project_at_once_have_a_cache_each() {
    let host = Host::with_images();
    Job::protected(&host, 1).passes("echo base > /cache/who");
    let mut older = Job::protected(&host, 2);
    let mut newer = Job::protected(&host, 3);
    older.prepared();
    // Caches are told apart by the second.
    std::thread::sleep(Duration::from_millis(1100));
    newer.prepared();
    for (job, who) in [(&older, "older"), (&newer, "newer")] {
        let script = format!("grep base /cache/who; echo {who} > /cache/who; sync");
        job.runs("build_script", &script).succeeds();
    }
    for (job, who) in [(&older, "older"), (&newer, "newer")] {
        let script = format!("grep {who} /cache/who");
        job.runs("step_look", &script).succeeds();
    }
    assert_eq!(cached(&host, "gl-5"), "base");
    newer.cleaned_up();
    assert_eq!(cached(&host, "gl-5"), "newer");
    older.cleaned_up();
    assert_eq!(cached(&host, "gl-5"), "newer");
    only_caches_are_left(&host);
}

#[test]
fn gitlab_job_says_nothing_that_its_runner_believes() {
    let host = Host::with_images();
    Job::protected(&host, 1).passes("echo base > /cache/who");
    // It claims to be another job, of another project, on a protected branch.
    let mut job = Job::new(&host, 2);
    for (name, value) in [
        ("CI_JOB_ID", "1"),
        ("CI_PROJECT_ID", "6"),
        ("CI_COMMIT_REF_PROTECTED", "true"),
        ("CI_JOB_NAME", "-x '\"\n$(touch pwned)`touch pwned`"),
        ("CASEMATE_KEEP", "keep"),
        ("PATH", "/nowhere"),
    ] {
        job.sets(name, value);
        job.response["variables"]
            .as_array_mut()
            .unwrap()
            .push(json!({"key": name, "value": value}));
    }
    job.response["git_info"]["ref"] = json!("\n'\"$(touch pwned) -x");
    job.passes("grep base /cache/who; echo poison > /cache/who");
    assert_eq!(cached(&host, "gl-5"), "base");

    // Its image is no option.
    for image in [
        "--privileged",
        "-v/:/host",
        "a b",
        "busybox\n--help",
        "$(touch pwned)",
        "'",
        "../busybox",
    ] {
        let mut job = Job::new(&host, 3);
        job.sets("CI_JOB_IMAGE", image);
        job.configured();
        ends(job.stage("prepare"))
            .ends_with(SYSTEM_FAILED)
            .complains_of("gl-3 doesn't start");
        only_caches_are_left(&host);
    }
    job.sets("CI_JOB_IMAGE", "");
    ends(job.stage("prepare"))
        .ends_with(BUILD_FAILED)
        .complains_of("names no image");
    job.response["services"] = json!([{"name": "redis"}, {"name": "db"}]);
    job.configured();
    ends(job.stage("prepare"))
        .ends_with(BUILD_FAILED)
        .complains_of("redis db");
    for broken in [
        json!("nonsense"),
        json!({"id": 1}),
        json!({"id": "1; reboot"}),
    ] {
        job.response = broken;
        job.config().ends_with(SYSTEM_FAILED).prints("");
    }
    for name in ["", "-f", "a/b", "a b", "a\nb", "a.b", &"x".repeat(51)] {
        let mut command = program(&host, "casemate-job");
        command.args(["end", name]);
        ends(command).ends_with(125).complains_of("JOB");
    }
    assert!(!job.dir.join("pwned").exists() && !host.dir().join("pwned").exists());
    only_caches_are_left(&host);
}
