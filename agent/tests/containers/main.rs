//! Containers as the shim asks for them, against the real agent.

mod guest;
mod life;
mod mounts;
mod settings;
mod streams;
