//! The power device: one port, one byte.

use crate::bus::BusDevice;
use crate::ending::{Ending, Outcome};
use crate::exit_code;
use casemate_protocol::power;
use std::sync::Arc;

/// Ends the VM when the guest says so; reads as 0.
pub struct Power(pub Arc<Ending>);

impl BusDevice for Power {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        match data {
            [power::OFF] => {
                let outcome = Outcome::new(exit_code::SHUTDOWN, "the guest powered off");
                self.0.end(outcome);
            }
            [power::RESET] => {
                let outcome = Outcome::new(exit_code::RESET, "the guest reset itself");
                self.0.end(outcome);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_after(data: &[u8]) -> Option<u8> {
        let ending = Arc::new(Ending::new().expect("eventfd"));
        Power(ending.clone()).write(0, data);
        ending.outcome().map(|outcome| outcome.code)
    }

    #[test]
    fn write_off_ends_with_shutdown() {
        assert_eq!(code_after(&[power::OFF]), Some(exit_code::SHUTDOWN));
    }

    #[test]
    fn write_reset_ends_with_reset() {
        assert_eq!(code_after(&[power::RESET]), Some(exit_code::RESET));
    }

    #[test]
    fn write_anything_else_is_ignored() {
        for data in [&[][..], &[0], &[3], &[power::OFF, 0], &[0xff; 4]] {
            assert_eq!(code_after(data), None, "{data:?}");
        }
    }
}
