//! The serial console: a 16550 UART that only writes, present only when asked for.

use crate::bus::BusDevice;
use crate::sync::lock;
use crate::virtio::saved::{self, RestoreError};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::sync::Mutex;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};
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

    /// As it was saved; an interrupt that was due is raised again.
    pub fn restore(
        state: &serde_json::Value,
        irqfd: EventFd,
        out: File,
    ) -> Result<Self, RestoreError> {
        let State(state) = saved::parse("the serial console", state)?;
        vm_superio::Serial::from_state(&state, Line(irqfd), NoEvents, out)
            .map(|serial| Self(Mutex::new(serial)))
            .map_err(|error| RestoreError::Build {
                device: "the serial console",
                source: io::Error::other(format!("{error:?}")),
            })
    }

    /// What the guest has written to the registers.
    pub fn save(&self) -> serde_json::Value {
        serde_json::json!(State(lock(&self.0).state()))
    }
}

/// What the UART remembers.
#[derive(Serialize, Deserialize)]
struct State(#[serde(with = "Registers")] SerialState);

/// The registers of a 16550, one byte each, and the bytes that loop back.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState", deny_unknown_fields)]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
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

    #[test]
    fn restore_gives_the_registers_back_and_refuses_what_never_was() {
        let eventfd = || EventFd::new(0).expect("eventfd");
        let out = || tempfile::tempfile().expect("temporary file");
        let serial = Serial::new(eventfd(), out());
        let (scratch, loopback) = (7, 0x10);
        serial.write(scratch, &[0x5a]);
        serial.write(4, &[loopback]);
        serial.write(0, b"back");

        let state = serial.save();
        let restored = Serial::restore(&state, eventfd(), out()).expect("own state");

        let mut byte = [0];
        restored.read(scratch, &mut byte);
        assert_eq!(byte, [0x5a]);
        let mut text = [0; 4];
        restored.read(0, &mut text);
        assert_eq!(&text, b"back");
        let mut too_full = state.clone();
        too_full["in_buffer"] = vec![0; 65].into();
        let mut unknown = state;
        unknown["colour"] = "amber".into();
        for bad in [too_full, unknown, serde_json::Value::Null] {
            assert!(Serial::restore(&bad, eventfd(), out()).is_err(), "{bad}");
        }
    }
}
