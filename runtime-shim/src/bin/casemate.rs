//! `casemate`: containers in microVMs of their own.

use std::process::ExitCode;

fn main() -> ExitCode {
    casemate::cli::main()
}
