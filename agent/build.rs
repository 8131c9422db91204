//! Writes the tables of syscall names that seccomp profiles are compiled with, sorted for binary search.

use std::fmt::Write as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let x86_64 = syscalls::x86_64::Sysno::iter().map(|s| (s.name(), s.id()));
    let x86 = syscalls::x86::Sysno::iter().map(|s| (s.name(), s.id()));
    let code = table("X86_64", x86_64.collect())? + &table("X86", x86.collect())?;
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(format!("{out}/syscall_tables.rs"), code)?;
    Ok(())
}

fn table(name: &str, mut rows: Vec<(&str, i32)>) -> Result<String, std::fmt::Error> {
    rows.sort_unstable();
    let mut code = format!(
        "pub(super) static {name}: [(&str, u32); {}] = [\n",
        rows.len()
    );
    for (syscall, number) in rows {
        writeln!(code, "    ({syscall:?}, {number}),")?;
    }
    code.push_str("];\n");
    Ok(code)
}
