//! One point: the fault, and what must be true afterwards.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use casemate_tests::machine::{self, Snapshot};
use casemate_tests::{Finished, Running};
use rustix::process::Signal;

use crate::guest::Dies;
use crate::plan::{Fault, Net, Phase, Point, Victim};
use crate::scene::{BOX, Scene};

const SHIM: &str = "containerd-shim-casemate-v2";
const VMM: &str = "casemate-vmm";
/// What settles by itself does so within this, even on an emulated host.
const SETTLES: Duration = Duration::from_secs(40);

/// How long each phase takes undisturbed, by network.
#[derive(Debug, Default)]
pub(crate) struct Durations(Vec<(Phase, Net, Duration)>);

const PHASES: [Phase; 7] = [
    Phase::Create,
    Phase::Start,
    Phase::Exec,
    Phase::CopyIn,
    Phase::CopyOut,
    Phase::Stop,
    Phase::Remove,
];

impl Durations {
    /// Goes through a whole life on a network, unless that was done before.
    pub(crate) fn measure(&mut self, scene: &Scene, net: Net) {
        if self.0.iter().any(|entry| entry.1 == net) {
            return;
        }
        for phase in PHASES {
            if phase == Phase::Remove {
                // One that runs takes longest to remove.
                scene.begin(Phase::Start, net).ends().succeeds();
            }
            let begun = Instant::now();
            scene.begin(phase, net).ends().succeeds();
            self.0.push((phase, net, begun.elapsed()));
            if phase == Phase::Start {
                scene.works();
            }
        }
        scene.volume_has(0);
        scene.forget_copies();
        let taken = self.0.iter().filter(|entry| entry.1 == net);
        let taken: Vec<String> = taken
            .map(|(phase, _, t)| format!("{phase:?} {t:.1?}"))
            .collect();
        println!("undisturbed on {net:?}: {}", taken.join(", "));
    }

    fn of(&self, phase: Phase, net: Net) -> Duration {
        let found = self
            .0
            .iter()
            .find(|entry| (entry.0, entry.1) == (phase, net));
        found.expect("every phase was measured").2
    }
}

/// What came of a point.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The fault met something; else the phase was over before it.
    pub(crate) hit: bool,
    /// The disturbed command's exit code.
    code: i32,
    /// What `ps` then said.
    state: Option<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.as_deref().unwrap_or("gone");
        let missed = if self.hit { "" } else { "over before it; " };
        write!(f, "{missed}exit code {}, then {state}", self.code)
    }
}

/// Has the fault happen, and judges what is left.
pub(crate) fn happens(scene: &mut Scene, durations: &Durations, point: &Point) -> Outcome {
    let Point {
        phase, net, fault, ..
    } = *point;
    let before = Snapshot::take(&scene.host);
    let delay = durations.of(phase, net).mul_f64(point.at);
    let death = death(scene, durations, point, delay);

    for earlier in PHASES.into_iter().take_while(|earlier| *earlier != phase) {
        if matches!(earlier, Phase::Create | Phase::Start) {
            scene.begin(earlier, net).ends().succeeds();
        }
    }
    let ran = !matches!(phase, Phase::Create | Phase::Start);
    if ran {
        scene.works();
    }
    let mut told = if ran { scene.told() } else { 0 };
    if let Some(death) = death
        && ran
    {
        let begin = death - delay;
        let wait = begin.duration_since(SystemTime::now());
        std::thread::sleep(wait.unwrap_or_default());
    }
    let mut command = scene.begin(phase, net);
    let (hit, filler) = strike(scene, fault, delay, &mut command);
    let finished = command.ends();
    if let Some(filler) = &filler {
        // The sandbox meets the full disk for a while.
        std::thread::sleep(delay);
        fs::remove_file(filler).unwrap();
    }
    if let Some(death) = death {
        let left = death.duration_since(SystemTime::now());
        std::thread::sleep(left.unwrap_or_default());
    }
    scene.guests_die(None);
    told = told.max(scene.told());

    speaks_up(fault, &finished);
    let deadly = match fault {
        Fault::Kill(victim) => victim != Victim::Cli && hit,
        Fault::Agent | Fault::Kernel | Fault::Orphan(_) => true,
        Fault::DiskFull | Fault::Plugin(..) | Fault::NoPasst => false,
    };
    let state = ps_tells_the_truth(scene, deadly);
    agrees(phase, &finished, state.as_deref());
    told = told.max(scene.told());
    // A plugin that fails keeps what it has to give back from being forgotten.
    if let Fault::Plugin("DEL", _) = fault {
        scene.command(["rm", "-f", BOX]);
    }
    scene.fail(None);
    everything_comes_back(scene);
    scene.forget_copies();
    scene.volume_has(told);
    unchanged_since(scene, &before);
    scene.neighbour_goes_on();
    Outcome {
        hit,
        code: finished.code(),
        state,
    }
}

/// When the guest shall die, if it shall, which is set before it boots.
fn death(
    scene: &Scene,
    durations: &Durations,
    point: &Point,
    delay: Duration,
) -> Option<SystemTime> {
    let dies = match point.fault {
        Fault::Agent => Dies::Agent,
        Fault::Kernel => Dies::Kernel,
        _ => return None,
    };
    let create = durations.of(Phase::Create, point.net);
    let start = durations.of(Phase::Start, point.net);
    let until_phase = match point.phase {
        Phase::Start => create,
        // Twice: nothing of before the phase may be disturbed.
        _ => (create + start) * 2 + Duration::from_secs(2),
    };
    let when = SystemTime::now() + until_phase + delay;
    scene.guests_die(Some((dies, when)));
    Some(when)
}

/// Has it happen `delay` after the command began.
fn strike(
    scene: &Scene,
    fault: Fault,
    delay: Duration,
    command: &mut Running,
) -> (bool, Option<PathBuf>) {
    let happens_at = Instant::now() + delay;
    let wait = || std::thread::sleep(happens_at.saturating_duration_since(Instant::now()));
    match fault {
        Fault::Kill(Victim::Cli) => {
            wait();
            if command.has_ended() {
                return (false, None);
            }
            command.gets(Signal::KILL);
        }
        Fault::Kill(victim) => {
            wait();
            // One that isn't there yet is killed as soon as it is.
            loop {
                let programs: &[&str] = match victim {
                    Victim::Shim | Victim::Cli => &[SHIM],
                    Victim::Vmm => &[VMM],
                    Victim::Virtiofsd => &["virtiofsd"],
                    Victim::Passt => &["passt", "passt.avx2"],
                    Victim::All => &[SHIM, VMM, "virtiofsd", "passt", "passt.avx2"],
                };
                if victim == Victim::All && !command.has_ended() {
                    command.gets(Signal::KILL);
                }
                let over = command.has_ended();
                let found: Vec<_> = programs.iter().flat_map(|p| scene.processes(p)).collect();
                if machine::kill(&found) > 0 || victim == Victim::All {
                    break;
                }
                if over {
                    return (false, None);
                }
            }
        }
        Fault::DiskFull => {
            wait();
            return (true, Some(scene.fill_disk()));
        }
        Fault::Plugin(call, name) => scene.fail(Some(&format!("{call} {name}"))),
        Fault::Orphan(name) => {
            scene.fail(Some(&format!("slow {name}")));
            while !scene.slow_file().exists() {
                if command.has_ended() {
                    return (false, None);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            machine::kill(&scene.processes(SHIM));
        }
        Fault::NoPasst => scene.fail(Some("passt")),
        Fault::Agent | Fault::Kernel => {}
    }
    (true, None)
}

/// A command that failed says why, unless it was killed itself.
fn speaks_up(fault: Fault, finished: &Finished) {
    let killed = matches!(fault, Fault::Kill(Victim::Cli | Victim::All));
    if finished.code() != 0 && !(killed && finished.code() == 137) {
        finished.fails();
    }
    if matches!(fault, Fault::Plugin("ADD", _) | Fault::NoPasst) {
        finished.fails().complains_of("made to fail");
    }
}

/// Waits until `ps` and the living processes say the same, which must be soon. A sandbox that is said to run works; after
/// a deadly fault none does.
fn ps_tells_the_truth(scene: &Scene, deadly: bool) -> Option<String> {
    let deadline = Instant::now() + SETTLES;
    loop {
        let state = scene.state();
        let (vmms, shims) = (scene.processes(VMM), scene.processes(SHIM));
        let lives = !vmms.is_empty() && !shims.is_empty();
        let dead = vmms.is_empty() && shims.is_empty();
        let words = match state.as_deref() {
            Some("running") if lives => {
                let exec = scene.command(["exec", BOX, "echo", "alive"]);
                if exec.code() == 0 && !deadly {
                    return state;
                }
                exec.text() + &exec.stderr_text()
            }
            Some("created" | "exited") | None if dead => return state,
            _ => String::new(),
        };
        assert!(
            Instant::now() < deadline,
            "ps says {state:?} of {BOX}; its VMM's processes are {vmms:?}, its shim's {shims:?}; {words}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What a command said it did was done.
fn agrees(phase: Phase, finished: &Finished, state: Option<&str>) {
    if finished.code() != 0 {
        return;
    }
    let fine = match phase {
        Phase::Create => state == Some("created"),
        Phase::Start | Phase::Exec | Phase::CopyIn | Phase::CopyOut => state.is_some(),
        Phase::Stop => state == Some("exited"),
        Phase::Remove => state.is_none(),
    };
    assert!(fine, "{phase:?} succeeded, but {BOX} is {state:?}");
}

fn everything_comes_back(scene: &Scene) {
    if scene.state().is_some() {
        scene.command(["rm", "-f", BOX]).succeeds();
    }
    scene.command(["system", "prune", "-f"]).succeeds();
    assert_eq!(scene.state(), None, "{BOX} is still there");
}

/// Waits until everything is as before, which must be soon.
pub(crate) fn unchanged_since(scene: &Scene, before: &Snapshot) {
    let deadline = Instant::now() + SETTLES;
    loop {
        let changes = Snapshot::take(&scene.host).changes_since(before);
        if changes.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "not as before: {changes:#?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
