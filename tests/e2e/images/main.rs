//! What a user of `casemate pull`, `load`, `save` and the store's other commands can rely on. None of it needs
//! a KVM host: `tests/run-e2e` runs it on the machine itself.

mod bad_layers;
mod bad_registry;
mod commands;
mod pull;
mod save;
