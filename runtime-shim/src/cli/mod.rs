//! The command line: a thin client of the image store and of the shim.

mod args;
mod attach;
mod attend;
mod caps;
mod check;
mod client;
mod commit;
mod containers;
mod cp;
mod create;
mod data;
mod detach_keys;
mod diff;
mod docs;
mod env;
mod events;
mod exec;
mod filter;
mod follow;
mod health;
mod images;
mod initcalls;
mod kernel_log;
mod lifecycle;
mod limits;
mod logs;
mod mounts;
mod network_args;
mod network_options;
mod network_view;
mod networks;
mod outfile;
mod output;
mod progress;
mod publish;
mod resolv;
mod run;
mod security;
mod signals;
mod spec;
mod start;
mod stats;
mod streams;
mod system;
mod template;
mod terminal;
mod timing;
mod tools;
mod top;
mod update;
mod volumes;

use crate::settings::Settings;
use anyhow::Context;
use args::{Cli, Command, FormatArgs};
use clap::Parser;
use serde_json::json;
use std::process::ExitCode;

/// Docker's exit code for a wrong use of `run`.
const RUN_FAILED: u8 = 125;

/// The program.
pub fn main() -> ExitCode {
    let begun = monotonic_ns();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match dispatch(cli.command, begun) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("casemate: {}", crate::rpc::chain(failure.error.as_ref()));
            ExitCode::from(failure.code)
        }
    }
}

/// Help goes to standard output; a wrong `run` or `create` exits as Docker's does.
fn usage(error: &clap::Error) -> ExitCode {
    // A closed standard output is nothing to complain about.
    let _ = error.print();
    let word = std::env::args().nth(1);
    let is_run = matches!(word.as_deref(), Some("run" | "create"));
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if is_run => ExitCode::from(RUN_FAILED),
        code => ExitCode::from(code as u8),
    }
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn dispatch(command: Command, begun: u64) -> Result<u8, run::Failure> {
    // What needs neither configuration nor an event loop.
    match &command {
        Command::Version(args) => return done(version(args)),
        Command::Completion { shell } => return done(docs::completion(*shell)),
        Command::Man { dir } => return done(docs::man(dir)),
        _ => {}
    }
    let settings = Settings::load().map_err(anyhow::Error::from);
    let settings = match (settings, &command) {
        (Ok(settings), _) => settings,
        (Err(error), Command::Run(_) | Command::Create(_)) => return Err(error.into()),
        (Err(error), _) => return done(Err(error)),
    };
    match command {
        Command::Run(args) => event_loop()?.block_on(run::run(&settings, &args, begun)),
        Command::Create(args) => event_loop()?.block_on(create::create(&settings, &args)),
        Command::Start(args) => or_1(blocking_code(start::start(&settings, &args))),
        Command::Restart(args) => done(blocking(start::restart(&settings, &args))),
        Command::Logs(args) => done(blocking(logs::logs(&settings, &args))),
        Command::Attach(args) => or_1(blocking_code(attach::attach(&settings, &args))),
        Command::Cp(args) => done(blocking(cp::cp(&settings, &args))),
        Command::Commit(args) => done(blocking(commit::commit(&settings, &args))),
        Command::Diff(args) => done(blocking(diff::diff(&settings, &args))),
        Command::Top(args) => or_1(blocking_code(top::top(&settings, &args))),
        Command::Stats(args) => done(blocking(stats::stats(&settings, &args))),
        Command::Events(args) => done(blocking(events::events(&settings, &args))),
        Command::Update(args) => done(blocking(update::update(&settings, &args))),
        Command::System(command) => done(system::system(&settings, &command)),
        Command::Info(args) => done(system::info(&settings, &args)),
        Command::Rename(args) => done(containers::rename(&settings, &args)),
        Command::Pull(args) => done(blocking(images::pull(&settings, &args))),
        Command::Load(args) => done(blocking(images::load(&settings, &args))),
        Command::Images(args) => done(images::images(&settings, &args)),
        Command::Rmi(args) => done(images::rmi(&settings, &args)),
        Command::Save(args) => done(images::save(&settings, &args)),
        Command::Tag(args) => done(images::tag(&settings, &args)),
        Command::Prune(args) => done(images::prune(&settings, &args)),
        Command::Inspect(args) => done(containers::inspect(&settings, &args)),
        Command::Ps(args) => done(containers::ps(&settings, &args)),
        Command::Volume(args) => done(volumes::volume(&settings, &args)),
        Command::Rm(args) => done(blocking(containers::rm(&settings, &args))),
        Command::Exec(args) => or_1(blocking_code(exec::exec(&settings, &args))),
        Command::Stop(args) => done(blocking(lifecycle::stop(&settings, &args))),
        Command::Kill(args) => done(blocking(lifecycle::kill(&settings, &args))),
        Command::Wait(args) => done(blocking(lifecycle::wait(&settings, &args))),
        Command::Pause(args) => done(blocking(lifecycle::pause(&settings, &args))),
        Command::Unpause(args) => done(blocking(lifecycle::unpause(&settings, &args))),
        Command::Port(args) => done(network_view::port(&settings, &args)),
        Command::Network(command) => done(networks::run(&settings, &command)),
        Command::Check(args) => match check::check(&settings, &args) {
            Ok(well) => Ok(u8::from(!well)),
            Err(error) => done(Err(error)),
        },
        Command::Version(_) | Command::Completion { .. } | Command::Man { .. } => Ok(0),
    }
}

/// What Docker's engine doesn't do itself fails with 1.
fn done(result: anyhow::Result<()>) -> Result<u8, run::Failure> {
    match result {
        Ok(()) => Ok(0),
        Err(error) => Err(run::Failure { error, code: 1 }),
    }
}

/// Only for `run` and `create` is a failure of ours told from one of the command by 125.
fn or_1(result: Result<u8, run::Failure>) -> Result<u8, run::Failure> {
    result.map_err(|failure| run::Failure {
        code: match failure.code {
            RUN_FAILED => 1,
            code => code,
        },
        ..failure
    })
}

fn blocking_code(work: impl Future<Output = Result<u8, run::Failure>>) -> Result<u8, run::Failure> {
    event_loop()?.block_on(work)
}

fn event_loop() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the event loop")
}

fn blocking(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    event_loop()?.block_on(work)
}

fn version(args: &FormatArgs) -> anyhow::Result<()> {
    let row = json!({
        "Version": env!("CARGO_PKG_VERSION"),
        "Os": std::env::consts::OS,
        "Arch": std::env::consts::ARCH,
    });
    match args.format.as_deref() {
        None => output::write(concat!("casemate ", env!("CARGO_PKG_VERSION"), "\n")),
        format => output::print(format, "", &["Version", "Os", "Arch"], &[row]),
    }
}
