//! Port I/O.
#![allow(unsafe_code)] // the power device is an I/O port

use std::arch::asm;
use std::io;

use casemate_protocol::POWER_PORT;

/// Tells the VMM's power device; returns only if the port can't be had.
pub(crate) fn write_power_port(value: u8) -> io::Error {
    // SAFETY: asks for this one port.
    if unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) } < 0 {
        return io::Error::last_os_error();
    }
    // SAFETY: the port is ours and has no effect on memory.
    unsafe {
        asm!("out dx, al", in("dx") POWER_PORT, in("al") value, options(nomem, nostack, preserves_flags))
    };
    io::Error::other("the power device did not answer")
}
