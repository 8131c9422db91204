//! What busybox lacks, for use in the guest: a static program that every fixture image carries.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((verb, rest)) if verb == "tree" && !rest.is_empty() => {
            let skip: Vec<PathBuf> = rest[1..].iter().map(PathBuf::from).collect();
            match casemate_tests::list_tree(Path::new(&rest[0]), &skip) {
                Ok(text) => {
                    print!("{text}");
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    eprintln!("{}: {error}", rest[0]);
                    ExitCode::FAILURE
                }
            }
        }
        Some((verb, [])) if verb == "hog" => hog(),
        Some((verb, [length])) if verb == "stream" && length.parse::<u64>().is_ok() => {
            let length = length.parse().unwrap_or(0);
            match casemate_tests::stream::write(length, &mut std::io::stdout().lock()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        _ => {
            eprintln!("usage: guest-tool tree ROOT [SKIP…] | stream BYTES | hog");
            ExitCode::from(2)
        }
    }
}

/// Takes memory, every page of it touched, until the kernel has had enough.
fn hog() -> ! {
    let mut hoard = Vec::new();
    loop {
        hoard.push(vec![1_u8; 1 << 20]);
        std::hint::black_box(&hoard);
    }
}
