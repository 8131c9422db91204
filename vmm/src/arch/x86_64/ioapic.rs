//! The IO-APIC, in this process: KVM keeps the local APICs only ("split irqchip").
//!
//! Each unmasked pin is an MSI route of KVM's, so an irqfd reaches the guest
//! without this code. And as there are no PICs at all, Linux skips what it does
//! to a PC's: some 400 VM exits that clear the IO-APIC's pins at boot.

use super::layout::IO_APIC_PINS;
use crate::bus::BusDevice;
use crate::sync::lock;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

/// Offset of the register that selects.
const SELECT: u64 = 0x00;
/// Offset of the selected register.
const WINDOW: u64 = 0x10;
/// Size of the register window.
pub const SIZE: u64 = 0x20;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;
/// Version of the 82093AA, which has no EOI register.
const VERSION_82093AA: u32 = 0x11;

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// Delivery status and remote IRR are the hardware's.
const WRITABLE: u64 = !(1 << 12 | 1 << 14);

const MSI_ADDRESS: u32 = 0xfee0_0000;
const MSI_LOGICAL: u32 = 1 << 2;
const MSI_DESTINATION_SHIFT: u32 = 12;

/// An interrupt line as the message that KVM is to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The line.
    pub pin: u8,
    /// Low half of the message's address; the high half is 0.
    pub address: u32,
    /// The message.
    pub data: u32,
}

/// What the guest has written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    select: u8,
    id: u32,
    entries: Vec<u64>,
}

/// Takes all routes that hold from now on.
type SetRoutes = Box<dyn Fn(&[Route]) + Send + Sync>;

/// The IO-APIC's registers.
pub struct IoApic {
    state: Mutex<State>,
    set_routes: SetRoutes,
}

impl IoApic {
    /// All of this many pins masked, as after power-on.
    pub fn new(pins: usize, set_routes: SetRoutes) -> Self {
        assert!(
            (1..=IO_APIC_PINS).contains(&pins),
            "VmConfig bounds devices"
        );
        let state = State {
            select: 0,
            id: 0,
            entries: vec![MASKED; pins],
        };
        Self {
            state: Mutex::new(state),
            set_routes,
        }
    }

    /// As it was saved, with its routes.
    pub fn restore(state: &State, set_routes: SetRoutes) -> Self {
        set_routes(&state.routes());
        Self {
            state: Mutex::new(state.clone()),
            set_routes,
        }
    }

    /// What the guest has written.
    pub fn save(&self) -> State {
        lock(&self.state).clone()
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = lock(&self.state).read(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(&word) = <&[u8; 4]>::try_from(data) {
            let mut state = lock(&self.state);
            if state.write(offset, u32::from_le_bytes(word)) {
                // Under the lock, so that routes can't overtake each other.
                (self.set_routes)(&state.routes());
            }
        }
    }
}

impl State {
    fn read(&self, offset: u64) -> u32 {
        match (offset, self.select) {
            (SELECT, select) => select.into(),
            (WINDOW, ID | ARBITRATION) => self.id,
            (WINDOW, VERSION) => VERSION_82093AA | (self.entries.len() as u32 - 1) << 16,
            (WINDOW, select) => match self.entry_of(select) {
                Some((pin, half)) => (self.entries[pin] >> (32 * half)) as u32,
                None => 0,
            },
            _ => 0,
        }
    }

    /// Whether this changed the routes.
    fn write(&mut self, offset: u64, value: u32) -> bool {
        match (offset, self.select) {
            (SELECT, _) => self.select = value as u8,
            (WINDOW, ID) => self.id = value & 0x0f00_0000,
            (WINDOW, select) => {
                if let Some((pin, half)) = self.entry_of(select) {
                    let old = self.entries[pin];
                    let kept = old & !(0xffff_ffff << (32 * half));
                    let new = (kept | u64::from(value) << (32 * half)) & WRITABLE;
                    self.entries[pin] = new;
                    return old != new && (old & MASKED == 0 || new & MASKED == 0);
                }
            }
            _ => {}
        }
        false
    }

    /// Pin and half of a redirection register.
    fn entry_of(&self, select: u8) -> Option<(usize, u32)> {
        let index = usize::from(select.checked_sub(FIRST_ENTRY)?);
        (index < 2 * self.entries.len()).then_some((index / 2, index as u32 % 2))
    }

    fn routes(&self) -> Vec<Route> {
        let pins = self.entries.iter().zip(0..);
        pins.filter(|(entry, _)| **entry & MASKED == 0)
            .map(|(&entry, pin)| route(pin, entry))
            .collect()
    }
}

/// Always edge-triggered: that is what irqfd gives, and a level would want an exit at each EOI.
fn route(pin: u8, entry: u64) -> Route {
    let destination = (entry >> DESTINATION_SHIFT) as u32;
    let logical = if entry & LOGICAL != 0 { MSI_LOGICAL } else { 0 };
    Route {
        pin,
        address: MSI_ADDRESS | destination << MSI_DESTINATION_SHIFT | logical,
        data: (entry & (VECTOR | DELIVERY_MODE)) as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    type Seen = Arc<Mutex<Vec<Vec<Route>>>>;

    fn ioapic() -> (IoApic, Seen) {
        let seen = Seen::default();
        let sink = seen.clone();
        let set_routes = move |routes: &[Route]| lock(&sink).push(routes.to_vec());
        (IoApic::new(9, Box::new(set_routes)), seen)
    }

    fn write(ioapic: &IoApic, register: u8, value: u32) {
        ioapic.write(SELECT, &u32::from(register).to_le_bytes());
        ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn read(ioapic: &IoApic, register: u8) -> u32 {
        ioapic.write(SELECT, &u32::from(register).to_le_bytes());
        let mut word = [0; 4];
        ioapic.read(WINDOW, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn version_tells_the_number_of_pins() {
        let (ioapic, _) = ioapic();

        assert_eq!(read(&ioapic, VERSION), 0x0008_0011);
    }

    #[test]
    fn unmasked_pin_becomes_a_route() {
        let (ioapic, seen) = ioapic();

        write(&ioapic, 0x10 + 2 * 5 + 1, 3 << 24);
        assert!(lock(&seen).is_empty(), "a masked pin needs no route");
        write(&ioapic, 0x10 + 2 * 5, 0x31);

        let expected = Route {
            pin: 5,
            address: 0xfee0_3000,
            data: 0x31,
        };
        assert_eq!(*lock(&seen), [[expected]]);
    }

    #[test]
    fn masked_pin_loses_its_route() {
        let (ioapic, seen) = ioapic();
        write(&ioapic, 0x10 + 2 * 5, 0x31);

        write(&ioapic, 0x10 + 2 * 5, 0x31 | MASKED as u32);

        assert_eq!(lock(&seen).last(), Some(&Vec::new()));
    }

    #[test]
    fn same_value_again_changes_nothing() {
        let (ioapic, seen) = ioapic();

        write(&ioapic, 0x10, 0x31);
        write(&ioapic, 0x10, 0x31);

        assert_eq!(lock(&seen).len(), 1);
    }

    #[test]
    fn read_only_bits_stay_clear() {
        let (ioapic, _) = ioapic();

        write(&ioapic, 0x10, u32::MAX);

        assert_eq!(read(&ioapic, 0x10), WRITABLE as u32);
    }

    #[test]
    fn restored_ioapic_has_the_same_registers_and_routes() {
        let (saved, seen) = ioapic();
        write(&saved, 0x10 + 2 * 7, 0x41);
        let json = serde_json::to_string(&saved.save()).expect("serializable");

        let again = Seen::default();
        let sink = again.clone();
        let state: State = serde_json::from_str(&json).expect("deserializable");
        let restored = IoApic::restore(
            &state,
            Box::new(move |routes: &[Route]| lock(&sink).push(routes.to_vec())),
        );

        assert_eq!(restored.save(), saved.save());
        assert_eq!(lock(&again).last(), lock(&seen).last());
    }

    proptest! {
        #[test]
        fn any_access_is_survived(accesses in proptest::collection::vec((0u64..0x20, any::<u32>(), 0usize..9), 0..64)) {
            let (ioapic, seen) = ioapic();
            for (offset, value, width) in accesses {
                ioapic.write(offset & !0xf, &value.to_le_bytes());
                ioapic.write(offset, &vec![value as u8; width]);
                ioapic.read(offset, &mut vec![0; width]);
            }
            for routes in lock(&seen).iter() {
                prop_assert!(routes.len() <= IO_APIC_PINS);
                prop_assert!(routes.iter().all(|r| r.address & 0xfff0_0000 == MSI_ADDRESS));
            }
        }
    }
}
