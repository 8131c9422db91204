//! The `/init` of the guests that are only booted: says one word on the console, then waits to be ended.

use std::io::Write;
use std::time::Duration;

fn main() {
    // The kernel opened the console for its first process. What can't be written can't be told either.
    let _ = std::io::stdout().write_all(b"casemate-bench: up\n");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
