//! The container hooks of GitHub's runner.

use super::*;
use serde_json::{Value, json};
use std::fs;

/// A runner with its directories, as it is while it has a job.
struct Runner<'a> {
    host: &'a Host,
    root: PathBuf,
    variables: Vec<(String, String)>,
    state: Value,
}

impl<'a> Runner<'a> {
    fn new(host: &'a Host, name: &str) -> Self {
        let root = host.dir().join(name);
        for dir in [
            "_work/_temp/_runner_hook_responses",
            "_work/_temp/_github_home",
            "_work/_temp/_github_workflow",
            "_work/_actions",
            "_work/_tool",
            "_work/my repo/my repo",
            "externals/node20",
            "tmp",
        ] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        let text = |path: &str| root.join(path).to_str().unwrap().to_owned();
        let variables = [
            ("RUNNER_NAME", name.to_owned()),
            ("RUNNER_TEMP", text("_work/_temp")),
            ("TMPDIR", text("tmp")),
            ("GITHUB_REPOSITORY_ID", "77".to_owned()),
            ("GITHUB_RUN_ID", "1000".to_owned()),
            ("GITHUB_RUN_ATTEMPT", "1".to_owned()),
            ("GITHUB_JOB", "te st/../x".to_owned()),
            ("GITHUB_REF_PROTECTED", "true".to_owned()),
            ("GITHUB_REF_TYPE", "branch".to_owned()),
            ("GITHUB_EVENT_NAME", "push".to_owned()),
        ];
        Self {
            host,
            variables: variables.map(|(k, v)| (k.to_owned(), v)).to_vec(),
            root,
            state: Value::Null,
        }
    }

    fn sets(&mut self, name: &str, value: &str) {
        self.variables.retain(|(old, _)| old != name);
        self.variables.push((name.into(), value.into()));
    }

    fn path(&self, path: &str) -> String {
        self.root.join(path).to_str().unwrap().to_owned()
    }

    fn responses(&self) -> PathBuf {
        self.root.join("_work/_temp/_runner_hook_responses")
    }

    /// `node HOOK` with the hook's JSON on standard input, which then ends.
    fn starts(&self, command: &str, args: Value) -> Running {
        let response = self.responses().join(format!("{command}.json"));
        if !response.is_symlink() {
            fs::write(&response, "").unwrap();
        }
        let input = json!({"command": command, "responseFile": response, "args": args, "state": self.state});
        let mut node = Command::new("node");
        prepare(self.host, &mut node);
        node.arg(paths::repository().join("docs/ci/github/index.js"))
            .current_dir(self.root.join("_work/my repo/my repo"))
            .envs(self.variables.iter().cloned());
        let mut running = Running::start(node);
        running.says(input.to_string()).hangs_up();
        running
    }

    fn calls(&self, command: &str, args: Value) -> Finished {
        self.starts(command, args).ends()
    }

    fn mounts(&self) -> Value {
        let mount = |source: String, target: &str, read_only: bool| json!({"sourceVolumePath": source, "targetVolumePath": target, "readOnly": read_only});
        json!([
            mount("/var/run/docker.sock".into(), "/var/run/docker.sock", false),
            mount(self.path("_work"), "/__w", false),
            mount(self.path("externals"), "/__e", true),
            mount(self.path("_work/_temp"), "/__w/_temp", false),
            mount(self.path("_work/_actions"), "/__w/_actions", false),
            mount(self.path("_work/_tool"), "/__w/_tool", false),
            mount(self.path("_work/_temp/_github_home"), "/github/home", false),
            mount(
                self.path("_work/_temp/_github_workflow"),
                "/github/workflow",
                false
            ),
        ])
    }

    fn container(&self) -> Value {
        json!({
            "image": "busybox",
            "dockerfile": null,
            "entryPointArgs": [],
            "entryPoint": null,
            "workingDirectory": "/__w/my repo/my repo",
            "createOptions": null,
            "registry": null,
            "environmentVariables": {"HOME": "/github/home", "OF_JOB": "it's \"$(reboot)\"\nand more", "BOTH": "job"},
            "portMappings": [],
            "systemMountVolumes": self.mounts(),
            "userMountVolumes": [],
        })
    }

    fn prepared(&mut self) -> &mut Self {
        let args = json!({"container": self.container(), "services": []});
        self.calls("prepare_job", args).succeeds();
        let response = fs::read(self.responses().join("prepare_job.json")).unwrap();
        let response: Value = serde_json::from_slice(&response).unwrap();
        assert_eq!(response["isAlpine"], false);
        self.state = response["state"].clone();
        self
    }

    /// A step as the runner hands it on: the script is in its directory, a shell gets it.
    fn step(&self, script: &str) -> Value {
        fs::write(self.root.join("_work/_temp/step.sh"), script).unwrap();
        json!({
            "entryPoint": "sh",
            "entryPointArgs": ["-e", "/__w/_temp/step.sh"],
            "environmentVariables": {"INPUT_FETCH-DEPTH": "1", "BOTH": "step", "CI": "true"},
            "prependPath": ["/__w/my bin", "/opt/x"],
            "workingDirectory": "/__w/my repo/my repo",
        })
    }

    fn runs(&self, script: &str) -> Finished {
        self.calls("run_script_step", self.step(script))
    }

    fn cleaned_up(&self) {
        self.calls("cleanup_job", json!({})).succeeds();
        assert!(names_in(&self.root.join("tmp")).is_empty());
    }

    fn passes(&mut self, script: &str) {
        self.prepared();
        self.runs(script).succeeds();
        self.cleaned_up();
    }
}

#[test]
fn github_job_goes_through_all_hooks_and_its_cache_is_kept() {
    let host = Host::with_images();
    let mut runner = Runner::new(&host, "a runner");
    runner.prepared();
    let script = "test \"$PWD\" = '/__w/my repo/my repo'
        echo \"$OF_JOB|$BOTH|$CI|$HOME\"
        tr '\\0' '\\n' < /proc/$$/environ | grep INPUT_FETCH-DEPTH
        echo ${PATH%%:/opt/x:*}
        cat
        touch /__w/_temp/output /github/home/x
        ! touch /__e/x 2> /dev/null
        test -d /__e/node20
        mkdir /artifacts/dir; echo built > /artifacts/dir/-x
        echo first > /cache/who";
    runner.runs(script).succeeds().prints(
        "it's \"$(reboot)\"\nand more|step|true|/github/home\nINPUT_FETCH-DEPTH=1\n/__w/my bin\n",
    );
    assert!(runner.root.join("_work/_temp/output").exists());
    assert!(runner.root.join("_work/_temp/_github_home/x").exists());
    // A container action has a VM of its own, and the same files.
    let mut action = runner.container();
    action["workingDirectory"] = json!("/__w/my repo");
    action["entryPoint"] = json!("sh");
    action["entryPointArgs"] = json!([
        "-c",
        "echo $PWD $SINGLE; test ! -e /cache; ls /__w/_temp/output"
    ]);
    action["environmentVariables"] = json!({"SINGLE": "it's $(reboot)"});
    runner
        .calls("run_container_step", action)
        .succeeds()
        .prints("/__w/my repo it's $(reboot)\n/__w/_temp/output\n");
    runner.cleaned_up();
    let [out] = &names_in(&artifacts(&host))[..] else {
        panic!("not one job's artefacts");
    };
    assert!(out.starts_with("77-1000-1-te_st____x-"), "{out}");
    let built = artifacts(&host).join(out).join("dir/-x");
    assert_eq!(fs::read_to_string(built).unwrap(), "built\n");
    assert_eq!(cached(&host, "github-77"), "first");

    // What isn't pushed to a protected branch gets the cache, and changes nothing for others.
    for (name, value) in [
        ("GITHUB_REF_PROTECTED", "false"),
        ("GITHUB_EVENT_NAME", "pull_request_target"),
    ] {
        let mut runner = Runner::new(&host, name);
        runner.sets(name, value);
        runner.passes("grep first /cache/who; echo second > /cache/who");
        assert_eq!(cached(&host, "github-77"), "first");
    }
    only_caches_are_left(&host);
}

#[test]
fn github_job_that_fails_or_is_killed_leaves_nothing() {
    let host = Host::with_images();
    let mut runner = Runner::new(&host, "runner");
    // Nothing was prepared.
    runner.cleaned_up();
    assert!(names_in(&artifacts(&host)).is_empty());
    runner.prepared();
    runner
        .runs("echo out; exit 3")
        .ends_with(1)
        .prints("out\n")
        .complains_of("exit code 3");
    runner.runs("echo always").succeeds().prints("always\n");
    runner.cleaned_up();
    assert!(volumes(&host).is_empty());

    // Cancelled, or out of time: the runner interrupts the hook alone.
    runner.prepared();
    let mut step = runner.starts(
        "run_script_step",
        runner.step("sleep 54321 & echo begun; sleep 54321"),
    );
    step.prints("begun").gets(Signal::INT);
    step.ends().ends_with(1);
    runner.runs("! pgrep -f 54321").succeeds();
    runner.cleaned_up();
    assert!(volumes(&host).is_empty());

    // The runner is killed in the middle of a step, and of preparing.
    runner.prepared();
    let mut step = runner.starts("run_script_step", runner.step("echo begun; sleep 1000"));
    step.prints("begun");
    signal_group(&step, Signal::KILL);
    drop(step);
    runner.cleaned_up();
    assert!(volumes(&host).is_empty());
    let args = json!({"container": runner.container(), "services": []});
    let preparing = runner.starts("prepare_job", args);
    std::thread::sleep(Duration::from_secs(1));
    signal_group(&preparing, Signal::KILL);
    drop(preparing);
    // Without a word of cleaning up the next job begins.
    runner.prepared();
    runner.cleaned_up();
    only_caches_are_left(&host);
}

#[test]
fn github_jobs_at_once_have_a_cache_each() {
    let host = Host::with_images();
    Runner::new(&host, "zero").passes("echo base > /cache/who");
    let mut one = Runner::new(&host, "one");
    let mut two = Runner::new(&host, "two");
    one.prepared();
    two.prepared();
    for runner in [&one, &two] {
        let script = "grep base /cache/who; echo changed > /cache/who; sync";
        runner.runs(script).succeeds();
    }
    assert_eq!(cached(&host, "github-77"), "base");
    one.cleaned_up();
    two.cleaned_up();
    assert_eq!(cached(&host, "github-77"), "changed");
    only_caches_are_left(&host);
}

#[test]
fn github_registry_password_is_there_while_the_image_is_fetched() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::with_images();
    let mut runner = Runner::new(&host, "runner");
    let stand_in = host.dir().join("stand-in");
    fs::write(
        &stand_in,
        "#!/bin/sh\ncat \"$DOCKER_CONFIG/config.json\" >&2; ls -l \"$DOCKER_CONFIG\" >&2; exit 1\n",
    )
    .unwrap();
    fs::set_permissions(&stand_in, fs::Permissions::from_mode(0o755)).unwrap();
    runner.sets("CASEMATE", stand_in.to_str().unwrap());
    let mut container = runner.container();
    container["registry"] = json!({"username": "u", "password": "p:'\"", "serverUrl": "ghcr.io"});
    let args = json!({"container": container, "services": []});
    runner
        .calls("prepare_job", args)
        .ends_with(1)
        .complains_of(r#"{"auths":{"ghcr.io":{"auth":"dTpwOici"}}}"#)
        .complains_of("-rw-------");
    assert!(names_in(&runner.root.join("tmp")).is_empty());
}

#[test]
fn github_job_reaches_nothing_of_its_host() {
    let host = Host::with_images();
    let mut runner = Runner::new(&host, "runner");
    // What a step added to the PATH, which the runner then gives to the hook.
    let trojans = runner.root.join("_work/trojans");
    fs::create_dir(&trojans).unwrap();
    for name in ["sh", "casemate", "date", "sort", "env"] {
        use std::os::unix::fs::PermissionsExt;
        let trojan = trojans.join(name);
        fs::write(&trojan, "#!/bin/busybox sh\ntouch \"${0%/*}/pwned\"\n").unwrap();
        fs::set_permissions(&trojan, fs::Permissions::from_mode(0o755)).unwrap();
    }
    // Nothing is run by its name before the hook sets the PATH: the runner has node's full path.
    let path = std::env::var("PATH").unwrap();
    runner.sets("PATH", &format!("{}:{path}", trojans.display()));
    let asks = |runner: &Runner, key: &str, value: Value, why: &str| {
        let mut container = runner.container();
        container[key] = value;
        let args = json!({"container": container, "services": []});
        runner
            .calls("prepare_job", args)
            .ends_with(1)
            .complains_of(why);
        assert!(volumes(&host).is_empty());
    };
    asks(
        &runner,
        "createOptions",
        json!("--privileged -v /:/host"),
        "`options`",
    );
    asks(&runner, "portMappings", json!(["22:22"]), "`ports`");
    let volume = json!([{"sourceVolumePath": "/etc", "targetVolumePath": "/x", "readOnly": false}]);
    asks(&runner, "userMountVolumes", volume, "`volumes`");
    for image in ["-v/:/host", "busybox\n--help"] {
        asks(
            &runner,
            "image",
            json!(image),
            "start ended with exit code 125",
        );
    }
    let services = json!({"container": runner.container(), "services": [{"image": "redis"}]});
    runner
        .calls("prepare_job", services)
        .ends_with(1)
        .complains_of("service");
    runner
        .calls("prepare_job", json!({"container": null, "services": []}))
        .ends_with(1)
        .complains_of("`container`");
    runner
        .calls("constructor", json!({}))
        .ends_with(1)
        .complains_of("constructor");

    // The job can write to the directory of the responses, and so make any file a link.
    let victim = host.dir().join("victim");
    fs::write(&victim, "whole").unwrap();
    let response = runner.responses().join("prepare_job.json");
    fs::remove_file(&response).unwrap();
    std::os::unix::fs::symlink(&victim, &response).unwrap();
    let args = json!({"container": runner.container(), "services": []});
    runner
        .calls("prepare_job", args)
        .ends_with(1)
        .complains_of("ELOOP");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "whole");
    fs::remove_file(&response).unwrap();

    runner.prepared();
    // It can write into its state, too: that names no other container.
    runner.state = json!({"container": "victim", "env": {"-i": "x"}});
    runner.runs("true").ends_with(0);
    let mut step = runner.step("true");
    step["workingDirectory"] = json!("/no such'$(touch /tmp/x)");
    runner.calls("run_script_step", step).ends_with(1);
    let mut action = runner.container();
    action["environmentVariables"] = json!({"LINES": "a\nb"});
    runner
        .calls("run_container_step", action)
        .ends_with(1)
        .complains_of("LINES");
    let built = json!({"image": null, "dockerfile": "./Dockerfile"});
    runner
        .calls("run_container_step", built)
        .ends_with(1)
        .complains_of("builds no images");
    runner.cleaned_up();
    assert!(!trojans.join("pwned").exists());
    assert!(volumes(&host).is_empty());
    only_caches_are_left(&host);
}
