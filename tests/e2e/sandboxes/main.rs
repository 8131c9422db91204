//! What a user of `casemate run` can rely on; run on a KVM host by `tests/run-e2e`.

mod bad_guests;
mod bad_options;
mod binds;
mod check;
mod confined;
mod containers;
mod detached;
mod exec;
mod exit_codes;
mod filesystem;
mod full_disk;
mod initcalls;
mod isolation;
mod killed;
mod layers;
mod lifecycle;
mod limits;
mod metadata;
mod options;
mod process;
mod signals;
mod stdio;
mod tty;
mod unprivileged;
mod volumes;
