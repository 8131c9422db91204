//! The serial console: a 16550 UART that only writes, present only when asked for.

use crate::bus::BusDevice;
use crate::sync::lock;
use std::fs::File;
use std::io;
use std::sync::Mutex;
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

/// The UART's interrupt, an irqfd.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A UART whose output goes to a file.
pub struct Serial(Mutex<vm_superio::Serial<Line, NoEvents, File>>);

impl Serial {
    /// `out` may be a pipe or a terminal; what it doesn't take at once is lost, so that a
    /// stuck reader never stops the guest (the caller sets O_NONBLOCK for that).
    pub fn new(irqfd: EventFd, out: File) -> Self {
        Self(Mutex::new(vm_superio::Serial::new(Line(irqfd), out)))
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut serial = lock(&self.0);
        for byte in data {
            *byte = serial.read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut serial = lock(&self.0);
        for &byte in data {
            let _ = serial.write(offset as u8, byte); // a lost console byte is no reason to stop
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn write_to_data_register_reaches_the_file() {
        let mut out = tempfile::tempfile().expect("temporary file");
        let serial = Serial::new(
            EventFd::new(0).expect("eventfd"),
            out.try_clone().expect("clone"),
        );

        serial.write(0, b"boot");

        let mut text = String::new();
        out.rewind().expect("seek");
        out.read_to_string(&mut text).expect("read");
        assert_eq!(text, "boot");
    }

    #[test]
    fn access_to_any_register_never_panics() {
        let out = tempfile::tempfile().expect("temporary file");
        let serial = Serial::new(EventFd::new(0).expect("eventfd"), out);

        for offset in 0..8 {
            for value in [0, 0x80, 0xff] {
                serial.write(offset, &[value; 8]);
                serial.read(offset, &mut [0; 8]);
            }
        }
    }
}
