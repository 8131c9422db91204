//! Faults at many times of a sandbox's life, then many lives: nothing may be lost, left behind or grow.
//!
//! `tests/run-faults` runs it on a KVM host. A failed point is told with the command that repeats it; the others go on.

mod fault;
mod guest;
mod plan;
mod scene;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use casemate_tests::machine::{self, Snapshot};

use fault::{Durations, Outcome};
use plan::{Fault, Net};
use scene::{Scene, Vitals};

/// Growth of a process's own memory that is no leak: an allocator's caches.
const SLACK_KIB: u64 = 4096;

struct Options {
    points: usize,
    cycles: usize,
    seed: u64,
    only: Option<Range<usize>>,
    /// Which of how many equal shares is ours: several hosts may have a part each.
    share: (usize, usize),
}

impl Options {
    fn has(&self, point: usize) -> bool {
        let (ours, of) = self.share;
        let is_wanted = self.only.as_ref().is_none_or(|only| only.contains(&point));
        is_wanted && point % of == ours
    }

    fn own_cycles(&self) -> usize {
        let (ours, of) = self.share;
        self.cycles / of + usize::from(ours < self.cycles % of)
    }
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        points: 200,
        cycles: 1000,
        seed: 1,
        only: None,
        share: (0, 1),
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args
            .next()
            .with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--points" => options.points = value.parse()?,
            "--cycles" => options.cycles = value.parse()?,
            "--seed" => options.seed = value.parse()?,
            "--only" => {
                let (first, last) = value.split_once('-').unwrap_or((&value, &value));
                options.only = Some(first.parse()?..last.parse::<usize>()? + 1);
            }
            "--share" => {
                let (ours, of) = value
                    .split_once('/')
                    .context("--share is of the form K/N")?;
                options.share = (ours.parse()?, of.parse()?);
                let (ours, of) = options.share;
                anyhow::ensure!(ours < of, "--share {value}: there is no such share");
            }
            _ => bail!(
                "unknown option {name}: there are --points, --cycles, --seed, --only FIRST-LAST and --share K/N"
            ),
        }
    }
    Ok(options)
}

fn main() -> anyhow::Result<ExitCode> {
    let options = options()?;
    let (ours, of) = options.share;
    println!(
        "{} points of seed {}, {} cycles; of these the share {ours} of {of}",
        options.points, options.seed, options.cycles
    );
    let mut failed = 0;
    if options.points > 0 {
        failed += points(&options);
    }
    let own = options.own_cycles();
    if own > 0 {
        failed += usize::from(catch_unwind(|| cycles(own)).is_err());
    }
    println!("{failed} failed");
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// Goes through the points and says how many failed.
fn points(options: &Options) -> usize {
    machine::way_out();
    let mut stage = Stage::default();
    let (mut failed, mut missed) = (0, 0);
    let begun = Instant::now();
    for point in plan::points(options.seed, options.points) {
        if !options.has(point.number) {
            continue;
        }
        let begun_point = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| stage.play(&point)));
        let took = begun_point.elapsed().as_secs_f64();
        match outcome {
            Ok(outcome) => {
                missed += usize::from(!outcome.hit);
                println!("ok {point} ({took:.1} s): {outcome}");
            }
            Err(_) => {
                failed += 1;
                let Options { points, seed, .. } = options;
                println!(
                    "FAILED {point}\n  once more: tests/run-faults --cycles 0 --points {points} --seed {seed} --only {}",
                    point.number
                );
                // What is left of it must not be the next one's.
                match point.fault {
                    Fault::DiskFull => drop(stage.small.take()),
                    _ => drop(stage.main.take()),
                }
            }
        }
    }
    let ended = catch_unwind(AssertUnwindSafe(|| stage.ends()));
    failed += usize::from(ended.is_err());
    println!(
        "points: {failed} failed, {missed} came too late, {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    failed
}

/// The scenes, each made when it is needed.
#[derive(Default)]
struct Stage {
    main: Option<Scene>,
    small: Option<Scene>,
    durations: Durations,
    vitals: Vec<Vitals>,
}

impl Stage {
    fn play(&mut self, point: &plan::Point) -> Outcome {
        let durations = &mut self.durations;
        let main = self.main.get_or_insert_with(|| {
            let mut scene = Scene::new();
            // Before the neighbour comes: what the first container on a network leaves is the machine's.
            durations.measure(&scene, Net::None);
            durations.measure(&scene, Net::Bridge);
            scene.settle_neighbour();
            self.vitals = scene.vitals();
            scene
        });
        durations.measure(main, point.net);
        if point.fault == Fault::DiskFull {
            let small = self.small.get_or_insert_with(Scene::small);
            let outcome = fault::happens(small, durations, point);
            // On another disk, but on the same machine.
            main.neighbour_goes_on();
            return outcome;
        }
        fault::happens(main, durations, point)
    }

    fn ends(mut self) {
        if let Some(scene) = self.main.take() {
            has_not_grown(&scene, &self.vitals);
            scene.ends();
        }
        if let Some(scene) = self.small.take() {
            scene.ends();
        }
    }
}

/// The neighbour's processes hold what they held, and little more memory.
fn has_not_grown(scene: &Scene, before: &[Vitals]) {
    for (before, now) in before.iter().zip(scene.vitals()) {
        println!("{before:?} -> {now:?}");
        assert_eq!(now.process, before.process);
        assert!(
            now.descriptors <= before.descriptors,
            "descriptors of {} grew: {} -> {}",
            now.process,
            before.descriptors,
            now.descriptors
        );
        let is_vmm = now.process.ends_with("casemate-vmm");
        // A VMM's memory is its guest's, too.
        assert!(
            is_vmm || now.memory <= before.memory + SLACK_KIB,
            "memory of {} grew: {} -> {} KiB",
            now.process,
            before.memory,
            now.memory
        );
    }
}

/// Runs and removes a container many times.
fn cycles(count: usize) {
    let mut scene = Scene::new();
    let cycle = |scene: &Scene, number: usize| {
        // Most without a network, which is the machine's slowest part.
        let network = if number.is_multiple_of(10) {
            "bridge"
        } else {
            "none"
        };
        let word = number.to_string();
        let args = [
            "run",
            "--rm",
            "--network",
            network,
            "-v",
            "kept:/data",
            "-v",
            "/anonymous",
        ];
        let args = args.iter().copied().chain(["busybox", "echo", &word]);
        scene.command(args).succeeds().prints(&format!("{word}\n"));
    };
    // The first one's traces are the machine's.
    cycle(&scene, 0);
    scene.settle_neighbour();
    let (before, vitals) = (Snapshot::take(&scene.host), scene.vitals());
    let begun = Instant::now();
    for number in 1..=count {
        cycle(&scene, number);
        if number.is_multiple_of(100) {
            fault::unchanged_since(&scene, &before);
            println!("{number} cycles, {:.0} s", begun.elapsed().as_secs_f64());
        }
    }
    fault::unchanged_since(&scene, &before);
    scene.neighbour_goes_on();
    has_not_grown(&scene, &vitals);
    scene.ends();
    println!("ok {count} cycles ({:.0} s)", begun.elapsed().as_secs_f64());
}
