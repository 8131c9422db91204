//! What a user of `casemate run` can rely on; run on a KVM host by `tests/run-e2e`.

mod bad_guests;
mod bad_options;
mod confined;
mod exec;
mod exit_codes;
mod filesystem;
mod initcalls;
mod isolation;
mod killed;
mod layers;
mod lifecycle;
mod limits;
mod metadata;
mod process;
mod signals;
mod stdio;
mod tty;
mod unprivileged;
